"""Everything that `m2_encoder.load` opens, as evaluation sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2_encoder.checkpoints.download import is_url
from m2_encoder.checkpoints.exported import read_heldout_style
from m2_encoder.checkpoints.weight_files import find_weights
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.errors import UserError
from m2_encoder.evaluation.encode import Tokenize
from m2_encoder.evaluation.models.base import (
    EvaluatedModel,
    ModelFacts,
    count_parameters,
    digest_tokenizer,
    make_fingerprint,
    refuse_texts,
    tensor_bytes,
)
from m2_encoder.hub import load
from m2_encoder.models.two_towers import Encoder
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
    return wrap_towers(
        loaded.model,
        loaded.preprocess,
        text,
        name=name,
        weight_bytes=_file_bytes(model, checkpoint, weights),
        heldout_style=read_heldout_style(model) if weights is None else "",
    )


def wrap_towers(
    model: Encoder,
    preprocess: EvalTransform,
    tokenizer: Tokenize | None,
    *,
    name: str,
    weight_bytes: int = 0,
    heldout_style: str = "",
) -> EvaluatedModel:
    """A model in memory, such as one that was just trained.

    Args:
        model: of ours, or of two towers.
        preprocess: what its pictures go through.
        tokenizer: of its texts; None if there is none.
        name: in tables and records.
        weight_bytes: of its file; 0 for what its tensors take.
        heldout_style: drawing style of the built-in set that its training left out, if it was trained on that set.
    """
    config, text = model.config, tokenizer if isinstance(tokenizer, SentencePieceTokenizer) else None
    tokenizing = _tokenizing(tokenizer, config.context_length)
    facts = ModelFacts(
        kind="m2",
        parameters=count_parameters(model),
        weight_bytes=weight_bytes or tensor_bytes(model),
        embed_dim=config.feature_dim,
        image_size=config.image_size,
        context_length=int(tokenizing.get("context_length", 0)),
        preprocessing={
            "resize": "squash",
            "interpolation": "bicubic",
            "image_size": config.image_size,
            "max_pixels": preprocess.max_pixels,
            "pictures": preprocess.pictures.to_dict(),
        },
        tokenizing=tokenizing,
    )
    content = "" if text is None else text.digest
    if text is None and tokenizer is not None:
        content = digest_tokenizer(tokenizer, content=type(tokenizer).__qualname__)
    return EvaluatedModel(
        name=name,
        model=model,
        preprocess=preprocess.to_uint8,  # a quarter of the memory; the model divides by 255
        tokenizer=tokenizer or refuse_texts,
        facts=facts,
        fingerprint=make_fingerprint(model, facts, architecture={**config.to_dict(), "name": ""}, tokenizer=content),
        no_texts=_NO_TEXTS if tokenizer is None else "",
        heldout_style=heldout_style,
    )


def _tokenizing(tokenizer: Tokenize | None, context_length: int) -> dict[str, Any]:
    """What texts go through, as plain values."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {
            "tokenizer": "SentencePiece",
            "truncation_side": tokenizer.truncation_side,
            "normalise": tokenizer.normalise,
            "context_length": tokenizer.context_length,
        }
    return {} if tokenizer is None else {"tokenizer": type(tokenizer).__name__, "context_length": context_length}


def _file_bytes(model: str, checkpoint: str | None, weights: str | None) -> int:
    """Of the file of weights; 0 if it is not known: of a checkpoint, which holds the optimizer, too, or a download."""
    if checkpoint is not None or (weights is not None and is_url(weights)):
        return 0
    try:
        path = find_weights(Path(weights if weights is not None else model).expanduser())
        return os.path.getsize(path) if path.is_file() else 0
    except (UserError, OSError):
        return 0
