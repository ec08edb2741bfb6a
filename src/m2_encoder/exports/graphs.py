"""The encoder as two ONNX graphs: pictures to features, token ids to features.

Normalisation of pixels and features, and the mask of texts, are inside. Letters: B batch · T tokens · S side · E
feature dim.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from m2_encoder.errors import UserError, abridge
from m2_encoder.exports.base import Features
from m2_encoder.exports.rounding import RoundedTable, round_matrices
from m2_encoder.models.config import NUM_RESERVED_POSITIONS, M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.multiway import EXPERTS

OPSET: Final = 20
MAX_BYTES: Final = 2**31 - 1
"""Of one ONNX file: it is a protobuf message."""

BATCH_GAP: Final = 1e-2
"""By how much a number of a feature may differ between a sample alone and in a batch."""

_SUFFIXES: Final = {torch.float32: "", torch.float16: "_fp16", torch.int8: "_int8"}
_RUNNER: Final = Path(__file__).with_name("run_graphs.py")
_LOGGERS: Final = ("", "torch.onnx", "onnxscript", "onnx_ir")  # the quantiser uses the first, that of all


class ImageGraph(nn.Module):
    """`encode_image` without its checks.

    Args:
        model: in evaluation mode, of the dtype to compute in.
    """

    def __init__(self, model: M2Encoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) fp32 in 0..1 to (B, E) fp32, L2-normalised."""
        model = self.model
        tokens = model.image_embed(pixel_values)
        lower = model.backbone(tokens, num_image_tokens=tokens.shape[1])
        hidden = model.vl_encoder(lower, num_image_tokens=tokens.shape[1], first_token_only=True)
        return _normalise(model.vl_image_proj(hidden[:, 0]))


