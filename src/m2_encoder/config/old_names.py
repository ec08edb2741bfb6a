"""What saved configurations say in an older way, or do not say.

Names of what has moved, mappings for what are pairs today, and the policy of pictures, which was one and the same.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

_MOVED: Final = {
    "m2_encoder.cli.loggers.build_csv_logger": "m2_encoder.runs.loggers.build_csv_logger",
    "m2_encoder.cli.loggers.build_wandb_logger": "m2_encoder.runs.loggers.build_wandb_logger",
    "m2_encoder.data.captions.CaptionSampler": "m2_encoder.data.samples.captions.CaptionSampler",
    "m2_encoder.data.datamodule.EmojiDataModule": "m2_encoder.data.emoji.emoji_module.EmojiDataModule",
    "m2_encoder.data.decode.decode_image_uint8": "m2_encoder.data.images.decode.decode_image_uint8",
    "m2_encoder.data.transforms.TrainTransform": "m2_encoder.data.images.transforms.TrainTransform",
    "m2_encoder.data.tensor_transforms.TensorTrainTransform": (
        "m2_encoder.data.images.tensor_transforms.TensorTrainTransform"
    ),
}
"""Where what a `_target_` of an old configuration names is today."""

_BY_STEP: Final = ("schedule", "softness")
"""Arguments that were mappings, {0: 0, 1000: 1}, and are pairs today, [[0, 0], [1000, 1]]."""

_LOGGERS: Final = {
    "m2_encoder.runs.loggers.build_wandb_logger": "wandb",
    "m2_encoder.runs.loggers.build_csv_logger": "csv",
}
"""The names of loggers that were the only one of a run."""

_KEY_OF_WANDB: Final = re.compile(
    r"([+~]*logger)\.((?:project|entity|group|tags|mode|finish_timeout_s)(?:=.*)?)", re.DOTALL
)

Node = TypeVar("Node")


def update_line(line: str) -> str:
    """An override as it would be written today.

    >>> update_line("logger.mode=offline")
    'logger.wandb.mode=offline'
    """
    found = _KEY_OF_WANDB.fullmatch(line)
    return line if found is None else f"{found[1]}.wandb.{found[2]}"


def update_names(node: Node) -> Node:
    """A configuration, or a part of one, as it would be written today; plain containers."""
    updated: Any = _update(node)
    if isinstance(updated, dict) and isinstance(one := updated.get("logger"), dict) and "_target_" in one:
        updated["logger"] = {_LOGGERS.get(one["_target_"], "own"): one}
    model = updated.get("model") if isinstance(updated, dict) else None
    if isinstance(model, dict) and "tokenizer" in model:  # the group `model` of m2-train
        model.setdefault("pictures", "older")
    return updated


def _update(node: Node) -> Node:
    updated: Any = node
    if isinstance(node, dict):
        updated = {key: _update(value) for key, value in node.items()}
        if isinstance(target := updated.get("_target_"), str):
            updated["_target_"] = _MOVED.get(target, target)
        for key in _BY_STEP:
            if isinstance(value := updated.get(key), dict) and all(str(step).isdecimal() for step in value):
                updated[key] = [[int(step), number] for step, number in value.items()]
    elif isinstance(node, list):
        updated = [_update(value) for value in node]
    return updated
