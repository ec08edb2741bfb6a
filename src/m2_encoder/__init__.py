"""M2-Encoder: bilingual (Chinese/English) image-text encoders in PyTorch.

>>> from m2_encoder import load
>>> model, preprocess, tokenizer = load("outputs/emoji/export")          # doctest: +SKIP
>>> model.encode_text(tokenizer(["一只猫", "a cat"])).shape                # doctest: +SKIP
torch.Size([2, 128])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from m2_encoder.errors import CheckpointError, ImageError, UserError

if TYPE_CHECKING:
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

# Imported when they are asked for, so that `m2-train --help` loads no torch.
_MODULES = {
    "LoadedModel": "m2_encoder.hub",
    "list_models": "m2_encoder.hub",
    "load": "m2_encoder.hub",
    "M2EncoderConfig": "m2_encoder.models.config",
    "M2Encoder": "m2_encoder.models.m2_encoder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
