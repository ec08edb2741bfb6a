"""Lightning's loggers of a run: `metrics.jsonl`, which is always there, and W&B that never stops a run."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from m2_encoder.config.output import say
from m2_encoder.files import write_text
from m2_encoder.runs.loggers import first_line, forget_service

_SERVICE = "wandb-core"
_SERVICE_TIMEOUT_S = 15.0  # beyond what its server may take
_NOT_METRICS = ("epoch",)  # Lightning adds it; steps decide here, so it is always 0


class JsonlLogger(Logger):
    """Writes `metrics.jsonl`: one object per logged step with `step`, `samples_seen`, then scalars by name.

    Values logged at the same step share a line, which is written at once and again when more values arrive: a process
    that is killed loses nothing. Values that are not finite are left out. A resumed run appends after dropping what a
    crash left behind the checkpoint: lines of later steps, and a half-written last line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._step: int | None = None
        self._record: dict[str, float | int | None] = {}
        self._line_start = 0

    @property
    def name(self) -> str:
        """Fixed: there is one such file per run."""
        return "metrics"

    @property
    def version(self) -> str:
        """None of its own."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` stands beside this file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars of a step, beside those that its line has already."""
        step = 0 if step is None else step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _naming(self.path), self.path.open("ab") as file:
            if step != self._step:
                self._step, self._record = step, {}
                self._line_start = file.seek(0, os.SEEK_END)
            self._record.update({k: _plain(v) for k, v in metrics.items() if k not in _NOT_METRICS})
            head = {"step": step, "samples_seen": self._record.get("samples_seen")}
            line = {key: value for key, value in {**head, **self._record}.items() if value is not None}
            file.truncate(self._line_start)
            file.write(json.dumps(line).encode() + b"\n")

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Drop lines of steps after `step`, which a resumed run will write again; that of `step` goes on."""
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if 0 <= _step_of(line) <= step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        if kept and _step_of(kept[-1]) == step:
            self._step, self._record = step, json.loads(kept[-1])
            self._line_start = sum(len(line.encode()) + 1 for line in kept[:-1])

    def has_validation(self, step: int) -> bool:
        """Whether the newest line is that of `step` and has metrics of a validation."""
        return self._step == step and any(name.startswith("val/") for name in self._record)


class QuietWandbLogger(WandbLogger):
    """Lightning's W&B logger, which gives up with one line instead of stopping the run when W&B fails."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._wandb_init.pop("anonymous", None)  # Lightning passes it always; W&B warns that it is gone
        self._has_failed = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hand scalars to W&B; after a failure only `metrics.jsonl` goes on."""
        self._try(lambda: super(QuietWandbLogger, self).log_metrics(dict(metrics), step))

    @rank_zero_only
    def close(self, summary: Mapping[str, float] | None) -> None:
        """End the W&B run, so that the next run of this process gets its own.

        What its server does not take in time is said; it stays on the disk.

        Args:
            summary: final metrics; None for a run that did not get to its end.
        """
        if summary is not None:
            self._try(lambda: self.experiment.summary.update(dict(summary)))
        self._try(lambda: self._finish(exit_code=int(summary is None)))

    def _finish(self, *, exit_code: int) -> None:
        run = self.experiment
        place = Path(run.dir).parent
        later = f"with: wandb sync {place}"
        with _bounded_service(self._wandb_init["settings"].finish_timeout + _SERVICE_TIMEOUT_S) as ended:
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                say(f"W&B: its server did not take everything in time; upload the rest {later}", error=True)
            except Exception:
                if not ended.is_set():
                    raise
        if ended.is_set():
            forget_service()
            say(f"W&B: its process did not answer and was ended; upload what it wrote {later}", error=True)

    def _try(self, action: Callable[[], object]) -> None:
        if self._has_failed:
            return
        try:
            with _bounded_service(2 * _SERVICE_TIMEOUT_S + self._wandb_init["settings"].finish_timeout):
                action()
        except Exception as error:  # whatever breaks there, the training it reports on is worth more
            self._has_failed = True
            say(f"W&B: stopped ({first_line(error)}); metrics.jsonl goes on", error=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says which file it was that a disk did not take all of."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _bounded_service(limit_s: float) -> Iterator[threading.Event]:
    """Ends W&B's own process if an action takes longer, because one that is stopped would keep the run for ever.

    The event that it yields says that this has happened.
    """
    ended = threading.Event()

    def end() -> None:
        for pid in find_services():
            ended.set()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield ended
    finally:
        timer.cancel()


def find_services() -> list[int]:
    """Process ids of W&B's service, where this process has started one; empty where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            pid, _, rest = path.read_text(encoding="utf-8", errors="replace").partition(" (")
            name, _, fields = rest.rpartition(") ")
            if name.startswith(_SERVICE) and int(fields.split()[1]) == os.getpid():
                found.append(int(pid))
    return found


def _step_of(line: str) -> int:
    """Step of a written line, -1 for one that a crash cut in half."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return -1


def _plain(value: Any) -> float | int | None:
    """A JSON number: whole floats as integers; what JSON cannot say (nan, inf) as None."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
