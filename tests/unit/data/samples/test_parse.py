from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.data.loading.faults import SKIP_REASONS
from m2_encoder.data.samples.parse import CaptionText, SampleProblem, parse_sample_text


def _encode(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("json_file", "text_file", "expected"),
    [
        ({"captions": {"zh": ["猫"], "en": [" a cat ", ""]}}, None, [("a cat", "en", None), ("猫", "zh", None)]),
        (
            {"captions": {"en": [{"text": "cat", "role": "name"}, "tom"]}},
            None,
            [("cat", "en", "name"), ("tom", "en", None)],
        ),
        (
            {"captions": {"en": ["cat", "pet"]}, "caption_roles": {"en": ["name", "keyword"]}},
            None,
            [("cat", "en", "name"), ("pet", "en", "keyword")],
        ),
        ({"caption": "一只 cat"}, None, [("一只 cat", "zh", None)]),
        ({"text": "cat", "url": "x"}, b"not this one", [("cat", "en", None)]),
        ({"url": "x"}, "\ufeff猫\n".encode(), [("猫", "zh", None)]),
        ({"captions": {"fr": ["chat"], "en": ["cat"]}}, None, [("cat", "en", None)]),
        (None, b"a cat\n", [("a cat", "en", None)]),
        (
            None,
            "a cat\r\n一只猫\n\n two cats".encode(),
            [("a cat", "en", None), ("two cats", "en", None), ("一只猫", "zh", None)],
        ),
        (
            {"captions": {"zh-CN": ["KFC"], "EN_us": "cat", "zh_Hant": ["M"]}},
            None,
            [("cat", "en", None), ("KFC", "zh", None), ("M", "zh", None)],
        ),
        ({"captions": {"cn": "KFC"}, "caption_roles": {"cn": ["name"]}}, None, [("KFC", "zh", "name")]),
        ({"captions": {"chs": "K"}, "caption_roles": {"chs": "name"}}, None, [("K", "zh", "name")]),
        ({"captions": {"Chinese": {"text": "K", "role": "name"}}}, None, [("K", "zh", "name")]),
        ({"captions": {"und": ["猫", "cat"]}}, None, [("cat", "en", None), ("猫", "zh", None)]),
        (
            {"captions": ["cat", "猫"], "caption_roles": ["name", None]},
            None,
            [("cat", "en", "name"), ("猫", "zh", None)],
        ),
        ({"captions": "cat"}, None, [("cat", "en", None)]),
        ({"captions": {"en": [None, "cat"]}}, None, [("cat", "en", None)]),
        ({"caption": ["cat", {"text": "KFC", "language": "zh-CN"}]}, None, [("cat", "en", None), ("KFC", "zh", None)]),
        ({"caption": {"zh": "KFC"}}, None, [("KFC", "zh", None)]),
        ({"caption": "KFC", "LANGUAGE": "zho"}, None, [("KFC", "zh", None)]),
        ({"caption": "", "TEXT": "cat"}, None, [("cat", "en", None)]),
        ({"caption": "cat", "caption_cn": "KFC", "caption_len": "3"}, None, [("cat", "en", None), ("KFC", "zh", None)]),
        ({"captions": {"en": [" "]}, "caption": "cat"}, b"not this", [("cat", "en", None)]),
        ({"captions": {"zh": ["猫"]}}, b"", [("猫", "zh", None)]),
        ({"captions": {"fr": ["chat"]}}, b"cat", [("cat", "en", None)]),
        ({"caption": " ", "text": "cat"}, None, [("cat", "en", None)]),
        ({"caption": [], "text": "cat"}, None, [("cat", "en", None)]),
        ({"Captions": {"EN": ["cat"]}}, None, [("cat", "en", None)]),
        ({"caption": '{"zh": "KFC", "en": ["a cat"]}'}, None, [("a cat", "en", None), ("KFC", "zh", None)]),
        ({"captions": '["a cat", "猫"]'}, None, [("a cat", "en", None), ("猫", "zh", None)]),
        ({"caption": "[1] cat"}, None, [("[1] cat", "en", None)]),
        ({"caption": "['quoted'] cat"}, None, [("['quoted'] cat", "en", None)]),
        (None, b'{"zh": "KFC"}', [("KFC", "zh", None)]),
        ({"caption_1": "cat", "Caption 2": "猫"}, None, [("cat", "en", None), ("猫", "zh", None)]),
        ({"caption": "cat", "text2": "KFC", "lang": "zh"}, None, [("cat", "zh", None), ("KFC", "zh", None)]),
        ({"caption": ["cat", "猫"], "language": "zh-en"}, None, [("cat", "en", None), ("猫", "zh", None)]),
    ],
)
def test_captions(json_file: Any, text_file: bytes | None, expected: list[tuple[str, str, str | None]]) -> None:
    content = None if json_file is None else _encode(json_file)
    found = parse_sample_text(content, text_file)
    assert found.captions == tuple(CaptionText(*item) for item in expected)
    assert tuple(found.metadata) == tuple(json_file or ())


