"""An exported folder gives the same features, appears whole, and notices damage."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder import CheckpointError, M2Encoder, UserError, load
from m2_encoder.checkpoints.card import CardInfo, DataSource, model_card
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.io import save_safetensors
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.closeness import assert_close_in_ulps
from tests.support.models import random_images, random_model, small_config

TEXTS = ["一只猫", "a cat", "", "cat " * 40]
METRICS = {
    "heldout_style": {
        "chance": {"i2t_r@1": 0.067, "t2i_r@10": 0.67},
        "zh": {"i2t_r@1": 41.26, "t2i_r@10": 61.0},
        "en": {"t2i_r@10": 44.4},
    },
    "heldout_families": {"zh": {"i2t_r@1": 40.0}},
}
CARD = CardInfo(
    title="Emoji",
    summary="A small encoder.",
    data=[DataSource(name="Noto | Emoji", licence="Apache-2.0", note="drawings", url="https://example.org/noto")],
    training={"steps": "3,000"},
    limits=["It has seen drawings only."],
    licence="CC-BY-SA-4.0",
)


@pytest.fixture(scope="module")
def tokenizer(repo_root: Path) -> SentencePieceTokenizer:
    path = repo_root / "src" / "m2_encoder" / "assets" / "emoji" / "tokenizer.model"
    return SentencePieceTokenizer(path, context_length=9, truncation_side="right")


@pytest.fixture(scope="module")
def model(tokenizer: SentencePieceTokenizer) -> M2Encoder:
    torch.manual_seed(2)
    return random_model(small_config(vocab_size=tokenizer.vocab_size, drop_path_rate=0.1)).requires_grad_(False)


@pytest.fixture(scope="module")
def exported(model: M2Encoder, tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run" / "export"
    return export_model(
        folder,
        model=model,
        tokenizer=tokenizer,
        metrics=METRICS,
        provenance={"run": "emoji", "versions": {"torch": "x"}},
        card=CARD,
    )


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_weights_and_features_are_those_of_the_model(
    exported: Path, model: M2Encoder, tokenizer: SentencePieceTokenizer
) -> None:
    loaded = load(exported)
    assert loaded.model.config == model.config
    saved = loaded.model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    images, tokens = random_images(model.config, 3), tokenizer(TEXTS)
    assert torch.equal(loaded.tokenizer(TEXTS).ids, tokens.ids), "context length and truncation side come along"
    assert_close_in_ulps(loaded.model.encode_image(images), model.encode_image(images))
    assert_close_in_ulps(loaded.model.encode_text(loaded.tokenizer(TEXTS)), model.encode_text(tokens))
    assert loaded.preprocess.image_size == model.config.image_size


def test_folder_holds_what_the_contract_says(exported: Path, tokenizer: SentencePieceTokenizer) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.model", "README.md"}
    assert (exported / "tokenizer.model").read_bytes() == tokenizer.model_bytes
    content = json.loads((exported / "config.json").read_text("utf-8"))
    assert content["format_version"] == 1
    assert content["metrics"] == METRICS
    assert content["provenance"]["run"] == "emoji"
    assert content["tokenizer"]["context_length"] == 9
    assert [path.name for path in exported.parent.iterdir()] == ["export"], "no temporary folder stays"


def test_moved_folder_loads(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(exported, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    expected = load(exported).model.encode_image(images)
    for spelling in ("elsewhere", "./elsewhere", tmp_path / "elsewhere"):
        assert_close_in_ulps(load(spelling).model.encode_image(images), expected)


def test_options_of_load_apply_to_folders(exported: Path, model: M2Encoder, tmp_path: Path) -> None:
    assert load(exported, image_size=24).preprocess.image_size == 24
    assert load(exported, dtype=torch.bfloat16).model.logit_scale.dtype == torch.bfloat16
    other = random_model(model.config)
    save_safetensors(other, tmp_path / "other.safetensors")
    replaced = load(exported, weights=tmp_path / "other.safetensors").model
    assert torch.equal(replaced.pooler.weight, other.pooler.weight)


def test_half_precision_model_is_stored_in_fp32(
    model: M2Encoder, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    half = random_model(model.config, dtype=torch.bfloat16)
    loaded = load(export_model(tmp_path / "half", model=half, tokenizer=tokenizer)).model
    for name, value in half.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float())


# ------------------------------------------------------------------------------------------------------ model card


def test_card_says_what_a_reader_needs(exported: Path) -> None:
    card = (exported / "README.md").read_text("utf-8")
    for part in (
        "# Emoji\n",
        "A small encoder.",
        "from m2_encoder import load",
        "[Noto \\| Emoji](https://example.org/noto) | Apache-2.0 | 图画 / drawings |",
        "- steps · 步数: 3,000",
        "### heldout_style · 没见过的画风",
        "| zh | 41.3 | 61.0 |",
        "| en |  | 44.4 |",
        "| chance · 随机 | 0.07 | 0.67 |",
        "It has seen drawings only.",
        "- run · 训练名: emoji",
        "The weights: CC-BY-SA-4.0",
        "权重：CC-BY-SA-4.0。",
    ):
        assert part in card, part
    assert card.index("| zh |") < card.index("| chance ·")


def test_card_ends_with_sizes_and_checksums(exported: Path) -> None:
    _, end = (exported / "README.md").read_text("utf-8").split("\n## Files · 文件\n\n")
    for name in ("model.safetensors", "tokenizer.model"):
        content = (exported / name).read_bytes()
        assert f"| {name} | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |" in end


def test_card_without_any_information(model: M2Encoder) -> None:
    card = model_card(model, card=CardInfo(), metrics={})
    assert card.startswith("# small\n")
    assert "## Results" not in card
    assert f"{sum(p.numel() for p in model.parameters()):,}" in card


def test_lines_of_the_card_run(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    Image.new("RGB", (20, 20), "red").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code.group(1).replace("path/to/this/folder", str(exported)), scope)
    assert scope["probabilities"].shape == (1, 2)


# ------------------------------------------------------------------------------------------------------- writing


def test_existing_folder(model: M2Encoder, tokenizer: SentencePieceTokenizer, copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists; choose another folder, or pass overwrite=True"):
        export_model(copy, model=model, tokenizer=tokenizer)
    assert (copy / "notes.txt").exists()
    export_model(copy, model=model, tokenizer=tokenizer, overwrite=True)
    assert not (copy / "notes.txt").exists()
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    load(copy)


def test_a_failure_leaves_the_earlier_export(model: M2Encoder, tokenizer: SentencePieceTokenizer, copy: Path) -> None:
    with pytest.raises(UserError, match="must be plain JSON values"):
        export_model(copy, model=model, tokenizer=tokenizer, provenance={"a": object()}, overwrite=True)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    load(copy)


def test_impossible_places(model: M2Encoder, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file of that name exists"):
        export_model(tmp_path / "file", model=model, tokenizer=tokenizer, overwrite=True)
    with pytest.raises(UserError, match="cannot write the folder"):
        export_model(tmp_path / "file" / "export", model=model, tokenizer=tokenizer)


def test_tokenizer_of_another_model(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pieces, the token table 40 rows"):
        export_model(tmp_path / "e", model=random_model(small_config()), tokenizer=tokenizer)


# -------------------------------------------------------------------------------------------------------- damage


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        change(content)
        (folder / "config.json").write_text(json.dumps(content), "utf-8")

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json missing"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list, expected an object"),
    "newer format": (_edit(lambda c: c.update(format_version=2)), "version 2, this package reads"),
    "another format": (_edit(lambda c: c.pop("format")), "format None version 1"),
    "unknown field": (_edit(lambda c: c["model"].update(colour=3)), "unknown model field(s) colour"),
    "no model": (_edit(lambda c: c.pop("model")), "no entry 'model'"),
    "no tokenizer facts": (_edit(lambda c: c.pop("tokenizer")), "no entry 'tokenizer'"),
    "impossible value": (_edit(lambda c: c["model"].update(num_heads=5)), "must be a multiple of num_heads=5"),
    "shape edited": (_edit(lambda c: c["model"].update(num_layers=1)), "describes another architecture"),
    "heads edited": (_edit(lambda c: c["model"].update(num_heads=4)), "describes another architecture"),
    "side edited": (
        _edit(lambda c: c["tokenizer"].update(truncation_side="left")),
        "another tokenizer.truncation_side",
    ),
    "length edited": (_edit(lambda c: c["tokenizer"].update(context_length=5)), "another tokenizer.context_length (5)"),
    "blanks edited": (_edit(lambda c: c["tokenizer"].update(normalise=False)), "another tokenizer.normalise"),
    "policy edited": (
        _edit(lambda c: c["preprocess"]["pictures"].update(background="black")),
        "another preprocess.pictures.background ('black')",
    ),
    "name of a key flipped": (
        _edit(lambda c: c["preprocess"].update(qictures=c["preprocess"].pop("pictures"))),
        "another preprocess.qictures",
    ),
    "config of another export": (
        _edit(lambda c: c["tokenizer"].update(context_length=c["tokenizer"]["context_length"] - 1)),
        "than model.safetensors was exported with",
    ),
    "weights truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "damaged or not a safetensors file",
    ),
    "weights are text": (lambda f: (f / "model.safetensors").write_text("hello"), "damaged or not a safetensors"),
    "weights of another run": (
        lambda f: save_safetensors(random_model(small_config()), f / "model.safetensors"),
        "describes another architecture",
    ),
    "tokenizer replaced": (lambda f: (f / "tokenizer.model").write_bytes(b"x"), "is not the file that was exported"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_error(copy: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(UserError) as caught:
        load(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_shape_inside_a_consistent_folder(copy: Path, model: M2Encoder) -> None:
    from m2_encoder.checkpoints.exported import CONFIG_METADATA_KEY, config_text

    other = random_model(small_config(feature_dim=7, vocab_size=model.config.vocab_size))
    metadata = {CONFIG_METADATA_KEY: config_text(model.config)}
    save_safetensors(other, copy / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"4 of another shape \(text_proj.weight is \(7, 16\)"):
        load(copy)
