"""The ONNX graphs of an exported folder, run by ONNX Runtime on the CPU: our features without weights in torch.

What the graphs read and where they come from is in their metadata, so neither configuration nor weights are opened.

Letters: B batch · T tokens · S image side in pixels · E feature dim.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2_encoder.checkpoints.exported import TOKENIZER_FILE
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.evaluation.models.base import EvaluatedModel, ModelFacts, import_peer
from m2_encoder.pictures import PicturePolicy, read_policy
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import TextTokens

FOLDER: Final = "onnx"
"""Of an exported folder, that holds the graphs."""

SUFFIXES: Final = ("", "_fp16", "_int8")
"""Of graphs that compute in 32, in 16 and in 8 bits; the first pair that is there is taken."""

_NAMES: Final = ("vision_model", "text_model")
_SAME: Final = ("fingerprint", "preprocess", "tokenizer", "feature_dim")
_AGAIN: Final = "write it again with m2-export model=FOLDER 'to=[native,onnx]' output=NEW"


class GraphFiles(NamedTuple):
    """Two graphs of one folder."""

    image: Path
    text: Path


def find_graphs(folder: str | os.PathLike[str]) -> GraphFiles:
    """The graphs in an exported folder; those of the most bits, if there are several.

    Raises:
        CheckpointError: if a graph is missing.
    """
    for suffix in SUFFIXES:
        files = GraphFiles(*(Path(folder) / FOLDER / f"{name}{suffix}.onnx" for name in _NAMES))
        if all(file.is_file() for file in files):
            return files
    files = GraphFiles(*(Path(folder) / FOLDER / f"{name}.onnx" for name in _NAMES))
    missing = " and ".join(f"{FOLDER}/{file.name}" for file in files if not file.is_file())
    fix = f"write them with m2-export model={folder} 'to=[native,onnx]' output=NEW, and give that folder"
    raise CheckpointError(f"{folder}: {missing} missing; {fix}")


class GraphTowers:
    """Two graphs in place of `M2Encoder`.

    Args:
        files: the graphs.

    Raises:
        CheckpointError: if ONNX Runtime cannot open them.
    """

    def __init__(self, files: GraphFiles) -> None:
        # Opening takes more memory than what is left of it, so the larger one comes first.
        opened = {file: _open(file) for file in sorted(files, key=lambda file: file.stat().st_size, reverse=True)}
        self._image, self._text = opened[files.image], opened[files.text]
        self.metadata = [dict(session.get_modelmeta().custom_metadata_map) for session in (self._image, self._text)]

    def encode_image(self, images: Tensor, /) -> Tensor:
        """(B, 3, S, S), uint8 or floating in 0..1, to (B, E) fp32, L2-normalised."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return _run(self._image, pixels.numpy())

    def encode_text(self, text: TextTokens, /) -> Tensor:
        """Ids, (B, T), to (B, E) fp32, L2-normalised; the mask is what padding with the end token says."""
        return _run(self._text, text.ids.numpy())


def open_graphs(
    folder: str | os.PathLike[str], *, name: str, tokenizer: str | os.PathLike[str] | None = None
) -> EvaluatedModel:
    """The model of an exported folder by its graphs; its fingerprint is that of the weights they were made from.

    Args:
        folder: written by `m2-export` with the format onnx.
        name: in tables and records.
        tokenizer: its SentencePiece file; None for `tokenizer.model` in the folder, which the format native writes.

    Raises:
        UserError: without ONNX Runtime; or if a file is missing, damaged or of another model than the others.
    """
    files = find_graphs(folder)
    towers = GraphTowers(files)
    facts = _read_facts(files, towers)
    text = _read_tokenizer(Path(tokenizer) if tokenizer is not None else Path(folder) / TOKENIZER_FILE, facts)
    preprocess = EvalTransform(facts.image_size, pictures=facts.pictures)
    size = sum(path.stat().st_size for path in files.image.parent.glob("*.onnx*") if _belongs(path, files))
    return EvaluatedModel(
        name=name,
        model=towers,
        preprocess=preprocess.to_uint8,
        tokenizer=text,
        facts=ModelFacts(
            kind="onnx",
            parameters=0,
            weight_bytes=size,
            embed_dim=facts.feature_dim,
            image_size=facts.image_size,
            context_length=text.context_length,
            preprocessing={"image_size": facts.image_size, "pictures": preprocess.pictures.to_dict()},
            tokenizing={"tokenizer": "SentencePiece", "context_length": text.context_length},
        ),
        fingerprint=facts.fingerprint,
    )


class _Facts(NamedTuple):
    """Of the metadata of both graphs."""

    fingerprint: str
    feature_dim: int
    image_size: int
    pictures: PicturePolicy
    tokenizing: Mapping[str, Any]  # arguments of the tokenizer
    tokenizer_sha256: str


def _read_facts(files: GraphFiles, towers: GraphTowers) -> _Facts:
    image, text = towers.metadata
    folder = files.image.parent
    if "fingerprint" not in image or "fingerprint" not in text:
        raise CheckpointError(f"{folder}: graphs that do not say which model they are of; {_AGAIN}")
    if differing := [key for key in _SAME if image.get(key) != text.get(key)]:
        said = f"{files.image.name} and {files.text.name} are of two models ({', '.join(differing)} differ)"
        raise CheckpointError(f"{folder}: {said}; {_AGAIN}")
    try:
        preprocess, tokenizer = json.loads(image["preprocess"]), json.loads(image["tokenizer"])
        return _Facts(
            fingerprint=image["fingerprint"],
            feature_dim=int(image["feature_dim"]),
            image_size=int(preprocess["image_size"]),
            pictures=read_policy(preprocess["pictures"]),
            tokenizing={key: tokenizer[key] for key in ("context_length", "truncation_side", "normalise")},
            tokenizer_sha256=tokenizer["tokenizer_sha256"],
        )
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise CheckpointError(f"{folder}: its metadata are damaged ({error!r:.100}); {_AGAIN}") from error


def _read_tokenizer(path: Path, facts: _Facts) -> SentencePieceTokenizer:
    if not path.is_file():
        fix = "export with 'to=[native,onnx]', or add tokenizer=FILE"
        raise CheckpointError(f"{path}: no such file, and graphs hold no tokenizer; {fix}")
    tokenizer = SentencePieceTokenizer(path, **facts.tokenizing)
    if tokenizer.digest != facts.tokenizer_sha256:
        raise CheckpointError(f"{path} is not the tokenizer of the graphs in {FOLDER}/; give that of their model")
    return tokenizer


def _open(path: Path) -> Any:
    """A session with as many threads as torch has."""
    runtime = import_peer("onnxruntime", "graphs", extra="export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a server waits most of the time
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of ONNX Runtime, which has a class for each code and no common one
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: ONNX Runtime cannot open it ({said}); {_AGAIN}") from error


def _run(session: Any, values: npt.NDArray[Any]) -> Tensor:
    (entry,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {entry.name: np.ascontiguousarray(values)})[0])


def _belongs(path: Path, files: GraphFiles) -> bool:
    """Whether a file is one of the graphs, or holds the weights of one."""
    return path.name.removesuffix(".data") in {file.name for file in files}
