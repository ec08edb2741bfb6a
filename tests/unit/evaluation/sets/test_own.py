"""The user's own pictures: the same set as validation reads from the same files, without decoding."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.packing.pack import PackOptions, pack
from m2_encoder.data.packing.records import Columns
from m2_encoder.data.packing.sources import find_source
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.base import EvaluationSet
from m2_encoder.evaluation.sets.own import read_emoji, read_own
from tests.support.shards import make_image, write_numbers, write_tar


def write_folder(root: Path) -> Path:
    """Pictures with captions beside: two files are one picture, two others are one content."""
    for name, number, said in (
        ("1", 1, {"captions": {"zh": ["猫"], "en": ["a cat", "cat"]}}),
        ("sub/2", 2, {"captions": {"en": ["a dog"]}, "identity": "dog"}),
        ("sub/3", 3, {"captions": {"en": ["a hound"], "zh": ["狗"]}, "identity": "dog"}),
        ("4", 1, {"captions": {"en": ["a cat", "one cat"]}}),
        ("5", 5, {"captions": {"en": ["a cat"], "fr": ["un chat"]}}),
    ):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(number))
        path.with_suffix(".json").write_text(json.dumps(said), encoding="utf-8")
    return root


def write_table(root: Path) -> Path:
    write_folder(root)
    for file in root.rglob("*.json"):
        file.unlink()
    rows = ["image,caption_zh,caption_en", "1.png,猫,a cat", "sub/2.png,,a dog", "4.png,猫咪,", "5.png,,a cat"]
    (root / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root / "table.csv"


def write_parquet(root: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet as parquet

    rows = {"image": [make_image(number) for number in (1, 2, 1)], "caption": ["a cat", "a dog", "one cat"]}
    root.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(rows), root / "table.parquet", row_group_size=2)
    return root / "table.parquet"


def write_pair(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    lines = [f"{number}\t{base64.b64encode(make_image(number)).decode()}" for number in (5, 7)]
    (root / "a_imgs.tsv").write_text("\n".join(lines) + "\n")
    texts = [{"text_id": number, "text": f"图 {number}", "image_ids": [number]} for number in (5, 7)]
    (root / "a_texts.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    return root


def write_shards(root: Path) -> Path:
    source = write_folder(root.with_name("source"))
    pack(find_source(str(source), columns=Columns()), root, PackOptions(samples_per_shard=2), workers=0)
    return root


def contents(found: RetrievalSet | EvaluationSet) -> dict[str, set[tuple[str, tuple[bytes, ...]]]]:
    """Every query with the pictures that are right for it, of either kind of set."""
    transform = EvalTransform(4)
    if isinstance(found, RetrievalSet):
        images = [image.numpy().tobytes() for image in found.images]
        numbers = found.numbers()
        return {
            language: {
                (text, tuple(sorted(images[row] for row, other in enumerate(numbers) if other == number)))
                for number, text in found.queries(language)
            }
            for language in found.languages
        }
    images = [transform.to_uint8(picture.read()).numpy().tobytes() for picture in found.pictures]
    sets: dict[str, set[tuple[str, tuple[bytes, ...]]]] = {}
    for language, texts in found.texts.items():
        right: dict[int, list[bytes]] = {}
        for text, picture in texts.pairs.tolist():
            right.setdefault(text, []).append(images[picture])
        sets[language] = {(texts.rows[text], tuple(sorted(own))) for text, own in right.items()}
        assert len(right) == len(texts.rows), "every text has a picture"
    return sets


@pytest.mark.parametrize("write", [write_folder, write_table, write_parquet, write_pair, write_shards])
def test_the_same_set_as_validation_reads(tmp_path: Path, write: Any) -> None:
    source = write(tmp_path / "own")
    found = read_own(source)
    theirs = read_retrieval_set(source, name="own", transform=EvalTransform(4))
    assert contents(found) == contents(theirs)
    assert {language: len(texts.rows) for language, texts in found.texts.items()} == {
        language: len(theirs.queries(language)) for language in theirs.languages
    }
    assert len(found.pictures) == len(theirs.images)
    assert theirs.reading is not None
    assert {name: found.counts[name] for name in theirs.reading._fields} == theirs.reading._asdict()


def test_names_and_positives_of_a_folder(tmp_path: Path) -> None:
    found = read_own(write_folder(tmp_path / "mine"))
    assert found.name == "mine"
    assert [picture.name for picture in found.pictures] == ["1.png", "5.png", "sub/2.png", "sub/3.png"]
    assert found.texts["zh"].rows == ("猫", "狗")
    assert found.texts["zh"].pairs.tolist() == [[0, 0], [1, 2], [1, 3]]
    assert found.counts["repeated_images"] == 1
    assert found.counts["other_languages"] == {"fr": 1}


def test_no_picture_is_decoded_or_kept_and_nothing_is_written(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine")
    (folder / "5.png").write_bytes(b"no picture at all")
    assert len(read_own(folder).pictures) == 4
    tars = tmp_path / "tars"
    write_numbers(tars, [3, 2])
    before = sorted(tars.iterdir())
    found = read_own(tars)
    assert sorted(tars.iterdir()) == before
    assert [picture.name for picture in found.pictures][:4:3] == ["000000.tar:000000", "000001.tar:000003"]
    (tars / "000001.tar").write_bytes(b"")
    with pytest.raises(UserError, match="is shorter than it was"):
        found.pictures[4].read()


def test_faults_have_one_line_each(tmp_path: Path) -> None:
    table = write_table(tmp_path / "mine")
    (table.parent / "5.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 pictures are not there: 5\.png"):
        read_own(table)
    table.write_text("image,caption\nhttp://example.org/1.jpg,a cat\n")
    with pytest.raises(UserError, match=r"1 pictures are urls, such as http.*m2-data pack source="):
        read_own(table)
    write_tar(tmp_path / "cut" / "0.tar", [("a.png", make_image(1)), ("a.txt", b"a cat"), ("b.txt", b"alone")])
    with pytest.raises(UserError, match=r"missing_image.*an evaluation skips nothing"):
        read_own(tmp_path / "cut")
    with pytest.raises(UserError, match="no such file or folder"):
        read_own(tmp_path / "nowhere")


def test_labels_make_classes_of_folders(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "1.png").write_bytes(make_image(number))
    (tmp_path / "names.txt").write_text("cat\t猫\tcat\ndog\t狗\tdog\n", encoding="utf-8")
    found = read_own(tmp_path / "own", labels=str(tmp_path / "names.txt"))
    assert found.classes is not None
    assert found.classes.names == {"zh": ("猫", "狗"), "en": ("cat", "dog")}


def test_a_split_of_the_emoji_set(emoji_folder: Path) -> None:
    found = read_emoji(emoji_folder, split="heldout_families")
    theirs = read_retrieval_set(
        emoji_folder / "heldout_families", name="x", transform=EvalTransform(8), split="heldout_families"
    )
    assert (found.name, len(found.pictures)) == ("emoji_heldout_families", len(theirs.images))
    for language in ("zh", "en"):
        assert list(found.texts[language].rows) == [text for _, text in theirs.queries(language)]
    names = [[number for number, _ in theirs.queries(language)] for language in ("zh", "en")]
    assert found.parallel["zh", "en"].tolist() == [
        [row, other] for row, number in enumerate(names[0]) for other, same in enumerate(names[1]) if number == same
    ]
    with pytest.raises(UserError, match="split=None: one of train, val"):
        read_emoji(emoji_folder)
    assert found.style == "twemoji"
    assert read_emoji(emoji_folder, split="val").style == "", "of several styles"
    with pytest.raises(UserError, match=r"heldout_style=noto: the drawings in .*heldout_families are of twemoji"):
        read_emoji(emoji_folder, split="heldout_families", heldout_style="noto")
