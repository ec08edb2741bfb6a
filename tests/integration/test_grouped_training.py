"""Emoji training from the command line, with groups and micro-batches, has the losses of the equal single process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch

from m2_encoder.config.compose import open_composer
from m2_encoder.objectives.base import FeaturePair, Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.runs.build import build_run
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

STEPS = 8
SHARED = (
    "+experiment=smoke", f"trainer.max_steps={STEPS}", "trainer.limit_val_batches=0", "logger=csv", "run.export=false"
)  # fmt: skip
RTOL = 1e-5  # fp32; AdamW's first steps divide by the gradient's own size


class MeanOfGroups(Objective):
    """ITC of every group by itself, all rows in one process: what grouped training is said to be.

    Of W ranks, rank r holds every W-th row, from r on.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self._groups, self._itc = groups, ImageTextContrastive()

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        captions = len(inputs.text_features) // len(inputs.image_features)
        losses, per_sample = [], torch.zeros(len(inputs.text_features))
        for group in range(self._groups):
            texts = inputs.text_features.unflatten(0, (-1, captions))[group :: self._groups].flatten(0, 1)
            pair = FeaturePair(inputs.image_features[group :: self._groups], texts, inputs.logit_scale)
            output = self._itc(ObjectiveInputs({"features": pair}, inputs.identity[group :: self._groups], None))
            losses.append(output.loss)
            per_sample.view(-1, captions)[group :: self._groups] = output.per_sample.view(-1, captions)
        return ObjectiveOutput(torch.stack(losses).mean(), per_sample)


def losses_of(folder: Path) -> dict[str, list[float]]:
    """The curves of a run, by metric."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    names = ("train/loss/itc", "train/loss/itc_zh", "train/loss/itc_en", "train/grad_norm", "train/logit_scale")
    return {name: [record[name] for record in records] for name in names}


def train_by_command(folder: Path, emoji_folder: Path, name: str, *overrides: str) -> dict[str, list[float]]:
    script = shutil.which("m2-train", path=str(Path(sys.executable).parent))
    assert script, "m2-train is not installed beside this Python"
    words = [script, *SHARED, f"run.folder={folder}", f"data.folder={emoji_folder}", f"run.name={name}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses_of(folder / name)


def train_alone(folder: Path, emoji_folder: Path, *, groups: int) -> dict[str, list[float]]:
    """One process, one loss per group, no micro-batches; the same data in the same order."""
    with open_composer(Path(__file__).resolve().parents[2] / "conf", "train") as composer:
        words = [*SHARED, f"run.folder={folder}", f"data.folder={emoji_folder}", "run.name=alone"]
        composition = composer.compose(words)
    assert composition.problems == []
    lightning.seed_everything(composition.cfg["seed"], workers=True, verbose=False)
    run = build_run(composition.cfg, folder / "alone")
    run.module.objectives["itc"] = MeanOfGroups(groups)
    run.trainer.fit(run.module, datamodule=run.datamodule)
    return losses_of(folder / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "overrides"),
    [
        (1, ("strategy.micro_batches=4",)),
        (2, ("strategy=grouped_ddp", "trainer.devices=2", "strategy.group_size=1", "strategy.micro_batches=2")),
    ],
    ids=["one-rank-four-pieces", "two-groups-two-pieces"],
)
def test_curves_of_the_command_are_those_of_one_process(
    groups: int, overrides: tuple[str, ...], emoji_folder: Path, tmp_path: Path
) -> None:
    expected = train_alone(tmp_path, emoji_folder, groups=groups)
    given = train_by_command(tmp_path, emoji_folder, "command", *overrides)
    for name, curve in expected.items():
        assert given[name] == pytest.approx(curve, rel=RTOL), name
    assert len(set(expected["train/loss/itc"])) == STEPS
