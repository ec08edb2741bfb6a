"""Other people's parts, from a folder outside of the checkout: each does its work in a run of m2-train."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import m2_encoder
from m2_encoder.cli.commands import EXPORT, TRAIN
from m2_encoder.config.command import run_command
from m2_encoder.errors import UserError
from tests.support.own_parts import write_own_parts
from tests.support.shards import write_numbers

Train = Callable[..., int]
MODULE = "my_parts_of_mine"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_parts(tmp_path_factory.mktemp("somewhere") / "parts")


@pytest.fixture
def train(own: Path, tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """Two steps of m2-train with that folder, in this process."""
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, MODULE, raising=False)

    def run(*lines: str) -> int:
        start = ["--config-dir", str(own), "+experiment=two_steps", f"run.folder={tmp_path}"]
        warm = [] if any(line.startswith("scheduler=") for line in lines) else ["scheduler.warmup_steps=1"]
        model = [] if any(line.startswith("model=") for line in lines) else ["model=small"]
        return run_command(TRAIN, [*start, *warm, *model, *lines])

    yield run
    sys.modules.pop(MODULE, None)


def used() -> set[str]:
    found: list[str] = sys.modules[MODULE].USED
    return set(found)


PAIRS = ("data=pairs", "data.global_batch_size=8", f"data.train._target_={MODULE}.Pairs")
VAL = f"data.validation={{own: {{_target_: {MODULE}.Pairs, size: 9}}}}"


def test_a_model_and_what_trains_it(
    train: Train, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, tokenizer, objective, adaptation, callback, evaluation, dataset, optimizer and scheduler in one run."""
    parts = [
        "model=towers",
        "objective=[itc,pull]",
        "adaptation=freeze_words",
        f"+callbacks.own._target_={MODULE}.CountBatches",
    ]
    parts += [
        "evaluation=[retrieval,spread]",
        "optimizer=sgd",
        "+model.num_layers=3",
        "scheduler=steps",
        *PAIRS,
        VAL,
        "strategy.micro_batches=2",
    ]
    assert train("run.name=own", *parts) == 0
    assert used() >= {"objective", "adaptation", "callback", "evaluation", "dataset"}
    said = capsys.readouterr().out
    assert "model.num_layers: say nothing of my_parts_of_mine.Towers, and are left out" in said
    assert "towers.classifier.weight, towers.classifier.bias get no gradient of the features, and are frozen" in said
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert {"val/own/spread", "val/own_en/mean_recall", "val/own_zh/mean_recall"} <= summary["metrics"].keys()
    records = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train/loss/pull" in record] == [1, 2]

    state = torch.load(tmp_path / "own" / "checkpoints" / "last.ckpt", weights_only=True)
    (group,) = state["optimizer_states"][0]["param_groups"]
    assert (group["momentum"], group["lr"]) == (0.9, 0.05 * 0.25)
    assert "model.towers.words.weight" not in group["names"]
    export = tmp_path / "own" / "export"
    weights = load_file(export / "model.safetensors")
    towers = sys.modules[MODULE].Towers(vocab_size=300, image_size=16, width=12)
    towers.load_state_dict(weights)  # under its own names
    assert (export / "README.md").read_text().count("load_state_dict") == 1
    with pytest.raises(UserError, match=r"holds somebody else's model.*README\.md"):
        m2_encoder.load(export)

    assert train("run.name=own", *parts, "run.resume=must", "trainer.max_steps=3") == 0
    assert "continuing at step 2 of 3" in capsys.readouterr().out
    assert train("run.name=own", *parts, "run.resume=must", "trainer.max_steps=4", "model.width=10") == 2
    assert "image.1.weight" in capsys.readouterr().err

    places = ["run.name=own", f"run.folder={tmp_path}", "checkpoint=step=1", f"output={tmp_path / 'first'}"]
    assert run_command(EXPORT, places) == 2
    assert "my_parts_of_mine.Towers: is named by a saved configuration" in capsys.readouterr().err
    assert run_command(EXPORT, ["--config-dir", str(own), *places]) == 0
    assert load_file(tmp_path / "first" / "model.safetensors").keys() == weights.keys()


