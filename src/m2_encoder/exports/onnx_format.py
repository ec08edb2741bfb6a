"""ONNX graphs under the names of transformers.js, for ONNX Runtime on servers and in browsers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from m2_encoder.bounds import Tokens, check_bounds
from m2_encoder.checkpoints.card_words import Words
from m2_encoder.errors import NOTHING, Problem
from m2_encoder.evaluation.models.onnx_model import FOLDER
from m2_encoder.exports.base import (
    BOUND_FP16,
    BOUND_FP32,
    BOUND_INT8,
    BOUND_INT8_TABLE,
    ExportFormat,
    ExportSource,
    Features,
    Measured,
    compare,
)
from m2_encoder.exports.graphs import (
    BATCH_GAP,
    MAX_BYTES,
    GraphRun,
    Graphs,
    GraphSettings,
    graph_bytes,
    run_graphs,
    share_graphs,
)
from m2_encoder.exports.parity import WARNING
from m2_encoder.exports.recall import Recall, measure_recall
from m2_encoder.exports.samples import TEXTS
from m2_encoder.models.config import NUM_RESERVED_POSITIONS, M2EncoderConfig

NEEDED: Final = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
_BOUNDS: Final = {torch.float32: BOUND_FP32, torch.float16: BOUND_FP16, torch.int8: BOUND_INT8}
_INT8_GAP: Final = 0.1  # activations of a batch have one scale
_SHARE: Final = 0.99  # of the largest file that weights may take; the graph itself is small


class Onnx(ExportFormat):
    """`onnx/vision_model.onnx` and `onnx/text_model.onnx`, with the suffix `_fp16` or `_int8` of their dtype.

    Batch and number of tokens are free. Pixels are fp32 in 0..1 and normalised inside; the mask of texts is derived
    inside; features come out L2-normalised in fp32. Metadata of both files say how pictures and texts are read.

    Args:
        dtype: of weights and of what is computed; int8 rounds all matrix products and the token table.
        token_table: int8 rounds the table alone, and computes as before.
        context_length: most tokens of a text; None: the model's own.
        external_data: whether weights lie in files of their own (`*.onnx.data`), which graphs above 2 GB need.
    """

    @check_bounds
    def __init__(
        self,
        *,
        dtype: Literal["float32", "float16", "int8"] = "float32",
        token_table: Literal["float", "int8"] = "float",
        context_length: Annotated[Tokens, Ge(3)] | None = None,
        external_data: bool = False,
    ) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.context_length, self.external_data = context_length, external_data
        self.int8_table = token_table == "int8"
        self.bound = _BOUNDS[self.dtype] if not self.int8_table else min(_BOUNDS[self.dtype], BOUND_INT8_TABLE)
        suffix = self._settings(0).suffix
        self.image_file, self.text_file = (f"{FOLDER}/{name}{suffix}.onnx" for name in ("vision_model", "text_model"))

    def problems(self, config: M2EncoderConfig) -> Iterator[Problem]:
        """As the base class says."""
        yield from missing_extra(NEEDED)
        yield from context_problems(self.context_length, config)
        if self.dtype == torch.int8:
            if self.external_data:
                yield Problem("external_data", True, "int8 writes single files", "leave it out")
            if rule := size_rule(config, bytes_per_value=4):
                rule = f"the quantiser reads single files of fp32, but {rule}"
                yield Problem("dtype", "int8", rule, "give float16 and external_data=true")
        elif not self.external_data and (rule := size_rule(config, bytes_per_value=self.dtype.itemsize)):
            yield Problem("external_data", self.external_data, rule, "weights then need files of their own: give true")

    def write(self, folder: Path, source: ExportSource) -> None:
        """As the base class says."""
        length = self.context_length or source.tokenizer.context_length
        graphs = make_graphs(folder.parent, source, self._settings(length))
        (folder / FOLDER).mkdir(parents=True)
        for path in graphs.image.parent.iterdir():
            _link(path, folder / FOLDER / path.name)

    def measure(self, folder: Path, source: ExportSource) -> Measured:
        """As the base class says."""
        run = self._run(folder, source, source.pixels, TEXTS)
        ours = Features(source.image_features, source.text_features(context_length=self.context_length))
        recall = None
        if self.int8_table or self.dtype == torch.int8:
            recall = measure_recall(
                source,
                lambda pixels, texts: self._run(folder, source, pixels, texts).features,
                context_length=self.context_length,
            )
        notes = self._warnings(run, recall)
        return Measured(*compare(ours, run.features), run.image_ms, run.text_ms, run.peak_bytes, notes, recall)

    def usage(self, source: ExportSource) -> str:
        """As the base class says."""
        size = source.model.config.image_size
        return (
            f"用 ONNX Runtime 打开 `{self.image_file}` 和 `{self.text_file}`；像素为 0..1，掩码和归一化都在图内。\n\n"
            f"ONNX Runtime opens `{self.image_file}` (`pixel_values` (B, 3, {size}, {size}) fp32 in 0..1, not "
            f"normalised) and `{self.text_file}` (`input_ids` (B, T) int64, padded with {source.tokenizer.end_id}). "
            "Both give L2-normalised features; their metadata say how pictures and texts are read."
        )

    def _settings(self, context_length: int) -> GraphSettings:
        return GraphSettings(self.dtype, context_length, self.external_data, self.int8_table)

    def _run(self, folder: Path, source: ExportSource, pixels: Tensor, texts: Sequence[str]) -> GraphRun:
        tokens = source.tokenizer(texts, self.context_length)
        rows = [ids[mask].tolist() for ids, mask in zip(*tokens, strict=True)]
        graphs = Graphs(folder / self.image_file, folder / self.text_file)
        gap = _INT8_GAP if self.dtype == torch.int8 else BATCH_GAP
        return run_graphs(graphs, pixels=pixels, rows=rows, batch_gap=gap)

    def _warnings(self, run: GraphRun, recall: Recall | None) -> tuple[Words, ...]:
        found = []
        if self.dtype == torch.int8:
            gap = f"{run.batch_difference:.3f}"
            found.append(
                Words(
                    f"{WARNING}all matrix products are rounded to 8 bits; numbers of a feature change with what else "
                    f"is in the batch, by up to {gap} here; compare results on pictures of your own",
                    f"警告：所有矩阵乘法都舍入到 8 位；特征随同批的输入而变，这里至多 {gap}；请用自己的图片比较",
                )
            )
        if recall is not None and not recall.decides:
            found.append(
                Words(
                    f"{WARNING}{recall.silence}; the cosine decided alone",
                    f"警告：召回率不能说明问题，模型自己只找到 {recall.ours_mean:.1f} %；仅由余弦决定",
                )
            )
        return tuple(found)


def _link(path: Path, target: Path) -> None:
    """The same file under another name; a copy on disks that have only one name for each."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def context_problems(context_length: int | None, config: M2EncoderConfig) -> Iterator[Problem]:
    """A problem if texts would be longer than the model can read."""
    longest = config.num_text_positions - NUM_RESERVED_POSITIONS
    if context_length is not None and context_length > longest:
        rule = f"the model has positions for {longest} tokens"
        yield Problem("context_length", context_length, rule, f"give at most {longest}")


