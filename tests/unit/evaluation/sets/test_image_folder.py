"""Folders of classes, against torchvision's reader, and the names of their classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import ImageFolder

from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.base import Classes
from m2_encoder.evaluation.sets.image_folder import read_image_folder
from tests.support.shards import make_image

FOLDERS = ("dog", "cat", "tree_frog")


def write(root: Path, folders: tuple[str, ...] = FOLDERS) -> Path:
    for number, folder in enumerate(folders):
        for file in ("b.png", "sub/c.PNG", "a.jpg"):
            path = root / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_image(number))
    return root


def classes(root: Path, **settings: Any) -> Classes:
    found = read_image_folder(root, **settings).classes
    assert found is not None
    return found


def test_pictures_and_numbers_are_those_of_torchvision(tmp_path: Path) -> None:
    root = write(tmp_path)
    (root / ".cache").mkdir()
    (root / "cat" / "notes.txt").write_text("x")
    found = read_image_folder(root)
    (root / ".cache").rmdir()  # torchvision takes it for a class
    theirs = ImageFolder(root)
    assert [str(root / picture.name) for picture in found.pictures] == [path for path, _ in theirs.samples]
    assert found.classes is not None
    assert found.classes.targets.tolist() == theirs.targets
    assert found.classes.names == {"en": ("cat", "dog", "tree frog")}
    assert found.classes.label_set == "names of folders"


@pytest.mark.parametrize(
    "content",
    [
        "dog\t狗\tdog\ncat\t猫\tcat\ntree_frog\t树蛙\ttree frog\n",
        "\ufefffolder\tzh\ten\r\ncat\t猫\tcat\r\ndog\t狗\tdog\r\ntree_frog\t树蛙\ttree frog\r\n",
        "cat,cat,猫\ndog,狗,dog\ntree_frog，树蛙，tree frog",
    ],
    ids=["tabs", "header", "commas"],
)
def test_folders_with_a_chinese_and_an_english_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "names.txt").write_text(content, encoding="utf-8")
    found = classes(write(tmp_path / "own"), labels=str(tmp_path / "names.txt"))
    assert found.names == {"zh": ("猫", "狗", "树蛙"), "en": ("cat", "dog", "tree frog")}
    assert found.label_set == "names.txt"


def test_lists_in_the_order_of_the_folders(tmp_path: Path) -> None:
    root = write(tmp_path / "val", ("n01440764", "n01443537"))
    (tmp_path / "zh.txt").write_text("丁鲷\n金鱼\n", encoding="utf-8")
    (tmp_path / "en.txt").write_text("tench\ngoldfish", encoding="utf-8")
    by_language = {language: str(tmp_path / f"{language}.txt") for language in ("zh", "en")}
    found = classes(root, labels=by_language)
    assert found.names == {"zh": ("丁鲷", "金鱼"), "en": ("tench", "goldfish")}
    assert found.label_set == "zh.txt + en.txt"
    assert classes(root, labels=by_language["zh"]).names == {"zh": ("丁鲷", "金鱼")}


def test_class_index_of_imagenet(tmp_path: Path) -> None:
    root = write(tmp_path / "val", ("n01443537", "n01440764"))
    with pytest.raises(UserError, match=r"its folders are called n01440764, n01443537.*labels=FILE"):
        read_image_folder(root)
    index = tmp_path / "imagenet_class_index.json"
    index.write_text(json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "gold_fish"]}))
    assert classes(root).names == {"en": ("tench", "gold fish")}
    index.write_text(json.dumps({"0": ["n01440764", "tench"], "2": ["n01443537", "gold_fish"]}))
    with pytest.raises(UserError, match=r"is no class index; wanted .* without a gap"):
        read_image_folder(root)
    index.write_text(json.dumps({"0": ["n01440764", "tench"]}))
    with pytest.raises(UserError, match="does not have the folders n01443537; it is of another set"):
        read_image_folder(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\t猫\tcat\ndog\t狗\tdog\n", "no line for 1 folders: tree_frog"),
        ("cat\t猫\ndog\t狗\ntree_frog\t树蛙\nfox\t狐狸\n", "lines for 1 folders that are not there: fox"),
        ("cat\t猫\tcat\ndog\t狗\ntree_frog\t树蛙\tfrog\n", "1 of 3 folders have no name in en: dog"),
        ("cat\t猫\t猫咪\ndog\t狗\ntree_frog\t树蛙\n", "cat has two names in zh: 猫 and 猫咪; keep one"),
        ("a\nb\n", "has 2 names, 3 folders are there"),
        ("a\n\nb\n", "line 2 is blank"),
        ("", "is empty"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "names.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_image_folder(write(tmp_path / "own"), labels=str(tmp_path / "names.txt"))


def test_other_faults(tmp_path: Path) -> None:
    root = write(tmp_path / "own")
    with pytest.raises(UserError, match=r"labels=.*: no such file"):
        read_image_folder(root, labels="nowhere.txt")
    (root / "fox").mkdir()
    with pytest.raises(UserError, match="no picture in 1 of 4 folders: fox"):
        read_image_folder(root)
