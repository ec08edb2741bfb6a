"""Layouts of evaluation sets on disk, each with what tells it; a wrong one gives one message.

Recognising looks at names, and at the first lines of a file where names do not suffice.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.data.packing.records import Columns
from m2_encoder.data.packing.sources import find_source
from m2_encoder.data.retrieval_source import list_tars
from m2_encoder.data.shards.names import walk_files
from m2_encoder.data.shards.paths import what_is_there
from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.pictures import is_picture

_HEAD_BYTES = 65_536  # of a file, to tell what it holds
_MOST_FOLDERS = 500  # to look into
_MOST_TEXTS = 20  # to open
_TRANSLATION = re.compile(r"^[a-z]{2,3}(?:_[A-Z]{2})?(?:@\w+)?\.utf8=", re.MULTILINE)


class Layout(NamedTuple):
    """How a set lies on disk.

    Attributes:
        name: as in settings.
        expects: what it consists of, in words.
        find_missing: what of that is not at a path, in words; nothing if it may be this layout.
    """

    name: str
    expects: str
    find_missing: Callable[[Path], list[str]]


def expect(path: str | os.PathLike[str], name: str) -> Path:
    """The path of a set, if it is of a layout.

    Raises:
        UserError: if nothing is there, or it is of another layout: what was expected, what is there, and which layout
            fits best.
    """
    place, layout = find_root(path), LAYOUTS[name]
    if not (missing := layout.find_missing(place)):
        return place
    raise UserError(
        f"{place}: layout {name} is {layout.expects}; not there: {', '.join(missing)}. {_describe(place)}; "
        f"{_describe_nearest(place, but=name)}"
    )


def recognise(path: str | os.PathLike[str]) -> str:
    """Name of the first layout that fits.

    Raises:
        UserError: if nothing is there, or none fits.
    """
    place = find_root(path)
    for layout in LAYOUTS.values():
        if not layout.find_missing(place):
            return layout.name
    raise UserError(f"{place}: no layout of evaluation sets fits. {_describe(place)}; {_describe_nearest(place)}")


def find_root(path: str | os.PathLike[str]) -> Path:
    """The path itself, if something is there; raises a `UserError` otherwise."""
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{place}: no such file or folder; {what_is_there(str(place))}")
    return place


def _describe(place: Path) -> str:
    if place.is_dir():
        return f"It holds {name_some(sorted(os.listdir(place)), 6, 40) or 'nothing'}"
    return f"It is a file of {place.stat().st_size:,} bytes"


def _describe_nearest(place: Path, but: str = "") -> str:
    fits: list[str] = []
    near: list[tuple[int, str]] = []
    for layout in LAYOUTS.values():
        if layout.name != but and (missing := layout.find_missing(place)):
            near.append((len(missing), f"{layout.name}, which lacks {', '.join(missing)}"))
        elif layout.name != but:
            fits.append(layout.name)
    if fits:
        return f"it fits layout {fits[0]}" + (f" (and {', '.join(fits[1:])})" if fits[1:] else "")
    return f"nearest is layout {min(near, key=lambda each: each[0])[1]}"


def _need(parts: dict[str, bool]) -> list[str]:
    return [name for name, is_there in parts.items() if not is_there]


def _clip_benchmark(place: Path) -> list[str]:
    splits = list(islice(place.glob("*/nshards.txt"), 1)) if place.is_dir() else []
    tars = list(islice(place.glob("*/*.tar"), 1)) if place.is_dir() else []
    return _need({"SPLIT/nshards.txt": bool(splits), "SPLIT/0.tar": bool(tars)})


def _elevater(place: Path) -> list[str]:
    test = place / "test"
    folders = [name for name in os.listdir(test) if name.isdecimal()] if test.is_dir() else []
    names = any((place / name).is_file() for name in ("label_cn.txt", "label.txt"))
    return _need({"label_cn.txt or label.txt": names, "test/000": bool(folders)})


def _xm3600(place: Path) -> list[str]:
    file = place / "captions.jsonl" if place.is_dir() else place
    row = _first_object(file)
    return _need({"captions.jsonl": file.is_file(), "image/key in its lines": "image/key" in row})


def _xtd(place: Path) -> list[str]:
    folders = [place, *sorted(each for each in place.iterdir() if each.is_dir())] if place.is_dir() else []
    names = any((folder / "test_image_names.txt").is_file() for folder in folders)
    captions = any(True for folder in folders for _ in folder.glob("test_1kcaptions_*.txt"))
    return _need({"test_image_names.txt": names, "test_1kcaptions_LANGUAGE.txt": captions})


def _chinese_clip(place: Path) -> list[str]:
    folder = place if place.is_dir() else place.parent
    pictures = any(True for _ in folder.glob("*_imgs.tsv"))
    return _need({"SPLIT_imgs.tsv": pictures, "SPLIT_texts.jsonl": any(True for _ in folder.glob("*_texts.jsonl"))})


def _caption_lines(place: Path) -> list[str]:
    row = _first_object(place)
    return _need(
        {
            "a file of JSON lines": bool(row),
            "caption, a list of texts": isinstance(row.get("caption"), list),
            "image, a path": isinstance(row.get("image"), str),
        }
    )


def _babel_imagenet(place: Path) -> list[str]:
    is_json = place.is_file() and place.suffix == ".json"
    head = _head(place) if is_json else ""
    return _need(
        {
            "a .json file": is_json,
            "LANGUAGE: [[class indices], [names]]": re.match(r'\s*{\s*"[^"]+"\s*:\s*\[\s*\[\s*\d', head) is not None,
        }
    )


def _tuxpaint(place: Path) -> list[str]:
    texts = list(islice(_texts_beside_pictures(place), _MOST_TEXTS))
    is_translated = any(_TRANSLATION.search(_head(file)) for file in texts)
    return _need({"a .png with a .txt of its name": bool(texts), "lines such as zh_CN.utf8=… in that": is_translated})


def _texts_beside_pictures(place: Path) -> Iterator[Path]:
    for folder, names in islice(_walk(place), _MOST_FOLDERS):
        stems = {os.path.splitext(name)[0] for name in names if is_picture(name) or name.endswith(".svg")}
        yield from (Path(folder, name) for name in names if name.endswith(".txt") and name[:-4] in stems)


def _emoji(place: Path) -> list[str]:
    marked = place.is_dir() and {"emoji.json", "index.json"} & set(os.listdir(place))
    content = [_read_object(place / name) for name in marked] if marked else []
    return _need(
        {"emoji.json, or index.json of a split": any({"concepts", "splits"} & each.keys() for each in content)}
    )


def _own(place: Path) -> list[str]:
    lacks = ["tars, a table, or pictures with a .txt or .json of the same name beside them"]
    try:
        if list_tars(str(place)):
            return []
        found = find_source(str(place), columns=Columns())
    except UserError:
        return lacks
    if found.format != "folder":
        return []
    for _, names in islice(_walk(place), _MOST_FOLDERS):
        pictures = {os.path.splitext(name)[0] for name in names if is_picture(name)}
        if any(name.endswith((".txt", ".json")) and os.path.splitext(name)[0] in pictures for name in names):
            return []
    return lacks


def _image_folder(place: Path) -> list[str]:
    folders = [each for each in place.iterdir() if each.is_dir() and each.name[0] != "."] if place.is_dir() else []
    inside = (
        name for each in folders[:_MOST_FOLDERS] for _, names in islice(_walk(each), _MOST_FOLDERS) for name in names
    )
    has_one = any(map(is_picture, inside))
    return _need({"a folder for each class": bool(folders), "pictures in it": has_one})


def _walk(place: Path) -> Iterator[tuple[str, list[str]]]:
    return walk_files(place) if place.is_dir() else iter(())


def _head(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES).decode("utf-8-sig", "replace")
    except OSError:
        return ""


def _first_object(path: Path) -> dict[str, Any]:
    """The first line of a JSON lines file; empty if it is none."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            row = json.loads(file.readline(1 << 20))
    except (OSError, ValueError):
        return {}
    return row if isinstance(row, dict) else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "clip_benchmark",
            "a folder with SPLIT/nshards.txt, SPLIT/0.tar and so on, and classnames.txt or dataset_type.txt beside",
            _clip_benchmark,
        ),
        Layout(
            "elevater_cn", "a folder with label_cn.txt, label.txt and test/000, test/001 and so on", _elevater
        ),
        Layout("xm3600", "captions.jsonl, and the pictures beside it or in images/", _xm3600),
        Layout("xtd", "a folder with test_image_names.txt and test_1kcaptions_LANGUAGE.txt", _xtd),
        Layout("chinese_clip", "SPLIT_imgs.tsv and SPLIT_texts.jsonl in one folder", _chinese_clip),
        Layout("caption_lines", 'a file with {"caption": […], "image": "PATH"} a line', _caption_lines),
        Layout("babel_imagenet", "a .json file with LANGUAGE: [[class indices], [names]]", _babel_imagenet),
        Layout("tuxpaint", "a folder of stamps: .png or .svg with a .txt of translations beside each", _tuxpaint),
        Layout("emoji", "the folder of the unpacked emoji set, or of one of its splits", _emoji),
        Layout("own", "tars, a table, or a folder of pictures with captions, as m2-data pack reads them", _own),
        Layout("image_folder", "a folder for each class, with its pictures in it", _image_folder),
    )
}  # fmt: skip
"""All layouts by name; of several that fit, the first one counts."""
