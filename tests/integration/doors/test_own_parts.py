"""An objective, a callback and a model's size of a user's own: a class or values, and one YAML file each."""

from __future__ import annotations

import json

import pytest

import m2_encoder
from tests.integration.doors.conftest import Own, Train

PARTS = """
    import lightning

    from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput


    class Pull(Objective):
        '''Images towards their captions, whatever the others do.'''

        def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
            images = inputs.image_features.repeat_interleave(inputs.batch.captions_per_image, dim=0)
            distances = (images - inputs.text_features).square().sum(dim=1)
            return ObjectiveOutput(loss=distances.mean(), per_sample=distances.detach())


    class Steps(lightning.Callback):
        '''Logs how many steps it has seen.'''

        def __init__(self, name: str):
            self.name, self.steps = name, 0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.steps += 1
            module.log(self.name, float(self.steps))
"""


def test_all_three_in_one_run(own: Own, m2_train: Train) -> None:
    own.write("door_parts.py", PARTS)
    own.write("objective/pull.yaml", "pull: {_target_: door_parts.Pull, weight: 0.5}\n")
    own.write("callbacks/mine.yaml", "defaults: [default]\nsteps: {_target_: door_parts.Steps, name: mine/steps}\n")
    own.write("model/mine.yaml", "defaults: [tiny]\nffn_ratio: 3\nnum_vl_layers: 2\n")
    run = m2_train(
        "objective=[itc,pull]", "callbacks=mine", "model=mine",
        "+callbacks.more={_target_: door_parts.Steps, name: mine/more}",
    )  # fmt: skip
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = {name: value for record in records for name, value in record.items()}
    assert (values["mine/steps"], values["mine/more"]) == (2, 2)
    assert values["train/loss/total"] > values["train/loss/itc"] > 0 < values["train/loss/pull"]
    model = m2_encoder.load(run / "export").model
    assert (model.config.ffn_ratio, model.config.num_vl_layers) == (3, 2)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("+evaluation.mine={_target_: my_nothing.Nothing}", "m2_encoder.evaluation.tasks.base.EvaluationTask"),
        ("+callbacks.mine={_target_: my_nothing.Nothing}", "lightning.pytorch.callbacks.callback.Callback"),
        ("+data.columns={mine: {_target_: my_nothing.Nothing}}", "m2_encoder.data.samples.sample.Column"),
    ],
)
def test_objects_of_another_kind_are_refused_before_anything_is_trained(
    own: Own, m2_train: Train, capsys: pytest.CaptureFixture[str], line: str, kind: str
) -> None:
    own.write("my_nothing.py", "class Nothing: pass\n")
    run = m2_train(line, code=2)
    said = capsys.readouterr()
    assert f"must be a subclass of {kind}; derive it from that" in said.err
    assert said.out == ""
    assert not (run / "metrics.jsonl").exists()
