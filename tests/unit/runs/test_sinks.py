"""The loggers that a run may have beside `metrics.jsonl`."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers.logger import Logger

from m2_encoder.config import loggers as config_loggers
from m2_encoder.config.compose import Composition, open_composer
from m2_encoder.config.old_names import update_line, update_names
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import format_problem
from m2_encoder.config.validate import check_late, validate_train
from m2_encoder.errors import UserError
from m2_encoder.runs.ending import Results
from m2_encoder.runs.mlflow_logger import mlflow_name
from m2_encoder.runs.sinks import build_loggers, close_loggers

CSV = {"_target_": "m2_encoder.runs.loggers.build_csv_logger"}
TENSORBOARD = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "name": "tensorboard"}


def compose(*lines: str) -> tuple[Composition, list[str]]:
    with open_composer(find_conf(), "train") as composer:
        found = composer.compose(composer.update(["trainer.accelerator=cpu", "run.name=no-such-run", *lines]))
    problems = [*found.problems, *validate_train(found.cfg, changed=found.changed)]
    problems += [] if problems else check_late(found.cfg, changed=found.changed)
    return found, [format_problem(problem) for problem in problems]


def config(**nodes: Any) -> dict[str, Any]:
    return {"logger": nodes, "run": {"name": "r"}, "optimizer": {"lr": 0.5}, "objective": {"itc": {"weight": 1.0}}}


class OwnLogger(Logger):
    """A user's, told nothing but where to write."""

    def __init__(self, save_dir: str, word: str = "") -> None:
        super().__init__()
        self.place, self.word, self.told = save_dir, word, []

    name = version = "own"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.told.append(dict(params))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.told.append((dict(metrics), step))


def fails(save_dir: str) -> None:
    raise RuntimeError("no licence\nmore")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ((), ["wandb"]),
        (("logger=csv",), ["csv"]),
        (("logger=[csv,tensorboard,mlflow,wandb]",), ["csv", "tensorboard", "mlflow", "wandb"]),
        (("logger=[]",), []),
        (("+experiment=smoke",), ["csv"]),
        (("logger=[csv]", "+logger.mine._target_=tests.unit.runs.test_sinks.OwnLogger"), ["csv", "mine"]),
    ],
)
def test_lists_of_loggers(choice: tuple[str, ...], names: list[str]) -> None:
    found, problems = compose(*choice)
    assert problems == []
    assert list(found.cfg["logger"]) == names


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("logger=[wandb,tensorbord]",), "did you mean tensorboard"),
        (("logger=[csv,csv]",), "csv is there twice"),
        (("logger=csv", "logger.wandb.mode=offline"), "unlike logger=[...,wandb]"),
        (("logger.mode=onlin",), "logger.wandb.mode=onlin: must be"),
        (("logger=[tensorboard]", "logger.tensorboard.log_graph=maybe"), "logger.tensorboard.log_graph=maybe"),
        (("logger.wandb.artifact=export", "run.export=false"), "run.export is false"),
        (("+logger.x.y=1",), "logger.x={y: 1}: must have a _target_"),
        (("logger.wandb.folder=x",), "logger.wandb"),
    ],
)
def test_wrong_loggers_are_named(lines: tuple[str, ...], said: str) -> None:
    _, problems = compose(*lines)
    assert any(said in problem for problem in problems), problems


def test_a_package_that_is_missing_is_named_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_loggers, "_is_installed", lambda module: False)
    _, problems = compose("logger=[tensorboard,csv]")
    assert problems == [
        "logger.tensorboard=lightning.pytorch.loggers.TensorBoardLogger: needs the package tensorboard, which is not "
        "installed; install it with pip install tensorboard"
    ]


