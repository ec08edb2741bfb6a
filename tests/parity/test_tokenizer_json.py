"""The official SentencePiece file as `tokenizer.json`: the official ids, by another library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.exports.tokenizer_json import write_tokenizer_json
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

transformers = pytest.importorskip("transformers", reason="opens what is written")


@pytest.fixture(scope="module")
def ours(parity_dir: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(parity_dir / "tokenizer" / "sp.model")


@pytest.fixture(scope="module")
def theirs(ours: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("official")
    write_tokenizer_json(ours, folder)
    assert (folder / "tokenizer.json").stat().st_size < 12e6
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def test_all_goldens_have_the_official_ids(theirs: Any, parity_dir: Path) -> None:
    lines = (parity_dir / "tokenizer" / "tokenizer_golden.jsonl").read_text(encoding="utf-8").splitlines()
    goldens = [json.loads(line) for line in lines]
    found = theirs([golden["text"] for golden in goldens], padding="max_length", truncation=True)
    assert found["input_ids"] == [golden["input_ids"] for golden in goldens]
    assert found["attention_mask"] == [golden["attention_mask"] for golden in goldens]


ODD = ["", "\x00", "  the   such  ", " such", "suchlike  Let us", "\r\n\r", "▁▁a", "[sMASK]<n><|blank_7|>"]


@pytest.mark.parametrize("text", [*ODD, "Ｔhe　猫", "🏽👩\u200d🚀"])
def test_odd_texts_have_the_same_ids(ours: SentencePieceTokenizer, theirs: Any, text: str) -> None:
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def test_pieces_keep_their_ids(ours: SentencePieceTokenizer, theirs: Any) -> None:
    assert len(theirs) == ours.vocab_size
    assert (theirs.cls_token_id, theirs.pad_token_id, theirs.mask_token_id) == (50002, 50000, 50003)
