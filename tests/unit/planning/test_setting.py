from __future__ import annotations

from typing import Any

import pytest

from m2_encoder.errors import UserError
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.setting import Setting, group_sizes_of

CONSTANTS: dict[str, Any] = {
    "devices_per_node": 8, "device_memory_gb": 80, "reserved_memory_gb": 3, "peak_tflops": 312,
    "peak_tflops_fp32": 19.5, "mfu": 0.45, "memory_gb_per_s": 2039, "intra_node_gb_per_s": 235,
    "intra_node_latency_us": 3.4, "inter_node_gb_per_s": 100, "inter_node_latency_us": 9.6,
    "collective_latency_us": 8.4, "overlap": 0.8, "straggler_std": 0.02,
}  # fmt: skip


def test_rows() -> None:
    grouped = Setting(world_size=32, group_size=8, rows=16, micro_batches=4)
    assert (grouped.local_rows, grouped.global_rows, grouped.contrasted_rows) == (64, 2048, 512)
    baseline = Setting(world_size=32, group_size=32, rows=16, micro_batches=4, method="local_loss")
    assert baseline.contrasted_rows == 512, "each micro-batch has a loss of its own"


@pytest.mark.parametrize(
    ("values", "encodes_again", "alive"),
    [
        ({}, False, 1),
        ({"micro_batches": 4}, True, 1),
        ({"micro_batches": 4, "recompute": False}, False, 4),
        ({"micro_batches": 4, "method": "local_loss"}, False, 1),
    ],
)
def test_what_is_kept(values: dict[str, Any], encodes_again: bool, alive: int) -> None:
    setting = Setting(world_size=8, group_size=8, rows=2, **values)
    assert (setting.encodes_again, setting.micro_batches_alive) == (encodes_again, alive)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 0}, "rows=0 must be 1 or more"),
        ({"method": "repetition"}, "method=repetition must be one of local_form"),
        ({"strategy": "ddp"}, "strategy=ddp must be one of grouped_ddp, grouped_fsdp"),
        ({"group_size": 3}, "group_size=3 must divide world_size=8"),
        ({"method": "local_loss", "group_size": 4}, "method=local_loss knows no groups: group_size must be 8"),
    ],
)
def test_wrong_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Setting(**{"world_size": 8, "group_size": 8, "rows": 2, **values})


@pytest.mark.parametrize(
    ("world", "per_node", "sizes"),
    [(16, 8, [1, 2, 4, 8, 16]), (24, 8, [1, 2, 4, 8, 24]), (4, 8, [1, 2, 4]), (8, 6, [1, 2, 8]), (6, 1, [1, 2, 3, 6])],
)
def test_group_sizes(world: int, per_node: int, sizes: list[int]) -> None:
    assert group_sizes_of(world, Hardware(**{**CONSTANTS, "devices_per_node": per_node})) == sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mfu": 1.5}, "mfu=1.5: must be a number, above 0 and at most 1"),
        ({"mfu": 0}, "mfu=0: must be a number, above 0"),
        ({"overlap": -0.1}, "overlap=-0.1: must be a number, 0 or more"),
        ({"devices_per_node": 2.5}, "devices_per_node=2.5: must be a whole number"),
        ({"peak_tflops": "fast"}, "peak_tflops=fast: must be a number"),
        ({"warp": 9}, r"unknown hardware constant\(s\) warp; known: devices_per_node"),
    ],
)
def test_impossible_hardware(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Hardware.from_dict({**CONSTANTS, **change})


def test_missing_constants_are_named() -> None:
    with pytest.raises(UserError, match=r"missing hardware constant\(s\): overlap$"):
        Hardware.from_dict({name: value for name, value in CONSTANTS.items() if name != "overlap"})
