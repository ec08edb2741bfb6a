"""What `m2-train` says at the start about the contrastive batch and the objectives."""

from __future__ import annotations

from typing import Any

import pytest

from m2_encoder.objectives.base import Objective
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.matching import Matching
from m2_encoder.runs.start import describe_batch, describe_passes, describe_start


@pytest.mark.parametrize(
    ("strategy", "ranks", "per_node", "expected"),
    [
        ({"micro_batches": 4}, 1, 1, "1 rank x 4 micro-batches x 32 rows = 128 rows in one group"),
        (
            {"group_size": 2, "micro_batches": 4},
            4,
            4,
            "2 ranks x 4 micro-batches x 8 rows = 64 rows in each of 2 groups",
        ),
        ({"group_nodes": 1}, 8, 4, "4 ranks x 1 micro-batch x 16 rows = 64 rows in each of 2 groups"),
        ({"group_size": 1}, 2, 2, "1 rank x 1 micro-batch x 64 rows = 64 rows in each of 2 groups"),
    ],
)
def test_batch_in_words(strategy: dict[str, Any], ranks: int, per_node: int, expected: str) -> None:
    cfg = {"strategy": strategy, "data": {"global_batch_size": 128}}
    assert describe_batch(cfg, world_size=ranks, ranks_per_node=per_node) == f"contrastive batch: {expected}"


def test_passes_over_the_samples() -> None:
    assert describe_passes(570, steps=100, batch_size=128) == "100 steps of 128 pass 22.5 times over 570 samples"
    assert describe_passes(12_800, steps=100, batch_size=128).endswith("1.0 times over 12,800 samples")
    few = describe_passes(19_000, steps=100, batch_size=128)
    assert few == "100 steps of 128 pass 0.7 times over 19,000 samples; once takes trainer.max_steps=149"


def say(weights: str | None = None, max_steps: int = 10, **objectives: Objective) -> list[str]:
    cfg = {
        "strategy": {},
        "data": {"global_batch_size": 128},
        "trainer": {"max_steps": max_steps},
        "model": {"weights": weights},
    }
    return describe_start(cfg, objectives, world_size=1, ranks_per_node=1)


BATCH = "contrastive batch: 1 rank x 1 micro-batch x 128 rows = 128 rows in one group"


def test_a_contrastive_batch_needs_an_objective_that_compares_rows() -> None:
    assert say(cmlm=MaskedLanguage()) == []
    assert say(cmlm=MaskedLanguage(), cmim=MaskedImage()) == []
    assert say(cmlm=MaskedLanguage(), itc=ImageTextContrastive()) == [BATCH]


@pytest.mark.parametrize(
    ("schedule", "counts"),
    [
        (None, True),
        ({0: 0, 10: 0, 11: 1}, False),
        ({0: 0, 10: 1}, True),
        ({10: 0, 20: 1}, False),
        ({9: 0, 20: 1}, False),
        ({8: 0, 20: 1}, True),
        ({0: 1, 1: 0}, True),
        ({0: 0, 4: 0, 5: 1, 6: 0}, True),
        ({3: 0, 4: 2, 5: 0}, True),
    ],
)
def test_an_objective_that_never_counts_is_said(schedule: dict[int, float] | None, counts: bool) -> None:
    said = "objective.cmlm never counts: its schedule is 0 at all steps before trainer.max_steps=10"
    assert say(cmlm=MaskedLanguage(schedule=schedule), cmim=MaskedImage()) == ([] if counts else [said])


def test_choosing_by_features_that_nothing_trains_is_said() -> None:
    way_out = "features that nothing in this run trains; add itc to objective=[...], or start from model.weights"
    assert say(itm=Matching()) == [BATCH, f"objective.itm chooses hard negatives by {way_out}"]
    assert say(itm=Matching(), itc=ImageTextContrastive()) == [BATCH]
    assert say("some.ckpt", itm=Matching()) == [BATCH]
    assert say(cmim=MaskedImage(masking="attentive")) == [f"objective.cmim chooses patches by {way_out}"]
    assert say(cmim=MaskedImage(masking="attentive"), itc=ImageTextContrastive()) == [BATCH]
