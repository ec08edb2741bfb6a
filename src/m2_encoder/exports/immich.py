"""immich: the cache folder of a model that it lists, with our graphs in it.

immich takes models by name from a list, which also tells the width of features in its database. Ours goes under the
name of a listed model that is as wide, or wider: zeros behind a feature change no cosine.

Letters: B batch · T tokens · S side · E feature dim · W width in immich's database.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from m2_encoder.bounds import Text, check_bounds
from m2_encoder.checkpoints.card_words import Words
from m2_encoder.data.images.transforms import open_image
from m2_encoder.errors import NOTHING, Problem
from m2_encoder.exports.base import ExportFormat, ExportSource, Features, Measured, compare
from m2_encoder.exports.graphs import Graphs, GraphSettings, run_graphs
from m2_encoder.exports.onnx_format import NEEDED, make_graphs, missing_extra, size_rule
from m2_encoder.exports.samples import TEXTS, make_pictures
from m2_encoder.exports.tokenizer_json import TOKENIZER_CONFIG, TOKENIZER_JSON, write_tokenizer_json
from m2_encoder.files import write_json
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

LISTED: Final = {512: "ViT-B-32__openai", 768: "ViT-L-14__openai", 1024: "ViT-H-14__laion2b-s32b-b79k"}
"""Names that immich lists, by the width of their features."""

DEFAULT_REVISION: Final = "main"
"""The revision that immich keeps in the folder of the model itself."""

QUERY_TOKENS: Final = 1024
"""Tokens that immich pads every text to; what is longer it cuts at the right."""

_REVISION: Final = re.compile(r"\w[\w.-]*")


class Immich(ExportFormat):
    """`clip/NAME/` as immich's cache has it, or `clip/NAME/REVISION/`: `config.json`, `textual/`, `visual/`.

    immich pads every text to one length. The graph cuts padding off again, and long texts to what the model reads, at
    the side at which our tokenizer does: a query costs its own length. Pictures are squashed to a square.

    Args:
        revision: what immich's machine learning has as `MACHINE_LEARNING_MODEL_REVISION`, a variable of versions from
            3.3 on. It adds a folder to the path, unless it is `main`, which is their default.
    """

    @check_bounds
    def __init__(self, *, revision: Text = DEFAULT_REVISION) -> None:
        self.revision = revision

    def problems(self, config: M2EncoderConfig) -> Iterator[Problem]:
        """As the base class says."""
        yield from missing_extra((*NEEDED, "tokenizers"))
        if not _REVISION.fullmatch(self.revision):
            fix = f"give what MACHINE_LEARNING_MODEL_REVISION is, such as {DEFAULT_REVISION} or v2"
            yield Problem("revision", self.revision, "must be the name of one folder", fix)
        if rule := size_rule(config, bytes_per_value=4):
            yield Problem("", NOTHING, rule, "leave it out; immich cannot be given a model of this size")
        if config.feature_dim > max(LISTED):
            rule = f"features of {config.feature_dim} numbers are wider than those of any model that immich lists"
            yield Problem("", NOTHING, rule, "leave it out")

    def write(self, folder: Path, source: ExportSource) -> None:
        """As the base class says."""
        tokenizer, size = source.tokenizer, source.model.config.image_size
        graphs = make_graphs(folder.parent, source, GraphSettings(torch.float32, tokenizer.context_length, False))
        width, home = listed_width(source.model.config.feature_dim), folder / self._home(source)
        for part in ("textual", "visual"):
            (home / part).mkdir(parents=True)
        write_json(home / "config.json", {"embed_dim": width, "text_cfg": {"context_length": QUERY_TOKENS}})
        _adapt(graphs.text, home / "textual" / "model.onnx", "text", (QUERY_TOKENS,), width, _cut_like(tokenizer))
        write_tokenizer_json(tokenizer, home / "textual")
        _adapt(graphs.image, home / "visual" / "model.onnx", "image", (3, size, size), width)
        preprocess = {
            "size": [size, size],
            "mode": "RGB",
            "mean": [0.0, 0.0, 0.0],  # the graph normalises
            "std": [1.0, 1.0, 1.0],
            "interpolation": "bicubic",
            "resize_mode": "squash",
            "fill_color": 0,
        }
        write_json(home / "visual" / "preprocess_cfg.json", preprocess)

    def measure(self, folder: Path, source: ExportSource) -> Measured:
        """As the base class says; texts go through `tokenizer.json`."""
        home = folder / self._home(source)
        texts = [" ".join(text.split()) for text in TEXTS]
        rows = _tokenize(home / "textual", texts)
        graphs = Graphs(home / "visual" / "model.onnx", home / "textual" / "model.onnx")
        run = run_graphs(graphs, pixels=source.pixels, rows=rows)
        texts_ours = source.text_features(texts)
        width = listed_width(source.model.config.feature_dim)
        ours = Features(*(_widen(features, width) for features in (source.image_features, texts_ours)))
        found = compare(ours, run.features)
        return Measured(*found, run.image_ms, run.text_ms, run.peak_bytes, (self._crop_note(source),))

    def usage(self, source: ExportSource) -> str:
        """As the base class says."""
        home = self._home(source)
        name, other = home.parts[1], "v2/" if self.revision == DEFAULT_REVISION else "../"
        variable = f"`MACHINE_LEARNING_MODEL_REVISION={self.revision}`"
        return (
            f"停止 immich 的机器学习容器，删除模型缓存中的 `/cache/clip/{name}`（较新版本在其中存有旧权重的副本）；"
            f"把 `{home}` 复制到 `/cache/{home}`，在管理设置里选择模型 `{name}`，然后对全部资源重新运行“智能搜索”。"
            f"此路径对应 {variable}（默认 `{DEFAULT_REVISION}`）；其他设置对应 `{other}`。\n\n"
            f"Stop immich's machine learning, delete `/cache/clip/{name}` from its model cache (newer versions keep "
            f"copies there that they have prepared from the weights before), copy `{home}` to `/cache/{home}`, choose "
            f"the model `{name}` in the settings, and run Smart Search again on all assets. The path is that of "
            f"{variable} (`{DEFAULT_REVISION}` by default); other settings look in `{other}`. The name is that of a "
            "listed model of this width; the weights are these."
        )

    def _home(self, source: ExportSource) -> Path:
        home = Path("clip") / LISTED[listed_width(source.model.config.feature_dim)]
        return home if self.revision == DEFAULT_REVISION else home / self.revision

    def _crop_note(self, source: ExportSource) -> Words:
        """What versions lose that ignore `resize_mode`: they cut the longer side off."""
        size, pictures = source.model.config.image_size, source.loaded.preprocess.pictures
        opened = [open_image(picture.content, pictures=pictures) for picture in make_pictures()]
        rows = [row for row, image in enumerate(opened) if image.width != image.height]
        pixels = torch.stack([_crop(opened[row], size) for row in rows])
        with torch.inference_mode():
            cropped = torch.cat([source.model.encode_image(batch) for batch in pixels.split(8)])
        cosines = torch.nn.functional.cosine_similarity(cropped, source.image_features[rows])
        median, least = float(cosines.median()), float(cosines.min())
        return Words(
            f"versions of immich before mid-2026 crop instead of squashing: over {len(rows)} sample pictures that are "
            f"no squares, the cosine to the right feature is {median:.2f} (median), {least:.2f} at worst",
            f"2026 年中以前的 immich 裁剪而不是压成正方形：{len(rows)} 张非正方形样本图片与正确特征的余弦中位数为 "
            f"{median:.2f}，最低 {least:.2f}",
        )


def listed_width(feature_dim: int) -> int:
    """W: the least width of a listed model that features fit in."""
    return min(width for width in LISTED if width >= feature_dim)


def _widen(features: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(features, (0, width - features.shape[1]))


def _tokenize(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    pad = config["pad_token"]
    tokenizer.enable_padding(length=QUERY_TOKENS, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=QUERY_TOKENS)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def _crop(image: Image.Image, size: int) -> Tensor:
    """The shorter side to `size`, the middle of the longer one; (3, S, S) fp32 in 0..1."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 255


