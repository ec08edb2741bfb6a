"""Rules of callbacks, of the checkpoints that stay, and of the one that is taken in the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from m2_encoder.config.known import Known
from m2_encoder.errors import NOTHING, Problem

_CHECKPOINT: Final = "m2_encoder.training.callbacks.checkpoint.RunCheckpoint"
_BEST: Final = "m2_encoder.training.callbacks.monitors.BestCheckpoint"
_AVERAGE: Final = "m2_encoder.training.callbacks.average.WeightAverage"
_STOPS: Final = "m2_encoder.training.callbacks.monitors.StopEarly"


def check_kept(known: Known) -> Iterator[Problem]:
    """A wish that would change nothing."""
    every = known("run.keep_every", None)
    if every is not None and known("run.keep_last", None) is None:
        fix = "leave it out, or give run.keep_last, for example run.keep_last=3"
        yield Problem("run.keep_every", every, "changes nothing where run.keep_last=null keeps all checkpoints", fix)


def check_best(known: Known) -> Iterator[Problem]:
    """The best checkpoint: one at most, written by `RunCheckpoint`."""
    names = _named(known, _BEST)
    if known("run.final", "last") == "best" and not names:
        fix = "use callbacks=[default,best_checkpoint], or run.final=last"
        yield Problem("run.final", "best", "needs a callback that chooses it", fix)
    if len(names) > 1:
        rule = f"is the second one, after callbacks.{names[0]}; there is one best.ckpt"
        yield Problem(f"callbacks.{names[1]}", NOTHING, rule, f"leave it out: ~callbacks.{names[1]}")
    elif names and not _named(known, _CHECKPOINT):
        fix = "use callbacks=[default,best_checkpoint]"
        yield Problem(f"callbacks.{names[0]}", NOTHING, "needs callbacks.checkpoint, which writes the file", fix)


def check_average(known: Known) -> Iterator[Problem]:
    """The moving average of the weights: one at most."""
    names = _named(known, _AVERAGE)
    if known("run.final", "last") == "ema" and not names:
        fix = "use callbacks=[default,ema], or run.final=last"
        yield Problem("run.final", "ema", "needs a callback that keeps an average of the weights", fix)
    if len(names) > 1:
        rule = f"is the second one, after callbacks.{names[0]}; a checkpoint holds one average"
        yield Problem(f"callbacks.{names[1]}", NOTHING, rule, f"leave it out: ~callbacks.{names[1]}")


def check_validations(known: Known) -> Iterator[Problem]:
    """Callbacks that decide by validations, where none would come."""
    names = [*_named(known, _STOPS), *_named(known, _BEST)]
    if names and (why := _no_validation(known)):
        rule, fix = why
        for name in names:
            yield Problem(f"callbacks.{name}", NOTHING, f"decides by validations, and {rule}", fix)


def _named(known: Known, target: str) -> list[str]:
    nodes: dict[str, Any] = known("callbacks", None) or {}
    return [name for name in nodes if known(f"callbacks.{name}._target_", None) == target]


def _no_validation(known: Known) -> tuple[str, str] | None:
    if known("trainer.limit_val_batches", 1.0) == 0:
        return "trainer.limit_val_batches=0 leaves none", "leave that out"
    if not known("data.validation", "none of its keys"):
        return "data.validation names no set", "give data.validation"
    interval, steps = known("trainer.val_check_interval", None), known("trainer.max_steps")
    if type(interval) is int and interval > steps:
        rule = f"trainer.val_check_interval={interval} is beyond trainer.max_steps={steps}"
        return rule, f"for example trainer.val_check_interval={max(1, steps // 10)}"
    return None
