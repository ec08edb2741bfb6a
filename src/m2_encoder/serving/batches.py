"""Requests that meet share a forward pass of the model, or a pass over the index.

A batch is whatever waits when the one before is done: nobody waits for others to come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from m2_encoder.serving.refusals import busy

Features = npt.NDArray[np.float32]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Batches(Generic[_Item, _Result]):
    """A bounded queue before a function that takes many items at once.

    Args:
        call: n items to n results.
        thread: where it runs. Two queues before one model share an executor of one thread.
        batch_size: items of a call at most.
        max_waiting: items that may wait; those of the running call are not counted.
    """

    def __init__(
        self, call: Callable[[list[_Item]], Iterable[_Result]], thread: Executor, *, batch_size: int, max_waiting: int
    ) -> None:
        self._call = call
        self._thread = thread
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[_Item, asyncio.Future[_Result]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def run(self, items: Sequence[_Item]) -> list[_Result]:
        """Results of some items, in their order.

        Raises:
            Refusal: 503, if they do not fit into the queue.
        """
        if len(self._waiting) + len(items) > self._max_waiting:
            raise busy(f"{len(self._waiting)} pictures, texts or searches wait, {self._max_waiting} may")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[_Result]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await asyncio.gather(*futures)

    async def _work(self) -> None:
        """Empties the queue, then ends; the next item starts another one."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]
            batch = [(item, future) for item, future in taken if not future.done()]  # whoever hung up is not waited for
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(self._thread, self._call, [item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
