"""Run the tasks of a stage on Ray Data, on several machines that see the same folders under the same names.

Workers decode and actors with a model consume; Ray Data streams between them, and slows the workers down when the model
is the bottleneck. This is the only module that imports ray, and it is loaded only for `executor=ray`.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from m2_encoder.curation.executors import peak_memory
from m2_encoder.errors import UserError

logger = logging.getLogger(__name__)

_PATIENCE_S = 10.0
_MAX_BLOCKS = 1024  # a block is what Ray schedules; more tasks than this share them


class RayExecutor:
    """Runs tasks on a Ray cluster.

    Args:
        address: of a running cluster, or "auto"; None starts a local one, which ends with `close`.
        workers: processors of the local one; None for what there is.
        models: actors with a model.
        gpus: that each of them needs, such as 1 or 0.5.

    Raises:
        UserError: if Ray is not installed or not reachable.
    """

    def __init__(
        self, *, address: str | None = None, workers: int | None = None, models: int = 1, gpus: float = 0
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UserError("executor=ray: needs an extra; install it with pip install 'm2-encoder[ray]'") from error
        self._ray: Any = ray
        self._models, self._gpus = models, gpus
        self._starts = not ray.is_initialized()
        if self._starts:
            _check_reachable(address)
            own: dict[str, Any] = {"num_cpus": workers or os.cpu_count(), "include_dashboard": False}
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **({} if address else own))
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(f"executor=ray: no cluster at {address!r}: {_first_line(error)}") from error
        self._check_gpus(address)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.verbose_stats_logs = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # four lines per stage otherwise

    def run(self, function: Callable[[Any], None], tasks: Sequence[Any]) -> Iterator[int]:
        """See `executors.Executor`."""
        if tasks:
            yield from self._peaks(self._dataset(tasks).map(_Call(function)))

    def run_model(
        self, prepare: Callable[[Any], Any], consumer: Callable[[Any], Callable[[Any], None]], settings: Any,
        tasks: Sequence[Any],
    ) -> Iterator[int]:  # fmt: skip
        """See `executors.Executor`; the model lives in an actor."""
        if tasks:
            prepared = self._dataset(tasks).map(_Call(prepare, keep=True))
            # Without a processor of their own, as locally: on a small machine they would leave none to decode.
            resources = {"num_cpus": 0, "num_gpus": self._gpus}
            actors = self._ray.data.ActorPoolStrategy(size=self._models)
            yield from self._peaks(
                prepared.map(_Consumer, fn_constructor_args=(consumer, settings), compute=actors, **resources)
            )

    def close(self) -> None:
        """End the local cluster, or leave the one that was there before."""
        if self._starts:
            self._ray.shutdown()

    def _check_gpus(self, address: str | None) -> None:
        """Refuse more GPUs than there are, for which Ray would wait for ever."""
        wanted, there = self._models * self._gpus, self._ray.cluster_resources().get("GPU", 0)
        if wanted <= there:
            return
        message = f"{self._models} models with {self._gpus:g} GPUs each, and there are {there:g}"
        if address is None:
            self.close()
            raise UserError(f"executor=ray: {message}; lower ray_gpus or ray_models, or name a cluster by ray_address")
        logger.warning("%s in the cluster now: scoring waits until it grows", message)

    def _dataset(self, tasks: Sequence[Any]) -> Any:
        rows = [{"task": pickle.dumps(task)} for task in tasks]
        return self._ray.data.from_items(rows, override_num_blocks=min(len(rows), _MAX_BLOCKS))

    def _peaks(self, dataset: Any) -> Iterator[int]:
        lost = self._ray.exceptions
        try:
            for row in dataset.iter_rows():
                if row["mistake"]:
                    raise UserError(row["mistake"])
                yield int(row["peak"])
        except (lost.WorkerCrashedError, lost.OutOfMemoryError, lost.ActorDiedError, lost.NodeDiedError) as error:
            raise UserError(
                f"executor=ray: a worker died again and again ({_first_line(error)}); start again to go on"
            ) from error


def _check_reachable(address: str | None) -> None:
    """Refuse an address where nothing answers; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"executor=ray: nothing answers at {address} ({error}); give the address that `ray start` printed, "
            "or leave it out for a local cluster"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class _Call:
    """A row with a pickled task to a row with the peak memory and, if asked for, the pickled result.

    A user's mistake comes back as its message: Ray would wrap the exception and lose where it came from.
    """

    def __init__(self, function: Callable[[Any], Any], *, keep: bool = False) -> None:
        self._function, self._keep = function, keep

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result, mistake = None, ""
        try:
            result = self._function(pickle.loads(row["task"]))
        except UserError as error:
            mistake = str(error)
        return {"peak": peak_memory(), "mistake": mistake, "result": pickle.dumps(result) if self._keep else b""}


class _Consumer:
    """An actor that holds a consumer of results."""

    def __init__(self, consumer: Callable[[Any], Callable[[Any], None]], settings: Any) -> None:
        self._mistake = ""
        try:
            self._consume = consumer(settings)
        except UserError as error:  # an actor whose constructor fails is started again and again
            self._mistake = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        mistake = self._mistake or row["mistake"]
        if not mistake:
            self._consume(pickle.loads(row["result"]))
        return {"peak": max(row["peak"], peak_memory()), "mistake": mistake}
