"""Small runs of the real training code, built without Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint

from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.emoji.emoji_module import EmojiDataModule
from m2_encoder.data.images.transforms import TrainTransform
from m2_encoder.data.samples.captions import CaptionSampler
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import Objective
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.strategies.single import LocalStrategy
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.training.module import PretrainModule
from m2_encoder.training.optim import build_optimizer, warmup_cosine

IMAGE_SIZE = 16

# Lightning's own use of a newer torch; nothing that can be mended here.
LIGHTNING_WARNINGS = ("ignore:.*LeafSpec.*is deprecated.*", "ignore:.*GPU available but not used.*")


def tiny_config(**overrides: Any) -> M2EncoderConfig:
    """The shipped tiny model, as small as it still trains."""
    values: dict[str, Any] = {
        "embed_dim": 32,
        "num_heads": 2,
        "num_layers": 1,
        "feature_dim": 16,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    }
    return M2EncoderConfig.from_name("tiny", **{**values, **overrides})


def make_tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24)


def make_captions(*, every_language: bool = False) -> CaptionSampler:
    return CaptionSampler(
        language_weights={"zh": 1, "en": 1},
        role_weights={"name": 2, "alias": 1, "keyword": 1, "mixed": 1},
        every_language=every_language,
    )


def make_datamodule(folder: Path | None, **overrides: Any) -> EmojiDataModule:
    """The built-in set with flips, crops and both languages, so that every random choice shows."""
    values: dict[str, Any] = {
        "tokenizer": make_tokenizer(),
        "image_size": IMAGE_SIZE,
        "seed": 5,
        "max_steps": 12,
        "folder": None if folder is None else str(folder),
        "global_batch_size": 32,
        "num_workers": 0,
        "heldout_style": "twemoji",
        "captions": make_captions(),
        "transform": partial(TrainTransform, scale=(0.6, 1.0), flip=0.5, num_ops=1),
    }
    return EmojiDataModule(**{**values, **overrides})


def make_module(*, max_steps: int = 12, lr: float = 1e-3, **overrides: Any) -> PretrainModule:
    objectives: dict[str, Objective] = {"itc": ImageTextContrastive()}
    values: dict[str, Any] = {
        "model": tiny_config(),
        "objectives": objectives,
        "optimizer": partial(build_optimizer, lr=lr),
        "scheduler": partial(warmup_cosine, warmup_steps=min(2, max_steps), max_steps=max_steps),
        "validation_name": "emoji_val",
    }
    return PretrainModule(**{**values, **overrides})


def make_trainer(
    folder: Path,
    *,
    max_steps: int = 12,
    callbacks: Sequence[lightning.Callback] = (),
    loggers: Sequence[Any] = (),
    **overrides: Any,
) -> lightning.Trainer:
    """As `conf/trainer/default.yaml`, on the CPU, silent, every step logged, no validation unless asked for."""
    values: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": LocalStrategy("cpu"),
        "max_steps": max_steps,
        "max_epochs": -1,
        "gradient_clip_val": 1.0,
        "val_check_interval": 6,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "logger": list(loggers) or False,
        "callbacks": list(callbacks),
        "default_root_dir": str(folder),
    }
    return lightning.Trainer(**{**values, **overrides})
