"""Run the tasks of a stage in this process or on a pool of local ones; `ray_executor` runs them on Ray.

A task is a function of one tuple that writes one file, which appears by a rename. So a task may run anywhere, at any
time, and again.
"""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final, Protocol

from m2_encoder.data.worker_pool import open_pool
from m2_encoder.errors import UserError

_PRELOAD: Final = "m2_encoder.curation.pipeline"
_AHEAD: Final = 3  # tasks per worker that are sent ahead or done


class Executor(Protocol):
    """Runs tasks. Both methods yield once per finished task: the peak memory of whoever ran it, bytes."""

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[int]:
        """Run tasks that need only CPUs; `function` must be importable by name, and the tasks must pickle."""
        ...

    def run_model(
        self,
        prepare: Callable[[Any], Any],
        consumer: Callable[[Any], Callable[[Any], None]],
        settings: Any,
        tasks: Sequence[Any],
    ) -> Iterator[int]:
        """Run `prepare` on CPUs and hand each result to `consumer(settings)`, which is made once per device."""
        ...

    def close(self) -> None:
        """Give back what the executor holds."""
        ...


class LocalExecutor:
    """Processes of this machine, kept from stage to stage because starting one takes longer than most tasks.

    `workers=0` runs everything in this process.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[int]:
        """See `Executor`."""
        for _, peak in self._results(function, tasks):
            yield peak

    def run_model(
        self,
        prepare: Callable[[Any], Any],
        consumer: Callable[[Any], Callable[[Any], None]],
        settings: Any,
        tasks: Sequence[Any],
    ) -> Iterator[int]:
        """See `Executor`; the model lives in this process."""
        if not tasks:
            return
        consume = consumer(settings)
        for result, peak in self._results(prepare, tasks):
            consume(result)
            yield max(peak, peak_memory())

    def close(self) -> None:
        """Let the processes finish what they are at, and end them."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _results(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[Any, int]]:
        """Results as they are ready, with only so many tasks sent ahead that results cannot fill the memory."""
        if self._workers == 0:
            yield from (_run(function, task) for task in tasks)
            return
        stream = iter(tasks)
        waiting: set[Future[tuple[Any, int]]] = set()
        try:
            while True:
                room = _AHEAD * self._workers - len(waiting)
                waiting |= {self._open_pool().submit(_run, function, task) for task in itertools.islice(stream, room)}
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            self.close()
            raise UserError(
                "a worker process died, killed from outside or for want of memory; start again to go on, with fewer "
                "workers or smaller partition_rows"
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def _open_pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = open_pool(self._workers, preload=_PRELOAD)
        return self._pool


def peak_memory() -> int:
    """The most memory that this process has held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(function: Callable[[Any], Any], task: Any) -> tuple[Any, int]:
    return function(task), peak_memory()
