"""Every format of a model with prompts, adapters and mixtures gives its features."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from m2_encoder import M2Encoder, load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.exports.base import ExportFormat, ExportSource
from m2_encoder.exports.immich import Immich
from m2_encoder.exports.native import Native
from m2_encoder.exports.onnx_format import Onnx
from m2_encoder.exports.samples import TEXTS
from m2_encoder.exports.transformers_format import Transformers
from m2_encoder.exports.web_format import Web
from m2_encoder.exports.writing import write_export
from m2_encoder.hub import LoadedModel
from m2_encoder.pictures import STANDARD
from m2_encoder.tokenizers.han_pieces import mark_han_pieces
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.added_parts import adapted_config, random_adapted_model
from tests.support.models import random_images, small_config
from tests.support.training import make_tokenizer

for _name in ("transformers", "torchvision", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name, reason="needs the extra export")


@pytest.fixture(scope="module")
def adapted() -> ExportSource:
    torch.manual_seed(0)
    tokenizer = SentencePieceTokenizer(make_tokenizer().model_bytes, context_length=14)
    model = random_adapted_model(adapted_config(vocab_size=tokenizer.vocab_size)).requires_grad_(False)
    model.text_embed.han_pieces.copy_(mark_han_pieces(tokenizer))
    write = partial(export_model, model=model, tokenizer=tokenizer, pictures=STANDARD)
    return ExportSource(LoadedModel(model, EvalTransform(16, pictures=STANDARD), tokenizer), "# Adapted\n", write)


def test_code_for_transformers_knows_the_parts(adapted: ExportSource) -> None:
    from m2_encoder.exports.remote_code.configuration_m2_encoder import M2EncoderConfig
    from m2_encoder.exports.remote_code.modeling_m2_encoder import M2EncoderModel

    theirs = M2EncoderModel(M2EncoderConfig(model=adapted.model.config.to_dict())).eval()
    theirs.load_state_dict(adapted.model.state_dict())
    ids, mask = adapted.tokenizer(TEXTS)
    images = random_images(adapted.model.config, 3)
    with torch.no_grad():
        texts = theirs.get_text_features(ids, mask.long())
        alone = theirs.get_text_features(ids[:1, mask[0]])
        pictures = theirs.get_image_features((images - 0.5) / 0.5)
        torch.testing.assert_close(texts, adapted.model.encode_text(ids, mask), atol=1e-6, rtol=0)
        torch.testing.assert_close(pictures, adapted.model.encode_image(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(alone, texts[:1], atol=1e-6, rtol=0)
    with torch.device("meta"):
        plain = M2EncoderModel(M2EncoderConfig(model=small_config().to_dict()))
        assert plain.state_dict().keys() == M2Encoder(small_config()).state_dict().keys()


@pytest.mark.slow
def test_all_formats(adapted: ExportSource, tmp_path: Path) -> None:
    formats: dict[str, ExportFormat] = {
        "native": Native(),
        "onnx": Onnx(),
        "immich": Immich(),
        "web": Web(),
        "transformers": Transformers(),
    }
    parity = write_export(tmp_path / "out", source=adapted, formats=formats)
    assert {each.name: each.measured.smallest_cosine >= 0.99999 for each in parity.results} == dict.fromkeys(
        formats, True
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["model"]["adapter_width"] == 5
    assert load(tmp_path / "out").model.config == adapted.model.config
