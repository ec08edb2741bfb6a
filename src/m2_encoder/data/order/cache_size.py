"""Checks that `data.cache.max_bytes` suffices for the remote shards that are open at the same time."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from m2_encoder.data.order.plan import PositionPlan, Stretch
from m2_encoder.data.shards.paths import is_remote
from m2_encoder.errors import UserError

logger = logging.getLogger(__name__)


def check_cache(plan: PositionPlan, *, max_bytes: float, ranks: Sequence[int], world_size: int) -> None:
    """Compare `max_bytes` with the shards that the `ranks` of this machine read first.

    Warns if the shards of the open windows fit, but not those that are fetched ahead.

    Raises:
        UserError: if the shards of the open windows do not fit: some would be downloaded every few samples.
    """
    common = math.gcd(plan.lanes, world_size)  # a rank meets the lanes that leave its own remainder
    lanes = [lane for lane in range(plan.lanes) if lane % common in {rank % common for rank in ranks}]
    opened: dict[str, int] = {}
    coming: dict[str, int] = {}
    for number, source in enumerate(plan.manifest.sources):
        for lane in lanes:
            stretch = Stretch(number, lane, epoch=0, window=0)
            for found, each in ((opened, stretch), (coming, plan.following(stretch))):
                shards = ((source.shards[i], int(source.sizes[i])) for i in plan.shards(each))
                found |= {shard: size for shard, size in shards if is_remote(shard)}
    now, later = sum(opened.values()), sum((opened | coming).values())
    if later <= max_bytes:
        return
    numbers = (
        f"data.cache.max_bytes={max_bytes:,.0f}: the {len(lanes)} lanes that this machine reads have {len(opened)} "
        f"remote shards open at the same time, {now:,} bytes, and {later:,} with those that are fetched ahead"
    )
    if now > max_bytes:
        smaller = f", or a smaller data.window (now {plan.window})" if len(opened) > len(lanes) else ""
        raise UserError(f"{numbers}; give at least {later:,}{smaller}")
    logger.warning("%s; with room for them, training would not wait for downloads", numbers)
