from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.models.config import NAME_TO_CONFIG
from m2_encoder.planning.cost import ModelCost, estimate_cost
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.memory import count_logits, estimate_memory
from m2_encoder.planning.setting import Setting
from m2_encoder.planning.step import Prediction, predict

A100 = Hardware(
    devices_per_node=8, device_memory_gb=80, reserved_memory_gb=0, peak_tflops=312, peak_tflops_fp32=19.5, mfu=0.45,
    memory_gb_per_s=2039, intra_node_gb_per_s=235, intra_node_latency_us=3.4, inter_node_gb_per_s=100,
    inter_node_latency_us=9.6, collective_latency_us=8.4, overlap=0.8, straggler_std=0.0,
)  # fmt: skip
JITTERY = dataclasses.replace(A100, straggler_std=0.1)
COSTS = {name: estimate_cost(config) for name, config in NAME_TO_CONFIG.items()}
BASE, LARGE = COSTS["m2-encoder-0.4b"], COSTS["m2-encoder-1b"]


def _predict(cost: ModelCost = BASE, hardware: Hardware = A100, **values: Any) -> Prediction:
    setting = {"world_size": 256, "group_size": 8, "rows": 64, "feature_bytes": 2, **values}
    if setting.get("method", "local_form") != "local_form":
        setting["group_size"] = setting["world_size"]
    return predict(cost, hardware, Setting(**setting))


def _gain(baseline: str, cost: ModelCost, rows: int, hardware: Hardware = A100, **values: Any) -> float:
    """How much longer a step of a baseline takes than a grouped one with the same rows."""
    slow = _predict(cost, hardware, rows=rows, method=baseline, **values)
    return slow.time.total / _predict(cost, hardware, rows=rows, **values).time.total - 1


# ------------------------------------------------------------------ where grouping pays, 256 A100, features in 16 bits


