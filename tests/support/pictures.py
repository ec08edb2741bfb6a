"""A small exported model and folders of pictures for tests of search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

FEATURE_DIM = 16


def export_small(folder: Path, *, seed: int = 0) -> Path:
    """Writes a model with random weights; another seed is another model."""
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24)
    config = M2EncoderConfig.from_name(
        "tiny", embed_dim=32, num_heads=2, num_layers=1, feature_dim=FEATURE_DIM, image_size=32,
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    torch.manual_seed(seed)
    return export_model(folder, model=M2Encoder(config), tokenizer=tokenizer)


def write_picture(path: Path, seed: int, *, side: int = 24) -> Path:
    """Writes coarse noise, which no two seeds have in common."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST).save(path)
    return path
