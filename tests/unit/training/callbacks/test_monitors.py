"""Stopping early and the best checkpoint decide as in an uninterrupted run, wherever a run was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from m2_encoder.checkpoints.training_state import find_newest
from m2_encoder.errors import UserError
from m2_encoder.runs.callbacks import find_stop, take_best
from m2_encoder.runs.ending import describe_end
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.callbacks.monitors import BestCheckpoint, StopEarly
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

SCORES = [3.0, 5.0, 4.0, 4.5, 6.0, 5.0, 5.5, 5.9, 7.0]  # of the validations after the steps 1, 2, ...


class Scripted(Callback):
    """A validation that finds what the test says; it may be the last thing that a process does."""

    def __init__(self, kills_at: int = 0) -> None:
        self._kills_at = kills_at

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self._kills_at:
            raise RuntimeError("killed")
        pl_module.log("val/score", SCORES[trainer.global_step - 1])


class Fitted:
    """A run, or a part of one."""

    def __init__(
        self, emoji_folder: Path, folder: Path, *, steps: int = 9, every: int = 1, kills_at: int = 0, **settings: Any
    ) -> None:
        self.folder = folder / "checkpoints"
        self.stop = StopEarly(**{"monitor": "val/score", "patience": 3, **settings})
        self.best = BestCheckpoint(monitor="val/score")
        keeper = RunCheckpoint(folder=self.folder, every_n_steps=every, keep_last=1)
        callbacks = [self.best, keeper, Scripted(kills_at), self.stop]
        self.trainer = make_trainer(
            folder, max_steps=steps, callbacks=callbacks, limit_val_batches=1, val_check_interval=1
        )
        self.newest = find_newest(self.folder)
        self.module = make_module(max_steps=9)
        datamodule = make_datamodule(emoji_folder, max_steps=9, global_batch_size=4, eval_batch_size=8)
        path = self.newest and self.newest.path
        self.error = ""
        try:
            self.trainer.fit(self.module, datamodule=datamodule, ckpt_path=path, weights_only=True)
        except RuntimeError as error:
            self.error = str(error)


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return dict(content["state_dict"])


def equal(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == other.keys() and all(torch.equal(ours[name], value) for name, value in other.items())


@pytest.fixture(scope="module")
def whole(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Stops after the validations of steps 6, 7 and 8, none of them as good as that of step 5."""
    torch.manual_seed(4)
    return Fitted(emoji_folder, tmp_path_factory.mktemp("whole"))


def test_it_ends_where_patience_does_and_keeps_the_best(whole: Fitted) -> None:
    assert (whole.trainer.global_step, whole.best.step, whole.best.value) == (8, 5, 6.0)
    assert sorted(path.name for path in whole.folder.iterdir()) == ["best.ckpt", "last.ckpt", "step=8.ckpt"]
    assert torch.load(whole.folder / "best.ckpt", weights_only=True)["global_step"] == 5
    end = describe_end(whole.trainer, 9)
    assert end.is_finished
    assert str(end) == (
        "8 of 9, finished early (early stopping: val/score did not rise in the last 3 validations; best 6 at step 5)"
    )


@pytest.mark.parametrize(
    ("stop", "kills_at", "every"),
    [
        (6, 0, 4),
        (9, 7, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, 0, 1), (9, 4, 1), (9, 5, 1)]),
    ],
)
def test_a_run_that_goes_on_decides_as_if_nothing_had_come_between(
    emoji_folder: Path, tmp_path: Path, whole: Fitted, stop: int, kills_at: int, every: int
) -> None:
    torch.manual_seed(4)
    first = Fitted(emoji_folder, tmp_path, steps=stop, kills_at=kills_at, every=every)
    assert first.error == ("killed" if kills_at else "")
    second = Fitted(emoji_folder, tmp_path, every=every)
    assert second.newest is not None
    assert (second.trainer.global_step, second.best.step, second.best.value) == (8, 5, 6.0)
    assert second.stop.state_dict() == whole.stop.state_dict()
    for name in ("best.ckpt", "last.ckpt"):
        assert equal(weights(second.folder / name), weights(whole.folder / name))


def test_a_stopped_run_stays_so_with_the_same_settings_and_goes_on_with_others(
    emoji_folder: Path, tmp_path: Path
) -> None:
    first = Fitted(emoji_folder, tmp_path, patience=2)
    assert first.trainer.global_step == 4
    same = Fitted(emoji_folder, tmp_path, patience=2)
    assert find_stop(same.newest, [same.stop]).startswith("early stopping: val/score did not rise in the last 2")
    assert same.trainer.global_step == 4
    assert describe_end(same.trainer, 9) == describe_end(first.trainer, 9)
    more = StopEarly(monitor="val/score", patience=3)
    more.resolve(same.module)
    assert find_stop(same.newest, [more]) == ""
    assert Fitted(emoji_folder, tmp_path, patience=3).trainer.global_step == 8


def test_the_best_weights_are_taken(emoji_folder: Path, tmp_path: Path) -> None:
    run = Fitted(emoji_folder, tmp_path, steps=3)
    assert take_best(run.module, [run.best], tmp_path).step == 2
    assert equal(dict(run.module.state_dict()), weights(run.folder / "best.ckpt"))
    (run.folder / "best.ckpt").unlink()
    with pytest.raises(UserError, match=r"best\.ckpt: is missing, and the best step was 2; use run\.final=last"):
        take_best(run.module, [run.best], tmp_path)


@pytest.mark.parametrize(
    ("settings", "steps", "said"),
    [
        ({"stopping_threshold": 4.9}, 2, "early stopping: val/score=5 passed a threshold"),
        ({"mode": "min", "patience": 1}, 2, "early stopping: val/score did not fall in the last validation; best 3"),
        ({"min_delta": 2.5, "patience": 2}, 3, "early stopping: val/score did not rise in the last 2 validations"),
    ],
)
def test_other_reasons(emoji_folder: Path, tmp_path: Path, settings: dict[str, Any], steps: int, said: str) -> None:
    run = Fitted(emoji_folder, tmp_path, **settings)
    assert run.trainer.global_step == steps
    assert run.stop.stopped.startswith(said)


@pytest.mark.parametrize(
    ("monitor", "steps", "there"), [("val/scor", 1, "val/score"), ("train/los/total", 1, "train/loss/total")]
)
def test_a_metric_that_does_not_exist_names_those_that_do(
    emoji_folder: Path, tmp_path: Path, monitor: str, steps: int, there: str
) -> None:
    with pytest.raises(UserError, match=f"monitor={monitor}: is no metric of this run; .*{there}"):
        Fitted(emoji_folder, tmp_path, monitor=monitor)
    assert not (tmp_path / "checkpoints" / f"step={steps}.ckpt").exists()
