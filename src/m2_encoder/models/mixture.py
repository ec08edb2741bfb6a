"""A feed-forward network as a mixture: copies of it, of which every token passes a few that a router chooses.

In this project an expert is the branch of a modality (`multiway.EXPERTS`). What papers call the experts of a mixture
are its *copies* here; the network of the branch itself is the first of them.

Letters: M tokens · D width · C copies · k copies that a token passes.

Reference: sparse upcycling (arXiv:2212.05055); CLIP-MoE (arXiv:2409.19291); the router, Switch (arXiv:2101.03961).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.unpadded_text import UnpaddedText

ROUTER_STD = 0.02
"""Of the router's matrix at the start: its input is normalised, so that logits of 768 numbers differ by about 0.5."""


class RouterOutput(NamedTuple):
    """What a router said of the tokens of a pass."""

    logits: Tensor  # (B, N, C), fp32 at least; meaningless on padding
    chosen: Tensor  # the copies that each token passed, the best one first, (B, N, k) int64


class Routing:
    """Takes what the routers of a pass say, from the lowest layer up."""

    def __init__(self) -> None:
        self._outputs: list[RouterOutput] | None = []

    def add(self, output: RouterOutput) -> None:
        """Take one more, unless they have been read: layers that run again in backward add nothing."""
        if self._outputs is not None:
            self._outputs.append(output)

    def extend(self, other: Routing, unpadded: UnpaddedText | None) -> None:
        """Take those of a layer, (1, M, …) if `unpadded`."""
        for output in other.take():
            self.add(output if unpadded is None else RouterOutput(*map(unpadded.pad, output)))

    def take(self) -> list[RouterOutput]:
        """All of them, once."""
        found, self._outputs = self._outputs or [], None
        return found


class FeedForwardParts(Protocol):
    """What a feed-forward network is made of."""

    fc1: nn.Linear
    ffn_inner_norm: nn.LayerNorm
    fc2: nn.Linear


def feed_forward(net: FeedForwardParts, x: Tensor) -> Tensor:
    """(…, D), normalised, to (…, D). GELU is the exact (erf) one."""
    output: Tensor = net.fc2(net.ffn_inner_norm(functional.gelu(net.fc1(x))))
    return output


class FeedForwardCopy(nn.Module):
    """A copy of an expert's feed-forward network, of its dtype and on its device."""

    def __init__(self, expert: FeedForwardParts) -> None:
        super().__init__()
        self.fc1 = copy.deepcopy(expert.fc1)
        self.ffn_inner_norm = copy.deepcopy(expert.ffn_inner_norm)
        self.fc2 = copy.deepcopy(expert.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """As `feed_forward`."""
        return feed_forward(self, x)


class Mixture(nn.Module):
    """Further copies of an expert's feed-forward network, and the router.

    A token passes the k copies of the largest logits; their outputs are summed with the softmax of these k, so that
    equal copies give the output of one. At the start they are equal.

    Args:
        expert: whose network it is.
        config: of the model.
    """

    def __init__(self, expert: FeedForwardParts, config: M2EncoderConfig) -> None:
        super().__init__()
        self.top_k = config.mixture_top_k
        like = expert.fc1.weight
        self.router = nn.Linear(
            config.embed_dim, config.mixture_copies, bias=False, device=like.device, dtype=like.dtype
        )
        self.copies = nn.ModuleList(FeedForwardCopy(expert) for _ in range(config.mixture_copies - 1))
        self.reset(expert)

    @torch.no_grad()
    def reset(self, expert: FeedForwardParts) -> None:
        """As at the start: draw the router anew, and copy the expert's values."""
        nn.init.normal_(self.router.weight, std=ROUTER_STD)
        for each in self.copies:
            for name in ("fc1", "ffn_inner_norm", "fc2"):
                each.get_submodule(name).load_state_dict(getattr(expert, name).state_dict())

    def forward(self, x: Tensor, first: Callable[[Tensor], Tensor], routing: Routing | None = None) -> Tensor:
        """(B, N, D), normalised, to (B, N, D).

        Args:
            x: the tokens.
            first: the network of the expert itself, (…, D) to (…, D).
            routing: takes what the router says; None for nobody.
        """
        logits = self._score(x)
        best, chosen = logits.topk(self.top_k)
        if routing is not None:
            routing.add(RouterOutput(logits, chosen))
        nets = [first, *self.copies]
        # Shapes of a compiled or exported graph must not depend on data: there every copy sees every token.
        run = _run_all if torch.compiler.is_compiling() or x.is_meta else _run_chosen
        outputs = run(nets, x, chosen)
        shares = best.softmax(dim=-1).to(outputs.dtype).unsqueeze(-1)
        # Shares sum to 1, so this is the weighted sum; equal outputs stay as they are, to the bit.
        first_output = outputs[..., 0, :]
        return first_output + (shares[..., 1:, :] * (outputs[..., 1:, :] - first_output.unsqueeze(-2))).sum(dim=-2)

    def _score(self, x: Tensor) -> Tensor:
        """Logits, (…, C), in fp32 at least: rounded ones would choose other copies (Switch, 2.4)."""
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(precise), self.router.weight.to(precise))


def _run_all(nets: Sequence[Callable[[Tensor], Tensor]], x: Tensor, chosen: Tensor) -> Tensor:
    """Outputs of the chosen networks, (…, k, D), of which each sees all tokens."""
    outputs = torch.stack([net(x) for net in nets], dim=-2)
    return outputs.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, x.shape[-1]))


def _run_chosen(nets: Sequence[Callable[[Tensor], Tensor]], x: Tensor, chosen: Tensor) -> Tensor:
    """The same, where each network sees the tokens that chose it; one that no token chose has a gradient of 0."""
    pairs = chosen.flatten()
    order = pairs.argsort(stable=True)
    sizes = torch.bincount(pairs, minlength=len(nets)).tolist()
    parts = x.flatten(0, -2).index_select(0, order // chosen.shape[-1]).split(sizes)
    outputs = torch.cat([net(part) for net, part in zip(nets, parts, strict=True)])
    return outputs.index_select(0, order.argsort()).unflatten(0, chosen.shape)