Cut: TypeAlias = Callable[[str, str], tuple[list[Any], list[Any]]]
"""Gives nodes and constants that make of padded ids, one name, those that the text graph reads, the other name."""


def _cut_like(tokenizer: SentencePieceTokenizer) -> Cut:
    """Cuts padding off, and texts of more tokens than `context_length` at the side at which the tokenizer cuts them.

    With n tokens of a text and c of the context, column i of the result is column i + max(0, n - c) of the ids for all
    columns but the first (cut at the left, [CLS] stays), or for the last one alone (at the right, the end stays).
    """
    from onnx import TensorProto, helper

    most, end_id, is_left = tokenizer.context_length, tokenizer.end_id, tokenizer.truncation_side == "left"
    moved = [int(column > 0) if is_left else int(column == most - 1) for column in range(most)]
    numbers = {"end": [end_id], "places": [*range(QUERY_TOKENS)], "moved": moved, "most": [most]}
    scalars = {"zero": 0, "one": 1}
    lists = {"two": [2], "axis": [1], "nothing": [0]}

    def cut(given: str, wanted: str) -> tuple[list[Any], list[Any]]:
        steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
            ("Equal", [given, "cut_end"], "cut_is_end", {}),
            ("Not", ["cut_is_end"], "cut_is_token", {}),
            ("Cast", ["cut_is_token"], "cut_counted", {"to": TensorProto.INT64}),
            ("Mul", ["cut_counted", "cut_places"], "cut_reached", {}),
            ("ReduceMax", ["cut_reached", "cut_axis"], "cut_last", {"keepdims": 1}),
            ("Add", ["cut_last", "cut_two"], "cut_tokens", {}),  # with the end token, (B, 1)
            ("Sub", ["cut_tokens", "cut_most"], "cut_over", {}),
            ("Max", ["cut_over", "cut_nothing"], "cut_excess", {}),
            ("Min", ["cut_tokens", "cut_most"], "cut_kept", {}),
            ("ReduceMax", ["cut_kept"], "cut_length", {"keepdims": 0}),
            ("Range", ["cut_zero", "cut_length", "cut_one"], "cut_columns", {}),
            ("Gather", ["cut_moved", "cut_columns"], "cut_moves", {}),
            ("Mul", ["cut_excess", "cut_moves"], "cut_shift", {}),
            ("Add", ["cut_shift", "cut_columns"], "cut_index", {}),
            ("GatherElements", [given, "cut_index"], wanted, {"axis": 1}),
        ]
        nodes = [helper.make_node(kind, inputs, [output], **more) for kind, inputs, output, more in steps]
        constants = [
            helper.make_tensor(f"cut_{name}", TensorProto.INT64, [len(values)], values)
            for name, values in {**numbers, **lists}.items()
        ]
        constants += [helper.make_tensor(f"cut_{name}", TensorProto.INT64, [], [v]) for name, v in scalars.items()]
        return nodes, constants

    return cut


