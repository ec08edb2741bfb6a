"""Room for copies of remote shards, against the windows that are open at the same time."""

from __future__ import annotations

import logging

import pytest

from m2_encoder.data.order.cache_size import check_cache
from m2_encoder.data.order.manifest import Manifest, SourceSpec, make_source
from m2_encoder.data.order.plan import PositionPlan
from m2_encoder.errors import UserError

SHARD_BYTES = 1_000


def plan(*, lanes: int = 4, window: int = 20, shards: int = 40, remote: bool = True) -> PositionPlan:
    """Forty shards of ten samples: a lane has ten shards, and five windows of two."""
    place = "https://host" if remote else "/data"
    source = make_source(
        SourceSpec("far", "unused"),
        [f"{place}/{i}.tar" for i in range(shards)],
        [10] * shards,
        [SHARD_BYTES] * shards,
    )
    return PositionPlan(Manifest([source]), seed=3, lanes=lanes, window=window)


def opened(plan: PositionPlan, lanes: list[int], windows: int) -> int:
    """Bytes of the shards that the first samples of some lanes lie in, found position by position."""
    length = 100  # samples of a lane
    shards = {
        plan.locate(step * plan.lanes + lane).shard for lane in lanes for step in range(min(20 * windows, length))
    }
    return len(shards) * SHARD_BYTES


@pytest.mark.parametrize(
    ("ranks", "world", "lanes"),
    [
        ([0], 1, [0, 1, 2, 3]),
        ([1], 2, [1, 3]),
        ([0, 1], 2, [0, 1, 2, 3]),
        ([2, 3], 4, [2, 3]),
        ([4, 5], 8, [0, 1]),
        ([1], 3, [0, 1, 2, 3]),
    ],
)
def test_the_limit_is_what_the_first_windows_read(
    ranks: list[int], world: int, lanes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    mixture = plan()
    now, later = opened(mixture, lanes, 1), opened(mixture, lanes, 2)
    assert now < later
    with caplog.at_level(logging.WARNING):
        check_cache(mixture, max_bytes=later, ranks=ranks, world_size=world)
        assert not caplog.text
        check_cache(mixture, max_bytes=now, ranks=ranks, world_size=world)
        assert f"{now:,} bytes, and {later:,} with those that are fetched ahead" in caplog.text
    with pytest.raises(UserError, match=rf"max_bytes={now - 1:,}: the {len(lanes)} lanes .*give at least {later:,}"):
        check_cache(mixture, max_bytes=now - 1, ranks=ranks, world_size=world)


def test_a_smaller_window_helps_and_local_shards_need_nothing() -> None:
    with pytest.raises(UserError, match=r"a smaller data.window \(now 20\)$"):
        check_cache(plan(), max_bytes=1, ranks=[0], world_size=1)
    with pytest.raises(UserError, match=r"give at least [\d,]+$"):
        check_cache(plan(window=10), max_bytes=1, ranks=[0], world_size=1)
    check_cache(plan(remote=False), max_bytes=1, ranks=[0], world_size=1)
