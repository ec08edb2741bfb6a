"""Two towers put together from modules that exist: one for pictures, one for texts, each locked or trained.

With a locked, pretrained image tower this is LiT (arXiv:2111.07991); with a locked sentence encoder as the text tower
(`models.sentence`) it is the way of LLM2CLIP (arXiv:2411.04997) and ProCLIP (arXiv:2510.18795). It is trained as
somebody else's model is (`TwoTowers`).

Letters: B batch · S side of a picture · T tokens · D width of a module · E feature dim.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from m2_encoder.bounds import Count, Index, Temperature, check_bounds
from m2_encoder.errors import UserError

_TEMPERATURE: Final = 0.07  # CLIP's at the start

Layers: TypeAlias = Literal[0, 1, 2]
"""Linear layers of a projection."""


class ComposedTowers(nn.Module):
    """Features of pictures and texts from two modules and a projection on each.

    A locked module is never trained, stays in evaluation mode (so that batch norm and dropout do nothing else in
    training), and is run without a graph.

    Args:
        image: module of pixels, (B, 3, S, S) as `pixel_mean` and `pixel_std` make them; gives (B, D), or (B, D, h, w),
            which is averaged.
        text: module of ids, (B, T), and of their mask, (B, T) bool, if its `forward` takes two arguments; gives (B, D).
        image_size: S.
        vocab_size: of the tokenizer; ids below it are tried.
        feature_dim: E; None for the width of the module that has a projection of 0 layers.
        locked: `image`, `text`, both or none.
        cached_rows: outputs of each locked module that are kept by their input, the oldest dropped first; pays where
            inputs come again, as captions do, however they are padded, and pictures without augmentation.
        image_layers: of the projection on the image module: 0 takes its outputs as features, which must be E wide then;
            1 is a matrix; 2 have a GELU between them, D wide.
        text_layers: of that on the text module.
        temperature: at the start; that of the model whose tower is taken on, where there is one.

    Raises:
        UserError: for a module that gives something else.
    """

    @check_bounds
    def __init__(
        self,
        *,
        image: nn.Module,
        text: nn.Module,
        image_size: Count,
        vocab_size: Count,
        feature_dim: Count | None = None,
        locked: Sequence[Literal["image", "text"]] = ("image",),
        cached_rows: Index = 0,
        image_layers: Layers = 1,
        text_layers: Layers = 1,
        temperature: Temperature = _TEMPERATURE,
    ) -> None:
        super().__init__()
        self.image, self.text = image, text
        self._takes_mask = _takes_mask(text)
        self._locked, self._cached_rows = frozenset(locked), cached_rows
        self._kept: dict[str, dict[bytes, Tensor]] = {"image": {}, "text": {}}
        for name in self._locked:
            getattr(self, name).requires_grad_(False)
        self.train(self.training)
        ids = torch.arange(2).remainder(vocab_size)[None]
        widths = {
            "image": self._try("image", torch.zeros(1, 3, image_size, image_size)),
            "text": self._try("text", ids, torch.ones_like(ids, dtype=torch.bool)),
        }
        layers = {"image": image_layers, "text": text_layers}
        if feature_dim is None:
            feature_dim = next((widths[name] for name, count in layers.items() if count == 0), None)
        if feature_dim is None:
            raise UserError("must be a number where both modules have a projection", key="feature_dim")
        self.image_proj = _project(widths["image"], feature_dim, image_layers, key="image_layers")
        self.text_proj = _project(widths["text"], feature_dim, text_layers, key="text_layers")
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def train(self, mode: bool = True) -> ComposedTowers:
        """Locked modules stay in evaluation mode."""
        super().train(mode)
        for name in self._locked:
            getattr(self, name).eval()
        return self

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, E) of pixels, (B, 3, S, S)."""
        features: Tensor = self.image_proj(self._run("image", self._see, images))
        return features

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, E) of ids, (B, T), with True on tokens in the mask, (B, T)."""
        features: Tensor = self.text_proj(self._run("text", self._read, ids, mask))
        return features

    def _see(self, images: Tensor) -> Tensor:
        found: Any = self.image(images)
        return found.mean(dim=(2, 3)) if isinstance(found, Tensor) and found.ndim == 4 else found

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.text(ids, mask) if self._takes_mask else self.text(ids)
        return found

    def _run(self, name: str, encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if name not in self._locked:
            return encode(*inputs)
        with torch.no_grad():
            return self._look_up(name, encode, inputs) if self._cached_rows else encode(*inputs)

    def _look_up(self, name: str, encode: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """Rows that were seen before are looked up, the others are computed together."""
        kept = self._kept[name]
        # Padding depends on the other texts of a batch; who takes the mask does not see it.
        unpadded = name == "text" and self._takes_mask
        rows = list(zip(*inputs, strict=True))
        keys = [_digest([row[0][row[1]]] if unpadded else row) for row in rows]
        new = {key: row for row, key in enumerate(keys) if key not in kept}
        if new:
            chosen = torch.tensor([*new.values()], device=inputs[0].device)
            computed = encode(*(each[chosen] for each in inputs))
            kept |= dict(zip(new, computed.unbind(), strict=True))
        found = torch.stack([kept[key] for key in keys])
        for key in [*kept][: max(0, len(kept) - self._cached_rows)]:
            del kept[key]
        return found

    @torch.no_grad()
    def _try(self, name: str, *inputs: Tensor) -> int:
        """Width of what a module gives."""
        module: nn.Module = getattr(self, name)
        modes = [(each, each.training) for each in module.modules()]
        module.eval()
        found: Any = (self._see if name == "image" else self._read)(*inputs)
        for each, mode in modes:
            each.training = mode
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"gives {what} for one item; it must give (1, D)", key=name, value=type(module).__name__)
        return found.shape[1]


def _project(width: int, feature_dim: int, layers: int, *, key: str) -> nn.Module:
    if layers == 0:
        if width != feature_dim:
            rule = f"leaves features of {width} numbers as they are, where feature_dim={feature_dim}; use 1"
            raise UserError(rule, key=key, value=0)
        return nn.Identity()
    if layers == 1:
        return nn.Linear(width, feature_dim)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, feature_dim))


def _takes_mask(text: nn.Module) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in kinds for each in inspect.signature(text.forward).parameters.values()) > 1


def _digest(rows: Sequence[Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(row.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
