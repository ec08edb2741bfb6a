"""Rules of `task`: what a run trains in place of an encoder, and what then has no meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from m2_encoder.config.known import Known, count_ranks
from m2_encoder.config.problems import show
from m2_encoder.distributed.topology import divisors
from m2_encoder.errors import NOTHING, Problem

_TOKENIZER_TARGET: Final = "m2_encoder.training.visual_tokenizer_module.VisualTokenizerModule"
_FULL_TARGET: Final = "m2_encoder.training.adaptation.Full"
_SINGLE_TARGET: Final = "m2_encoder.strategies.single.LocalStrategy"


def _check_task(known: Known) -> Iterator[Problem]:
    if (target := known("task._target_")) != _TOKENIZER_TARGET:
        fix = "use task=visual_tokenizer, or leave task out to train an encoder"
        yield Problem("task._target_", target, f"must be {_TOKENIZER_TARGET}", fix)


def _check_tokenizer_task(known: Known) -> Iterator[Problem]:
    if known("task._target_") != _TOKENIZER_TARGET:
        return
    if known("objective", {}):
        given = list(known("objective"))
        yield Problem("objective", given, "must be empty: the task has a loss of its own", "use objective=[]")
    if count_ranks(known) > 1 or known("strategy._target_", _SINGLE_TARGET) != _SINGLE_TARGET:
        rule = "must be single, on one device: the codes follow the batch of one process"
        yield Problem("strategy", NOTHING, rule, "use strategy=single trainer.devices=1")
        return
    for key, neutral in (("micro_batches", 1), ("activation_checkpointing", False)):
        if (value := known(f"strategy.{key}", neutral)) != neutral:
            rule = "has no meaning for a visual tokenizer, which is small"
            yield Problem(f"strategy.{key}", value, rule, f"use strategy.{key}={show(neutral)}")
    if (weights := known("model.weights", None)) is not None:
        rule = "must be null: of the model only the sizes of images and patches count here"
        yield Problem("model.weights", weights, rule, "use model.weights=null")
    if (adaptation := known("adaptation._target_", _FULL_TARGET)) != _FULL_TARGET:
        rule = "must be full: a visual tokenizer is trained as a whole"
        yield Problem("adaptation._target_", adaptation, rule, "use adaptation=full")


def _check_task_heads(known: Known) -> Iterator[Problem]:
    width, heads = known("task.embed_dim"), known("task.num_heads")
    if known("task._target_") == _TOKENIZER_TARGET and width % heads:
        fits = min(divisors(width), key=lambda divisor: (abs(divisor - heads), -divisor))
        rule = f"must divide task.embed_dim={width}"
        yield Problem("task.num_heads", heads, rule, f"for example task.num_heads={fits}")


TASK_CHECKS: Final[tuple[Callable[[Known], Iterator[Problem]], ...]] = (
    _check_task,
    _check_tokenizer_task,
    _check_task_heads,
)
