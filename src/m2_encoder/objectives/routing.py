"""Balance of the copies of mixtures, and size of their routers' logits.

For a sample of T tokens, of which each passes k of C copies, with the router's softmax p_tc:

    balance = sum_c f_c P_c,    f_c = C / (k T) * (tokens that pass copy c),    P_c = mean_t p_tc
    z       = mean_t (log sum_c exp(logit_tc))^2

A term is balance + z_weight * z of one sample and layer; the loss is the mean over the terms of all ranks. Padding is
no token. The balance is 1 where all copies get the same; f has no gradient. It is that of each sample, not of a batch,
so that micro-batches and ranks do not change it.

Reference: DeepSeek-V3 (arXiv:2412.19437), Eq. 17-20, for softmax; router z-loss: ST-MoE (arXiv:2202.08906), Eq. 5.

Letters: b images of a piece · k' captions of each · L layers with a mixture.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.bounds import NotNegative, check_bounds
from m2_encoder.models.mixture import RouterOutput
from m2_encoder.objectives.base import LocalObjective, LocalTerms
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.objectives.schedule import Schedule


class _Routed(NamedTuple):
    """Sums over layers, by sample."""

    balance: Tensor  # (b,)
    z: Tensor  # (b,)
    shares: Tensor  # of the tokens' places that each copy got, (b, C), constant
    layers: int  # summed over


class BalancedRouting(LocalObjective):
    """The loss above, of the passes of images and clean captions.

    Its scores are the means of `balance` and `z`, and for each copy the share of the places of image or text tokens
    that it got: `image_share_0` and so on; 1 / C is even.

    Args:
        weight: see `Objective`.
        schedule: see `Objective`.
        z_weight: of z beside the balance.
        text_expert: that of other objectives; nothing here depends on it.
    """

    passes = frozenset({"routing"})

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 0.01,
        schedule: Schedule | None = None,
        z_weight: NotNegative = 0.1,
        text_expert: bool = False,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule, text_expert=text_expert)
        self._z_weight = z_weight

    def trained_parts(self) -> frozenset[str]:
        """None: routers train with the backbone."""
        return frozenset()

    def terms(self, passes: PiecePasses) -> LocalTerms:
        """Of each caption: its own, and those of its image."""
        every = torch.ones(passes.image_hidden.shape[:2], dtype=torch.bool, device=passes.image_hidden.device)
        routed = {
            "image": _measure(passes.image_routing, every),
            "text": _measure(passes.text_routing, passes.text.mask),
        }
        captions = passes.batch.captions_per_image
        found = {kind: each for kind, each in routed.items() if each is not None}
        layers = sum(each.layers for each in found.values())
        repeats = {"image": captions, "text": 1}
        balance, z = (
            sum(getattr(each, name).repeat_interleave(repeats[kind]) for kind, each in found.items())
            for name in ("balance", "z")
        )
        scores = {"balance": balance.detach(), "z": z.detach()}
        for kind, each in found.items():
            shares = each.shares.repeat_interleave(repeats[kind], dim=0) * (layers / each.layers)
            scores |= {f"{kind}_share_{copy}": share for copy, share in enumerate(shares.unbind(dim=1))}
        self.score_names = tuple(scores)
        counts = torch.full(balance.shape, layers, device=balance.device)
        return LocalTerms(balance + self._z_weight * z, counts, scores)


def _measure(outputs: list[RouterOutput], mask: Tensor) -> _Routed | None:
    """Of all layers with a mixture; None without any.

    Args:
        outputs: of each of them.
        mask: True on tokens, (b, N) bool.
    """
    if not outputs:
        return None
    logits = torch.stack([output.logits for output in outputs])  # (L, b, N, C)
    chosen = torch.stack([output.chosen for output in outputs])  # (L, b, N, k)
    copies, top_k = logits.shape[-1], chosen.shape[-1]
    tokens = mask.to(logits.dtype)
    weights = (tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(-1)  # of the mean over tokens
    passed = functional.one_hot(chosen, copies).sum(dim=-2).to(logits.dtype)
    shares = (passed * weights).sum(dim=-2) / top_k  # (L, b, C)
    probabilities = (logits.softmax(dim=-1) * weights).sum(dim=-2)
    balance = copies * (shares * probabilities).sum(dim=-1)
    z = (logits.logsumexp(dim=-1).square() * weights.squeeze(-1)).sum(dim=-1)
    return _Routed(balance.sum(dim=0), z.sum(dim=0), shares.sum(dim=0), len(outputs))