def _adapt(path: Path, target: Path, name: str, shape: Sequence[int], width: int, cut: Cut | None = None) -> None:
    """Writes a graph with another input, (B, *shape), and with zeros behind its features, (B, W)."""
    import onnx

    model: Any = onnx.load(path)
    graph, helper = model.graph, onnx.helper
    (old,), (features,) = graph.input, graph.output
    is_text = old.type.tensor_type.elem_type == onnx.TensorProto.INT64
    kind = onnx.TensorProto.INT32 if is_text else onnx.TensorProto.FLOAT
    ready = "padded" if cut else old.name
    nodes = [helper.make_node("Cast", [name], [ready], to=old.type.tensor_type.elem_type)]
    if cut is not None:
        steps, constants = cut(ready, old.name)
        nodes += steps
        graph.initializer.extend(constants)
    nodes += graph.node
    wide = features.name
    if missing := width - features.type.tensor_type.shape.dim[1].dim_value:
        wide, zeros = "features", helper.make_tensor("zeros_behind", onnx.TensorProto.INT64, [4], [0, 0, 0, missing])
        graph.initializer.append(zeros)
        nodes.append(helper.make_node("Pad", [features.name, zeros.name], [wide]))
    for entries, new in (
        (graph.node, nodes),
        (graph.input, [helper.make_tensor_value_info(name, kind, ["batch", *shape])]),
        (graph.output, [helper.make_tensor_value_info(wide, onnx.TensorProto.FLOAT, ["batch", width])]),
        (graph.value_info, []),  # which has the old shapes
    ):
        kept = [type(each).FromString(each.SerializeToString()) for each in new]
        del entries[:]
        entries.extend(kept)
    onnx.save(model, target)
