"""Requests that meet share a forward pass of the model.

A batch is whatever waits when the model becomes free: nobody waits for others to come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from m2_encoder.serving.refusals import busy

Features = npt.NDArray[np.float32]

_Item = TypeVar("_Item")


class Batches(Generic[_Item]):
    """A bounded queue before a function that takes many items at once.

    Args:
        encode: n items to features (n, D), L2-normalised.
        thread: where it runs. Two queues before one model share an executor of one thread.
        batch_size: items of a call at most.
        max_waiting: items that may wait; those of the running call are not counted.
    """

    def __init__(
        self, encode: Callable[[list[_Item]], Features], thread: Executor, *, batch_size: int, max_waiting: int
    ) -> None:
        self._encode = encode
        self._thread = thread
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[_Item, asyncio.Future[Features]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def encode(self, items: Sequence[_Item]) -> Features:
        """Features of some items, (n, D), in their order.

        Raises:
            Refusal: 503, if they do not fit into the queue.
        """
        if len(self._waiting) + len(items) > self._max_waiting:
            raise busy(f"{len(self._waiting)} pictures or texts wait for the model, {self._max_waiting} may")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Features]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return np.stack(await asyncio.gather(*futures))

    async def _work(self) -> None:
        """Empties the queue, then ends; the next item starts another one."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]
            batch = [(item, future) for item, future in taken if not future.done()]  # whoever hung up is not waited for
            if not batch:
                continue
            try:
                rows = await loop.run_in_executor(self._thread, self._encode, [item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), row in zip(batch, rows, strict=True):
                    if not future.done():
                        future.set_result(row)
