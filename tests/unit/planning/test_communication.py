from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.errors import UserError
from m2_encoder.planning.communication import METHODS, contrastive_bytes

SHAPE: dict[str, Any] = {
    "world_size": 256, "group_size": 32, "rows": 64, "micro_batches": 4, "feature_dim": 768, "bytes_per_element": 2,
}  # fmt: skip


def _drawn(data: st.DataObject) -> dict[str, Any]:
    group_size = data.draw(st.integers(1, 64))
    return {
        "group_size": group_size,
        "world_size": group_size * data.draw(st.integers(1, 16)),
        "rows": data.draw(st.integers(1, 512)),
        "micro_batches": data.draw(st.integers(1, 16)),
        "feature_dim": data.draw(st.integers(1, 1024)),
        "bytes_per_element": data.draw(st.sampled_from([2, 4, 8])),
        "heads": data.draw(st.integers(1, 2)),
    }


@pytest.mark.parametrize(
    ("method", "bytes_sent", "collectives"),
    [
        # counted by hand: 255 or 31 other ranks, 64 * 768 * 2 = 98,304 bytes of features each and micro-batch
        ("full_logits", 4 * 4 * 255 * 98_304, 16),
        ("local_loss", 4 * 4 * 255 * 98_304, 16),
        ("repetition", 4 * 16 * 255 * 98_304, 16),
        ("grouped_local_loss", 4 * 4 * 31 * 98_304, 16),
        ("local_form", 2 * 4 * 31 * 98_304 + 8 * 4 * 31 * 64, 2),
    ],
)
def test_by_hand(method: str, bytes_sent: int, collectives: int) -> None:
    assert contrastive_bytes(method, **SHAPE) == (bytes_sent, collectives)


def test_measured_elsewhere() -> None:
    """What two prototypes sent over gloo, W = 4, B = 512, E = 768, fp32: 18.9, 9.45 and 3.15 MB."""
    shape: dict[str, Any] = {"world_size": 4, "rows": 512, "feature_dim": 768, "bytes_per_element": 4}
    sent = [
        contrastive_bytes(method, group_size=g, **shape).bytes_sent / 1e6
        for method, g in (("local_loss", 4), ("local_form", 4), ("local_form", 2))
    ]
    assert sent == pytest.approx([18.87, 9.45, 3.15], abs=0.005)


@given(st.data())
def test_a_group_of_all_ranks_is_the_full_method(data: st.DataObject) -> None:
    shape = {**_drawn(data)}
    shape["group_size"] = shape["world_size"]
    assert contrastive_bytes("grouped_local_loss", **shape) == contrastive_bytes("local_loss", **shape)


@given(st.data())
def test_larger_groups_never_send_less(data: st.DataObject) -> None:
    shape = _drawn(data)
    larger = {**shape, "group_size": shape["world_size"]}
    for method in METHODS:
        assert contrastive_bytes(method, **larger) >= contrastive_bytes(method, **shape)


@given(st.data())
def test_accumulation_only_regroups_the_bytes_of_the_same_rows(data: st.DataObject) -> None:
    shape = _drawn(data)
    k = shape["micro_batches"]
    at_once = {**shape, "rows": k * shape["rows"], "micro_batches": 1}
    for method in METHODS.keys() - {"repetition"}:
        assert contrastive_bytes(method, **shape).bytes_sent == contrastive_bytes(method, **at_once).bytes_sent
    repeated = contrastive_bytes("repetition", **shape).bytes_sent
    assert repeated == k * contrastive_bytes("repetition", **at_once).bytes_sent


@given(st.data())
def test_the_local_form_has_at_most_two_collectives(data: st.DataObject) -> None:
    shape = _drawn(data)
    assert contrastive_bytes("local_form", **shape).collectives == (2 if shape["group_size"] > 1 else 0)


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_sends_nothing(method: str) -> None:
    assert contrastive_bytes(method, **{**SHAPE, "world_size": 1, "group_size": 1}) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows=0 must be 1 or more"),
        ({"heads": -1}, "heads=-1 must be 1 or more"),
        ({"group_size": 48}, "group_size=48 must divide world_size=256"),
    ],
)
def test_wrong_numbers(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        contrastive_bytes("local_form", **{**SHAPE, **change})


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"method='ring' must be one of full_logits, .*local_form"):
        contrastive_bytes("ring", **SHAPE)
