"""Rows of tables as records: which columns are found, and what is wrong with a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from m2_encoder.data.packing.records import Columns, Failure, Place, Record, locate_tables, read_row
from m2_encoder.errors import UserError


def _read(row: dict[str, Any], columns: Columns | None = None) -> Record:
    record = read_row(row, columns or Columns(), "row 1", Place())
    assert isinstance(record, Record), record
    return record


@pytest.mark.parametrize(
    ("row", "captions", "key"),
    [
        ({"image": "a.jpg", "caption": "a cat"}, {"en": ["a cat"]}, "a.jpg"),
        ({"url": "http://x/a", "TEXT": "猫", "id": 7}, {"zh": ["猫"]}, "7"),
        ({"image": "a", "caption": ["a cat", "猫"]}, {"en": ["a cat"], "zh": ["猫"]}, "a"),
        ({"image": "a", "caption_zh": "猫", "caption_en": "cat"}, {"en": ["cat"], "zh": ["猫"]}, "a"),
        ({"image": "a", "captions": {"zh": ["猫", "喵"]}}, {"zh": ["猫", "喵"]}, "a"),
        ({"image": "a", "caption": "KFC", "lang": "zh-CN"}, {"zh": ["KFC"]}, "a"),
        ({"image": b"bytes", "caption": "cat"}, {"en": ["cat"]}, None),
        ({"image": {"bytes": b"x", "path": "p"}, "caption": "cat"}, {"en": ["cat"]}, None),
        ({"image": {"bytes": None, "path": "p"}, "caption": "cat"}, {"en": ["cat"]}, "p"),
        ({"image": "", "url": "u", "caption": "", "text": "cat"}, {"en": ["cat"]}, "u"),
        ({"URL": "u", "TEXT": "KFC", "LANGUAGE": "zh-TW"}, {"zh": ["KFC"]}, "u"),
        ({"Image": "a", " Caption ": "cat", "Lang": "EN_us"}, {"en": ["cat"]}, "a"),
        ({"image": "a", "zh": "猫", "en": "cat"}, {"en": ["cat"], "zh": ["猫"]}, "a"),
        ({"image": "a", "caption": "cat", "en": "0.93", "zh": "0.07"}, {"en": ["cat"]}, "a"),
        (
            {"image": "a", "caption_cn": "猫", "text_zh": "喵", "captionEn": "cat"},
            {"en": ["cat"], "zh": ["猫", "喵"]},
            "a",
        ),
        ({"image": "a", "chinese_caption": "KFC", "caption": "cat"}, {"en": ["cat"], "zh": ["KFC"]}, "a"),
        ({"image": "a", "caption": "cat", "caption_en": "cat"}, {"en": ["cat"]}, "a"),
        ({"image": "a", "caption": {"zh-CN": "KFC", "zh-TW": ["M"]}}, {"zh": ["KFC", "M"]}, "a"),
        ({"image": "a", "caption": '{"zh_Hans": "KFC", "EN": ["cat"]}'}, {"en": ["cat"], "zh": ["KFC"]}, "a"),
        ({"image": "a", "caption": '["a cat", "a pet"]'}, {"en": ["a cat", "a pet"]}, "a"),
        ({"image": "a", "caption": "[1] cat"}, {"en": ["[1] cat"]}, "a"),
        ({"image": "a", "caption": "[1]"}, {"en": ["[1]"]}, "a"),
        ({"image": "a", "caption": "cat", "lang": "und"}, {"en": ["cat"]}, "a"),
        ({"url": "http://x/a", "jpg": b"bytes", "caption": "cat", "key": "000"}, {"en": ["cat"]}, "000"),
        ({"图片": "a", "中文描述": "KFC", "英文描述": "cat"}, {"en": ["cat"], "zh": ["KFC"]}, "a"),
        ({"image": "a", "caption": "cat", "id": 9, "image_id": 5.0}, {"en": ["cat"]}, "5"),
    ],
)
def test_usual_columns(row: dict[str, Any], captions: dict[str, list[str]], key: str | None) -> None:
    record = _read(row)
    found: dict[str, list[str]] = {}
    for caption in record.captions:
        found.setdefault(caption.language, []).append(caption.text)
    assert (found, record.key) == (captions, key)


def test_named_columns() -> None:
    columns = Columns(image="file", caption="title", key="url", language="l", extra=("license",), default_language="zh")
    row = {"file": "a", "image": "no", "title": "KFC", "caption": "no", "url": "u", "l": None, "license": "CC0", "x": 1}
    record = _read(row, columns)
    assert (record.image, record.captions[0][:2], record.key) == ("a", ("KFC", "zh"), "u")
    assert record.extra == {"license": "CC0"}


@pytest.mark.parametrize(("value", "identity"), [(5, "5"), (5.0, "5"), ("5.0", "5"), ("x", "x"), ("nan", None)])
def test_identity_is_valid_in_all_sources(value: object, identity: str | None) -> None:
    record = _read({"image": "a", "caption": "cat", "Identity": value})
    assert (record.key, record.identity) == ("a", identity)
    assert _read({"image": "a", "caption": "cat", "who": value}, Columns(identity="who")).identity == identity


def test_columns_that_are_not_read_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    Columns().check(["image", "text", "caption", "title_zh", "nsfw", "caption_1", "lang_code"], "t.csv")
    Columns().check(["image", "text", "caption", "title_zh", "nsfw", "caption_1", "lang_code"], "u.csv")
    assert caplog.messages == [
        "columns that are not read: 'nsfw'; columns.extra keeps values",
        "read only where 'caption' is empty: 'text'",
    ]
    caplog.clear()
    Columns(extra=("w",)).check(["image", "w", *(f"{'x' * 99}{n}" for n in range(99)), "caption"], "t.csv")
    assert len(caplog.messages[0]) < 500
    Columns(caption="title").check(["image", "title"], "t.csv")
    assert len(caplog.messages) == 1


def test_names_that_begin_again_in_every_table_mean_nothing() -> None:
    places = [place for _, place in locate_tables([Path("x/a/t.csv"), Path("x/b/t.csv")], None)]
    assert places == [Place("x/a", "a/t.csv", "a", "a/t.csv"), Place("x/b", "b/t.csv", "b", "b/t.csv")]
    keys = {
        name: [cast("Record", read_row({"caption": "cat", **row}, Columns(), "", place)).key for place in places]
        for name, row in {
            "path": {"image": "0.jpg"},
            "url": {"image": "http://x/0.jpg"},
            "id": {"image": b"?", "id": 0},
            "key": {"image": b"?", "key": 0},
        }.items()
    }
    assert keys == {
        "path": ["a/0.jpg", "b/0.jpg"],
        "url": ["http://x/0.jpg"] * 2,
        "id": ["a/t.csv: 0", "b/t.csv: 0"],
        "key": ["0", "0"],
    }
    assert [place for _, place in locate_tables([Path("x/t.csv")], None)] == [Place("x", "t.csv")]
    shared = [place for _, place in locate_tables([Path("x/a/t.csv"), Path("x/b/t.csv")], "pictures")]
    assert [(place.root, place.folder) for place in shared] == [("pictures", "")] * 2


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"caption": "cat"}, "missing_image", "no path, URL or bytes"),
        ({"image": 3, "caption": "cat"}, "missing_image", "3.jpg"),
        ({"image": True, "caption": "cat"}, "wrong_type", "bool"),
        ({"image": float("nan"), "caption": "cat"}, "missing_image", "no path"),
        ({"image": "a", "caption": "nan"}, "missing_caption", "caption"),
        ({"image": "a", "caption": "None"}, "missing_caption", "caption"),
        ({"url": "http://x/a", "jpg": None, "caption": "cat"}, "missing_image", "no path, URL or bytes"),
        ({"image": "a", "caption": "#N/A"}, "missing_caption", "caption"),
        ({"image": "a", "caption": "chat", "caption_language": "fr"}, "missing_caption", "in fr;"),
        ({"image": "a"}, "missing_caption", "caption"),
        ({"image": "a", "caption": "  "}, "missing_caption", "caption"),
        ({"image": "a", "caption": 3}, "wrong_type", "int"),
        ({"image": "a", "caption": [3]}, "wrong_type", "3"),
        (
            {"image": "a", "caption": "chat", "lang": "fr"},
            "missing_caption",
            "it has 1 caption in fr; wanted a text in one of en, zh",
        ),
        ({"image": "a", "TEXT": "chat", "LANGUAGE": "fr-FR"}, "missing_caption", "in fr;"),
        ({"image": "a", "TEXT": "ねこ"}, "missing_caption", "in ja;"),
        ({"image": "a", "caption_fr": "chat", "caption_de": ""}, "missing_caption", "in fr;"),
        ({"image": "a", "caption": "['a cat', 'a pet']"}, "wrong_type", "write it as JSON"),
        ({"image": "a", "caption": "cat\ud83d"}, "not_utf8", "U+D83D"),
        ({"image": "a\udcff", "caption": "cat"}, "not_utf8", "U+DCFF"),
        ({"image": "a", "caption": "cat", "id": [1]}, "wrong_type", "key"),
    ],
)
def test_wrong_rows(row: dict[str, Any], reason: str, detail: str) -> None:
    failure = read_row(row, Columns(), "row 1", Place())
    assert isinstance(failure, Failure)
    assert (failure.name, failure.reason) == ("row 1", reason)
    assert detail in failure.detail


@pytest.mark.parametrize(
    ("columns", "present", "message"),
    [
        (Columns(), ["title", "width"], "no column with the image: it has 'title', 'width'"),
        (Columns(), ["url", "width"], "no column with the caption"),
        (Columns(caption="alt"), ["url", "caption"], "wanted alt; say which it is with columns.caption=NAME"),
        (Columns(extra=("license",)), ["url", "caption"], "columns.extra"),
    ],
)
def test_tables_without_images_or_captions_are_refused(columns: Columns, present: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        columns.check(present, "t.csv")


def test_captions_in_other_languages_are_told() -> None:
    record = _read({"image": "a", "captions": {"en": "cat", "fr": ["chat", "matou"], "de": "Katze"}})
    assert [(caption.language, caption.text) for caption in record.left_out] == [
        ("fr", "chat"), ("fr", "matou"), ("de", "Katze"),
    ]  # fmt: skip
    failure = read_row({"image": "a", "caption": "chat", "lang": "fr"}, Columns(), "row 1", Place())
    assert isinstance(failure, Failure)
    assert failure.languages == ("fr",)
