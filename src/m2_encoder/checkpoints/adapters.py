"""Names of the official checkpoints and ours: one table, read in both directions.

Official names put the expert's letter after a projection or norm (`q_proj.A.weight`) but before the parts of the
feed-forward network (`ffn.A.fc1.weight`); ours begin with the expert (`vision_expert.q_proj.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

_PLACEHOLDERS: dict[str, dict[str, str] | str] = {
    # official spelling -> ours; a plain string is a pattern that stays as it is
    "encoder": {"backbone.encoder": "backbone", "backbone_vl": "vl_encoder"},
    "expert": {"A": "vision_expert", "B": "text_expert"},
    "layer": r"\d+",
    "kind": r"weight|bias",
}

NAME_TABLE: tuple[tuple[str, str], ...] = (
    ("logit_scale", "logit_scale"),
    ("logit_vl_scale", "logit_vl_scale"),
    ("backbone.text_embed.weight", "text_embed.tokens.weight"),
    ("backbone.vision_embed.mask_token", "image_embed.mask_token"),
    ("backbone.vision_embed.cls_token", "image_embed.cls_token"),
    ("backbone.vision_embed.proj.{kind}", "image_embed.proj.{kind}"),
    ("backbone.encoder.embed_positions.A.weight", "image_embed.positions.weight"),
    ("backbone.encoder.embed_positions.B.weight", "text_embed.positions.weight"),
    ("{encoder}.layers.{layer}.self_attn.k_proj.{expert}.{kind}", "{encoder}.layers.{layer}.{expert}.k_proj.{kind}"),
    ("{encoder}.layers.{layer}.self_attn.v_proj.{expert}.{kind}", "{encoder}.layers.{layer}.{expert}.v_proj.{kind}"),
    ("{encoder}.layers.{layer}.self_attn.q_proj.{expert}.{kind}", "{encoder}.layers.{layer}.{expert}.q_proj.{kind}"),
    (
        "{encoder}.layers.{layer}.self_attn.out_proj.{expert}.{kind}",
        "{encoder}.layers.{layer}.{expert}.out_proj.{kind}",
    ),
    (
        "{encoder}.layers.{layer}.self_attn.inner_attn_ln.{expert}.{kind}",
        "{encoder}.layers.{layer}.{expert}.attention_inner_norm.{kind}",
    ),
    (
        "{encoder}.layers.{layer}.self_attn_layer_norm.{expert}.{kind}",
        "{encoder}.layers.{layer}.{expert}.attention_norm.{kind}",
    ),
    ("{encoder}.layers.{layer}.ffn.{expert}.fc1.{kind}", "{encoder}.layers.{layer}.{expert}.fc1.{kind}"),
    ("{encoder}.layers.{layer}.ffn.{expert}.fc2.{kind}", "{encoder}.layers.{layer}.{expert}.fc2.{kind}"),
    (
        "{encoder}.layers.{layer}.ffn.{expert}.ffn_layernorm.{kind}",
        "{encoder}.layers.{layer}.{expert}.ffn_inner_norm.{kind}",
    ),
    ("{encoder}.layers.{layer}.final_layer_norm.{expert}.{kind}", "{encoder}.layers.{layer}.{expert}.ffn_norm.{kind}"),
    ("{encoder}.layer_norm.{expert}.{kind}", "{encoder}.norm.{expert}.{kind}"),
    ("norm.{kind}", "norm.{kind}"),
    ("pooler.dense.{kind}", "pooler.{kind}"),
    ("itc_text_proj.fc.weight", "text_proj.weight"),
    ("itc_image_proj.fc.weight", "image_proj.weight"),
    ("itc_vl_text_proj.fc.weight", "vl_text_proj.weight"),
    ("itc_vl_image_proj.fc.weight", "vl_image_proj.weight"),
)
"""(official, ours). `{...}` stand for the same thing on both sides; see `_PLACEHOLDERS`."""


IGNORED_NAMES: dict[str, str] = {
    "visual_tokenizer.": "gave targets for masked image modelling; released checkpoints carry it",
    "objectives.": "heads of objectives in our own training checkpoints; features do not need them",
}
"""Documented extras, part of a name -> why it is dropped. Everything else that is unknown is an error."""


class _Renamer:
    """One direction of the table."""

    def __init__(self, rows: Iterable[tuple[str, str]], *, to_official: bool) -> None:
        self._to_official = to_official
        self._rows = [
            (re.compile(self._pattern(target if to_official else source)), source if to_official else target)
            for source, target in rows
        ]

    def _spellings(self, name: str) -> dict[str, str] | str:
        spelling = _PLACEHOLDERS[name]
        if self._to_official and isinstance(spelling, dict):
            return {ours: official for official, ours in spelling.items()}
        return spelling

    def _pattern(self, template: str) -> str:
        pattern = ""
        for i, part in enumerate(re.split(r"\{(\w+)\}", template)):
            if i % 2 == 0:
                pattern += re.escape(part)
                continue
            spelling = self._spellings(part)
            options = spelling if isinstance(spelling, str) else "|".join(map(re.escape, spelling))
            pattern += f"(?P<{part}>{options})"
        return pattern

    def __call__(self, name: str) -> str | None:
        for pattern, template in self._rows:
            match = pattern.fullmatch(name)
            if match:
                values = {}
                for key, value in match.groupdict().items():
                    spelling = self._spellings(key)
                    values[key] = value if isinstance(spelling, str) else spelling[value]
                return template.format(**values)
        return None


official_to_ours = _Renamer(NAME_TABLE, to_official=False)
"""Our name of an official parameter, or None."""

ours_to_official = _Renamer(NAME_TABLE, to_official=True)
"""Official name of one of our parameters, or None."""


def to_official_state(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename a state dict of ours to the official names.

    Raises:
        ValueError: for a name that the table does not know.
    """
    renamed = {}
    for name, value in state.items():
        official = ours_to_official(name)
        if official is None:
            raise ValueError(f"{name!r} has no official name; add a row to NAME_TABLE")
        renamed[official] = value
    return renamed
