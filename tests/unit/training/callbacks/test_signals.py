"""SIGINT and SIGTERM to a training: the step they come in is saved."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


class Interrupt(Callback):
    """Sends this process signals in a step."""

    def __init__(self, *numbers: int, step: int) -> None:
        self._numbers, self._step = numbers, step

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if trainer.global_step == self._step - 1:
            for number in self._numbers:
                os.kill(os.getpid(), number)


def fit(emoji_folder: Path, checkpoint: RunCheckpoint, interrupt: Interrupt, *, workers: int = 0) -> None:
    trainer = make_trainer(checkpoint.folder.parent, callbacks=[checkpoint, interrupt], max_steps=8)
    trainer.fit(make_module(), datamodule=make_datamodule(emoji_folder, global_batch_size=4, num_workers=workers))


@pytest.mark.usefixtures("hangups_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_step_it_comes_in(emoji_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    checkpoint = RunCheckpoint(folder=tmp_path / "checkpoints", every_n_steps=100)
    with pytest.raises(SIGTERMException) as end:
        fit(emoji_folder, checkpoint, Interrupt(number, step=3))
    assert end.value.code == 128 + number
    assert torch.load(checkpoint.last, weights_only=True)["global_step"] == 3
    assert signal.getsignal(number) == before


def test_a_second_interrupt_does_not_wait_for_the_step(emoji_folder: Path, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(folder=tmp_path / "checkpoints", every_n_steps=100)
    with pytest.raises(SystemExit) as end:  # Lightning makes that of a KeyboardInterrupt; a run makes it one again
        fit(emoji_folder, checkpoint, Interrupt(signal.SIGINT, signal.SIGINT, step=3))
    assert not isinstance(end.value, SIGTERMException)
    assert not checkpoint.last.exists()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it for what it does at the end
