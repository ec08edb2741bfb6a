"""Architecture of the M2-Encoder family: one frozen dataclass, and the table of published sizes.

Reference: M2-Encoder (arXiv:2401.15896) and its released inference configurations.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le, Lt

from m2_encoder.bounds import Count, Index, Positive, check_fields, refuse
from m2_encoder.errors import Problem, UserError

NUM_RESERVED_POSITIONS = 2
"""Rows 0 and 1 of both position tables are never read: token t uses row t + 2."""

_ADDED_PARTS = (
    *("num_prompts", "prompt_layers", "adapter_width"),
    *("mixture_copies", "mixture_top_k", "mixture_vision_layers", "mixture_text_layers"),
)
"""Fields of parts that adaptations add; 0 where there is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class M2EncoderConfig:
    """Shape of one M2-Encoder.

    Upper bounds are far above what exists: they keep a damaged file from asking for the memory of a machine.

    Attributes:
        name: in exports and logs.
        embed_dim: width D of both encoders.
        num_heads: attention heads H; D must be a multiple of it.
        num_layers: layers of the multiway backbone.
        num_vl_layers: layers of the vision-language encoder on top, shared by both modalities.
        feature_dim: width E of the contrastive features.
        image_size: side S of the square input, pixels; a multiple of `patch_size`.
        patch_size: side P of a patch, pixels.
        vocab_size: rows of the token table.
        context_length: longest text in tokens, special tokens included.
        num_text_positions: rows of the text position table, the two reserved ones included.
        ffn_ratio: hidden width of the feed-forward network over D.
        drop_path_rate: stochastic depth of the last layer of each encoder (linear from 0); training only.
        layer_norm_eps: epsilon of every LayerNorm in the encoders.
        position_init_std: standard deviation of both position tables at the start. The released constructor has 1; with
            little data from scratch, such positions drown the content, and the loss stays at chance.
        initial_temperature: 1 / exp(logit_scale) at the start. CLIP and the released constructor have 0.07. Short runs
            from scratch do better with more: a sharp softmax over random features makes them all alike.
        num_prompts: prompts of each modality in each of the first `prompt_layers` layers of the backbone, which
            `adaptation=prompts` adds; see `added_parts.Prompts`. 0 for none, in both.
        prompt_layers: see there.
        adapter_width: hidden width of a small module per language behind each layer of the backbone, which
            `adaptation=adapters` adds; see `added_parts.LanguageAdapters`. 0 for none.
        mixture_copies: feed-forward networks of a mixture, which `adaptation=mixture` makes; see `mixture.Mixture`. 0
            for none, as in the next three.
        mixture_top_k: how many of them a token passes, 2 at least: with one, no loss of features trains the router.
        mixture_vision_layers: the last so many layers of the backbone have a mixture for pictures.
        mixture_text_layers: and for texts.

    Raises:
        UserError: if a value is impossible; all of them are listed at once.
    """

    name: str = "custom"
    embed_dim: Annotated[Count, Le(2**16)] = 768
    num_heads: Annotated[Count, Le(2**12)] = 12
    num_layers: Annotated[Count, Le(2**10)] = 12
    num_vl_layers: Annotated[Count, Le(2**10)] = 3
    feature_dim: Annotated[Count, Le(2**16)] = 768
    image_size: Annotated[Count, Le(2**14)] = 224
    patch_size: Annotated[Count, Le(2**14)] = 16
    vocab_size: Annotated[Count, Le(2**24)] = 21128
    context_length: Annotated[Count, Le(2**20)] = 52
    num_text_positions: Annotated[Count, Le(2**20)] = 1024
    ffn_ratio: Annotated[Count, Le(2**6)] = 4
    drop_path_rate: Annotated[float, Ge(0), Lt(1)] = 0.0
    layer_norm_eps: Annotated[float, Ge(1e-12), Lt(1)] = 1e-5
    position_init_std: Positive = 1.0
    initial_temperature: Annotated[float, Ge(0.01), Le(1)] = 0.07
    num_prompts: Annotated[Index, Le(2**12)] = 0
    prompt_layers: Annotated[Index, Le(2**10)] = 0
    adapter_width: Annotated[Index, Le(2**16)] = 0
    mixture_copies: Annotated[Index, Le(2**10)] = 0
    mixture_top_k: Annotated[Index, Le(2**10)] = 0
    mixture_vision_layers: Annotated[Index, Le(2**10)] = 0
    mixture_text_layers: Annotated[Index, Le(2**10)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        problems = []
        if self.embed_dim % self.num_heads:
            fit = f"for example {_multiple(self.embed_dim, self.num_heads)}"
            rule = f"must be a multiple of num_heads={self.num_heads}"
            problems.append(Problem("embed_dim", self.embed_dim, rule, fit))
        if self.image_size % self.patch_size:
            fit = f"for example {_multiple(self.image_size, self.patch_size)}"
            rule = f"must be a multiple of patch_size={self.patch_size}"
            problems.append(Problem("image_size", self.image_size, rule, fit))
        longest = self.num_text_positions - NUM_RESERVED_POSITIONS
        if not 2 <= self.context_length <= longest:
            rule = f"must be in 2..{longest}, with num_text_positions={self.num_text_positions}"
            fit = f"for example {max(2, longest)}"
            problems.append(Problem("context_length", self.context_length, rule, fit))
        if (self.num_prompts > 0) != (self.prompt_layers > 0):
            rule = f"and prompt_layers={self.prompt_layers} must both be 0, or both above 0"
            problems.append(Problem("num_prompts", self.num_prompts, rule))
        if self.prompt_layers > self.num_layers:
            rule = f"must not exceed num_layers={self.num_layers}, the layers of the backbone"
            problems.append(Problem("prompt_layers", self.prompt_layers, rule))
        refuse([*problems, *self._mixture_problems()])

    def _mixture_problems(self) -> Iterator[Problem]:
        copies, layers = self.mixture_copies, ("mixture_vision_layers", "mixture_text_layers")
        if copies == 0:
            for name in ("mixture_top_k", *layers):
                if value := getattr(self, name):
                    yield Problem(name, value, "needs mixture_copies above 1")
            return
        if copies == 1:
            yield Problem("mixture_copies", copies, "must be 0, or 2 and more")
        elif not 2 <= self.mixture_top_k <= copies:
            yield Problem("mixture_top_k", self.mixture_top_k, f"must be in 2..{copies}, with mixture_copies={copies}")
        if not any(getattr(self, name) for name in layers):
            yield Problem("mixture_copies", copies, "needs mixture_vision_layers or mixture_text_layers above 0")
        for name in layers:
            if (value := getattr(self, name)) > self.num_layers:
                rule = f"must not exceed num_layers={self.num_layers}, the layers of the backbone"
                yield Problem(name, value, rule)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """N: the cls token and one token per patch."""
        return self.grid_size**2 + 1

    @property
    def num_image_positions(self) -> int:
        """Rows of the image position table: two reserved ones, cls and the patches."""
        return self.num_image_tokens + NUM_RESERVED_POSITIONS

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON; without those of added parts that the model has not.

        So a plain model is described as ever, and versions of this package from before such parts read it.
        """
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value or name not in _ADDED_PARTS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> M2EncoderConfig:
        """Rebuild from `to_dict`; unknown fields are an error that lists the known ones."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"unknown model field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> M2EncoderConfig:
        """A row of `NAME_TO_CONFIG`, with single fields overridden.

        Raises:
            UserError: for an unknown name or field; the message lists the known ones.
        """
        if name not in NAME_TO_CONFIG:
            raise UserError(f"unknown model {name!r}; known: {', '.join(NAME_TO_CONFIG)}")
        return cls.from_dict({**NAME_TO_CONFIG[name].to_dict(), **overrides})

    @classmethod
    def from_official(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> M2EncoderConfig:
        """Read a configuration of the official release: its JSON as a mapping, a path, or the text itself.

        `drop_path_rate` is 0, as in the released code, which never passes its value on.

        Raises:
            UserError: for another JSON, or a switch that no published model uses.
        """
        official = _read_official(source)
        _refuse_unsupported(official)
        size = str(official.get("beit_version", "base"))
        if size not in _OFFICIAL_HEADS:
            raise UserError(f"beit_version={size!r} is not one of {', '.join(_OFFICIAL_HEADS)}")
        fields = {ours: official[theirs] for theirs, ours in _OFFICIAL_FIELDS.items() if theirs in official}
        fields["num_heads"] = official.get("encoder_attention_heads") or _OFFICIAL_HEADS[size]
        config = cls(**{"name": "official", **fields})
        return dataclasses.replace(config, name=_published_name(config) or "official")


def _multiple(value: int, of: int) -> int:
    return max(1, value // of) * of


NAME_TO_CONFIG: dict[str, M2EncoderConfig] = {
    config.name: config
    for config in (
        # Ours: trains from scratch on two cores in minutes (see conf/experiment/emoji.yaml).
        M2EncoderConfig(
            name="tiny", embed_dim=128, num_heads=4, num_layers=3, num_vl_layers=1, feature_dim=128,
            image_size=32, patch_size=8, vocab_size=3500, context_length=24, num_text_positions=128,
            position_init_std=0.02, initial_temperature=0.25,
        ),
        # "0.4B", "1B" and "10B" of the paper (263 M, 730 M and 10.2 G parameters as built for inference).
        M2EncoderConfig(
            name="m2-encoder-0.4b", embed_dim=768, num_heads=12, num_layers=9, feature_dim=768, vocab_size=115244,
        ),
        M2EncoderConfig(
            name="m2-encoder-1b", embed_dim=1024, num_heads=16, num_layers=21, feature_dim=1024, vocab_size=115244,
        ),
        M2EncoderConfig(
            name="m2-encoder-10b", embed_dim=4096, num_heads=32, num_layers=21, feature_dim=1024, vocab_size=115244,
        ),
    )
}  # fmt: skip
"""Every model that `load` and `model=` know by name."""

_OFFICIAL_FIELDS = {
    "encoder_embed_dim": "embed_dim",
    "encoder_layers": "num_layers",
    "beit3_vl_layers": "num_vl_layers",
    "out_embed_dim": "feature_dim",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "vocab_size": "vocab_size",
    "max_text_len": "context_length",
}
_OFFICIAL_HEADS = {"base": 12, "large": 16, "huge": 32}
_OFFICIAL_OFF_SWITCHES = (
    "share_layer", "share_attn", "one_attn", "deepnorm", "mask_ratio", "xpos_rel_pos", "rel_pos_buckets", "moe_freq",
)  # fmt: skip


def _read_official(source: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    text = os.fspath(source)
    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file():
            raise UserError(f"official configuration {text!r}: no such file")
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        official = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"official configuration {str(source)[:80]!r} is not JSON: {error}") from error
    if not isinstance(official, dict):
        raise UserError(f"official configuration {str(source)[:80]!r} must be a JSON object")
    return official


def _refuse_unsupported(official: Mapping[str, Any]) -> None:
    switched_on = [f"{key}={official[key]!r}" for key in _OFFICIAL_OFF_SWITCHES if official.get(key)]
    if switched_on:
        raise UserError(
            f"official configuration switches on {', '.join(switched_on)}; no published model does, set to 0 or false"
        )
    losses = official.get("loss_names")
    if isinstance(losses, Mapping) and not losses.get("itc", 1):
        raise UserError(
            "official configuration sets loss_names.itc=0: such a model has no contrastive heads, set it to 1"
        )
    if not any(key in official for key in _OFFICIAL_FIELDS):
        raise UserError(
            f"not an official M2-Encoder configuration: none of the keys {', '.join(_OFFICIAL_FIELDS)} is present"
        )


def _published_name(config: M2EncoderConfig) -> str | None:
    """Name of the published row with exactly this shape, if there is one."""
    for name, known in NAME_TO_CONFIG.items():
        if dataclasses.replace(config, name=name) == known:
            return name
    return None
