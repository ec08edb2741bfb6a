"""Checkpoints of training."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import CheckpointError, name_some
from m2_encoder.files import atomic_file
from m2_encoder.training.callbacks.monitors import BestCheckpoint
from m2_encoder.training.callbacks.retention import KeptCheckpoints, delete
from m2_encoder.training.optim import follow_schedule

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SAVING = b"m2-train: this step will be saved, then the run ends; once more Ctrl-C ends it at once\n"

_RANDOM_STATES = "random_states"
_SETTINGS = ("hyper_parameters", "datamodule_hyper_parameters")

BEST_NAME = "best.ckpt"


@runtime_checkable
class CountedEpochs(Protocol):
    """A data module that knows how long an epoch is."""

    def epoch_steps(self) -> int:
        """Steps of an epoch as the trainer limits it."""
        ...


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the same folder and renames it, so that a checkpoint is always complete.

    Settings that a task or data module saves beside it (`save_hyperparameters`) are left out where they are no plain
    values.

    Lightning writes to the machine's temporary folder and moves the file. On another disk that is a copy, and a process
    that ends meanwhile leaves a broken `last.ckpt`.
    """

    _is_known_safe = False  # of what this run saves

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a training state.

        Raises:
            CheckpointError: if it cannot be written.
        """
        assert storage_options is None, f"nothing gives storage_options, got {storage_options!r}"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.pop("hparams_type", None)
        for key in _SETTINGS:
            if key in checkpoint:
                checkpoint[key] = {name: value for name, value in checkpoint[key].items() if is_plain(value)}
        with atomic_file(path, error=CheckpointError) as temporary:
            torch.save(checkpoint, temporary)
            if not self._is_known_safe:
                _refuse_code(temporary)
                self._is_known_safe = True


def is_plain(value: Any) -> bool:
    """Whether a checkpoint may hold a value: one that is read without running anybody's code."""
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    if isinstance(value, dict):
        return type(value) is dict and all(map(is_plain, [*value, *value.values()]))
    return value is None or type(value) in (bool, int, float, str, Tensor)


def _refuse_code(path: Path) -> None:
    """Refuse what this run could not read again: it would only come out when it goes on."""
    if found := get_unsafe_globals_in_checkpoint(path):
        rule = f"holds {name_some(found)}, which may run code when they are read, so that no run goes on from it"
        raise CheckpointError(f"the checkpoint {rule}; let on_save_checkpoint and state_dict give plain values")


