"""Parts of the model that not every objective trains, by parameter names.

Training freezes parts that no objective of a run names: DDP would hang without their gradients, and weight decay would
shrink them.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

OPTIONAL_PARTS: Final[dict[str, tuple[str, ...]]] = {
    "backbone_features": ("image_proj.*", "text_proj.*", "logit_vl_scale"),
    "mask_token": ("image_embed.mask_token",),
    "vl_text_expert": ("vl_encoder.*.text_expert.*",),
    "official_leftovers": ("pooler.*", "norm.*"),
}
"""Parameters, as name patterns, that the features do not depend on."""

_READING: Final = ("q_proj", "attention_inner_norm", "out_proj", "ffn_norm", "fc1", "ffn_inner_norm", "fc2")

_READERS: Final = {
    f"{expert}_reader": (
        *(f"vl_encoder.layers.{{last}}.{expert}.{module}.*" for module in _READING),
        f"vl_encoder.norm.{expert}.*",
    )
    for expert in ("vision_expert", "text_expert")
}

PARTS: Final[dict[str, tuple[str, ...]]] = {
    **OPTIONAL_PARTS,
    "features": ("vl_image_proj.*", "vl_text_proj.*", "logit_scale"),
    **_READERS,
}
"""All parts. `*_reader`: weights of the last vision-language layer, `{last}`, that act only on tokens whose states are
read: query and output projections, feed-forward, norm. Key and value projections act on all tokens and are always
trained."""


def is_part(name: str, parts: frozenset[str], *, num_vl_layers: int) -> bool:
    """Whether the parameter of this name belongs to one of the parts, named as in `PARTS`."""
    patterns = [pattern.replace("{last}", str(num_vl_layers - 1)) for part in parts for pattern in PARTS[part]]
    return any(fnmatchcase(name, pattern) for pattern in patterns)
