"""Position tables of another size: image grids, and longer texts.

Letters: G patches along one side · D width.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.checkpoints.exported import CONFIG_FILE, CONFIG_METADATA_KEY
from m2_encoder.checkpoints.formats import read_safetensors_metadata, read_small_json
from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER
from m2_encoder.checkpoints.weight_files import find_weights
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.models.config import NAME_TO_CONFIG, NUM_RESERVED_POSITIONS, M2EncoderConfig

NUM_PREFIX_ROWS = 3
"""Rows before the grid: two reserved ones and the cls token's. They are copied as they are."""

TEXT_POSITIONS: Final = "text_embed.positions.weight"
"""The parameter whose rows follow the length of texts."""

_LOGGER = logging.getLogger(__name__)


def resize_image_positions(table: Tensor, num_rows: int) -> Tensor:
    """Fit an image position table to another image size.

    The grid is resized by area interpolation, as the official loader does for one of its two checkpoint wrappers. (For
    the other it cuts larger tables to their first rows, which scrambles the grid.)

    Args:
        table: (G^2 + 3, D), floating point.
        num_rows: G'^2 + 3 of the model.

    Returns:
        (G'^2 + 3, D) in the dtype of the table, computed in fp32; the table itself if the sizes are equal.

    Raises:
        CheckpointError: if either number of rows belongs to no square grid.
    """
    if table.shape[0] == num_rows:
        return table
    old, new = _grid(table.shape[0]), _grid(num_rows)
    prefix, grid = table[:NUM_PREFIX_ROWS], table[NUM_PREFIX_ROWS:]
    pixels = grid.float().t().reshape(1, -1, old, old)
    resized = functional.interpolate(pixels, size=(new, new), mode="area")
    return torch.cat([prefix, resized.flatten(2)[0].t().to(table.dtype)])


def _grid(rows: int) -> int:
    side = math.isqrt(max(0, rows - NUM_PREFIX_ROWS))
    if side < 1 or side * side != rows - NUM_PREFIX_ROWS:
        raise CheckpointError(
            f"an image position table of {rows} rows has no square grid (expected G*G + {NUM_PREFIX_ROWS}); "
            "the checkpoint was trained on images that are not square"
        )
    return side


def find_context_length(weights: str | os.PathLike[str], *, model: str) -> int:
    """Most tokens of the texts that weights were trained with; later rows of their position table never were.

    Args:
        weights: a file or folder that is there. An export says its length in its weights, wherever these are moved,
            and in `config.json`; a checkpoint of a run has that of the run's export; others, such as the official
            ones, that of their name.
        model: name of the architecture.

    Raises:
        CheckpointError: for a checkpoint of a run without an export, or a damaged file.
    """
    path = find_weights(weights)
    if path.suffix == ".safetensors" and CONFIG_METADATA_KEY in (metadata := read_safetensors_metadata(path)):
        return M2EncoderConfig.from_dict(json.loads(metadata[CONFIG_METADATA_KEY])).context_length
    is_of_run = path.parent.name == CHECKPOINT_FOLDER
    said = (path.parent.parent / "export" if is_of_run else path.parent) / CONFIG_FILE
    if said.is_file():
        config = read_small_json(said).get("model")
        length = config.get("context_length") if isinstance(config, Mapping) else None
        if isinstance(length, int):
            return length
    if is_of_run:
        rule = "is of a run without an export, which would say how long its texts were; write one with m2-export"
        raise CheckpointError(rule, key="weights", value=os.fspath(weights))
    return NAME_TO_CONFIG.get(model, M2EncoderConfig()).context_length


def check_stretch(keep: int, *, old: int, new: int) -> None:
    """Refuse what is no stretch.

    Args:
        keep: positions that stay.
        old: context length of the weights.
        new: that of the model.

    Raises:
        UserError: with its key.
    """
    if new <= old:
        rule = f"must be above {old}, the context length of the weights, where positions are stretched"
        raise UserError(f"{rule}; for example {4 * old}, or stretch_positions=null", key="context_length", value=new)
    if keep >= old:
        rule = f"must be below {old}, the context length of the weights: none would be stretched"
        raise UserError(f"{rule}; for example {min(20, old // 2)}", key="stretch_positions", value=keep)


def stretch_text_positions(
    state: dict[str, Tensor], config: M2EncoderConfig, *, keep: int, weights: str | os.PathLike[str]
) -> None:
    """Give weights positions for longer texts than they were trained with.

    Of the old context length L, positions 0..keep-1 stay to the bit. The others, keep..L-1, are spread evenly over
    keep..L'-1 and interpolated linearly, both ends exact. What the table has beyond stays; a longer one repeats the
    last position there.

    Args:
        state: parameters under our names; the table of text positions is replaced.
        config: of the model, with its context length L' and the rows of its table.
        keep: positions that stay; the two reserved rows before them are not counted, and stay, too.
        weights: where the parameters come from.

    Raises:
        UserError: if L' is not above L, or `keep` not below it.

    Reference: Long-CLIP (arXiv:2403.15378), section 3.2, which keeps 20 of CLIP's 77 and stretches the others fourfold.
    """
    table = state.get(TEXT_POSITIONS)
    if table is None or table.dim() != 2 or not table.is_floating_point():
        return  # left for the comparison of names and shapes to report
    old, new = find_context_length(weights, model=config.name), config.context_length
    check_stretch(keep, old=old, new=new)
    first, last = NUM_RESERVED_POSITIONS + keep, NUM_RESERVED_POSITIONS + old
    trained = table[first:last].float().t()[None]
    longer = functional.interpolate(trained, size=new - keep, mode="linear", align_corners=True)[0].t()
    rows = torch.cat([table[:first], longer.to(table.dtype), table[NUM_RESERVED_POSITIONS + new :]])
    missing = max(0, config.num_text_positions - len(rows))
    state[TEXT_POSITIONS] = torch.cat([rows, rows[-1:].expand(missing, -1)])
    _LOGGER.warning(
        "%s: of %s text positions the first %s are kept, the other %s are stretched to %s",
        os.fspath(Path(weights)), old, keep, old - keep, new - keep,
    )  # fmt: skip
