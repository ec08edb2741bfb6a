"""Requests that meet share a call, in order; a full queue refuses; nobody takes others down."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from m2_encoder.serving.batches import Batches, Features
from m2_encoder.serving.refusals import Refusal


class Scripted:
    """Gives item i the feature (i, i), and stops before each call until it may go on."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.may_go = threading.Event()

    def __call__(self, items: list[int]) -> Features:
        assert self.may_go.wait(10)
        self.calls.append(items)
        if 13 in items:
            raise ValueError("thirteen")
        return np.array([[item, item] for item in items], dtype=np.float32)


def _run(body: Callable[[Batches[int, Features], Scripted], Coroutine[Any, Any, None]], **bounds: int) -> Scripted:
    encode = Scripted()
    with ThreadPoolExecutor(1) as thread:
        try:
            asyncio.run(body(Batches(encode, thread, **{"batch_size": 4, "max_waiting": 10, **bounds}), encode))
        finally:
            encode.may_go.set()
    return encode


async def _start(batches: Batches[int, Features], *requests: list[int]) -> list[asyncio.Task[list[Features]]]:
    tasks = [asyncio.create_task(batches.run(items)) for items in requests]
    await asyncio.sleep(0.02)
    return tasks


def test_what_waits_while_the_model_works_shares_the_next_calls() -> None:
    async def body(batches: Batches[int, Features], encode: Scripted) -> None:
        tasks = await _start(batches, [1], [2], [3, 4], [5], [6, 7])
        encode.may_go.set()
        found = await asyncio.gather(*tasks)
        assert [[int(row[0]) for row in rows] for rows in found] == [[1], [2], [3, 4], [5], [6, 7]]

    # They were started in one turn of the loop, so that the first call has as many as fit.
    assert _run(body).calls == [[1, 2, 3, 4], [5, 6, 7]]


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    async def body(batches: Batches[int, Features], encode: Scripted) -> None:
        tasks = await _start(batches, [1, 2], [3, 4])
        more = await _start(batches, [5, 6, 7, 8])
        with pytest.raises(Refusal) as refused:
            await batches.run([9])
        assert (refused.value.status, refused.value.code) == (503, "busy")
        assert refused.value.headers == {"Retry-After": "1"}
        encode.may_go.set()
        await asyncio.gather(*tasks, *more)
        assert [row.tolist() for row in await batches.run([9])] == [[9, 9]]

    _run(body, max_waiting=4, batch_size=4)


def test_who_hung_up_is_not_computed() -> None:
    async def body(batches: Batches[int, Features], encode: Scripted) -> None:
        tasks = await _start(batches, [1])
        gone, stays = await _start(batches, [2], [3])
        gone.cancel()
        await asyncio.sleep(0.02)
        encode.may_go.set()
        assert [row.tolist() for row in await stays] == [[3, 3]]
        await asyncio.gather(*tasks)

    assert _run(body).calls == [[1], [3]]


def test_an_error_reaches_those_of_its_call_alone() -> None:
    async def body(batches: Batches[int, Features], encode: Scripted) -> None:
        encode.may_go.set()
        found = await asyncio.gather(*(batches.run([n]) for n in (1, 13, 2)), return_exceptions=True)
        assert all(isinstance(each, ValueError) for each in found)
        assert [row.tolist() for row in await batches.run([5])] == [[5, 5]]

    _run(body)