@pytest.mark.parametrize(
    ("json_file", "text_file", "reason", "detail"),
    [
        (None, None, "missing_caption", "no .json or .txt"),
        (b"{}", None, "missing_caption", "its JSON has no keys"),
        (_encode({"url": "x", "alt": "y"}), None, "missing_caption", "its JSON has url, alt"),
        (_encode({"captions": {"en": [" "]}}), None, "missing_caption", "captions"),
        (_encode({"captions": {"fr": ["chat"]}}), None, "missing_caption", "1 caption in fr"),
        (None, b"", "empty_member", ".txt"),
        (None, b" \n", "missing_caption", ""),
        (b"", None, "empty_member", ".json"),
        (b"{", None, "bad_json", ""),
        (b"[1]", None, "bad_json", "list"),
        (b"[" * 100_000, None, "bad_json", "recursion"),
        (b"\xff{}", None, "not_utf8", "byte 0"),
        (None, "中文".encode("gb18030"), "not_utf8", ".txt is not UTF-8 at byte 0; convert it, as with iconv"),
        (_encode({"caption": "['a cat', 'a pet']"}), None, "wrong_type", "write it as JSON"),
        (_encode({"text": "chat", "text_lang": "fr"}), None, "missing_caption", "1 caption in fr"),
        (_encode({"text": "chat", "Lang_Code": "fr-CA"}), None, "missing_caption", "1 caption in fr"),
        (b'{"caption": "\\ud83d"}', None, "not_utf8", "U+D83D"),
        (b'{"caption": "a", "key": "\\ud83d"}', None, "not_utf8", "U+D83D"),
        (_encode({"caption": 7}), None, "wrong_type", "caption is a int"),
        (_encode({"captions": {"en": 7}}), None, "wrong_type", "captions of 'en' is a int"),
        (_encode({"captions": {"en": ["\u200b\ufeff"]}}), None, "missing_caption", "no text in captions"),
        (
            _encode({"captions": {"fr": ["chat", "matou"], "de-AT": "Katze"}}),
            None,
            "missing_caption",
            "2 captions in fr, 1 in de",
        ),
        (_encode({"caption": "chat", "lang": "fr"}), b"chat", "missing_caption", "it has 1 caption in fr; wanted"),
        (None, "ねこがいます".encode(), "missing_caption", "1 caption in ja"),
        (_encode({f"key{i}": 1 for i in range(99)}), None, "missing_caption", "key9, 89 more"),
        (_encode({"captions": {"en": [7]}}), None, "wrong_type", "7"),
        (_encode({"captions": {"en": ["a"]}, "caption_roles": {"en": []}}), None, "wrong_type", "1 captions and 0"),
        (_encode({"caption": "a", "key": [1]}), None, "wrong_type", "key"),
    ],
)
def test_problems(json_file: bytes | None, text_file: bytes | None, reason: str, detail: str) -> None:
    with pytest.raises(SampleProblem) as caught:
        parse_sample_text(json_file, text_file)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
    assert "\n" not in str(caught.value)


def test_given_language_beats_the_script() -> None:
    found = parse_sample_text(None, b"KFC", language="zh")
    assert found.captions[0].language == "zh"


@pytest.mark.parametrize(
    ("metadata", "identity"),
    [({"key": "a"}, "a"), ({"key": "a", "identity": 7}, "7"), ({}, None), ({"key": None}, None)],
)
def test_identity(metadata: dict[str, Any], identity: str | None) -> None:
    assert parse_sample_text(_encode({"caption": "x", **metadata}), None).identity == identity


@given(st.binary(max_size=60), st.one_of(st.none(), st.binary(max_size=20)))
def test_any_bytes_give_captions_or_a_known_reason(json_file: bytes, text_file: bytes | None) -> None:
    reason, captions = None, ()
    try:
        captions = parse_sample_text(json_file, text_file).captions
    except SampleProblem as problem:
        reason = problem.reason
    assert (reason in SKIP_REASONS) != bool(captions)
    assert all(caption.text.strip() == caption.text != "" for caption in captions)


def test_problems_travel_between_processes() -> None:
    left_out = (CaptionText("chat", "fr", None),)
    problem = pickle.loads(pickle.dumps(SampleProblem("bad_json", "two\nlines", left_out)))
    assert (problem.reason, problem.detail, str(problem)) == ("bad_json", "two lines", "bad_json: two lines")
    assert problem.left_out == left_out


def test_captions_in_other_languages_are_told() -> None:
    metadata = {"captions": {"en": ["cat"], "fr": ["chat", ""], "jp": [{"text": "猫"}]}}
    found = parse_sample_text(_encode(metadata), None)
    assert [caption.text for caption in found.captions] == ["cat"]
    assert [caption[:2] for caption in found.left_out] == [("chat", "fr"), ("猫", "jp")]
