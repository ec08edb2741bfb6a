"""Writes a trained model as a folder for `m2_encoder.load`: configuration, weights, tokenizer, model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2_encoder.checkpoints.card import CardInfo, Metrics, files_section, model_card
from m2_encoder.checkpoints.exported import (
    CARD_FILE,
    CONFIG_FILE,
    CONFIG_METADATA_KEY,
    FORMAT,
    FORMAT_VERSION,
    READING_METADATA_KEY,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    config_text,
    reading_text,
)
from m2_encoder.checkpoints.io import save_safetensors
from m2_encoder.checkpoints.matching_head import CONFIG_KEY, MatchingHead, save_head
from m2_encoder.checkpoints.tensors import find_non_finite
from m2_encoder.checkpoints.vocabulary import DIGEST_METADATA_KEY
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import atomic_folder, file_sha256
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.pictures import STANDARD, PicturePolicy
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer


def export_model(
    folder: str | os.PathLike[str],
    *,
    model: M2Encoder,
    tokenizer: SentencePieceTokenizer,
    pictures: PicturePolicy = STANDARD,
    metrics: Metrics | None = None,
    provenance: Mapping[str, Any] | None = None,
    card: CardInfo | None = None,
    matching: MatchingHead | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as a folder; it appears whole or not at all.

    `load(folder)` gives features that are bit for bit those of an fp32 model. Weights of another dtype are
    stored in fp32.

    Args:
        folder: where to write; must not exist unless `overwrite`.
        model: the model, with data.
        tokenizer: the one the model was trained with.
        pictures: what the pixels of its training pictures were.
        metrics: results for the model card and `config.json`.
        provenance: plain facts about the origin (run, command, revision, versions); must be JSON.
        card: what the model card says beyond that.
        matching: the head that ranks retrieved candidates again, stored in a file of its own; None for no such file.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        UserError: if tokenizer and model do not belong together, the folder exists, the provenance is not
            JSON, or the disk refuses.
    """
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the token table {config.vocab_size} rows; "
            "export the model with the tokenizer it was trained with"
        )
    _check_finite(model)
    card, folder = card or CardInfo(), Path(folder)
    with atomic_folder(folder, overwrite=overwrite, error=CheckpointError) as temporary:
        tokenizer.save(temporary / TOKENIZER_FILE)
        content = _config_content(config, tokenizer, pictures, file_sha256(temporary / TOKENIZER_FILE))
        content["metrics"] = metrics or {}
        content["provenance"] = provenance or {}
        if matching is not None:
            content[CONFIG_KEY] = save_head(temporary, matching)
        save_safetensors(model, temporary / WEIGHTS_FILE, metadata=_metadata(config, tokenizer, content))
        (temporary / CONFIG_FILE).write_text(_json_text(content), encoding="utf-8")
        text = model_card(model, card=card, pictures=pictures, metrics=metrics or {}, provenance=provenance or {})
        text += files_section(temporary, (WEIGHTS_FILE, TOKENIZER_FILE))
        (temporary / CARD_FILE).write_text(text, encoding="utf-8")
    return folder


def _metadata(config: M2EncoderConfig, tokenizer: SentencePieceTokenizer, content: Mapping[str, Any]) -> dict[str, str]:
    """Of the weights: what they belong with, so that other files beside them are noticed."""
    return {
        "format": "pt",
        CONFIG_METADATA_KEY: config_text(config),
        READING_METADATA_KEY: reading_text(content),
        DIGEST_METADATA_KEY: tokenizer.digest,
    }


def _check_finite(model: M2Encoder) -> None:
    if (broken := find_non_finite(model.state_dict())) is not None:
        raise UserError(f"cannot export the model: {broken} holds values that are NaN or infinite")


def _json_text(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"metrics and provenance must be plain JSON values: {error}") from error


def _config_content(
    config: M2EncoderConfig, tokenizer: SentencePieceTokenizer, pictures: PicturePolicy, tokenizer_sha256: str
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
        "preprocess": {
            "image_size": config.image_size,
            "pictures": pictures.to_dict(),
            "resize": "to a square, bicubic with antialias; the aspect ratio is not kept",
            "value_range": [0, 1],
            "normalisation": "(x - 0.5) / 0.5, inside the model",
        },
        "tokenizer": {
            "context_length": tokenizer.context_length,
            "truncation_side": tokenizer.truncation_side,
            "vocab_size": tokenizer.vocab_size,
            "normalise": tokenizer.normalise,
            "sha256": tokenizer_sha256,
        },
    }