class RunCheckpoint(Checkpoint):
    """Saves `step=<n>.ckpt` every so many steps and after the last one; `last.ckpt` is the newest of them.

    Where a step is also validated, it is saved after that, so that whoever decides by validations (early stopping, the
    best checkpoint) goes on as if nothing had come between. `KeptCheckpoints` says which files stay. With a
    `BestCheckpoint` among the callbacks, `best.ckpt` is the state of its step.

    Besides what Lightning saves (weights, optimizer, schedule, loops, the place in the data) a checkpoint holds the
    random state of every rank, so that stochastic depth goes on as in an uninterrupted run.

    After SIGTERM, SIGINT (Ctrl-C) or SIGHUP (a closed terminal) to any rank, all ranks finish the step, run a
    validation that is due, save, and end by `SIGTERMException`, whose code on the first rank is that of a shell:
    128 + the signal. This replaces Lightning's handlers, which do not save, and of which one communicates in the middle
    of a step. A second SIGINT is a `KeyboardInterrupt`.
    """

    @check_bounds
    def __init__(
        self,
        *,
        folder: str | os.PathLike[str],
        every_n_steps: Count,
        keep_last: Count | None = None,
        keep_every: Count | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self._kept = KeptCheckpoints(self.folder, last=keep_last, every=keep_every)
        self._saved_step = 0
        self._waits = False  # for the validation of a step that is to be saved
        self._starts = True
        self._random_states: list[Mapping[str, Tensor]] = []
        self._signal: int | None = None  # that this rank has got
        self._leaves = False

    @property
    def last(self) -> Path:
        """Path of the newest checkpoint, which need not exist."""
        return self.folder / "last.ckpt"

    @property
    def best(self) -> Path:
        """Path of the checkpoint that `BestCheckpoint` has chosen, which need not exist."""
        return self.folder / BEST_NAME

    def state_dict(self) -> dict[str, Any]:
        """Which files stay."""
        return self._kept.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the files of the earlier start."""
        self._kept.load_state_dict(state_dict)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Make saving atomic, and remove partial files of a killed process."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero and stage == "fit":
            _free(self.last)
            for partial in self.folder.glob(".*.ckpt.*.tmp"):
                partial.unlink(missing_ok=True)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the random state of every rank."""
        states: list[Any] = [_random_state()]
        if trainer.world_size > 1:
            own = states[0]
            states = [None] * trainer.world_size
            dist.all_gather_object(states, own)
        checkpoint[_RANDOM_STATES] = states

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random states until training starts: setup uses random numbers, too.

        The loops are told where they are in which epoch, and a `trainer.max_time` counts from this start.
        """
        self._random_states = checkpoint.get(_RANDOM_STATES, [])
        self._saved_step = int(checkpoint["global_step"])
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, CountedEpochs) and self._saved_step:
            _place_loops(checkpoint["loops"]["fit_loop"], self._saved_step, data.epoch_steps())
        for name in [name for name in checkpoint.get("callbacks", {}) if name.startswith(Timer.__qualname__)]:
            del checkpoint["callbacks"][name]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Handle signals from now on.

        Raises:
            CheckpointError: if the ranks go on from different checkpoints.
        """
        _check_ranks(trainer)
        for config in trainer.lr_scheduler_configs:
            follow_schedule(config.scheduler)
        self._signal, self._leaves, self._waits, self._starts = None, False, False, True
        if trainer.is_global_zero and trainer.global_step:
            self._kept.begin_at(trainer.global_step)
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in _SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # as nohup wants it
                signal.signal(number, self._note_signal)  # Lightning restores the old handlers in the end
        if self._random_states and len(self._random_states) != trainer.world_size and trainer.is_global_zero:
            logger.warning(
                "saved by %d ranks, continued by %d: the data go on exactly, stochastic depth is drawn anew",
                len(self._random_states),
                trainer.world_size,
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End after a signal, now that the metrics of the saved step are written; restore the random state."""
        self._leave(trainer)
        if self._starts:
            # Lightning counts one less after a checkpoint of a validation, unless the next start validates then, too.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            # Not before: Lightning may make the workers of a validation once more, which draws a number.
            if len(self._random_states) == trainer.world_size:
                _restore_random_state(self._random_states[trainer.global_rank])
            self._random_states, self._starts = [], False

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save every so many steps, after the last one, and after a signal to a rank."""
        step = trainer.global_step
        self._leaves = trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)
        is_due = step % self.every_n_steps == 0 or step == trainer.max_steps or trainer.should_stop or self._waits
        self._waits = is_due and _is_validated(trainer)
        if self._leaves or (is_due and not self._waits):
            self._save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the step that was validated, if it is due, the best one, or the last."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        is_best = any(isinstance(each, BestCheckpoint) and each.is_new(trainer) for each in _callbacks(trainer))
        is_due = self._waits or self._leaves or trainer.should_stop
        self._waits = False
        if is_best or is_due:
            self._write(trainer, best=is_best, step=is_due)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the last step of a run that ended early."""
        self._save(trainer)
        self._leave(trainer)

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._signal == number:
                raise KeyboardInterrupt
            if is_first_rank():
                with contextlib.suppress(OSError):
                    os.write(2, _SAVING)  # a handler may not use Python's streams
        self._signal = number

    def _leave(self, trainer: lightning.Trainer) -> None:
        if self._leaves:
            # Lightning's launcher kills the first rank for another one's exit code.
            raise SIGTERMException(128 + (self._signal or signal.SIGTERM) if trainer.is_global_zero else 0)

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step != self._saved_step:
            self._write(trainer, step=True)

    def _write(self, trainer: lightning.Trainer, *, step: bool, best: bool = False) -> None:
        """Write one file, and give it all of its names: that of the step (then it is the last, too), `best.ckpt`."""
        if getattr(trainer, "fast_dev_run", False):  # which keeps nothing
            return
        if step:
            self._kept.begin(trainer.global_step)
        # The best one comes first: after a kill in between, its state knows of it, and is the newest.
        paths = [*([self.best] if best else []), *([self._kept.path(trainer.global_step), self.last] if step else [])]
        if trainer.is_global_zero:
            for path in paths:
                _free(path)
        with getattr(trainer.strategy, "saving", contextlib.nullcontext)():  # ranks that wait say for what
            trainer.save_checkpoint(paths[0])
            if trainer.is_global_zero:
                for path in paths[1:]:
                    with atomic_file(path, error=CheckpointError) as temporary:
                        _link_or_copy(paths[0], temporary)
            trainer.strategy.barrier("last.ckpt")
        if step:
            self._saved_step = trainer.global_step
            given_up = self._kept.prune()
            if trainer.is_global_zero:
                for path in given_up:
                    delete(path)


def _is_validated(trainer: lightning.Trainer) -> bool:
    """Whether Lightning validates the step that has just been done; only its loop knows all reasons to."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and sum(trainer.num_val_batches) > 0


def _callbacks(trainer: lightning.Trainer) -> list[lightning.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _place_loops(loops: dict[str, Any], step: int, epoch_steps: int) -> None:
    """Say in Lightning's own words that a run is where it is when a step has ended: in which epoch, and how far.

    What a checkpoint says itself depends on how long an epoch was for those who saved it.
    """
    epoch, done = divmod(step, epoch_steps)
    begun = epoch + (done > 0)
    batches = done or epoch_steps  # after the last one of an epoch, Lightning begins the next by itself
    loops["epoch_progress"] = _progress(_counts(begun, processed=epoch, completed=epoch))
    loops["epoch_loop.batch_progress"] = {
        "total": _counts(step, completed=step - 1),
        "current": _counts(batches, completed=batches - 1),
        "is_last_batch": False,
    }


def _progress(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"total": counts, "current": dict(counts)}


def _counts(number: int, *, processed: int | None = None, completed: int) -> dict[str, int]:
    return {
        "ready": number,
        "started": number,
        "processed": number if processed is None else processed,
        "completed": completed,
    }


def _free(path: Path) -> None:
    """Move a folder aside that stands where a checkpoint will be written."""
    if path.is_dir():
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.aside")
        path.rename(aside)
        logger.warning("%s is a folder, where a checkpoint will be written; it is %s now", path, aside.name)


def _link_or_copy(path: Path, other: Path) -> None:
    """Hard-link a file, or copy it if the disk has no links. Neither file is ever changed in place."""
    with contextlib.suppress(OSError):
        os.link(path, other)
        return
    shutil.copyfile(path, other)


def _check_ranks(trainer: lightning.Trainer) -> None:
    """Every rank looks for the newest checkpoint itself; a folder that changes meanwhile would part them."""
    first = trainer.strategy.broadcast(trainer.global_step)
    if trainer.strategy.reduce_boolean_decision(first != trainer.global_step, all=False):
        raise CheckpointError(f"the ranks go on from different steps (the first from {first}); start the run again")


def _random_state() -> dict[str, Tensor]:
    """State of the random generators that layers use."""
    state = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: Mapping[str, Tensor]) -> None:
    torch.random.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