def size_rule(config: M2EncoderConfig, *, bytes_per_value: int) -> str:
    """What a model breaks whose graphs are larger than a file can be; empty if they are not."""
    sizes = graph_bytes(config, bytes_per_value=bytes_per_value)
    large = [f"{kind} {size / 1e9:.1f} GB" for kind, size in sizes.items() if size > _SHARE * MAX_BYTES]
    return f"one ONNX file holds at most 2 GB, this model takes {' and '.join(large)}" if large else ""


def make_graphs(scratch: Path, source: ExportSource, settings: GraphSettings) -> Graphs:
    """As `share_graphs`, with what is known of the source."""
    metadata = describe_source(source, context_length=settings.context_length)
    return share_graphs(scratch, source.model, settings, end_id=source.tokenizer.end_id, metadata=metadata)


def missing_extra(modules: tuple[str, ...]) -> Iterator[Problem]:
    """A problem if packages of the extra `export` are not installed."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        rule = f"needs an extra ({', '.join(missing)} missing)"
        yield Problem("", NOTHING, rule, "install it with pip install 'm2-encoder[export]'")


def describe_source(source: ExportSource, *, context_length: int) -> dict[str, str]:
    """How pictures and texts are read, as metadata of ONNX files: words and JSON."""
    config, tokenizer = source.model.config, source.tokenizer
    preprocess = {
        "image_size": config.image_size,
        "resize": "to a square, bicubic with antialias; the aspect ratio is not kept",
        "pictures": source.loaded.preprocess.pictures.to_dict(),
        "rescale": 1 / 255,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    }
    text = {
        "context_length": context_length,
        "truncation_side": tokenizer.truncation_side,
        "normalise": tokenizer.normalise,
        "cls_id": tokenizer.cls_id,
        "end_id": tokenizer.end_id,
        "pad_id": tokenizer.end_id,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.digest,
    }
    return {
        "m2_encoder": importlib.metadata.version("m2-encoder"),
        "model": config.name,
        "fingerprint": source.fingerprint,
        "feature_dim": str(config.feature_dim),
        "logit_scale": repr(float(source.model.logit_scale)),
        "preprocess": json.dumps(preprocess),
        "tokenizer": json.dumps(text),
    }
