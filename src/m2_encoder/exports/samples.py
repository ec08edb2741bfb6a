"""What every export is tried on: 64 texts and 32 pictures, all made here.

Texts are Chinese, English, both, empty, blank, long, and with signs that trip tokenizers. Pictures are files with
alpha, palettes, grey levels of 8 and 16 bits, CMYK, an orientation in EXIF, and sides of 1 to 1,200 pixels.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from PIL import Image, ImageDraw


class SamplePicture(NamedTuple):
    """One picture file."""

    name: str  # what is special about it, and its suffix
    content: bytes  # of the file


_CHINESE: Final = (
    "一只猫", "一只狗在草地上奔跑", "红色的苹果", "水果", "下雨天撑伞的行人", "生日蛋糕", "夜晚的城市灯光", "雪山",
    "穿着蓝色裙子的女孩", "一杯热咖啡", "海边的日落", "骑自行车的人", "大熊猫吃竹子", "古老的寺庙", "足球比赛",
    "一碗牛肉面，加辣", "春节的灯笼", "繁體中文：龍與鳳凰", "手机和电脑放在木桌上", "孩子们在公园里放风筝",
)  # fmt: skip
_ENGLISH: Final = (
    "a cat", "a dog running on the grass", "a red apple", "fruit", "people with umbrellas in the rain",
    "birthday cake", "city lights at night", "a snowy mountain", "a girl in a blue dress", "A CUP OF HOT COFFEE",
    "sunset at the beach", "someone riding a bicycle", "a giant panda eating bamboo", "an ancient temple",
    "a football match", "beef noodles, spicy", "red lanterns", "two laptops on a wooden desk",
    "children flying kites in the park", "the Eiffel Tower",
)  # fmt: skip
_MIXED: Final = (
    "一只cat和一只dog", "iPhone 手机壳", "穿T恤的man", "在 Paris 的埃菲尔铁塔", "coffee 咖啡 ☕", "2024年春晚 logo",
    "宝马BMW跑车", "KFC 炸鸡 family bucket", "PM2.5 雾霾天", "play 篮球 with friends",
)  # fmt: skip
_ODD: Final = ("", " ", "。", "?!", "１２３ＡＢＣ", "🐼🎋", "a  b   c", " 两边有空格 ")
_LONG_CHINESE: Final = "桌子上放着一盘水果，旁边是一本打开的书和一副眼镜，窗外正在下雪，屋里很暖和。"
_LONG_ENGLISH: Final = "On the table there is a plate of fruit beside an open book and a pair of glasses. "

TEXTS: Final[tuple[str, ...]] = (
    *_CHINESE,
    *_ENGLISH,
    *_MIXED,
    *_ODD,
    _LONG_CHINESE,
    _LONG_CHINESE * 6,
    _LONG_ENGLISH.strip(),
    (_LONG_ENGLISH * 6).strip(),
    "猫" * 500,
    "word " * 99 + "word",
)
"""64 texts; the last six are longer than a short query, four of them longer than any context."""

_SIZES: Final = (
    (224, 224), (640, 480), (480, 640), (1200, 100), (90, 900), (33, 47), (7, 5), (1, 1), (320, 320),
)  # fmt: skip
_ROTATED: Final = 6  # value of the EXIF tag: turned by 90 degrees
_ORIENTATION: Final = 0x0112


@functools.cache
def make_pictures() -> tuple[SamplePicture, ...]:
    """32 picture files; the same on every machine, up to how Pillow's JPEG rounds."""
    return tuple(_pictures())


def _pictures() -> Iterator[SamplePicture]:
    for number, size in enumerate(_SIZES):
        width, height = size
        yield _save(f"rgb-{width}x{height}.png", _scene(number, size))
    for number, quality in enumerate((95, 75, 40, 10)):
        yield _save(f"quality-{quality}.jpg", _scene(20 + number, (320, 240)), quality=quality)
    for number, size in enumerate(((256, 256), (200, 300), (300, 200), (64, 64))):
        yield _save(f"alpha-{size[0]}x{size[1]}.png", _with_alpha(_scene(30 + number, size)))
    for number, size in enumerate(((256, 256), (160, 120), (400, 90))):
        yield _save(f"grey-{size[0]}x{size[1]}.png", _scene(40 + number, size).convert("L"))
    yield _save("grey.jpg", _scene(43, (240, 180)).convert("L"), quality=90)
    yield _save("grey-alpha.png", _with_alpha(_scene(44, (200, 200))).convert("LA"))
    levels = np.linspace(0, 65535, 200 * 200).reshape(200, 200).astype(np.uint16)
    yield _save("grey-16-bits.png", Image.fromarray(levels))
    for orientation in (3, _ROTATED, 8):
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        yield _save(f"exif-{orientation}.jpg", _scene(50 + orientation, (300, 200)), quality=90, exif=exif)
    yield _save("palette.png", _scene(60, (200, 150)).convert("P", palette=Image.Palette.ADAPTIVE, colors=16))
    yield _save("two-levels.png", _scene(61, (200, 150)).convert("1"))
    yield _save("cmyk.jpg", _scene(62, (200, 150)).convert("CMYK"), quality=90)
    yield _save("animation.gif", _scene(63, (120, 120)), save_all=True, append_images=[_scene(64, (120, 120))])
    yield _save("picture.webp", _scene(65, (256, 192)), quality=80)
    yield _save("picture.bmp", _scene(66, (128, 96)))


def _scene(seed: int, size: tuple[int, int]) -> Image.Image:
    """A gradient with a few shapes."""
    rng = np.random.default_rng(seed)
    width, height = size
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.float64)
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    top = corners[0, 0] * (1 - across) + corners[0, 1] * across
    bottom = corners[1, 0] * (1 - across) + corners[1, 1] * across
    image = Image.fromarray((top * (1 - down) + bottom * down).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        (left, right), (upper, lower) = (sorted(rng.integers(0, side, 2).tolist()) for side in size)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((left, upper, right, lower), fill=colour)
    return image


def _with_alpha(image: Image.Image) -> Image.Image:
    """Transparent to the left, opaque to the right."""
    width, height = image.size
    ramp = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8), (height, width))
    image = image.copy()
    image.putalpha(Image.fromarray(np.ascontiguousarray(ramp)))
    return image


def _save(name: str, image: Image.Image, **options: object) -> SamplePicture:
    content = io.BytesIO()
    image.save(content, format={"jpg": "JPEG"}.get(suffix := name.rsplit(".", 1)[-1], suffix.upper()), **options)
    return SamplePicture(name, content.getvalue())
