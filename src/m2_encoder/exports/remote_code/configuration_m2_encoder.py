"""Configuration of an M2-Encoder for Hugging Face transformers; Apache-2.0.

This file and `modeling_m2_encoder.py` are all the code that a folder needs: they import torch and transformers alone.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig

_VERSION = transformers.__version__
if int(_VERSION.split(".", 1)[0]) < 5:
    # Older ones would crop pictures, where this model was trained on whole ones, and say nothing.
    raise ImportError(f"this model needs transformers>=5, installed is {_VERSION}: pip install -U transformers")

_DEFAULTS: dict[str, Any] = {
    "embed_dim": 768,
    "num_heads": 12,
    "num_layers": 9,
    "num_vl_layers": 3,
    "feature_dim": 768,
    "image_size": 224,
    "patch_size": 16,
    "vocab_size": 115244,
    "context_length": 52,
    "num_text_positions": 1024,
    "ffn_ratio": 4,
    "drop_path_rate": 0.0,
    "layer_norm_eps": 1e-5,
    "position_init_std": 1.0,
    "initial_temperature": 0.07,
}


class M2EncoderConfig(PretrainedConfig):
    """What `config.json` says.

    Args:
        model: the architecture; what it leaves out is that of M2-Encoder 0.4B.
        kwargs: everything else in the file, kept as it is.
    """

    model_type = "m2_encoder"

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.model = {**_DEFAULTS, **(model or {})}
        derived = {
            "projection_dim": self.model["feature_dim"],
            "hidden_size": self.model["embed_dim"],
            "num_attention_heads": self.model["num_heads"],
            "num_hidden_layers": self.model["num_layers"] + self.model["num_vl_layers"],
            "vocab_size": self.model["vocab_size"],
        }
        super().__init__(**{**kwargs, **derived})
