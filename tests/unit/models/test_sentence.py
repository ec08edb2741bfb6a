"""A sentence encoder on disk: its library's own embeddings, by ids and mask; and one line for what is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from m2_encoder.errors import UserError
from m2_encoder.models.composed import ComposedTowers
from m2_encoder.models.sentence import SentenceEncoder, SentenceTokenizer
from m2_encoder.tokenizers.foreign import ForeignTokenizer

pytest.importorskip("sentence_transformers")

from tests.support.sentence_folder import WORDS, write_sentence_encoder

TEXTS = ["a cat", "数 字 7", "a dog in a cat in a dog in a cat in a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentence_encoder(tmp_path_factory.mktemp("sentences") / "small")


def test_embeddings_are_those_of_the_library(folder: Path) -> None:
    import sentence_transformers

    library = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    tokenizer = ForeignTokenizer(SentenceTokenizer(str(folder)), "sentence")
    assert tokenizer.vocab_size == len(WORDS)
    ids, mask = tokenizer(TEXTS)
    assert mask.sum(dim=1).tolist() == [4, 5, 12], "the longest is cut at the length of the folder"
    with torch.no_grad():
        found = SentenceEncoder(str(folder)).eval()(ids, mask)
    torch.testing.assert_close(found, torch.from_numpy(library.encode(TEXTS)), rtol=1e-5, atol=1e-6)


def test_a_prompt_and_another_length(folder: Path) -> None:
    prompted = SentenceTokenizer(str(folder), context_length=5, prompt="a 数 ")(["cat cat"])
    assert prompted.ids.tolist() == SentenceTokenizer(str(folder), context_length=5)(["a 数 cat cat"]).ids.tolist()
    assert prompted.ids.shape == (1, 5)


def test_as_a_locked_text_tower(folder: Path) -> None:
    def build(rows: int) -> ComposedTowers:
        torch.manual_seed(0)
        encoder = SentenceEncoder(str(folder))
        image = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
        return ComposedTowers(
            image=image, text=encoder, image_size=2, vocab_size=len(WORDS), locked=["text"], cached_rows=rows,
            image_layers=0, text_layers=2,
        )  # fmt: skip

    plain, cached = build(0).train(), build(16).train()
    before = {name: value.clone() for name, value in cached.text.state_dict().items()}
    ids, mask = SentenceTokenizer(str(folder))(TEXTS)
    optimizer = torch.optim.AdamW([p for p in cached.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(cached.encode_text(ids, mask), plain.encode_text(ids, mask))
    for _ in range(2):
        optimizer.zero_grad()
        cached.encode_text(ids, mask).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in cached.text.state_dict().items())
    assert not torch.equal(cached.encode_text(ids, mask), plain.encode_text(ids, mask)), "its projection is trained"


def test_what_is_no_such_folder(folder: Path, tmp_path: Path) -> None:
    for build in (SentenceEncoder, SentenceTokenizer):
        with pytest.raises(UserError, match=r"folder=.*nowhere: no such folder"):
            build(str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match=r"is no folder of sentence-transformers \(modules\.json"):
            build(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}]))
    for build in (SentenceEncoder, SentenceTokenizer):
        with pytest.raises(UserError, match=r"cannot be loaded|has no tokenizer"):
            build(str(tmp_path))


def test_texts_must_have_a_place_and_padding(folder: Path, tmp_path: Path) -> None:
    """Else every text would be the same one, or batches would fail."""
    with pytest.raises(
        UserError, match="context_length=5: must be above 6, the tokens of every text and of the prompt"
    ):
        SentenceTokenizer(str(folder), context_length=5, prompt="a cat in a ")
    with pytest.raises(UserError, match="context_length=2: must be above 2"):
        SentenceTokenizer(str(folder), context_length=2)
    bare = shutil.copytree(folder, tmp_path / "bare")
    facts = json.loads((bare / "tokenizer_config.json").read_text())
    del facts["pad_token"]
    (bare / "tokenizer_config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="has a tokenizer without a token for padding"):
        SentenceTokenizer(str(bare))


def test_texts_are_no_longer_than_the_positions(folder: Path) -> None:
    """Else a run would fail at the first long caption."""
    longest = SentenceTokenizer(str(folder), context_length=32)(["a cat " * 60])
    assert SentenceEncoder(str(folder))(*longest).shape == (1, 16)
    with pytest.raises(UserError, match="context_length=33: must be at most 32, the positions of the encoder"):
        SentenceTokenizer(str(folder), context_length=33)
