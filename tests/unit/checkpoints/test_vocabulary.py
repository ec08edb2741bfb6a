"""Whether a tokenizer is that of the weights, and how weights get another one."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from pathlib import Path

import pytest
import torch

from m2_encoder import load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.io import save_official
from m2_encoder.checkpoints.vocabulary import find_tokenizer, pack_tokenizer
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.tokenizers.han_pieces import mark_han_pieces
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.added_parts import adapted_config, random_adapted_model
from tests.support.damage import train_other_tokenizer
from tests.support.models import random_model, small_config

OWN = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=9)


OTHER = SentencePieceTokenizer(train_other_tokenizer(size=60), context_length=9)


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    torch.manual_seed(3)
    return random_model(small_config(vocab_size=OWN.vocab_size)).requires_grad_(False)


@pytest.fixture(scope="module")
def exported(model: M2Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(tmp_path_factory.mktemp("a") / "run" / "export", model=model, tokenizer=OWN)


@pytest.fixture(params=["export", "safetensors alone", "training checkpoint", "checkpoint of an older run", "official"])
def weights(request: pytest.FixtureRequest, exported: Path, model: M2Encoder, tmp_path: Path) -> Path:
    if request.param == "export":
        return exported / "model.safetensors"
    if request.param == "safetensors alone":
        return Path(shutil.copy(exported / "model.safetensors", tmp_path / "w.safetensors"))
    if request.param == "official":
        save_official(model, tmp_path / "official.ckpt")
        return tmp_path / "official.ckpt"
    folder = exported.parent / "checkpoints"
    folder.mkdir(exist_ok=True)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    held = {"state_dict": state}
    if request.param == "training checkpoint":
        held["tokenizer"] = pack_tokenizer(OWN.model_bytes, OWN.digest)
        folder = tmp_path
    torch.save(held, folder / "last.ckpt")
    return folder / "last.ckpt"


def test_the_own_tokenizer_is_accepted_and_others_are_refused(weights: Path, model: M2Encoder) -> None:
    loaded = load(model.config, weights=weights, tokenizer=OWN.model_bytes)
    assert torch.equal(loaded.model.text_embed.tokens.weight, model.text_embed.tokens.weight)
    with pytest.raises(UserError, match=r"is not that of the weights .*map_tokenizer=true") as caught:
        load(model.config, weights=weights, tokenizer=OTHER.model_bytes)
    assert str(weights)[-40:] in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_export_keeps_its_tokenizer(exported: Path) -> None:
    assert load(exported, tokenizer=exported / "tokenizer.model").tokenizer is not None
    with pytest.raises(UserError, match=f"{OTHER.vocab_size} pieces.* is not that of the weights"):
        load(exported, tokenizer=OTHER)


def test_same_size_is_not_the_same_tokenizer(model: M2Encoder, exported: Path) -> None:
    changed = bytearray(OWN.model_bytes)
    place = changed.index("红".encode())
    changed[place : place + 3] = "龘".encode()
    other = SentencePieceTokenizer(bytes(changed))
    assert other.vocab_size == OWN.vocab_size
    with pytest.raises(UserError, match="is not that of the weights"):
        load(model.config, weights=exported / "model.safetensors", tokenizer=other)


def test_equal_pieces_that_cut_texts_otherwise_are_refused(model: M2Encoder, exported: Path) -> None:
    again = SentencePieceTokenizer(OWN.model_bytes + b"\x12\x00")  # an empty message, merged with the one before
    assert again.digest != OWN.digest
    weights = exported / "model.safetensors"
    assert load(model.config, weights=weights, tokenizer=again).model is not None
    changed = bytearray(OWN.model_bytes)
    score = changed.index("红".encode()) + 4
    changed[score : score + 4] = struct.pack("<f", -99)
    other = SentencePieceTokenizer(bytes(changed))
    assert other.pieces(range(other.vocab_size)) == OWN.pieces(range(OWN.vocab_size))
    with pytest.raises(UserError, match="is not that of the weights"):
        load(model.config, weights=weights, tokenizer=other)


def test_pieces_are_mapped_on_request(
    weights: Path, model: M2Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    is_known = find_tokenizer(weights).content is not None
    (tmp_path / "own.model").write_bytes(OWN.model_bytes)
    with caplog.at_level(logging.WARNING):
        mapped = load(
            model.config, weights=weights, tokenizer=OTHER, map_tokenizer=True if is_known else tmp_path / "own.model"
        )
    old, new = model.text_embed.tokens.weight, mapped.model.text_embed.tokens.weight
    assert mapped.model.config.vocab_size == len(new) == OTHER.vocab_size
    theirs, ours = (tokenizer.pieces(range(tokenizer.vocab_size)) for tokenizer in (OTHER, OWN))
    shared = [piece for piece in theirs if piece in ours]
    assert f"{len(shared)} of {OTHER.vocab_size} pieces" in caplog.text
    for piece in ("[CLS]", "<|endoftext|>", *shared):
        assert torch.equal(new[theirs.index(piece)], old[ours.index(piece)]), piece
    lacking = "redcat"
    parts = [index for index in OWN.encode(lacking) if OWN.pieces([index]) != ["▁"]]
    torch.testing.assert_close(new[theirs.index(lacking)], old[parts].mean(dim=0))
    assert mapped.model.encode_text(OTHER(["a red cat"])).isfinite().all()


def test_old_pieces_that_nobody_knows_are_asked_for(model: M2Encoder, tmp_path: Path) -> None:
    save_official(model, tmp_path / "official.ckpt")
    with pytest.raises(UserError, match=r"does not hold its tokenizer; give its file: map_tokenizer=sp\.model"):
        load(model.config, weights=tmp_path / "official.ckpt", tokenizer=OTHER, map_tokenizer=True)


def test_there_must_be_a_tokenizer_to_map_to(exported: Path) -> None:
    with pytest.raises(UserError, match="map_tokenizer: there is no tokenizer"):
        load(exported, map_tokenizer=True)


def test_exports_say_whether_blanks_are_tidied(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    content = json.loads((copy / "config.json").read_text("utf-8"))
    assert content["tokenizer"]["normalise"] is True
    content["tokenizer"]["normalise"] = None
    (copy / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert load(copy).tokenizer.normalise is True  # type: ignore[union-attr]
    model, _, tokenizer = load(exported)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    length = tokenizer.context_length
    plain = SentencePieceTokenizer(exported / "tokenizer.model", context_length=length, normalise=False)
    export_model(tmp_path / "plain", model=model, tokenizer=plain)
    assert load(tmp_path / "plain").tokenizer.normalise is False  # type: ignore[union-attr]


def test_mapped_pieces_still_tell_languages_apart(tmp_path: Path) -> None:
    """A model with an adapter per language knows the Chinese pieces of its new tokenizer."""
    model = random_adapted_model(adapted_config(vocab_size=OWN.vocab_size, num_text_positions=64))
    model.text_embed.han_pieces.copy_(mark_han_pieces(OWN))
    export_model(tmp_path / "out", model=model, tokenizer=OWN)
    mapped = load(tmp_path / "out", tokenizer=OTHER, map_tokenizer=True).model
    assert mapped.text_embed.han_pieces.equal(mark_han_pieces(OTHER))
    assert mapped.text_embed.find_chinese(*OTHER(["a red cat", "红"])).tolist() == [False, True]
