"""peft opens what is written, on the folder that transformers opens, and gives our features; and the other way."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder import load
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.native import Native
from m2_encoder.exports.peft_format import Peft
from m2_encoder.exports.transformers_format import write_transformers
from m2_encoder.exports.writing import write_export
from m2_encoder.training.adaptation import merge_adaptation
from m2_encoder.training.adaptations.lora import Lora
from tests.support.models import random_images, random_text
from tests.support.remote_code import code_apart

ALSO = ["logit_scale", "projections", "norms"]


@pytest.fixture(scope="module")
def folders(source: ExportSource, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base as transformers opens it, and an export of a trained adapter beside the merged model."""
    root = tmp_path_factory.mktemp("peft")
    source.write_native(root / "base")
    write_transformers(root / "base", config=source.model.config, tokenizer=source.tokenizer)
    adaptation = Lora(rank=3, alpha=5, first_layer=1, also=ALSO)  # type: ignore[arg-type]
    model = load(root / "base").model
    torch.manual_seed(5)
    adaptation.apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    adapter = adaptation.take_adapter(model)
    adapter = dataclasses.replace(
        adapter,
        pairs={name: tuple(each.clone() for each in pair) for name, pair in adapter.pairs.items()},  # type: ignore[misc]
        whole={name: value.clone() for name, value in adapter.whole.items()},
    )
    merged = merge_adaptation(adaptation, model.eval().requires_grad_(False))
    trained = dataclasses.replace(
        source,
        loaded=source.loaded._replace(model=merged),
        write_native=lambda path: _write(source, merged, path),
        adapter=adapter,
    )
    parity = write_export(root / "run", source=trained, formats={"peft": Peft(), "native": Native()})
    assert [each.measured.smallest_cosine for each in parity.results] == [1.0, 1.0]
    return root / "base", root / "run"


def _write(source: ExportSource, model: Any, path: Path) -> None:
    from m2_encoder.checkpoints.export import export_model

    export_model(path, model=model, tokenizer=source.tokenizer)


def test_it_belongs_to_the_base_alone(folders: tuple[Path, Path]) -> None:
    base, run = folders
    expected = load(run).model.state_dict()
    found = load(base, adapter=run / "adapter").model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="belongs to other weights"):
        load(run, adapter=run / "adapter")


def test_peft_gives_the_features_of_the_merged_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="opens the base")
    peft = pytest.importorskip("peft", reason="opens the adapter")
    base, run = folders
    with code_apart(tmp_path / "modules"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opened = transformers.AutoModel.from_pretrained(base, trust_remote_code=True)
        model = peft.PeftModel.from_pretrained(opened, run / "adapter").eval()
    assert not [each for each in said if "adapter" in str(each.message).lower() or "Unexpected" in str(each.message)]
    ours = load(run).model
    config = ours.config
    images, text = random_images(config, 3), random_text(config, [3, 9])
    with torch.no_grad():
        pictures = model.get_image_features((images - 0.5) / 0.5)
        texts = model.get_text_features(text.ids, text.mask.long())
        torch.testing.assert_close(pictures, ours.encode_image(images), rtol=0, atol=2e-6)
        torch.testing.assert_close(texts, ours.encode_text(text), rtol=0, atol=2e-6)


def test_an_adapter_that_peft_wrote_is_merged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="writes the adapter")
    base, _ = folders
    ours = load(base).model
    torch.manual_seed(6)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "fc2"], init_lora_weights=False,
        modules_to_save=["vl_text_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(ours, config)
    with torch.no_grad():
        model.base_model.model.vl_text_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "theirs")
    merged = load(base, adapter=tmp_path / "theirs").model
    images, text = random_images(ours.config, 3), random_text(ours.config, [3, 9])
    with torch.no_grad():
        torch.testing.assert_close(merged.encode_image(images), model.encode_image(images), rtol=0, atol=2e-6)
        torch.testing.assert_close(merged.encode_text(text), model.encode_text(text), rtol=0, atol=2e-6)
