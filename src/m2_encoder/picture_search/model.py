"""The model of an index: opened once for pictures and queries, and compared with the one that made the features."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from m2_encoder.checkpoints.download import is_url
from m2_encoder.errors import UserError
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.models.onnx_model import open_graphs
from m2_encoder.evaluation.models.opening import move_model
from m2_encoder.evaluation.models.own import wrap_towers
from m2_encoder.hub import load
from m2_encoder.picture_search.index import IndexModel, PictureIndex
from m2_encoder.pictures import PicturePolicy, read_policy

Runtime = Literal["torch", "onnx"]
"""What computes features: torch with the weights, or ONNX Runtime with the graphs of an export, on the CPU."""


class SearchModel(NamedTuple):
    """A model that is ready to encode pictures and words."""

    encoder: EvaluatedModel
    made_by: IndexModel  # what an index of it records


def open_search_model(
    model: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    pictures: PicturePolicy | str | Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
    runtime: Runtime = "torch",
) -> SearchModel:
    """Opens a model for search; the arguments are those of `m2_encoder.load`, whose paths are recorded whole.

    With `runtime="onnx"` the model is an exported folder with graphs, and `weights`, `pictures` and `device` say
    nothing.

    Raises:
        UserError: as `load`, or `open_graphs`; or if the model has no tokenizer.
    """
    name = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
    if runtime == "onnx":
        encoder = open_graphs(model, name=name, tokenizer=tokenizer)
    else:
        loaded = load(model, weights=weights, tokenizer=tokenizer, pictures=pictures)
        encoder = wrap_towers(loaded.model, loaded.preprocess, loaded.require_tokenizer(), name=name)
    made_by = IndexModel(
        model=name,
        weights=_whole(weights),
        tokenizer=_whole(tokenizer),
        pictures=read_policy(encoder.facts.preprocessing["pictures"]).to_setting(),
        fingerprint=encoder.fingerprint,
    )
    return SearchModel(encoder if runtime == "onnx" else move_model(encoder, device), made_by)


def open_index_model(
    index: PictureIndex,
    *,
    model: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    runtime: Runtime = "torch",
) -> EvaluatedModel:
    """Opens the model that made an index; `model`, `weights` and `tokenizer` say where it is now, if it was moved.

    Raises:
        UserError: as `open_search_model`; or if it is another one.
    """
    made_by = index.made_by
    opened = open_search_model(
        model or made_by.model,
        weights=weights or (None if model else made_by.weights),
        tokenizer=tokenizer or (None if model else made_by.tokenizer),
        pictures=made_by.pictures,
        device=device,
        runtime=runtime,
    )
    require_same(index, opened.made_by)
    return opened.encoder


def require_same(index: PictureIndex, given: IndexModel) -> None:
    """Refuse another model than the one that made an index.

    Raises:
        UserError: if weights, architecture, preprocessing or tokenizer differ.
    """
    made_by = index.made_by
    if given.fingerprint != made_by.fingerprint:
        same = " (its files have changed)" if given.model == made_by.model else ""
        raise UserError(
            f"is not the model of {index.path}: that was made by {made_by.model}, fingerprint "
            f"{made_by.fingerprint[:8]}, not {given.fingerprint[:8]}{same}; give that one, or index to another output",
            key="model",
            value=given.model,
        )


def _whole(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path) if is_url(str(path)) else os.path.abspath(path)
