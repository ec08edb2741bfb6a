"""Learning rates by layer and tower: what `optimizer.lr` is multiplied with for each parameter, by its name.

A tower is what one kind of input alone runs through: its embedding, its experts below the vision-language layers, and
its projections. The vision-language layers send texts through the experts of images, too, so they belong to both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from m2_encoder.errors import UserError

_LAYER: Final = re.compile(r"(?:^|\.)(backbone|vl_encoder)\.layers\.(\d+)\.")
_EMBEDDING: Final = re.compile(r"(?:^|\.)(image_embed|text_embed)\.")
_LAST_OF_BACKBONE: Final = re.compile(r"(?:^|\.)backbone\.norm\.")
_IMAGE: Final = re.compile(r"(?:^|\.)(image_embed|backbone\.(layers\.\d+|norm)\.vision_expert|(vl_)?image_proj)\.")
_TEXT: Final = re.compile(r"(?:^|\.)(text_embed|backbone\.(layers\.\d+|norm)\.text_expert|(vl_)?text_proj)\.")


def layer_of(name: str, *, num_layers: int, num_vl_layers: int) -> int:
    """Number of a parameter's layer: 0 for embeddings, then the backbone's, the vision-language ones, and the heads.

    The norm behind the backbone counts with its last layer; what is above the vision-language layers, and parameters
    of objectives, count as heads: `num_layers + num_vl_layers + 1`.
    """
    if found := _LAYER.search(name):
        below = num_layers if found[1] == "vl_encoder" else 0
        return below + int(found[2]) + 1
    if _EMBEDDING.search(name):
        return 0
    return num_layers if _LAST_OF_BACKBONE.search(name) else num_layers + num_vl_layers + 1


def rate_ratios(
    names: Iterable[str], *, layer_decay: float = 1.0, image_lr_ratio: float = 1.0, text_lr_ratio: float = 1.0
) -> Callable[[str], float]:
    """Gives a parameter's learning rate over `optimizer.lr`: `layer_decay ** (L + 1 - layer)`, times its tower's ratio.

    L is the number of layers, those of vision and language included; `layer_of` numbers them.

    Reference: BEiT (arXiv:2106.08254), fine-tuning: layer-wise learning-rate decay.

    Args:
        names: of all parameters, trained or not: they say how many layers there are.
        layer_decay: factor from each layer to the one below it; 1 for none.
        image_lr_ratio: of the image tower.
        text_lr_ratio: of the text tower.

    Raises:
        UserError: if a ratio is not 1 and the parameters have no such layers or towers.
    """
    names = list(names)
    given = {"layer_decay": layer_decay, "image_lr_ratio": image_lr_ratio, "text_lr_ratio": text_lr_ratio}
    wanted = [key for key, value in given.items() if value != 1]
    if not wanted:
        return lambda name: 1.0
    found = [match for name in names if (match := _LAYER.search(name))]
    counts = {
        kind: 1 + max((int(match[2]) for match in found if match[1] == kind), default=-1)
        for kind in ("backbone", "vl_encoder")
    }
    if not counts["backbone"]:
        rule = "needs the layers of an M2-Encoder, and this model has none"
        raise UserError(f"{rule}; leave it out", key=wanted[0], value=given[wanted[0]])
    last = sum(counts.values()) + 1

    def ratio(name: str) -> float:
        layer = layer_of(name, num_layers=counts["backbone"], num_vl_layers=counts["vl_encoder"])
        tower = image_lr_ratio if _IMAGE.search(name) else text_lr_ratio if _TEXT.search(name) else 1.0
        return tower * layer_decay ** (last - layer)

    return ratio
