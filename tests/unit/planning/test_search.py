from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.errors import UserError
from m2_encoder.models.config import NAME_TO_CONFIG
from m2_encoder.planning.cost import estimate_cost
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.search import Request, describe, enumerate_settings, find_baselines, find_best, scale_worlds
from m2_encoder.planning.step import predict

CLUSTER = Hardware(
    devices_per_node=8, device_memory_gb=80, reserved_memory_gb=3, peak_tflops=312, peak_tflops_fp32=19.5, mfu=0.45,
    memory_gb_per_s=2039, intra_node_gb_per_s=235, intra_node_latency_us=3.4, inter_node_gb_per_s=100,
    inter_node_latency_us=9.6, collective_latency_us=8.4, overlap=0.8, straggler_std=0.02,
)  # fmt: skip
COST = estimate_cost(NAME_TO_CONFIG["m2-encoder-1b"])


def _request(**values: Any) -> Request:
    return Request(**{"world_size": 64, "global_rows": 8192, "contrasted_rows": 2048, "memory_gb": 80.0, **values})


def test_every_setting_keeps_to_the_request() -> None:
    request = _request()
    found = list(enumerate_settings(request, CLUSTER))
    assert len(found) == len(set(found)) > 100
    for setting in found:
        assert setting.global_rows == request.global_rows
        assert setting.contrasted_rows >= request.contrasted_rows
    assert {setting.group_size for setting in found} == {16, 32, 64}
    assert {setting.micro_batches for setting in found} == {2**power for power in range(8)}


@settings(max_examples=40)
@given(
    memory_gb=st.floats(20, 200), less=st.floats(0.3, 1), power=st.integers(0, 3),
    strategy=st.sampled_from([None, "grouped_ddp", "grouped_fsdp"]),
)  # fmt: skip
def test_the_best_fits_and_nothing_that_fits_is_faster(
    memory_gb: float, less: float, power: int, strategy: str | None
) -> None:
    request = _request(memory_gb=memory_gb, contrasted_rows=1024 * 2**power, strategy=strategy)
    best = find_best(COST, CLUSTER, request)
    assert len({item.setting.group_size for item in best}) == len(best)
    everything = [predict(COST, CLUSTER, setting) for setting in enumerate_settings(request, CLUSTER)]
    fitting = [item.pairs_per_s for item in everything if item.memory.total <= memory_gb * 1e9]
    assert best[0].pairs_per_s == max(fitting)
    assert all(item.memory.total <= memory_gb * 1e9 for item in best)
    tighter = dataclasses.replace(request, memory_gb=less * memory_gb)
    if min(item.memory.total for item in everything) > tighter.memory_gb * 1e9:
        with pytest.raises(UserError, match="no setting fits"):
            find_best(COST, CLUSTER, tighter)
    else:
        assert find_best(COST, CLUSTER, tighter)[0].pairs_per_s <= best[0].pairs_per_s


def test_small_micro_batches_can_be_left_out() -> None:
    assert min(setting.rows for setting in enumerate_settings(_request(min_rows=16), CLUSTER)) == 16
    assert {setting.rows for setting in enumerate_settings(_request(min_rows=500), CLUSTER)} == {128}
    asked = enumerate_settings(_request(min_rows=16, micro_batches=64), CLUSTER)
    assert {setting.rows for setting in asked} == {2}, "a given k is taken at its word"


def test_memory_decides_what_is_computed_again() -> None:
    roomy, tight = (find_best(COST, CLUSTER, _request(memory_gb=gb))[0].setting for gb in (80, 20))
    assert not roomy.activation_checkpointing
    assert not roomy.encodes_again
    assert tight.activation_checkpointing or tight.encodes_again


def test_given_values_are_kept() -> None:
    values = {"group_size": 8, "micro_batches": 4, "strategy": "grouped_ddp", "recompute": False}
    (best,) = find_best(COST, CLUSTER, _request(**values))
    assert {name: getattr(best.setting, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_rows": 8200}, "global_batch_size=8200: must be a multiple of the 64 ranks; use 8192 or 8256"),
        ({"global_rows": 5}, "use 64 or 128"),
        ({"group_size": 12}, "group_size=12: must divide the 64 ranks and be node-aligned; use one of 1, 2, 4, 8, 16"),
        ({"micro_batches": 3}, "micro_batches=3: must divide the 128 rows of a rank; use one of 1, 2, 4"),
        ({"contrasted_rows": 10_000}, "group_batch_size=10000: all ranks together have 8192 rows"),
        ({"memory_gb": 2.0}, r"memory_gb=2: no setting fits; the smallest needs \d+\.\d GB \(grouped_fsdp, g 16"),
    ],
)
def test_impossible_requests(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_best(COST, CLUSTER, _request(**values))


def test_baselines_take_the_same_rows() -> None:
    local_loss, full_logits = find_baselines(COST, CLUSTER, _request())
    assert [item.setting.method for item in (local_loss, full_logits)] == ["local_loss", "full_logits"]
    assert {item.setting.global_rows for item in (local_loss, full_logits)} == {8192}
    assert min(item.setting.contrasted_rows for item in (local_loss, full_logits)) >= 2048
    assert local_loss.pairs_per_s > full_logits.pairs_per_s


def test_baselines_may_accumulate_as_long_as_they_contrast_enough() -> None:
    tight = _request(memory_gb=42.0, strategy="grouped_ddp", activation_checkpointing=False)
    for item in find_baselines(COST, CLUSTER, tight):
        assert item.setting.micro_batches > 1
        assert item.setting.contrasted_rows >= 2048
        assert item.setting.global_rows == 8192
        assert item.memory.total <= 42e9


def test_a_baseline_that_does_not_fit_says_so_by_its_memory() -> None:
    _, full_logits = find_baselines(COST, CLUSTER, _request(memory_gb=4.0))
    assert full_logits.memory.total > 4e9
    assert full_logits.setting.activation_checkpointing


def test_scaling_keeps_the_rows_of_a_rank() -> None:
    request = _request()
    planned = find_best(COST, CLUSTER, request)[0].setting
    points = scale_worlds(COST, CLUSTER, request, planned, world_sizes=(4, 64, 1024), fixed_group_size=8)
    assert [point.fixed is None for point in points] == [True, False, False]
    for point in points:
        for item in (point.best, point.full, point.local_loss, point.full_logits):
            assert item.setting.local_rows == planned.local_rows
            assert item.setting.world_size == point.world_size
        assert point.best.setting.contrasted_rows >= min(2048, point.world_size * 128)
        assert point.best.time.total <= point.full.time.total
    assert points[1].best.setting == planned


def test_what_does_not_fit_on_few_ranks_is_computed_again_there() -> None:
    request = _request(memory_gb=24.0)
    planned = find_best(COST, CLUSTER, dataclasses.replace(request, memory_gb=80.0))[0].setting
    few, many = scale_worlds(COST, CLUSTER, request, planned, world_sizes=(8, 1024), fixed_group_size=8)
    assert planned.micro_batches == 1
    for point in (few, many):
        assert point.best.memory.total <= 24e9
        assert point.best.setting.encodes_again or point.best.setting.activation_checkpointing


def test_description() -> None:
    setting = find_best(COST, CLUSTER, _request(micro_batches=4, recompute=True, activation_checkpointing=True))[
        0
    ].setting
    assert describe(setting) == f"{setting.strategy}, g 16, k 4, B 32, recompute, activation checkpointing"
