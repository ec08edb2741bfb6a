"""Folders of classes and captions that repeat, from the pictures to identities, splits and the recall of a set."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import read_retrieval_set
from m2_encoder.evaluation.prompts import load_templates
from m2_encoder.evaluation.recall_metric import RetrievalRecall
from tests.support.data_commands import Start
from tests.support.shards import make_image

NAMES = "cat\t猫\ta cat\ndog\t狗\ta dog\n"


def make_classes(folder: Path, each: int = 5) -> Path:
    for number in range(2 * each):
        place = folder / ("cat" if number < each else "dog") / ("deep" if number % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(make_image(number))
    return folder


def described(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    file = tar.extractfile(info)
                    assert file is not None
                    found.append(json.load(file))
    return found


def test_a_folder_of_classes_becomes_shards(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_classes(tmp_path / "photos")
    (tmp_path / "names.txt").write_text(NAMES, encoding="utf-8")
    assert start("pack", "source=photos", "classes=names.txt", "output=tars", "workers=0") == 0
    assert "captions: 80 en, 80 zh" in capsys.readouterr().out
    samples = described(tmp_path / "tars")
    assert [each["identity"] for each in samples] == ["class: 猫 | a cat"] * 5 + ["class: 狗 | a dog"] * 5
    for language, name in (("zh", "狗"), ("en", "a dog")):
        templates = load_templates("general", language).rows
        assert samples[-1]["captions"][language] == [each.replace("{}", name) for each in templates]
    again = (tmp_path / "tars" / "000000.tar").read_bytes()
    assert start("pack", "source=photos", "classes=names.txt", "output=tars", "workers=0") == 0
    assert (tmp_path / "tars" / "000000.tar").read_bytes() == again
    (tmp_path / "names.txt").write_text(NAMES.replace("a dog", "a hound"), encoding="utf-8")
    assert start("pack", "source=photos", "classes=names.txt", "output=tars", "workers=0") == 2
    assert "was packed from other records" in capsys.readouterr().err


def test_names_of_folders_and_templates_of_a_file(start: Start, tmp_path: Path) -> None:
    make_classes(tmp_path / "photos")
    (tmp_path / "own.txt").write_text("{} here\nsee {c}\n", encoding="utf-8")
    assert start("pack", "source=photos", "classes=folders", "templates=own.txt", "output=tars", "workers=0") == 0
    samples = described(tmp_path / "tars")
    assert samples[0]["captions"] == {"en": ["cat here", "see cat"]}
    assert {each["identity"] for each in samples} == {"class: cat", "class: dog"}


def test_classes_are_counted_right_and_split_by_picture(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_classes(tmp_path / "photos", 10)
    assert start("pack", "source=photos", "classes=folders", "output=tars", "workers=0") == 0
    assert start("split", "source=tars", "output=sides", "val=0.3", "by=picture", "workers=0") == 0
    said = capsys.readouterr().out
    assert "on both sides: 0 pictures, 8 captions, 1 identities" in said or "16 captions, 2 identities" in said
    found = read_retrieval_set(tmp_path / "sides" / "val", name="val", transform=EvalTransform(8))
    assert len(found.images) == 6
    classes = len(set(found.keys))
    assert len(found.queries("en")) == 8 * classes
    # Features that know classes alone, and nothing of pictures: every query finds one of its class first.
    pictures, texts = torch.tensor(found.numbers()), torch.tensor([number for number, _ in found.queries("en")])
    recall = RetrievalRecall()
    one_hot = torch.eye(max(2, classes))
    recall.update(one_hot[pictures], pictures, one_hot[texts], texts)
    assert float(recall.compute()["mean_recall"]) == 100


def test_captions_that_repeat_show_the_same(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, caption in enumerate(["Red shirt", "red  SHIRT", "blue shirt", "Red shirt"]):
        (folder / f"{number}.png").write_bytes(make_image(number))
        (folder / f"{number}.json").write_text(
            json.dumps({"captions": {"en": [caption]}} | ({"identity": "own"} if number == 3 else {}))
        )
    assert start("pack", "source=photos", "output=plain", "workers=0") == 0
    assert [each.get("identity") for each in described(tmp_path / "plain")] == [None, None, None, "own"]
    assert start("pack", "source=photos", "output=tars", "identity=captions", "workers=0") == 0
    assert [each.get("identity") for each in described(tmp_path / "tars")] == [
        "red shirt", "red shirt", "blue shirt", "own",
    ]  # fmt: skip
    found = read_retrieval_set(tmp_path / "tars", name="val", transform=EvalTransform(8))
    assert found.numbers()[:2] == [0, 0]
    assert start("pack", "source=photos", "output=tars", "workers=0") == 2, "packed with another option"


def test_a_column_may_be_the_identity(start: Start, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(make_image(number))
    (tmp_path / "products.csv").write_text("image,title,sku\n0.png,shirt,7\n1.png,shirt,7\n2.png,shirt,8\n")
    lines = ("pack", "source=products.csv", "columns.identity=sku", "identity=captions", "output=tars", "workers=0")
    assert start(*lines) == 0
    assert [each["identity"] for each in described(tmp_path / "tars")] == ["7", "7", "8"]


def test_what_does_not_fit_is_said_in_a_line(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_classes(tmp_path / "photos")
    (tmp_path / "table.csv").write_text("image,title\na.png,cat\n")
    (tmp_path / "short.txt").write_text("cat\t猫\n", encoding="utf-8")
    (tmp_path / "french.txt").write_text("folder\tfr\ncat\tchat\ndog\tchien\n", encoding="utf-8")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(make_image(1))
    for line, said in (
        ("source=photos classes=short.txt", "classes=short.txt: "),
        ("source=photos classes=nowhere.txt", "classes=nowhere.txt: no such file"),
        ("source=photos classes=french.txt", "classes=french.txt: has names in fr; wanted Chinese or English"),
        ("source=photos classes=folders templates=nowhere", "templates=nowhere: no such family or file"),
        ("source=photos classes=folders templates={zh:general}", "templates={zh: general}: must have those of en"),
        ("source=table.csv classes=folders", "classes=folders: belongs to a folder of pictures"),
        ("source=flat classes=folders", "classes=folders: "),
    ):
        assert start("pack", *line.split(), "output=tars", "workers=0") == 2, line
        (only,) = capsys.readouterr().err.strip().splitlines()
        assert said in only, only


def test_pictures_in_folders_without_captions_may_be_classes(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_classes(tmp_path / "photos", 2)
    assert start("pack", "source=photos", "output=tars", "workers=0") == 2
    assert "4 missing_caption" in (said := capsys.readouterr().err)
    assert said.strip().endswith("if its folders are classes, add classes=folders")


def test_texts_beside_pictures_of_classes_are_not_read(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_classes(tmp_path / "photos", 2)
    (tmp_path / "photos" / "cat" / "0.txt").write_text("a tabby")
    (tmp_path / "photos" / "loose.png").write_bytes(make_image(9))
    lines = ("classes=folders", "output=tars", "workers=0", "max_failed_share=0.5")
    assert start("pack", "source=photos", *lines) == 0
    assert "texts beside pictures, such as cat/0.txt, are not read" in caplog.text
    assert len(described(tmp_path / "tars")) == 4
    (failure,) = (tmp_path / "tars" / "failures.jsonl").read_text().splitlines()
    assert json.loads(failure)["detail"] == "lies in no folder of a class"
