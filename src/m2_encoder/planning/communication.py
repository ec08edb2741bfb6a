"""Bytes and collectives of the contrastive loss per rank and optimizer step, as formulas.

Letters: W world size · g ranks in a contrastive group · B rows of a rank in one micro-batch · k micro-batches of an
optimizer step · E feature dim · b bytes of a feature element on the wire · h contrastive heads.
"""

from __future__ import annotations

from typing import NamedTuple

from m2_encoder.errors import UserError

_STATISTIC_BYTES = 4  # logsumexps travel in fp32, whatever the features are
_STATISTICS = 2  # of each row: one logsumexp over the texts and one over the images

METHODS: dict[str, str] = {
    "full_logits": "all ranks gather with gradient, every rank computes all logits",
    "local_loss": "all ranks gather with gradient, a rank computes the logits of its own rows",
    "repetition": "as full_logits, with batch accumulation that repeats the gather for every micro-batch",
    "grouped_local_loss": "as local_loss, inside a contrastive group",
    "local_form": "GBA-ITC: a group gathers features and logsumexps, backward sends nothing",
}
"""Ways to compute image-text contrast over several ranks, by name, with what they do."""


class CommunicationCost(NamedTuple):
    """What one rank sends for the contrastive loss in one optimizer step."""

    bytes_sent: int  # by a ring, forward and backward together
    collectives: int  # operations on the critical path; nothing else can run meanwhile


def contrastive_bytes(
    method: str,
    *,
    world_size: int,
    group_size: int,
    rows: int,
    micro_batches: int = 1,
    feature_dim: int,
    bytes_per_element: int,
    heads: int = 1,
) -> CommunicationCost:
    """Communication of the contrastive loss alone; gradients of parameters are extra.

    ====================  ==========================  ===========
    method                bytes sent per head         collectives
    ====================  ==========================  ===========
    full_logits           4k(W-1)BEb                  4kh
    local_loss            4k(W-1)BEb                  4kh
    repetition            4k²(W-1)BEb                 4kh
    grouped_local_loss    4k(g-1)BEb                  4kh
    local_form            2k(g-1)BEb + 8k(g-1)B       2
    ====================  ==========================  ===========

    The 4 is images and texts, gathered and reduce-scattered. Heads of the local form travel together.

    Args:
        method: a key of `METHODS`.
        world_size: W.
        group_size: g; only the grouped methods depend on it.
        rows: B, rows of a rank in one micro-batch.
        micro_batches: k.
        feature_dim: E.
        bytes_per_element: b.
        heads: h, pairs of image and text features that are contrasted.

    Raises:
        UserError: for an unknown method, a number below 1, or a group that does not divide the world.

    Reference: derived for this project from M2-Encoder (arXiv:2401.15896), grouped aggregation with batch accumulation.
    """
    _check(method, world_size, group_size, rows, micro_batches, feature_dim, bytes_per_element, heads)
    ranks = group_size if method in {"grouped_local_loss", "local_form"} else world_size
    if ranks == 1:
        return CommunicationCost(0, 0)
    received_rows = micro_batches * (ranks - 1) * rows
    feature_bytes = heads * received_rows * feature_dim * bytes_per_element
    if method == "local_form":
        return CommunicationCost(2 * feature_bytes + heads * _STATISTICS * _STATISTIC_BYTES * received_rows, 2)
    repeats = micro_batches if method == "repetition" else 1
    return CommunicationCost(4 * repeats * feature_bytes, 4 * micro_batches * heads)


def _check(method: str, world_size: int, group_size: int, *others: int) -> None:
    names = ("world_size", "group_size", "rows", "micro_batches", "feature_dim", "bytes_per_element", "heads")
    for name, value in zip(names, (world_size, group_size, *others), strict=True):
        if value < 1:
            raise UserError(f"{name}={value} must be 1 or more")
    if method not in METHODS:
        raise UserError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if world_size % group_size:
        raise UserError(f"group_size={group_size} must divide world_size={world_size}")
