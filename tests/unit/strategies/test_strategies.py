"""What the strategies take, refuse and say before any process is started; what they do is in `tests/distributed`."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
from lightning.pytorch.strategies import Strategy

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.strategies.grouped_ddp import GroupedDDPStrategy
from m2_encoder.strategies.grouped_fsdp import GroupedFSDPStrategy
from m2_encoder.strategies.single import LocalStrategy
from m2_encoder.types import ContrastiveTopology
from tests.support.training import make_module, tiny_config

ALL = [LocalStrategy, GroupedDDPStrategy, GroupedFSDPStrategy]
GROUPED = [GroupedDDPStrategy, GroupedFSDPStrategy]


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("micro_batches", [0, -1, 2.0, True, None, "2"])
def test_impossible_micro_batches_are_refused(strategy: type[Strategy], micro_batches: Any) -> None:
    with pytest.raises(UserError, match=r"^micro_batches=.*must be a whole number, 1 or more"):
        strategy(micro_batches=micro_batches)


@pytest.mark.parametrize("strategy", ALL)
def test_accumulation_is_as_given(strategy: Any) -> None:
    assert (strategy().micro_batches, strategy().recompute) == (1, True)
    built = strategy(micro_batches=4, recompute=False)
    assert (built.micro_batches, built.recompute) == (4, False)


@pytest.mark.parametrize("strategy", GROUPED)
def test_two_names_for_a_size_are_refused(strategy: type[Strategy]) -> None:
    with pytest.raises(UserError, match=r"strategy\.group_nodes=1: must be null when strategy\.group_size=2"):
        strategy(group_size=2, group_nodes=1)


@pytest.mark.parametrize("strategy", GROUPED)
@pytest.mark.parametrize("name", ["contrastive_group", "topology"])
def test_groups_are_not_read_before_there_are_processes(strategy: type[Strategy], name: str) -> None:
    with pytest.raises(RuntimeError, match="only after the strategy has set up the processes"):
        getattr(strategy(), name)


def test_one_process_has_no_group() -> None:
    strategy = LocalStrategy("cpu", micro_batches=2)
    assert isinstance(strategy, ContrastiveTopology)
    assert strategy.contrastive_group is None


@pytest.mark.parametrize("strategy", [LocalStrategy, GroupedDDPStrategy])
@pytest.mark.parametrize("wanted", [False, True])
def test_layers_are_checkpointed_where_that_is_wanted(strategy: Any, wanted: bool) -> None:
    model = M2Encoder(tiny_config())
    strategy(activation_checkpointing=wanted).parallelize(model)
    assert model.backbone.recompute_layers is wanted
    assert model.vl_encoder.recompute_layers is wanted


def test_further_arguments_reach_ddp() -> None:
    assert GroupedDDPStrategy(group_size=2, find_unused_parameters=True)._ddp_kwargs == {"find_unused_parameters": True}


class Foreign(lightning.LightningModule):
    """Somebody else's."""


@pytest.mark.parametrize("strategy", ALL)
def test_micro_batches_of_a_module_that_does_not_read_them_are_refused(strategy: Any) -> None:
    with pytest.raises(
        UserError, match=r"^strategy\.micro_batches=4: must be 1 for Foreign, .*reads_micro_batches = True"
    ):
        strategy(micro_batches=4).connect(Foreign())
    for module in (Foreign(), make_module()):
        strategy(micro_batches=1).connect(module)
    strategy(micro_batches=4).connect(make_module())
    reads = Foreign()
    reads.reads_micro_batches = True
    strategy(micro_batches=4).connect(reads)