class TextGraph(nn.Module):
    """`encode_text`; the mask follows from the ids, because padding has the id of the end token.

    Args:
        model: in evaluation mode, of the dtype to compute in.
        end_id: of the end token.
        context_length: most tokens of a text; longer ones are refused where the graph runs.
        int8_table: whether the token table is kept in 8 bits.
    """

    def __init__(self, model: M2Encoder, *, end_id: int, context_length: int, int8_table: bool = False) -> None:
        super().__init__()
        self.model, self.end_id = model, end_id
        # No second name for the plain table: with one, the exporter mixes up parameters.
        self.table = RoundedTable(model.text_embed.tokens.weight) if int8_table else None
        rows = model.text_embed.positions.weight.detach()[NUM_RESERVED_POSITIONS:]
        self.positions = nn.Parameter(rows[:context_length].clone(), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) int64 to (B, E) fp32, L2-normalised.

        All end tokens at the end of a row but the first one are padding; those before other tokens are text.
        """
        model, length = self.model, input_ids.shape[1]
        places = torch.arange(length, device=input_ids.device)
        last = (places * (input_ids != self.end_id)).amax(dim=1, keepdim=True)
        mask = places <= last + 1
        tokens = model.text_embed.tokens if self.table is None else self.table
        embedded = tokens(input_ids).to(self.positions.dtype) + self.positions[:length]
        is_chinese = model.text_embed.find_chinese(input_ids, mask)
        lower = model.backbone(embedded, num_image_tokens=0, token_mask=mask, is_chinese=is_chinese)
        hidden = model.vl_encoder(lower, num_image_tokens=length, token_mask=mask, first_token_only=True)
        return _normalise(model.vl_text_proj(hidden[:, 0]))


def graph_bytes(config: M2EncoderConfig, *, bytes_per_value: int) -> dict[Literal["image", "text"], int]:
    """What the weights of both graphs take, from the architecture alone."""
    with torch.device("meta"):
        model = M2Encoder(config)
    numbers = {name: p.numel() for name, p in model.named_parameters()}

    def count(pattern: str) -> int:
        return sum(number for name, number in numbers.items() if fnmatchcase(name, pattern))

    common, adapters = count("vl_encoder.layers.*.vision_expert.*"), count("backbone.layers.*.adapters.*")
    image, text = (common + count(f"backbone.layers.*.{expert}.*") for expert in EXPERTS)
    return {
        "image": bytes_per_value * (image + count("image_embed.*")),
        "text": bytes_per_value * (text + adapters + model.text_embed.tokens.weight.numel()),
    }


class GraphSettings(NamedTuple):
    """What decides on two graphs."""

    dtype: torch.dtype  # of weights and computation: fp32, fp16 or int8
    context_length: int  # most tokens of a text
    external_data: bool = False  # whether weights lie in files of their own; not with int8
    int8_table: bool = False  # whether the token table has 8 bits; it has with int8

    @property
    def suffix(self) -> str:
        """Of the names of files, as transformers.js has it."""
        return _SUFFIXES[self.dtype]


class Graphs(NamedTuple):
    """Two files, with their weights beside them where those are files of their own."""

    image: Path
    text: Path


def share_graphs(
    scratch: Path, model: M2Encoder, settings: GraphSettings, *, end_id: int, metadata: Mapping[str, str]
) -> Graphs:
    """Both graphs, made once for all formats that want the same; batch and tokens are free.

    Inputs are fp32 and int64, outputs fp32 for every dtype.

    Args:
        scratch: a folder that these formats share, of one model.
        model: fp32, in evaluation mode.
        settings: of the graphs.
        end_id: of the end token.
        metadata: stored in both files.
    """
    folder = scratch / "-".join(str(each) for each in settings)
    graphs = Graphs(*(folder / f"{name}_model{settings.suffix}.onnx" for name in ("vision", "text")))
    if folder.is_dir():
        return graphs
    if settings.dtype == torch.int8:
        whole = settings._replace(dtype=torch.float32, int8_table=True)
        made = share_graphs(scratch, model, whole, end_id=end_id, metadata=metadata)
        folder.mkdir()
        with _quiet():
            for path, target in zip(made, graphs, strict=True):
                round_matrices(path, target)
        return graphs
    folder.mkdir(parents=True)
    config, length = model.config, settings.context_length
    if settings.dtype != torch.float32:
        model = copy.deepcopy(model).to(settings.dtype)
    batch = torch.export.Dim("batch")
    # A batch of 1 would be taken for a constant.
    images = torch.zeros(2, 3, config.image_size, config.image_size)
    image = _export(ImageGraph(model), images, ("pixel_values", "image_embeds"), {0: batch})
    _save(image, graphs.image, metadata, settings.external_data)
    ids = torch.full((2, min(7, length)), end_id)
    free = {0: batch, 1: torch.export.Dim("tokens", min=2, max=length)} if length > 2 else {0: batch}
    text = TextGraph(model, end_id=end_id, context_length=length, int8_table=settings.int8_table)
    _save(_export(text, ids, ("input_ids", "text_embeds"), free), graphs.text, metadata, settings.external_data)
    return graphs


def _normalise(features: Tensor) -> Tensor:
    """In fp32, whatever the graph computes in."""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


def _export(module: nn.Module, example: Tensor, names: tuple[str, str], free: Mapping[int, Any]) -> Any:
    with torch.no_grad(), _quiet():
        return torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_shapes=(free,),
            verbose=False,
        )


def _save(program: Any, path: Path, metadata: Mapping[str, str], external_data: bool) -> None:
    program.model.metadata_props.update(metadata)
    program.model.graph.name = path.stem
    if external_data:
        program.save(path, external_data=True)
    else:
        import onnx_ir

        onnx_ir.save(program.model, path)  # of `program.save`, one file ends at 1.5 GB already


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells what it does; what goes wrong is raised."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


class GraphRun(NamedTuple):
    """What ONNX Runtime made of the samples, in a process of its own."""

    features: Features
    image_ms: float  # median, one picture at a time
    text_ms: float  # median, one text at a time
    peak_bytes: int  # of that process, which holds both graphs
    batch_difference: float  # largest, of a number of a feature alone and in a batch


def run_graphs(
    graphs: Graphs, *, pixels: Tensor, rows: Sequence[Sequence[int]], batch_gap: float = BATCH_GAP
) -> GraphRun:
    """Features by ONNX Runtime, of each sample alone and of some in a batch.

    Args:
        graphs: to run.
        pixels: (n, 3, S, S) fp32.
        rows: ids of each text, without padding but what the tool adds.
        batch_gap: by how much a number of a feature may differ in a batch.

    Raises:
        UserError: if ONNX Runtime cannot run them, a sample in a batch has other features than alone, or the folder
            for temporary files is full.
    """
    names = " and ".join(path.name for path in graphs)
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), rows[0][-1], np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        try:
            np.savez(inputs, pixels=pixels.numpy(), ids=ids, lengths=lengths)
        except OSError as error:
            raise UserError(f"cannot write samples to {folder}: {error}; make room there, or set TMPDIR") from error
        paths = (_RUNNER, *graphs, inputs, outputs)
        threads = str(torch.get_num_threads())
        command = [sys.executable, *(os.fspath(path) for path in paths), threads]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"ONNX Runtime cannot run {names}: {abridge(said[-1], 300)}")
        with np.load(outputs) as found:
            images, texts = (torch.from_numpy(found[name]) for name in ("images", "texts"))
            facts = {name: float(found[name]) for name in ("image_ms", "text_ms", "peak_bytes", "batch_difference")}
    if not facts["batch_difference"] < batch_gap:
        raise UserError(f"{names}: features depend on the batch")
    times = facts["image_ms"], facts["text_ms"]
    return GraphRun(Features(images, texts), *times, int(facts["peak_bytes"]), facts["batch_difference"])
