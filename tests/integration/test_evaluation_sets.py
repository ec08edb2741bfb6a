"""Who is who in an evaluation set: the same pictures and captions give the same numbers, however they are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.packing.pack import PackOptions, pack
from m2_encoder.data.packing.records import Columns
from m2_encoder.data.packing.sources import find_source
from m2_encoder.data.retrieval_set import RetrievalSet, check_retrieval_set, read_retrieval_set
from m2_encoder.data.retrieval_source import describe_source
from m2_encoder.errors import UserError
from m2_encoder.evaluation.tasks.base import EvaluationContext, TaskResult
from m2_encoder.evaluation.tasks.retrieval import Retrieval
from m2_encoder.models.m2_encoder import M2Encoder
from tests.support.training import make_tokenizer, tiny_config

COLORS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色"}
WORDS = ["a {} circle", "one {} circle", "the circle is {}", "{} circle drawing", "picture of {} circle"]


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    torch.manual_seed(0)
    return M2Encoder(tiny_config(vocab_size=make_tokenizer().vocab_size))


def write_table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for color in COLORS:
        Image.new("RGB", (16, 12), color).save(folder / f"{color}.png")
    table = folder / "rows.jsonl"
    table.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return table


def packed(folder: Path, rows: list[dict[str, Any]], *, per_shard: int = 3, **columns: Any) -> Path:
    folder.mkdir()
    source = find_source(str(write_table(folder, rows)), columns=Columns(**columns))
    pack(source, folder / "tars", PackOptions(samples_per_shard=per_shard), workers=0)
    return folder / "tars"


def measure(model: M2Encoder, folder: Path) -> tuple[RetrievalSet, TaskResult]:
    found = read_retrieval_set(folder, name="mine", transform=EvalTransform(model.config.image_size))
    return found, Retrieval().measure(EvaluationContext(model, make_tokenizer(), {"mine": found}))


def texts(color: str) -> dict[str, list[str]]:
    return {
        "en": [words.format(color) for words in WORDS],
        "zh": [f"{COLORS[color]}的圆{number}" for number in range(5)],
    }


def of_five(found: TaskResult) -> Mapping[str, Any]:
    """The numbers, after the sizes are checked: 20 captions of each language, 4 pictures."""
    numbers: Mapping[str, Any] = found.record["evaluation"]["mine"]
    for metrics in numbers.values():
        assert (metrics["num_texts"], metrics["num_images"]) == (20, 4)
        assert metrics["t2i_chance@1"] == 25
    return numbers


def test_five_captions_of_a_picture_as_lists_and_as_rows(model: M2Encoder, tmp_path: Path) -> None:
    lists = [{"image": f"{color}.png", "captions": texts(color)} for color in COLORS]
    rows = [
        {"image": f"{color}.png", "caption_en": en, "caption_zh": zh, "id": f"{color} {number}"}
        for color in COLORS
        for number, (en, zh) in enumerate(zip(*texts(color).values(), strict=True))
    ]
    _, wanted = measure(model, packed(tmp_path / "lists", lists))
    _, found = measure(model, packed(tmp_path / "rows", rows))  # with an id of its own for every row
    assert of_five(found) == of_five(wanted)
    assert list(of_five(wanted)) == ["zh", "en"]
    assert wanted.record["protocol"]["sets"]["mine"] == {
        "samples": 4, "images": 4, "contents": 4, "captions": {"zh": 20, "en": 20}, "repeated_images": 0,
        "kept_apart": 0, "repeated_captions": {"zh": 0, "en": 0}, "equal_captions": {"zh": 0, "en": 0},
        "images_without_caption": {"zh": 0, "en": 0}, "left_out": {}, "other_languages": {},
    }  # fmt: skip
    assert found.record["protocol"]["sets"]["mine"]["repeated_images"] == 16
    assert found.rows[1:] == ("mine: 20 samples show 4 different pictures; 20 zh captions; 20 en captions",)
    both = packed(tmp_path / "both", [*rows, *lists, *rows], per_shard=7)
    _, twice = measure(model, both)  # the same pictures packed again
    assert of_five(twice) == of_five(wanted)
    assert twice.record["protocol"]["sets"]["mine"]["repeated_captions"] == {"zh": 40, "en": 40}


def test_captions_with_roles_in_one_language(model: M2Encoder, tmp_path: Path) -> None:
    rows = [
        {"image": f"{color}.png", "captions": {"zh": [{"text": texts(color)["zh"][0], "role": "translated"}]}}
        for color in COLORS
    ]
    dataset, found = measure(model, packed(tmp_path / "roles", rows))
    assert dataset.languages == ("zh",)
    assert list(found.record["table"]["mine"]) == ["zh", "chance"]
    assert {name.split("/")[1] for name in found.metrics} == {"mine_zh"}
    assert "| mine | 4 | zh |" in found.markdown
    assert "| en |" not in found.markdown
    assert len(found.rows) == 1, "one caption of one picture needs no further word"
    found.pictures["retrieval.png"](tmp_path / "page.png")
    assert (tmp_path / "page.png").is_file()


def test_pictures_without_a_caption_in_a_language_stay_in_its_gallery(model: M2Encoder, tmp_path: Path) -> None:
    rows = [
        {"image": f"{color}.png", "captions": {name: texts(color)[name][:1] for name in languages}}
        for color, languages in zip(COLORS, (("zh",), ("zh", "en"), ("en",), ("zh",)), strict=True)
    ]
    _, found = measure(model, packed(tmp_path / "partly", rows))
    numbers = found.record["evaluation"]["mine"]
    assert {name: metrics["num_texts"] for name, metrics in numbers.items()} == {"zh": 3, "en": 2}
    assert {metrics["num_images"] for metrics in numbers.values()} == {4}
    assert {name: metrics["i2t_chance@1"] for name, metrics in numbers.items()} == pytest.approx(
        {"zh": 100 / 3, "en": 50}
    )
    assert list(found.record["table"]["mine"]) == ["zh", "en", "chance zh", "chance en"]
    assert found.rows[1:] == ("mine: 3 zh captions (pictures without one: 1); 2 en captions (pictures without one: 2)",)
    found.pictures["retrieval.png"](tmp_path / "page.png")


def test_equal_words_of_two_pictures_are_two_queries_and_are_counted(model: M2Encoder, tmp_path: Path) -> None:
    rows = [{"image": f"{color}.png", "caption": "a circle" if color < "h" else color} for color in COLORS]
    _, found = measure(model, packed(tmp_path / "equal", rows))
    assert found.record["evaluation"]["mine"]["en"]["num_texts"] == 4
    assert found.record["protocol"]["sets"]["mine"]["equal_captions"] == {"en": 2}
    assert found.rows[1:] == ("mine: 4 en captions (2 with the words of another picture's)",)


def test_a_plain_folder_and_a_table_are_read_as_packed(model: M2Encoder, tmp_path: Path) -> None:
    rows = [{"image": f"{color}.png", "caption": texts(color)["en"][0]} for color in COLORS]
    tars = packed(tmp_path / "table", rows)
    plain = tmp_path / "plain" / "below"
    plain.mkdir(parents=True)
    for color in COLORS:
        Image.new("RGB", (16, 12), color).save(plain / f"{color}.{'bmp' if color == 'red' else 'PNG'}")
        (plain / f"{color}.txt").write_text(texts(color)["en"][0], encoding="utf-8")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    _, wanted = measure(model, tars)
    for source in (tmp_path / "plain", tmp_path / "table" / "rows.jsonl", tars / "*.tar"):
        _, found = measure(model, source)
        assert found.metrics == wanted.metrics, source
        check_retrieval_set(source, name="mine")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.png", b"no picture", "c.png: .*; an evaluation skips nothing: mend it, or pack what can be used"),
        ("c.txt", b"a caption alone", r"c: a caption without one of .* \(missing_image\)"),
    ],
)
def test_what_packing_would_leave_out_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    Image.new("RGB", (16, 12), "red").save(tmp_path / "red.png")
    (tmp_path / "red.json").write_text('{"caption": "red"}', encoding="utf-8")
    (tmp_path / name).write_bytes(content)
    if name == "c.png":
        (tmp_path / "c.txt").write_text("a circle", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_retrieval_set(tmp_path, name="mine", transform=EvalTransform(16))


def test_sources_are_looked_at_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_bytes(b"")
    assert "no such file or folder" in str(describe_source(str(tmp_path / "nowhere")))
    assert "files end in .docx: give a folder with images" in str(describe_source(str(tmp_path / "notes.docx")))
    assert "no *.tar there, and no image" in str(describe_source(str(tmp_path)))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.JPG").write_bytes(b"")
    assert describe_source(str(tmp_path)) is None
