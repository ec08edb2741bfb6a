"""Under every adaptation, two ranks, in one piece or several, give the loss and the gradients of one process.

As `test_objective_ranks`: real gloo processes and the real training module, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch.distributed as dist

from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.training.adaptation import Adaptation
from m2_encoder.training.adaptations.last import Last
from m2_encoder.training.adaptations.locked import Locked
from m2_encoder.training.adaptations.lora import Lora
from tests.distributed.test_objective_ranks import BlockMatching
from tests.support.objectives import Numbers, build_bench, make_batch, part_of, take_numbers
from tests.support.ranks import run_ranks
from tests.support.slow_parts import choose_parts, mark_parts

RANKS, ROWS = 2, 8  # of all ranks
RUNS = {"contrast": ((1, True), (4, True)), "mixture": ((2, False), (4, True))}
"""Objectives, with how many pieces a rank's rows are encoded in, and whether again in backward."""
CASES: dict[str, Callable[[], Adaptation]] = {
    "image tower": lambda: Locked(towers=["image"]),
    "text tower": lambda: Locked(towers=["text"], logit_scale=True),
    "first layer": lambda: Locked(layers=1, embeddings=["image", "text"]),
    "lora": lambda: Lora(rank=2),
    "lora of the last layer": lambda: Lora(rank=3, first_layer=1, also=["logit_scale", "projections", "norms"]),
    "last": Last,
}


FEW = ("image tower", "lora of the last layer", "last")
"""One of each kind. The others are slow."""


def run_cases(rank: int, group: dist.ProcessGroup | None, names: Iterable[str]) -> dict[str, Numbers]:
    found = {}
    ranks = 1 if group is None else RANKS
    batch = part_of(make_batch(ROWS, 2), rank, ranks)
    for name in names:
        for kind, ways in RUNS.items():
            for pieces, recompute in ways if ranks > 1 else ((1, True),):
                objectives = {"itc": ImageTextContrastive()}
                if kind == "mixture":
                    objectives |= {"cmlm": MaskedLanguage(weight=0.5), "matching": BlockMatching()}
                    objectives |= {"captioning": Captioning(weight=0.5)}
                topology = {"contrastive_group": group, "micro_batches": pieces, "recompute": recompute}
                module = build_bench(objectives, adaptation=CASES[name](), **topology)
                key = f"{name}, {kind}"
                found[f"{key} {pieces}" if ranks > 1 else key] = take_numbers(module, batch)
    return found


def work(rank: int, names: list[str]) -> dict[str, Numbers]:
    return run_cases(rank, dist.group.WORLD, names)


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest) -> dict[str, Numbers]:
    return run_cases(0, None, choose_parts(request, CASES, FEW))


@pytest.fixture(scope="module")
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Numbers]]:
    return run_ranks(work, RANKS, list(choose_parts(request, CASES, FEW)), folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("kind", "pieces"), [(kind, pieces) for kind, ways in RUNS.items() for pieces, _ in ways])
@pytest.mark.parametrize("name", mark_parts(CASES, FEW))
def test_ranks_and_pieces_equal_one_process(
    name: str, kind: str, pieces: int, alone: dict[str, Numbers], together: list[dict[str, Numbers]]
) -> None:
    expected = alone[f"{name}, {kind}"]
    moved = sum(float(np.abs(value).max()) > 1e-6 for key, value in expected.items() if not key.startswith("loss/"))
    assert moved >= 3, "gradients near 0 would prove nothing"
    for result in together:
        found = result[f"{name}, {kind} {pieces}"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-8, atol=1e-11, err_msg=key)
