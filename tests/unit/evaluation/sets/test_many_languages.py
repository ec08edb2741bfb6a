"""Crossmodal-3600, XTD and Babel-ImageNet as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.babel_imagenet import read_babel_imagenet
from m2_encoder.evaluation.sets.xm3600 import read_xm3600
from m2_encoder.evaluation.sets.xtd import read_xtd
from tests.support.shards import make_image


def said(*captions: str) -> dict[str, list[str]]:
    lower = [caption.lower() for caption in captions]
    return {"caption": list(captions), "caption/tokenized": list(captions), "caption/tokenized/lowercase": lower}


def write_xm3600(root: Path, folder: str = "images") -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [
        {
            "image/key": "a1",
            "image/locale": "zh",
            "zh": said("一只猫", "猫咪"),
            "en": said("A cat"),
            "quz": said("Michi"),
        },
        {"image/key": "b2", "zh": said("一只狗"), "en": said("A dog", "Dogs"), "quz": said()},
    ]
    for number, row in enumerate(rows):
        (root / folder / f"{row['image/key']}.jpg").write_bytes(make_image(number, kind="JPEG"))
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def test_xm3600_in_all_languages(tmp_path: Path) -> None:
    found = read_xm3600(write_xm3600(tmp_path))
    assert list(found.texts) == ["zh", "en", "quz"]
    assert found.texts["zh"].rows == ("一只猫", "猫咪", "一只狗")
    assert found.texts["en"].pairs.tolist() == [[0, 0], [1, 1], [2, 1]]
    assert found.texts["quz"].rows == ("Michi",)
    assert found.pictures[1].name == "b2.jpg"
    assert found.pictures[1].read() == make_image(1, kind="JPEG")
    assert found.comparable == "2 pictures, 3,600 published"
    assert list(read_xm3600(write_xm3600(tmp_path / "flat", "."), languages=["en"]).texts) == ["en"]


def test_faults_of_xm3600(tmp_path: Path) -> None:
    root = write_xm3600(tmp_path)
    with pytest.raises(UserError, match="has no fr; it has en, quz, zh"):
        read_xm3600(root, languages=["fr"])
    (root / "images" / "b2.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 2 pictures are not in .*images: b2\.jpg; complete the download"):
        read_xm3600(root)


def write_xtd(root: Path) -> Path:
    names = ["COCO_train2014_1.jpg", "COCO_train2014_2.jpg"]
    for folder in ("XTD10", "MIC", "STAIR", "train2014"):
        (root / folder).mkdir(parents=True)
    (root / "XTD10" / "test_image_names.txt").write_text("\n".join(names) + "\n")
    for number, name in enumerate(names):
        (root / "train2014" / name).write_bytes(make_image(number, kind="JPEG"))
    captions = {
        "XTD10": {"zh": "一只猫\n一只狗"},
        "MIC": {"en": "a cat\na dog\n", "de": "x\ny"},
        "STAIR": {"jp": "ねこ\nいぬ"},
    }
    for folder, own in captions.items():
        for language, content in own.items():
            (root / folder / f"test_1kcaptions_{language}.txt").write_text(content, encoding="utf-8")
    return root


@pytest.mark.parametrize("start", ["", "XTD10"])
def test_xtd_with_translations_of_one_caption(tmp_path: Path, start: str) -> None:
    found = read_xtd(write_xtd(tmp_path) / start, images=str(tmp_path / "train2014"))
    assert set(found.texts) == {"zh", "en", "de", "ja"}
    assert found.texts["ja"].rows == ("ねこ", "いぬ")
    assert found.texts["zh"].pairs.tolist() == [[0, 0], [1, 1]]
    assert set(found.parallel) == {("zh", "en"), ("de", "en")}, "Japanese captions are no translations"
    assert found.parallel["zh", "en"].tolist() == [[0, 0], [1, 1]]
    assert found.pictures[1].read() == make_image(1, kind="JPEG")


def test_xtd_finds_its_pictures_and_says_a_file_of_another_length(tmp_path: Path) -> None:
    root = write_xtd(tmp_path)
    assert len(read_xtd(root).pictures) == 2
    (root / "XTD10" / "test_1kcaptions_zh.txt").write_text("一只猫", encoding="utf-8")
    with pytest.raises(UserError, match=r"zh\.txt: has 1 lines, test_image_names\.txt has 2"):
        read_xtd(root)


def write_imagenet(root: Path, number: int = 4) -> Path:
    for each in range(number):
        folder = root / f"n{each:08d}"
        folder.mkdir(parents=True)
        (folder / f"ILSVRC2012_val_{each}.JPEG").write_bytes(make_image(each, kind="JPEG"))
    return root


def write_babel(file: Path, value: Any) -> Path:
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")
    return file


def test_babel_imagenet_names_some_classes_of_a_language(tmp_path: Path) -> None:
    file = write_babel(tmp_path / "babel.json", {"ZH": [[0, 3], ["猫", "狗"]], "DE": [[1], ["Fuchs"]]})
    (tmp_path / "en.txt").write_text("cat\nfox\nbear\ndog\n")
    images = write_imagenet(tmp_path / "val")
    found = read_babel_imagenet(file, images=images, languages=["zh", "en"], english=str(tmp_path / "en.txt"))
    assert found.classes is not None
    assert found.classes.names == {"zh": ("猫", "", "", "狗"), "en": ("cat", "fox", "bear", "dog")}
    assert found.classes.targets.tolist() == [0, 1, 2, 3]
    assert found.counts["classes_named"] == {"zh": 2, "en": 4}
    assert set(read_babel_imagenet(file, images=images).classes.names) == {"zh", "de"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "languages", "message"),
    [
        ({"ZH": [[0, 4], ["猫", "狗"]]}, None, "class indices from 0 to 4, but 4 folders are there"),
        ({"ZH": [[0, 1], ["猫"]]}, None, r"wanted \[\[class indices\], \[names\]\] of equal length"),
        ({"ZH": [[0], ["猫"]]}, ["fr"], "has no fr; it has zh"),
        ({"ZH": [[0], ["猫"]]}, ["en"], "has no en; it has zh"),
        ({"0": ["n01440764", "tench"]}, None, "layout babel_imagenet is"),
    ],
)
def test_faults_of_babel_imagenet(tmp_path: Path, value: Any, languages: list[str] | None, message: str) -> None:
    file = write_babel(tmp_path / "babel.json", value)
    with pytest.raises(UserError, match=message):
        read_babel_imagenet(file, images=write_imagenet(tmp_path / "val"), languages=languages)
