"""Two towers put together from modules that exist: one for pictures, one for texts, each locked or trained.

With a locked, pretrained image tower this is LiT (arXiv:2111.07991); with a locked sentence encoder as the text tower
it is the way of LLM2CLIP (arXiv:2411.04997). It is trained as somebody else's model is (`TwoTowers`).

Letters: B batch · S side of a picture · T tokens · E feature dim.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from m2_encoder.bounds import Count, Index, check_bounds
from m2_encoder.errors import UserError

_TEMPERATURE = 0.07  # CLIP's at the start


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
        feature_dim: E.
        locked: `image`, `text`, both or none.
        cached_rows: outputs of each locked module that are kept by their input, the oldest dropped first; pays where
            inputs come again, as captions do, and pictures without augmentation.

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
        feature_dim: Count = 256,
        locked: Sequence[Literal["image", "text"]] = ("image",),
        cached_rows: Index = 0,
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
        self.image_proj = nn.Linear(self._try("image", torch.zeros(1, 3, image_size, image_size)), feature_dim)
        self.text_proj = nn.Linear(self._try("text", ids, torch.ones_like(ids, dtype=torch.bool)), feature_dim)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(_TEMPERATURE)))

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
            return self._look_up(self._kept[name], encode, inputs) if self._cached_rows else encode(*inputs)

    def _look_up(self, kept: dict[bytes, Tensor], encode: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """Rows that were seen before are looked up, the others are computed together."""
        keys = [_digest([each[row] for each in inputs]) for row in range(len(inputs[0]))]
        new = {key: row for row, key in enumerate(keys) if key not in kept}
        if new:
            rows = torch.tensor([*new.values()], device=inputs[0].device)
            computed = encode(*(each[rows] for each in inputs))
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


def _takes_mask(text: nn.Module) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in kinds for each in inspect.signature(text.forward).parameters.values()) > 1


def _digest(rows: Sequence[Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(row.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