def test_what_was_the_only_logger_is_one_of_several_today() -> None:
    old = {"_target_": "m2_encoder.cli.loggers.build_wandb_logger", "project": "p"}
    new = {"_target_": "m2_encoder.runs.loggers.build_wandb_logger", "project": "p"}
    assert update_names({"logger": old})["logger"] == {"wandb": new}
    assert update_names({"logger": CSV})["logger"] == {"csv": CSV}
    assert update_names({"logger": {"_target_": "mine.Logger"}})["logger"] == {"own": {"_target_": "mine.Logger"}}
    assert update_names({"logger": {"csv": CSV}})["logger"] == {"csv": CSV}
    assert [update_line(line) for line in ("logger.tags=[a]", "++logger.mode=x", "logger=csv", "logger.csv.x=1")] == [
        "logger.wandb.tags=[a]", "++logger.wandb.mode=x", "logger=csv", "logger.csv.x=1",
    ]  # fmt: skip


def test_each_gets_flat_hyperparameters_and_the_metrics_of_the_end(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own = {"_target_": f"{OwnLogger.__module__}.OwnLogger", "word": "w"}
    made = build_loggers(config(csv=CSV, tensorboard=TENSORBOARD, mine=own), tmp_path, resumes=False)
    trainer: Any = SimpleNamespace(loggers=made)
    for sink in made:
        sink.log_metrics({"val/x_zh/i2t_r@1": 1.0}, 1)
    close_loggers(trainer, Results({"val/x_zh/i2t_r@1": 2.0}, (), tmp_path, 7))
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        assert [(row["step"], row["val/x_zh/i2t_r@1"]) for row in csv.DictReader(file)] == [("1", "1.0"), ("7", "2.0")]
    for name in ("csv", "tensorboard"):
        flat = yaml.safe_load((tmp_path / name / "version_0" / "hparams.yaml").read_text(encoding="utf-8"))
        assert flat["optimizer.lr"] == 0.5
        assert flat["objective.itc.weight"] == 1
    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/x_zh/i2t_r@1")] == [(1, 1), (7, 2)]
    mine = made[2]
    assert isinstance(mine, OwnLogger)
    assert (mine.place, mine.word, mine.told[0]["optimizer.lr"]) == (str(tmp_path), "w", 0.5)
    assert mine.told[1:] == [({"val/x_zh/i2t_r@1": 1.0}, 1), ({"val/x_zh/i2t_r@1": 2.0}, 7)]


def test_one_that_fails_at_the_end_costs_the_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink = OwnLogger(str(tmp_path))
    trainer: Any = SimpleNamespace(loggers=[sink])
    sink.told = None  # type: ignore[assignment]
    close_loggers(trainer, Results({"a": 1.0}, (), tmp_path, 1))
    assert capsys.readouterr().err.startswith("OwnLogger: stopped (")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("fails", "cannot start (no licence)"),
        ("config", "must be a subclass of lightning.pytorch.loggers.logger.Logger"),
    ],
)
def test_one_that_cannot_start_is_named(tmp_path: Path, target: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        build_loggers(config(mine={"_target_": f"{__name__}.{target}"}), tmp_path, resumes=False)
    problems = caught.value.problems or [caught.value]
    assert any(said in str(problem) for problem in problems)


def test_names_at_mlflow() -> None:
    assert mlflow_name("val/表情_zh/i2t_r@10") == "val/表情_zh/i2t_r_at_10"
    assert mlflow_name("train/a(b)") == "train/a_b_"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries of its data base
def test_mlflow_has_every_metric(tmp_path: Path) -> None:
    node = {"_target_": "m2_encoder.runs.mlflow_logger.MlflowLogger"}
    (sink,) = build_loggers(config(mlflow=node), tmp_path / "r", resumes=False)
    names = ["train/loss/itc", "val/表情_zh/i2t_r@1"]
    sink.log_metrics(dict.fromkeys(names, 1.5), 3)
    experiment: Any = sink.experiment  # type: ignore[attr-defined]
    run = experiment.get_run(sink.version if sink.version else sink.run_id)  # type: ignore[attr-defined]
    assert run.data.metrics == {"train/loss/itc": 1.5, "val/表情_zh/i2t_r_at_1": 1.5}
    assert run.data.params["optimizer.lr"] == "0.5"
    assert (tmp_path / "mlflow.db").is_file()
