"""M2-Encoder: bilingual (Chinese/English) image-text encoders in PyTorch.

>>> from m2_encoder import load
>>> model, preprocess, tokenizer = load("outputs/emoji/export")          # doctest: +SKIP
>>> model.encode_text(tokenizer(["一只猫", "a cat"])).shape                # doctest: +SKIP
torch.Size([2, 128])
"""

from __future__ import annotations

from m2_encoder.errors import CheckpointError, ImageError, UserError
from m2_encoder.hub import LoadedModel, list_models, load
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder

__all__ = [
    "CheckpointError",
    "ImageError",
    "LoadedModel",
    "M2Encoder",
    "M2EncoderConfig",
    "UserError",
    "list_models",
    "load",
]