def test_a_column_a_transform_and_a_logger(train: Train, tmp_path: Path) -> None:
    write_numbers(tmp_path / "tars", [24])
    lines = [
        "data=webdataset",
        f"data.sources.main.shards={tmp_path / 'tars'}",
        "data.check=null",
        "data.num_workers=0",
        "data.lanes=8",
        "data.global_batch_size=8",
    ]
    lines += [f"+data.columns.length._target_={MODULE}.Length", f"data.transform._target_={MODULE}.Plain"]
    lines += [f"~data.transform.{name}" for name in ("scale", "flip", "num_ops")]
    assert train("run.name=columns", *lines, "logger=[csv,lines]", "objective=[itc,pull]") == 0
    assert used() >= {"column", "transform", "logger", "objective"}
    assert "train/loss/pull" in json.loads((tmp_path / "lines.json").read_text())


def test_a_task_with_settings_of_its_own(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["run.name=task", "+task=mean", "objective=[]", *PAIRS]
    assert train(*lines) == 0
    said = capsys.readouterr().out
    assert "optimizer and scheduler do nothing: my_parts_of_mine.Task takes no such argument" in said
    assert "nothing is measured at the end: my_parts_of_mine.Task has no encode_image and encode_text" in said
    assert "nothing is exported" in said
    records = [json.loads(line) for line in (tmp_path / "task" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train/mse" in record] == [1, 2]
    assert json.loads((tmp_path / "task" / "summary.json").read_text())["finished"] is True
    assert train(*lines, "run.resume=must", "trainer.max_steps=3") == 0
    assert "continuing at step 2 of 3" in capsys.readouterr().out
    assert train(*lines, "run.resume=must", "trainer.max_steps=4", "task.width=7") == 2
    assert "net.1.weight is (6, 768) there, (7, 768) now" in capsys.readouterr().err


def test_data_of_ones_own(train: Train) -> None:
    assert train("run.name=mine", "data=own") == 0
    assert used() >= {"datamodule"}


def test_batches_of_another_kind(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run.name=other", "data=vectors") == 2
    assert "data._target_=my_parts_of_mine.Vectors: gives batches of list" in capsys.readouterr().err
    lines = ["run.name=vectors", "data=vectors", "+task=regression", "objective=[]"]
    assert train(*lines) == 2
    assert "trainer.gradient_clip_val=1.0: must be null" in capsys.readouterr().err
    assert train(*lines, "trainer.gradient_clip_val=null", "+data.shift=1") == 2
    assert "data._target_=my_parts_of_mine.Vectors: saves size as its settings, and so does" in capsys.readouterr().err
    assert train(*lines, "trainer.gradient_clip_val=null") == 0


REFUSED = [
    (
        ["model=towers", "objective=[itc,cmlm,itm]"],
        "objective.cmlm: predicts from hidden states; my_parts_of_mine.Towers",
    ),
    (["model=towers", "objective=[itc,itm]"], "objective.itm: needs image and text encoded together"),
    (["model=towers", "objective.itc.heads=[features,backbone_features]"], "trains backbone_features"),
    (["model=towers", "strategy.activation_checkpointing=true"], "the layers of my_parts_of_mine.Towers are not known"),
    (["model=towers", "adaptation=prompts"], "needs the layers of an M2-Encoder; those of my_parts_of_mine.Towers are"),
    (["model=towers", "+model.widht=3"], "unknown argument (did you mean width?)"),
    (["model=towers", "model._target_=my_parts_of_mine.Tower"], "has no Tower (did you mean Towers"),
    (["model=towers", "model.pixel_mean=[1]"], "3 numbers"),
    (["model=towers", "~model.image_size"], "model.image_size: is missing; add model.image_size=N"),
    (["optimizer=sgd", "optimizer.lr=-1"], "optimizer: cannot be built: ValueError: Invalid learning rate: -1"),
    (["+callbacks.bar._target_=lightning.pytorch.callbacks.RichProgressBar"], "multiple progress bar callbacks"),
    (["+data.train.size=0"], "data.train=Pairs: has no items"),
    (["model=towers", "optimizer=muon"], "Muon needs trainable matrices inside layers"),
    (["+task=mean"], "objective=[itc]: must be empty: the task has a loss of its own"),
    (["+task=mean", "objective=[]", "strategy.micro_batches=2"], "would change nothing: my_parts_of_mine.Task"),
    (["+task=mean", "objective=[]", "strategy=grouped_fsdp"], "in configure_model"),
    (["+task=mean", "objective=[]", "+task.depth=2"], "my_parts_of_mine.Task has width, activation"),
    (["scheduler=steps", "scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"], "follows a metric"),
    (["data=own", "objective=[cmlm]"], "does not take `masking`"),
]


@pytest.mark.parametrize(("lines", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_they_cannot_do_is_said_first(
    lines: list[str], said: str, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run.name=no", *([] if any(line.startswith("data=") for line in lines) else PAIRS), *lines) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "no" / "config.yaml").exists()
