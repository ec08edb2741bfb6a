"""The moving average of weights: its formula over a hundred steps, what validation sees, and a run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from m2_encoder.checkpoints.training_state import read_average
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.runs.callbacks import FinalWeights, take_final
from m2_encoder.strategies.single import LocalStrategy
from m2_encoder.training.adaptation import Adaptation
from m2_encoder.training.callbacks.average import WeightAverage
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.callbacks.monitors import BestCheckpoint
from m2_encoder.training.module import PretrainModule
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

State = dict[str, Tensor]


def trained(module: nn.Module) -> State:
    return {name: each.detach().clone() for name, each in module.named_parameters() if each.requires_grad}


class Record(lightning.Callback):
    """The weights after every step, as the optimizer leaves them, and those that each validation sees."""

    def __init__(self) -> None:
        self.weights: list[State] = []
        self.validated: list[State] = []
        self.after: list[State] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.weights.append(trained(pl_module))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.weights.append(trained(pl_module))

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        self.validated.append(trained(pl_module))

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        self.after.append(trained(pl_module))


class LocksTexts(Adaptation):
    def apply(self, model: M2Encoder) -> None:
        for name, parameter in model.named_parameters():
            if "text" in name:
                parameter.requires_grad_(False)

    def merge(self, model: M2Encoder) -> M2Encoder:
        return model


class Fitted:
    """A run in a folder; with `resume` it goes on there."""

    def __init__(
        self, data: Path, folder: Path, average: WeightAverage, *, steps: int, resume: bool = False,
        planned: int | None = None, micro_batches: int = 1, every: int = 2, **overrides: Any,
    ) -> None:  # fmt: skip
        lightning.seed_everything(3, workers=True, verbose=False)
        self.module: PretrainModule = make_module(max_steps=planned or steps, **overrides.pop("module", {}))
        self.record, self.average, self.folder = Record(), average, folder
        self.keeper = RunCheckpoint(folder=folder / "checkpoints", every_n_steps=every)
        self.best = BestCheckpoint(monitor="val/emoji_val/mean_recall")
        trainer = make_trainer(
            folder,
            max_steps=steps,
            callbacks=[average, self.record, self.best, self.keeper],
            strategy=LocalStrategy("cpu", micro_batches=micro_batches),
            **overrides,
        )
        data_module = make_datamodule(data, max_steps=planned or steps, global_batch_size=8)
        path = self.keeper.last if resume else None
        trainer.fit(self.module, datamodule=data_module, ckpt_path=path, weights_only=True)

    def saved(self) -> dict[str, Any]:
        return dict(torch.load(self.keeper.last, weights_only=True))


def formula(weights: list[State], *, decay: float, start: int = 0, every: int = 1) -> State:
    """In double precision: average = decay * average + (1 - decay) * weights."""
    average = {name: value.double() for name, value in weights[start].items()}
    for step in range(start + 1, len(weights)):
        if (step - start) % every == 0:
            average = {n: decay * value + (1 - decay) * weights[step][n].double() for n, value in average.items()}
    return average


def furthest(ours: State, expected: State) -> float:
    assert ours.keys() == expected.keys()
    return max(float((ours[name].double() - value.double()).abs().max()) for name, value in expected.items())


def test_a_hundred_steps_are_the_formula(emoji_folder: Path, tmp_path: Path) -> None:
    run = Fitted(emoji_folder, tmp_path, WeightAverage(decay=0.98), steps=100, every=50)
    saved = run.saved()["average"]
    assert len(run.record.weights) == 101
    assert furthest(saved["weights"], formula(run.record.weights, decay=0.98)) < 1e-6
    assert furthest(saved["weights"], run.record.weights[-1]) > 1e-3, "the average is another one"
    assert saved["validated"] is True


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"start_step": 3}, {}),
        ({"every_n_steps": 3, "start_step": 1}, {"micro_batches": 2}),
    ],
)
def test_start_distance_and_micro_batches(
    emoji_folder: Path, tmp_path: Path, settings: dict[str, Any], more: dict[str, Any]
) -> None:
    run = Fitted(emoji_folder, tmp_path, WeightAverage(decay=0.8, **settings), steps=8, **more)
    start, every = settings.get("start_step", 0), settings.get("every_n_steps", 1)
    expected = formula(run.record.weights, decay=0.8, start=start, every=every)
    assert len(run.record.weights) == 9
    assert furthest(run.saved()["average"]["weights"], expected) < 1e-6


def test_a_run_goes_on_bit_for_bit(emoji_folder: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2, "planned": 6}
    whole = Fitted(emoji_folder, tmp_path / "whole", WeightAverage(decay=0.7), steps=6, **more).saved()
    Fitted(emoji_folder, tmp_path / "parts", WeightAverage(decay=0.7), steps=4, **more)
    again = Fitted(emoji_folder, tmp_path / "parts", WeightAverage(decay=0.7), steps=6, resume=True, **more).saved()
    assert furthest(again["average"]["weights"], whole["average"]["weights"]) == 0
    assert furthest(again["state_dict"], whole["state_dict"]) == 0


@pytest.mark.parametrize("validates", [True, False])
def test_what_is_validated_and_taken(emoji_folder: Path, tmp_path: Path, validates: bool) -> None:
    more: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2}
    average = WeightAverage(decay=0.5, validate=validates)
    run = Fitted(emoji_folder, tmp_path, average, steps=4, **more)
    for number, step in enumerate((2, 4)):
        weights = run.record.weights[: step + 1]
        expected = formula(weights, decay=0.5) if validates else weights[-1]
        assert furthest(run.record.validated[number], expected) < 1e-6
    for step, after in enumerate(run.record.after):
        assert furthest(after, run.record.weights[step]) == 0, "training goes on from the weights"
    saved = run.saved()
    assert furthest({n: saved["state_dict"][n] for n in run.record.weights[4]}, run.record.weights[4]) == 0
    assert take_final("last", run.module, [average, run.best], tmp_path) == FinalWeights()
    assert furthest(trained(run.module), run.record.weights[4]) == 0
    step = run.best.step
    assert take_final("best", run.module, [average, run.best], tmp_path) == FinalWeights(step, averaged=validates)
    weights = run.record.weights[: step + 1]
    assert furthest(trained(run.module), formula(weights, decay=0.5) if validates else weights[-1]) < 1e-6
    assert take_final("ema", run.module, [average, run.best], tmp_path) == FinalWeights(averaged=True)
    assert furthest(trained(run.module), saved["average"]["weights"]) == 0
    assert bool(read_average(run.keeper.last, final="best")) is validates
    assert read_average(run.keeper.last, final="last") == {}


def test_only_what_is_trained_has_an_average(emoji_folder: Path, tmp_path: Path) -> None:
    run = Fitted(emoji_folder, tmp_path, WeightAverage(decay=0.5), steps=2, module={"adaptation": LocksTexts()})
    names = {name for name, parameter in run.module.named_parameters() if parameter.requires_grad}
    assert run.saved()["average"]["weights"].keys() == names
    assert names
    assert not [name for name in names if "text" in name]


def test_a_checkpoint_without_one_starts_it_there(
    emoji_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Fitted(emoji_folder, tmp_path, WeightAverage(decay=0.5), steps=2, planned=4)
    content = run.saved()
    del content["average"]
    torch.save(content, run.keeper.last)
    with pytest.raises(CheckpointError, match="holds no average of the weights; callbacks="):
        read_average(run.keeper.last, final="ema")
    again = Fitted(emoji_folder, tmp_path, WeightAverage(decay=0.5), steps=4, planned=4, resume=True)
    assert "the checkpoint holds no average of the weights" in caplog.text
    assert furthest(again.saved()["average"]["weights"], formula(again.record.weights, decay=0.5)) < 1e-6


def test_an_average_of_other_parameters_is_refused(emoji_folder: Path, tmp_path: Path) -> None:
    run = Fitted(emoji_folder, tmp_path, WeightAverage(decay=0.5), steps=2, planned=4)
    content = run.saved()
    del content["average"]["weights"]["model.logit_scale"]
    torch.save(content, run.keeper.last)
    with pytest.raises(UserError, match=r"its average lacks model\.logit_scale"):
        Fitted(emoji_folder, tmp_path, WeightAverage(decay=0.5), steps=4, planned=4, resume=True)


@pytest.mark.parametrize(
    ("decay", "start", "steps", "said"),
    [
        (0.999, 0, 100, "after 100 steps 90% of the average would still be the weights it starts from"),
        (0.999, 0, 100, "use callbacks.ema.decay=0.9, or"),
        (0.999, 96, 100, "use callbacks.ema.decay=0, or"),
        (0.98, 0, 100, None),
        (0.9, 0, 100, None),
        (0.999, 0, 10_000, None),
        (0.999, 100, 100, None),
        (0.999, 0, -1, None),
    ],
)
def test_an_average_that_hardly_leaves_its_start_is_named(
    decay: float, start: int, steps: int, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, max_steps=steps)
    WeightAverage(decay=decay, start_step=start).on_train_start(trainer, make_module())
    assert ((said or "would still be") in caplog.text) is (said is not None)
