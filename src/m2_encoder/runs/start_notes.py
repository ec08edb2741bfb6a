"""What `m2-train` says at the start about the contrastive batch and the objectives of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from m2_encoder.distributed.topology import GroupTopology, describe_contrastive_batch, resolve_group_size
from m2_encoder.objectives.base import LocalObjective, Objective, PairObjective, ever_counts
from m2_encoder.objectives.masked_image import MaskedImage


def describe_start(
    cfg: Mapping[str, Any], objectives: Mapping[str, Objective], *, world_size: int, ranks_per_node: int
) -> list[str]:
    """Lines about what is trained: the contrastive batch, and what works but may not be meant.

    Args:
        cfg: the resolved configuration.
        objectives: those that count, by name.
        world_size: W.
        ranks_per_node: processes per node.
    """
    lines = []
    if any(not isinstance(objective, LocalObjective) for objective in objectives.values()):
        lines.append(describe_batch(cfg, world_size=world_size, ranks_per_node=ranks_per_node))
    return [*lines, *_find_pauses(cfg, objectives), *_find_blind_choices(cfg, objectives)]


def describe_batch(cfg: Mapping[str, Any], *, world_size: int, ranks_per_node: int) -> str:
    """The contrastive batch of a configuration in words.

    Args:
        cfg: the resolved configuration.
        world_size: W.
        ranks_per_node: processes per node.
    """
    strategy = cfg["strategy"]
    group_size = resolve_group_size(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        group_size=strategy.get("group_size"),
        group_nodes=strategy.get("group_nodes"),
    )
    return describe_contrastive_batch(
        GroupTopology(world_size, group_size),
        micro_batches=strategy.get("micro_batches", 1),
        rows_per_rank=cfg["data"]["global_batch_size"] // world_size,
    )


def _find_pauses(cfg: Mapping[str, Any], objectives: Mapping[str, Objective]) -> Iterator[str]:
    """Objectives of which nothing would come: said and not refused, so that a long run can be tried for a few steps."""
    steps = cfg["trainer"]["max_steps"]
    for name, objective in objectives.items():
        if objective.schedule is not None and not ever_counts(objective.schedule, steps):
            yield f"objective.{name} never counts: its schedule is 0 at all steps before trainer.max_steps={steps}"


def _find_blind_choices(cfg: Mapping[str, Any], objectives: Mapping[str, Objective]) -> Iterator[str]:
    """Objectives that choose by similarities of features which are random and stay so."""
    trained = any("features" in objective.trained_parts() for objective in objectives.values())
    if trained or cfg["model"].get("weights") is not None:
        return
    for name, objective in objectives.items():
        is_attentive = isinstance(objective, MaskedImage) and objective.patch_ratio is None
        if is_attentive or isinstance(objective, PairObjective):
            yield (
                f"objective.{name} chooses {'patches' if is_attentive else 'wrong partners'} by features that nothing "
                "in this run trains; add itc to objective=[...], or start from model.weights"
            )
