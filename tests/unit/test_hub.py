"""`load`: names, configurations, folders, URLs, and everything that may be wrong with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from m2_encoder import CheckpointError, M2Encoder, M2EncoderConfig, UserError, list_models, load
from m2_encoder.checkpoints.io import save_official, save_safetensors
from m2_encoder.hub import MissingTokenizer, TextTower
from m2_encoder.models.config import NAME_TO_CONFIG
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.closeness import assert_close_in_ulps
from tests.support.file_server import serve
from tests.support.models import random_model, small_config
from tests.support.suites import small_export

TEXTS = ["一只猫", "a cat", ""]


@pytest.fixture(scope="module")
def tokenizer_file(repo_root: Path) -> Path:
    return repo_root / "src" / "m2_encoder" / "assets" / "emoji" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tokenizer_file, context_length=14)


@pytest.fixture(scope="module")
def model(tokenizer: SentencePieceTokenizer) -> M2Encoder:
    torch.manual_seed(2)
    return random_model(small_config(vocab_size=tokenizer.vocab_size)).requires_grad_(False)


@pytest.fixture(scope="module")
def weights(model: M2Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "weights.ckpt"
    save_official(model, path)
    return path


def test_names() -> None:
    assert list_models() == ["tiny", "m2-encoder-0.4b", "m2-encoder-1b", "m2-encoder-10b"]


def test_configuration_weights_and_tokenizer(model: M2Encoder, weights: Path, tokenizer_file: Path) -> None:
    loaded = load(model.config, weights=weights, tokenizer=tokenizer_file)
    ours, preprocess, tokenizer = loaded
    assert ours.config == model.config
    assert not ours.training
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    images = torch.stack([preprocess(pixels)])
    assert images.shape == (1, 3, 16, 16)
    tokens = tokenizer(TEXTS)
    assert_close_in_ulps(ours.encode_image(images), model.encode_image(images))
    assert_close_in_ulps(ours.encode_text(tokens), model.encode_text(tokens))
    assert ours.similarity(ours.encode_image(images), ours.encode_text(tokens)).shape == (1, 3)


def test_context_length_is_the_models(model: M2Encoder, weights: Path, tokenizer_file: Path) -> None:
    loaded = load(model.config, weights=weights, tokenizer=tokenizer_file)
    tokens = loaded.tokenizer("cat " * 100)
    assert tokens.ids.shape == (1, model.config.context_length)
    assert loaded.model.encode_text(tokens).isfinite().all()


def test_tokenizer_as_bytes_text_or_object(
    model: M2Encoder, weights: Path, tokenizer: SentencePieceTokenizer, tokenizer_file: Path
) -> None:
    for given in (tokenizer_file, str(tokenizer_file), tokenizer_file.read_bytes(), tokenizer):
        loaded = load(model.config, weights=weights, tokenizer=given)
        assert torch.equal(loaded.tokenizer(TEXTS).ids, tokenizer(TEXTS).ids)


@pytest.mark.parametrize("spelling", ["tiny", "TINY", "Tiny"])
def test_known_name_with_our_own_training_checkpoint(tmp_path: Path, spelling: str) -> None:
    trained = random_model(M2EncoderConfig.from_name("tiny"))
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state, "optimizer_states": [], "epoch": 1}, tmp_path / "last.ckpt")
    loaded = load(spelling, weights=tmp_path / "last.ckpt")
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


@pytest.mark.parametrize("spelling", ["m2-encoder-0.4b", "m2_encoder_0_4b", "M2-Encoder-0.4B", "m2_encoder_0.4B"])
def test_name_without_weights_says_what_to_download(
    spelling: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        load(spelling)
    message = str(caught.value)
    assert "m2_encoder_0.4B.ckpt is not on this machine, and could not be fetched" in message
    assert "weights='m2_encoder_0.4B.ckpt'" in message
    assert "M2Encoder(config)" in message


@pytest.mark.parametrize("model", ["tiny", small_config()])
def test_no_weights_are_never_random_weights(model: str | M2EncoderConfig) -> None:
    with pytest.raises(UserError, match="no weights given for"):
        load(model)


def test_gradients_only_when_asked_for(model: M2Encoder, weights: Path) -> None:
    images = torch.rand(1, 3, 16, 16)
    frozen = load(model.config, weights=weights).model
    assert not frozen.encode_image(images).requires_grad
    trainable = load(model.config, weights=weights, trainable=True).model
    trainable.encode_image(images).sum().backward()
    assert trainable.vl_image_proj.weight.grad is not None
    assert not trainable.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(model: M2Encoder, weights: Path, dtype: torch.dtype) -> None:
    loaded = load(model.config, weights=weights, dtype=dtype).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    images = torch.rand(2, 3, 16, 16)
    expected = model.encode_image(images)
    torch.testing.assert_close(loaded.encode_image(images).float(), expected, rtol=0, atol=5e-2)


def test_image_size(model: M2Encoder, weights: Path) -> None:
    loaded = load(model.config, weights=weights, image_size=24)
    image = loaded.preprocess(np.zeros((9, 9, 3), dtype=np.uint8))
    assert image.shape == (3, 24, 24)
    assert loaded.model.encode_image(image[None]).shape == (1, 12)
    with pytest.raises(UserError, match="image_size=25: must be a multiple of patch_size=4"):
        load(model.config, weights=weights, image_size=25)


def test_url(
    model: M2Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: Path,
) -> None:
    monkeypatch.setenv("M2_ENCODER_CACHE", str(tmp_path / "cache"))
    save_safetensors(model, tmp_path / "w.safetensors")
    with serve((tmp_path / "w.safetensors").read_bytes()) as server:
        loaded = load(model.config, weights=server.url("release/w.safetensors"))
        again = load(model.config, weights=server.url("release/w.safetensors"))
        assert len(server.requested_ranges) == 1
        server.status = 404
        with pytest.raises(CheckpointError, match="404"):
            load(model.config, weights=server.url("release/other.safetensors"))
    images = torch.rand(1, 3, 16, 16)
    for each in (loaded, again):
        assert_close_in_ulps(each.model.encode_image(images), model.encode_image(images))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "zeros"])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_url_whose_copy_is_damaged(
    model: M2Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path, kind: str, damage: str
) -> None:
    monkeypatch.setenv("M2_ENCODER_CACHE", str(tmp_path / "cache"))
    save_safetensors(model, tmp_path / "w.safetensors")
    content = (weights if kind == "ckpt" else tmp_path / "w.safetensors").read_bytes()
    half = len(content) // 2
    damaged = {
        "cut": content[:half],
        "flipped": content[:half] + bytes(byte ^ 1 for byte in content[half : half + 64]) + content[half + 64 :],
        "empty": b"",
        "zeros": bytes(len(content)),
    }[damage]
    with serve(content) as server:
        url = server.url(f"w.{kind}")
        load(model.config, weights=url)
        (copy,) = (tmp_path / "cache").glob(f"*.{kind}")
        copy.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"it was removed from the cache of downloads, run it again"
        ) as caught:
            load(model.config, weights=url)
        assert str(caught.value).startswith(f"{copy}: ")
        load(model.config, weights=url)
        assert copy.read_bytes() == content
        assert len(server.paths) == 2
    own = tmp_path / f"own.{kind}"
    own.write_bytes(damaged)
    with pytest.raises(CheckpointError) as caught:
        load(model.config, weights=own)
    assert "removed" not in str(caught.value)
    assert own.read_bytes() == damaged


def test_a_url_of_another_model_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    monkeypatch.setenv("M2_ENCODER_CACHE", str(tmp_path / "cache"))
    with serve(weights.read_bytes()) as server:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="does not fit model 'tiny'"):
                load("tiny", weights=server.url())
        assert len(server.paths) == 1


def test_missing_tokenizer_speaks_up_when_used(model: M2Encoder, weights: Path) -> None:
    _, _, tokenizer = load(model.config, weights=weights)
    with pytest.raises(UserError, match="no tokenizer was given"):
        tokenizer(["a cat"], context_length=3)
    assert repr(tokenizer) == "MissingTokenizer()"


def test_tokenizer_of_another_model(tmp_path: Path, tokenizer_file: Path) -> None:
    small = random_model(small_config(vocab_size=300))
    save_official(small, tmp_path / "w")
    with pytest.raises(UserError, match=r"is not that of the weights .*: their token table has 300 rows; give theirs"):
        load(small.config, weights=tmp_path / "w", tokenizer=tokenizer_file)


def test_weights_of_another_model(weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit model 'tiny' of \d+ parameters: .* of another shape"):
        load("tiny", weights=weights)


def test_weights_of_another_size_name_theirs(tmp_path: Path) -> None:
    tiny = NAME_TO_CONFIG["tiny"]
    save_official(random_model(tiny), tmp_path / "w")
    larger = dataclasses.replace(tiny, name="larger", embed_dim=2 * tiny.embed_dim)
    with pytest.raises(CheckpointError, match=r"'larger'.*; the weights are of the size of 'tiny': choose that model$"):
        load(larger, weights=tmp_path / "w")


# ---------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("m2-encoder-2b", "unknown model 'm2-encoder-2b'; known: tiny, m2-encoder-0.4b, m2-encoder-1b"),
        ("", "unknown model ''; known: tiny"),
        ("outputs/nothing/here", "no such folder: outputs/nothing/here; expected one written by m2-export"),
        (None, "model=None is no model; expected a name"),
        (3, "model=3 is no model; expected a name"),
        ({"embed_dim": 3}, "is no model; expected a name"),
    ],
)
def test_unknown_model(model: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(model)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_folder_that_is_no_export(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a complete exported model: model.safetensors, tokenizer.model missing"):
        load(tmp_path)


def test_a_run_without_an_export_says_how_to_take_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r'this run has no export; load\(\.\.\., checkpoint="last"\)'):
        load(tmp_path)


def test_checkpoint_given_as_model(weights: Path) -> None:
    with pytest.raises(UserError, match="is a file; name its architecture and pass it as weights"):
        load(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "nowhere.ckpt"}, "nowhere.ckpt: no such checkpoint file"),
        ({"weights": 3}, "weights=3 is no file"),
        ({"tokenizer": "nowhere.model"}, "nowhere.model: cannot read the tokenizer file"),
        ({"tokenizer": 3}, "must be the path or the bytes of a SentencePiece"),
        ({"device": "gpu"}, "device='gpu' cannot be used"),
        ({"device": "meta"}, "device='meta' holds no weights"),
        ({"device": None}, "device=None cannot be used"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not one of torch.float32"),
        ({"dtype": "float32"}, "dtype='float32' is not one of"),
        ({"image_size": 0}, "image_size=0: must be a whole number"),
    ],
)
def test_wrong_option(model: M2Encoder, weights: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(model.config, **{"weights": weights, **options})  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_text_tower_is_a_part_for_other_towers(tmp_path: Path) -> None:
    folder = small_export(tmp_path / "export")
    loaded, tower = load(folder), TextTower(str(folder)).eval()
    assert not isinstance(loaded.tokenizer, MissingTokenizer)
    text = loaded.tokenizer(["一只猫", "a bus on a road"])
    torch.testing.assert_close(tower(text.ids, text.mask), loaded.model.encode_text(text))
    assert all(parameter.requires_grad for parameter in tower.parameters())
