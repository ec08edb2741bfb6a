"""How the tasks of a stage are run: in this process or on a pool of local ones. Ray's is in `ray_executor`.

A task is a function of one tuple that writes one file; the file appears by a rename, whole or not at all. So it does
not matter who runs a task, when, how often, or whether the one before died in the middle.
"""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from m2_encoder.data.worker_pool import map_in_processes

_PRELOAD = "m2_encoder.curation.pipeline"


class Executor(Protocol):
    """Runs tasks. Both methods yield once per finished task: the peak memory of whoever ran it, bytes."""

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[int]:
        """Run tasks that need nothing but processors.

        Args:
            function: importable by name.
            tasks: arguments that pickle.
        """
        ...

    def run_model(
        self,
        prepare: Callable[[Any], Any],
        consumer: Callable[[Any], Callable[[Any], None]],
        settings: Any,
        tasks: Sequence[Any],
    ) -> Iterator[int]:
        """Run tasks that are prepared on processors and consumed by a model.

        Args:
            prepare: as `function` of `run`; its result goes to the consumer.
            consumer: from `settings` to what takes the results; made once per device.
            settings: pickles.
            tasks: arguments of `prepare`.
        """
        ...

    def close(self) -> None:
        """Give back what the executor holds."""
        ...


class LocalExecutor:
    """Processes of this machine.

    Args:
        workers: how many; 0 runs everything in this process.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

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
        """Nothing is held between stages."""

    def _results(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[Any, int]]:
        if tasks:
            call = functools.partial(_run, function)
            workers = self._workers if len(tasks) > 1 else 0  # to start a process takes longer than most tasks
            yield from map_in_processes(call, tasks, workers=workers, preload=_PRELOAD)


def peak_memory() -> int:
    """The most memory that this process has held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(function: Callable[[Any], Any], task: Any) -> tuple[Any, int]:
    return function(task), peak_memory()
