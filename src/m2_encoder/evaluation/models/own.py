"""Everything that `m2_encoder.load` opens, as evaluation sees it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2_encoder.checkpoints.download import is_url
from m2_encoder.checkpoints.weight_files import find_weights
from m2_encoder.errors import UserError
from m2_encoder.evaluation.models.base import (
    EvaluatedModel,
    ModelFacts,
    count_parameters,
    make_fingerprint,
    refuse_texts,
    tensor_bytes,
)
from m2_encoder.hub import load
from m2_encoder.pictures import PicturePolicy
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

_NO_TEXTS = "it was opened without a tokenizer; add tokenizer=FILE, the SentencePiece model of its weights"


def open_own(
    model: str,
    *,
    name: str,
    checkpoint: str | None,
    weights: str | None,
    tokenizer: str | None,
    pictures: PicturePolicy | str | Mapping[str, str] | None,
) -> EvaluatedModel:
    """A name of `list_models()`, an exported folder, or a run's; the arguments are those of `load`.

    Raises:
        UserError: as `load`.
    """
    loaded = load(model, checkpoint=checkpoint, weights=weights, tokenizer=tokenizer, pictures=pictures)
    text = loaded.tokenizer if isinstance(loaded.tokenizer, SentencePieceTokenizer) else None
    config = loaded.model.config
    tokenizing: dict[str, Any] = {}
    if text is not None:
        tokenizing = {
            "tokenizer": "SentencePiece",
            "truncation_side": text.truncation_side,
            "normalise": text.normalise,
            "context_length": text.context_length,
        }
    facts = ModelFacts(
        kind="m2",
        parameters=count_parameters(loaded.model),
        weight_bytes=_file_bytes(model, checkpoint, weights) or tensor_bytes(loaded.model),
        embed_dim=config.feature_dim,
        image_size=config.image_size,
        context_length=0 if text is None else text.context_length,
        preprocessing={
            "resize": "squash",
            "interpolation": "bicubic",
            "image_size": config.image_size,
            "max_pixels": loaded.preprocess.max_pixels,
            "pictures": loaded.preprocess.pictures.to_dict(),
        },
        tokenizing=tokenizing,
    )
    return EvaluatedModel(
        name=name,
        model=loaded.model,
        preprocess=loaded.preprocess.to_uint8,  # a quarter of the memory; the model divides by 255
        tokenizer=refuse_texts if text is None else text,
        facts=facts,
        fingerprint=make_fingerprint(
            loaded.model,
            facts,
            architecture={**dataclasses.asdict(config), "name": ""},
            tokenizer="" if text is None else text.digest,
        ),
        no_texts=_NO_TEXTS if text is None else "",
    )


def _file_bytes(model: str, checkpoint: str | None, weights: str | None) -> int:
    """Of the file of weights; 0 if it is not known: of a checkpoint, which holds the optimizer, too, or a download."""
    if checkpoint is not None or (weights is not None and is_url(weights)):
        return 0
    try:
        path = find_weights(Path(weights if weights is not None else model).expanduser())
        return os.path.getsize(path) if path.is_file() else 0
    except (UserError, OSError):
        return 0