@pytest.mark.parametrize(("name", "rows"), [("m2-encoder-0.4b", 115), ("m2-encoder-1b", 360)])
def test_sixty_percent_over_full_logits_needs_many_rows(name: str, rows: int) -> None:
    assert _gain("full_logits", COSTS[name], rows) == pytest.approx(0.6, abs=0.05)
    assert _gain("full_logits", COSTS[name], rows // 2) < 0.4


def test_the_largest_model_never_gains_sixty_percent() -> None:
    sharded = {"strategy": "grouped_fsdp"}
    rows = [2**power for power in range(3, 12)]
    runs = [_predict(COSTS["m2-encoder-10b"], rows=n, method="full_logits", **sharded) for n in rows]
    fitting = [n for n, run in zip(rows, runs, strict=True) if run.memory.total <= 80e9]
    assert fitting
    assert max(_gain("full_logits", COSTS["m2-encoder-10b"], n, **sharded) for n in fitting) < 0.05


@pytest.mark.parametrize("rows", [32, 64, 128, 256])
@pytest.mark.parametrize("cost", [BASE, LARGE], ids=lambda cost: cost.name)
def test_little_over_a_good_local_loss(cost: ModelCost, rows: int) -> None:
    assert 0 < _gain("local_loss", cost, rows) < 0.12


def test_slow_networks_and_many_ranks_gain_more() -> None:
    slow = dataclasses.replace(A100, inter_node_gb_per_s=12.5)
    alone = {hardware: _gain("local_loss", LARGE, 128, hardware) for hardware in (A100, slow)}
    many = {hardware: _gain("local_loss", LARGE, 128, hardware, world_size=1024) for hardware in (A100, slow)}
    assert alone[A100] < alone[slow] < many[slow]
    assert alone[A100] < many[A100] < many[slow]


# ------------------------------------------------------------------------------------------------ parts of the step


def test_encoding_is_operations_over_speed() -> None:
    time = _predict(rows=16, micro_batches=4).time
    assert time.forward == pytest.approx(64 * BASE.forward_flops / (312e12 * 0.45))
    assert time.backward == pytest.approx(64 * BASE.backward_flops / (312e12 * 0.45))
    assert time.recomputation == pytest.approx(time.forward)
    assert _predict(rows=16, micro_batches=4, recompute=False).time.recomputation == 0
    assert _predict(activation_checkpointing=True).time.recomputation == _predict().time.forward
    assert time.total == pytest.approx(sum(time))


def test_gradients_hide_behind_backward_alone() -> None:
    naked = dataclasses.replace(A100, overlap=0)
    seconds = _predict(hardware=naked, rows=1).time.gradient_communication
    assert seconds == pytest.approx(_predict(hardware=naked, rows=64).time.gradient_communication)
    assert _predict(rows=512).time.gradient_communication == 0
    one, two = (_predict(rows=8 // k, micro_batches=k).time.gradient_communication for k in (1, 2))
    assert one < two, "only the last micro-batch completes gradients"


def test_fsdp_moves_parameters_for_every_micro_batch() -> None:
    sent = [_predict(strategy="grouped_fsdp", micro_batches=k).gradient_bytes for k in (1, 2, 4)]
    assert sent[2] == pytest.approx(2 * sent[1])
    assert sent[1] > 2 * sent[0], "recomputation gathers once more"
    assert len({_predict(micro_batches=k).gradient_bytes for k in (1, 2, 4)}) == 1


def test_jitter_costs_groups_less_but_not_with_fsdp() -> None:
    waiting = [_predict(hardware=JITTERY, group_size=g).time.waiting for g in (1, 8, 64, 256)]
    assert waiting == sorted(waiting)
    assert waiting[0] < 0.9 * waiting[-1]
    sharded = [_predict(hardware=JITTERY, group_size=g, strategy="grouped_fsdp").time.waiting for g in (1, 256)]
    assert sharded[0] == sharded[1] == pytest.approx(waiting[-1])


def test_meeting_for_every_micro_batch_costs_more() -> None:
    values: dict[str, Any] = {"hardware": JITTERY, "recompute": False}
    once, *again = (
        _predict(method="local_loss", rows=64 // k, micro_batches=k, **values).time.waiting for k in (1, 4, 16)
    )
    assert once < again[0] < again[1]
    grouped = {_predict(rows=64 // k, micro_batches=k, **values).time.waiting for k in (1, 4, 16)}
    assert max(grouped) == pytest.approx(min(grouped))
    assert max(grouped) < once


@given(
    group=st.integers(0, 5), more=st.integers(0, 3), k=st.integers(1, 8), rows=st.integers(1, 256),
    strategy=st.sampled_from(["grouped_ddp", "grouped_fsdp"]),
)  # fmt: skip
def test_larger_groups_never_cost_less(group: int, more: int, k: int, rows: int, strategy: str) -> None:
    small, large = (
        _predict(hardware=JITTERY, group_size=2**power, micro_batches=k, rows=rows, strategy=strategy)
        for power in (group, group + more)
    )
    assert large.time.total >= small.time.total * (1 - 1e-6)
    assert large.memory.total >= small.memory.total
    assert large.communication.bytes_sent >= small.communication.bytes_sent
    assert large.logits >= small.logits


# ------------------------------------------------------------------------------------------------------------ memory


@given(power=st.integers(0, 7), more=st.integers(1, 3), checkpointing=st.booleans())
def test_more_recomputed_micro_batches_never_need_more_memory(power: int, more: int, checkpointing: bool) -> None:
    few, many = (
        estimate_memory(
            LARGE,
            A100,
            Setting(
                world_size=64,
                group_size=8,
                rows=1024 // k,
                micro_batches=k,
                activation_checkpointing=checkpointing,
            ),
        )
        for k in (2**power, 2 ** (power + more))
    )
    assert many.activations < few.activations
    assert many.total < few.total


def test_without_recomputation_all_micro_batches_are_kept() -> None:
    kept, again = (_predict(rows=16, micro_batches=8, recompute=flag).memory.activations for flag in (False, True))
    assert kept == pytest.approx(8 * again, rel=0.05)


def test_states_of_ddp_by_hand() -> None:
    memory = _predict().memory
    assert memory.weights == 4 * BASE.parameters
    assert memory.weight_copies == 2 * BASE.parameters
    assert memory.gradients == 8 * BASE.trainable_parameters, "gradients and DDP's buckets"
    assert memory.optimizer == 8 * BASE.trainable_parameters


def test_fsdp_shares_the_states() -> None:
    few, many = (_predict(LARGE, strategy="grouped_fsdp", world_size=w, group_size=8).memory for w in (8, 64))
    assert many.optimizer == pytest.approx(few.optimizer / 8)
    assert many.weights < few.weights < _predict(LARGE).memory.weights
    assert few.weight_copies == 0


def test_logits() -> None:
    local = Setting(world_size=16, group_size=4, rows=8, micro_batches=2)
    assert count_logits(local, heads=1) == 2 * 16 * 64, "own rows against those of the group, both directions"
    naive = Setting(world_size=16, group_size=16, rows=16, method="full_logits")
    assert count_logits(naive, heads=2) == 2 * 2 * 256**2


def test_the_naive_head_needs_twenty_bytes_a_logit() -> None:
    naive = _predict(rows=128, method="full_logits").memory.contrast
    features = 2 * 768 * 32768 * (2 + 4)
    assert naive == pytest.approx(20 * 32768**2 + features)
    assert _predict(rows=128, group_size=256).memory.contrast < naive / 40
