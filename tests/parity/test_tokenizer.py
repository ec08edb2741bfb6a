"""Token ids of the official tokenizer on 290 strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

CONTEXT_LENGTH = 52
END_ID = 50000


@pytest.fixture(scope="module")
def tokenizer(parity_dir: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(parity_dir / "tokenizer" / "sp.model")


@pytest.fixture(scope="module")
def goldens(parity_dir: Path) -> list[dict[str, Any]]:
    lines = (parity_dir / "tokenizer" / "tokenizer_golden.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_special_ids_and_size_are_the_official_ones(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.vocab_size == 115_244
    assert (tokenizer.cls_id, tokenizer.end_id, tokenizer.mask_id) == (50002, END_ID, 50003)
    assert (tokenizer.context_length, tokenizer.truncation_side) == (CONTEXT_LENGTH, "left")


def test_all_goldens_in_one_call(tokenizer: SentencePieceTokenizer, goldens: list[dict[str, Any]]) -> None:
    assert len(goldens) == 290
    ids, mask = tokenizer([golden["text"] for golden in goldens])
    # The set holds longer texts than 52, so the padded width of the call is the official one.
    assert ids.shape == mask.shape == (290, CONTEXT_LENGTH)
    for golden, row, valid in zip(goldens, ids.tolist(), mask.int().tolist(), strict=True):
        assert row == golden["input_ids"], golden["text"]
        assert valid == golden["attention_mask"], golden["text"]


def test_each_golden_alone_padded_to_the_context(
    tokenizer: SentencePieceTokenizer, goldens: list[dict[str, Any]]
) -> None:
    for golden in goldens:
        ids, mask = tokenizer(golden["text"])
        assert mask.all(), golden["text"]
        missing = CONTEXT_LENGTH - ids.shape[1]
        assert ids[0].tolist() + [END_ID] * missing == golden["input_ids"], golden["text"]
        assert [1] * ids.shape[1] + [0] * missing == golden["attention_mask"], golden["text"]


def test_untruncated_lengths_and_pieces(tokenizer: SentencePieceTokenizer, goldens: list[dict[str, Any]]) -> None:
    for golden in goldens:
        encoded = tokenizer.encode(golden["text"])
        assert len(encoded) + 2 == golden["n_tokens"], golden["text"]
        pieces = tokenizer.pieces(encoded)[:60]
        # The goldens spell a run of unknown characters out, ids 0 have no spelling.
        spelled = [
            theirs if index == 0 else ours
            for index, ours, theirs in zip(encoded, pieces, golden["pieces"], strict=False)
        ]
        assert spelled == golden["pieces"], golden["text"]


def test_the_eleven_long_texts_keep_their_last_pieces(
    tokenizer: SentencePieceTokenizer, goldens: list[dict[str, Any]]
) -> None:
    long = [golden for golden in goldens if golden["n_tokens"] > CONTEXT_LENGTH]
    assert len(long) == 11
    for golden in long:
        encoded = tokenizer.encode(golden["text"])
        assert golden["input_ids"] == [50002, *encoded[-50:], END_ID]
        (right,) = tokenizer(golden["text"], truncation_side="right").ids.tolist()
        assert right == [50002, *encoded[:50], END_ID]


def test_strings_that_tell_the_tokenizer_bases_apart(
    tokenizer: SentencePieceTokenizer, goldens: list[dict[str, Any]]
) -> None:
    telling = [golden for golden in goldens if "input_ids_newer_tokenizer_base" in golden]
    assert len(telling) == 7
    ids = tokenizer([golden["text"] for golden in telling]).ids.tolist()
    for golden, row in zip(telling, ids, strict=True):
        padded = row + [END_ID] * (CONTEXT_LENGTH - len(row))
        assert padded == golden["input_ids"] != golden["input_ids_newer_tokenizer_base"]


@pytest.mark.parametrize(
    ("spaces", "blanks"),
    [(2, [2]), (3, [3]), (9, [9]), (10, [10]), (11, [10]), (12, [10, 2]), (21, [10, 10]), (25, [10, 10, 5])],
)
def test_runs_of_spaces(tokenizer: SentencePieceTokenizer, spaces: int, blanks: list[int]) -> None:
    pieces = tokenizer.pieces(tokenizer.encode("a" + " " * spaces + "b"))
    named = [f"<|blank_{length}|>" for length in blanks]
    # What is left of the run, at most one space, stays with the next word.
    rest = "▁b" if spaces - sum(blanks) else "b"
    assert pieces == ["▁a", *named, rest]


def test_decode_restores_plain_text(tokenizer: SentencePieceTokenizer) -> None:
    for text in ("一只猫坐在沙发上", "a photo of a dog", "a   b", "12  个月 old"):
        (ids,) = tokenizer(text).ids
        assert tokenizer.decode(ids) == text
