"""W&B that never stops a run, and has every step of `metrics.jsonl` once.

`_step` at W&B is the step of the optimizer, so that its client takes no step twice; what a run that goes on finds
missing there is sent from `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from m2_encoder.config.output import say
from m2_encoder.runs.ending import Results
from m2_encoder.runs.lightning_loggers import NOT_METRICS, read_rows
from m2_encoder.runs.loggers import first_line, forget_service
from m2_encoder.runs.wandb_results import Artifact, make_media, upload
from m2_encoder.runs.wandb_service import bounded_service

_SERVICE_TIMEOUT_S = 15.0  # beyond what its server may take
_AXIS: Final = "trainer/global_step"
_ROWS: Final = 1000  # handed over within one limit


class QuietWandbLogger(WandbLogger):
    """Lightning's W&B logger, which gives up with one line instead of stopping the run when W&B fails.

    Args:
        artifact: what is uploaded at the end.
        settings: of Lightning's logger, and of `wandb.init`.
    """

    def __init__(self, *, artifact: Artifact | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._wandb_init.pop("anonymous", None)  # Lightning passes it always; W&B warns that it is gone
        self._wandb_init["resume"] = settings.get("resume")  # which Lightning sets as well
        self._artifact: Artifact | None = artifact
        self._has_failed = False
        self._best: dict[str, float] = {}
        self._last: int | None = None
        self._newest: tuple[int, set[str]] = (-1, set())  # the newest step that was replayed, and its metrics

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hand scalars to W&B; after a failure only `metrics.jsonl` goes on."""
        self._try(lambda: self._log(metrics, 0 if step is None else int(step)))

    @rank_zero_only
    def log_table(
        self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: int | None = None
    ) -> None:
        """As Lightning's; a failure stops no run."""
        self._try(lambda: super(QuietWandbLogger, self).log_table(key, columns, data, dataframe, step))

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """As Lightning's; a failure stops no run."""
        self._try(lambda: super(QuietWandbLogger, self).log_image(key, images, step, **kwargs))

    @rank_zero_only
    def replay(self, path: Path) -> None:
        """Hand over all steps of a `metrics.jsonl` that W&B does not have."""
        rows = list(read_rows(path))
        if rows:
            self._newest = (rows[-1][0], set(rows[-1][1]))

        def send(start: int) -> None:
            for step, row in rows[start : start + _ROWS]:
                self._log(row, step, at=step)

        for start in range(0, len(rows), _ROWS):
            self._try(partial(send, start))

    @rank_zero_only
    def close(self, results: Results | None) -> None:
        """End the W&B run, so that the next run of this process gets its own.

        What its server does not take in time is said; it stays on the disk.

        Args:
            results: of the run; None for one that did not get to its end.
        """
        if results is not None:
            self._try(lambda: self._report(results))
        self._try(lambda: self._finish(exit_code=int(results is None)), patience=1)

    def _log(self, metrics: Mapping[str, float], step: int, at: int | None = None) -> None:
        """Hands over what was logged of a step; `at` is W&B's own step, if that is known."""
        row = {name: value for name, value in metrics.items() if name not in NOT_METRICS}
        for name, value in row.items():
            if name.startswith("val/"):
                self._note_best(name, float(value))
        run = self.experiment
        if step < run.starting_step:  # W&B has it, but for a validation that the last start did not get to
            late = {k: v for k, v in row.items() if step == self._newest[0] and k not in self._newest[1]}
            if at is None and late:
                run.log({**late, _AXIS: step})
            return
        at = run.step if at is None else at
        # Who logs without a step, as a callback may, moves W&B's own step on: the axis is right all the same.
        run.log({**row, _AXIS: step}, step=step if at <= step else None)
        self._last = step

    def _note_best(self, name: str, value: float) -> None:
        choose, word = (min, "min") if "loss" in name else (max, "max")
        if name not in self._best:
            self.experiment.define_metric(name, step_metric=_AXIS, step_sync=True, summary=f"{word},last")
        self._best[name] = choose(self._best.get(name, value), value)

    def _report(self, results: Results) -> None:
        """Hands over what a finished run has; a table and an artifact ask the server, which may be gone."""
        run, media = self.experiment, make_media(results)
        # Where nothing new was logged, W&B has the last step already, and takes no more of it.
        step = self._last if self._last is not None and run.step <= self._last else None
        for name, value in media.items():
            with self._saying(f"{name} was not taken"):
                if step is None:
                    run.summary.update({name: value})
                else:
                    run.log({name: value}, step=step)
        if step is not None:
            run.log({_AXIS: step}, step=step, commit=True)  # before the summary, which its values would replace
        best = {f"best/{name}": value for name, value in self._best.items()}
        run.summary.update({**best, **results.metrics})
        if self._artifact is not None:
            with self._saying(f"the {self._artifact} was not taken"):
                upload(run, self._artifact, results.folder)

    @contextmanager
    def _saying(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its client raises what it likes
            say(f"W&B: {what} ({first_line(error)})", error=True)

    def _finish(self, *, exit_code: int) -> None:
        try:
            self.experiment.finish(exit_code=exit_code)
        except TimeoutError:
            say(f"W&B: its server did not take everything in time; upload the rest {self._later()}", error=True)

    def _later(self) -> str:
        """How what W&B lacks gets there."""
        if self.experiment.resumed:  # its files hold only what is new, and W&B may have a part of that
            return "with run.resume=auto"
        return f"with: wandb sync {Path(self.experiment.dir).parent}"

    def _try(self, action: Callable[[], object], *, patience: int = 2) -> None:
        """Does something with W&B, whose process gets `patience` times 15 s beyond what its server may take."""
        if self._has_failed:
            return
        limit_s = patience * _SERVICE_TIMEOUT_S + self._wandb_init["settings"].finish_timeout
        with bounded_service(limit_s) as ended:
            try:
                action()
            except Exception as error:  # whatever breaks there, the training it reports on is worth more
                self._has_failed = True
                if not ended.is_set():
                    say(f"W&B: stopped ({first_line(error)}); metrics.jsonl goes on", error=True)
        if ended.is_set():
            self._has_failed = True
            forget_service()
            say(f"W&B: its process did not answer and was ended; upload what it wrote {self._later()}", error=True)
