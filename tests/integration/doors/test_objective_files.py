"""An objective of a user's own that reads a file: one class, one YAML file; m2-train loads, checks and records it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.integration.doors.conftest import Own, Train

OBJECTIVE = """
    import torch

    from m2_encoder.objectives.base import Objective, ObjectiveOutput
    from m2_encoder.objectives.files import FILE


    class Anchors(Objective):
        files = {"anchors": FILE}

        def __init__(self, *, anchors, weight=1.0, schedule=None):
            super().__init__(weight=weight, schedule=schedule)
            self.anchors = anchors

        def prepare(self, resources):
            self.register_buffer("table", torch.load(resources.find_path(self.anchors)), persistent=False)

        def forward(self, inputs):
            loss = 1 - (inputs.image_features @ self.table.t()).amax(dim=1).mean() + inputs.logit_scale * 0
            return ObjectiveOutput(loss=loss, per_sample=loss.detach().expand(len(inputs.text_features)))
"""
CHOSEN = ("objective=[itc,anchors]", "run.export=false", "evaluation=[]")
KEY = "objective.anchors.anchors"


@pytest.fixture
def anchors(own: Own) -> str:
    own.write("my_anchors.py", OBJECTIVE)
    own.write("objective/anchors.yaml", "anchors:\n  _target_: my_anchors.Anchors\n  anchors: ???\n")
    torch.save(torch.eye(4, 64), own.folder / "anchors.pt")
    sys.modules.pop("my_anchors", None)
    return str(own.folder / "anchors.pt")


def test_its_file_is_loaded_recorded_and_compared(
    own: Own, anchors: str, m2_train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = m2_train(*CHOSEN, f"{KEY}={anchors}")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert "train/loss/anchors" in last
    record = json.loads((run / "frozen.json").read_text())
    assert set(record) == {KEY}
    assert record[KEY]["file"] == anchors
    torch.save(torch.eye(5, 64), own.folder / "anchors.pt")
    capsys.readouterr()
    m2_train(*CHOSEN, f"{KEY}={anchors}", "run.resume=must", "trainer.max_steps=3", code=2)
    said = capsys.readouterr().err
    assert said.startswith(f"m2-train: {KEY}={anchors}: {anchors} is not the file that this run began with")
    assert json.loads((run / "frozen.json").read_text()) == record


@pytest.mark.usefixtures("anchors")
def test_a_missing_file_is_refused_before_anything_starts(m2_train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = m2_train(*CHOSEN, f"{KEY}=nowhere.pt", code=2)
    said = capsys.readouterr().err
    assert said == f"m2-train: {KEY}=nowhere.pt: No such file or directory; give the path of a file\n"
    assert not run.exists()
