from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from m2_encoder.runs import loggers
from m2_encoder.runs.ending import Results
from m2_encoder.runs.wandb_files import find_id
from m2_encoder.runs.wandb_logger import QuietWandbLogger


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def _run(folder: Path, **more: object) -> SimpleNamespace:
    """Of W&B, as far as it is asked before anything is logged."""
    values = {"id": "x", "dir": str(folder / "wandb" / "offline-run-x" / "files"), "starting_step": 0, "step": 0}
    return SimpleNamespace(**{**values, **more})


def test_without_a_key_everything_stays_offline(capsys: pytest.CaptureFixture[str]) -> None:
    assert loggers.resolve_mode("auto") == "offline"
    assert loggers.resolve_mode("online") == "offline"
    assert "no key" in capsys.readouterr().err
    assert loggers.resolve_mode("disabled") == "disabled"


def test_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert loggers.resolve_mode("auto") == "online"
    assert loggers.resolve_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", " ")
    assert loggers.resolve_mode("auto") == "offline"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("machine api.wandb.ai login user password secret\n", True),
        ("machine other.host login user password secret\n", False),
        ("machine\n", False),
        ("", False),
    ],
)
def test_key_of_the_netrc_file(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "netrc").write_text(text, encoding="utf-8")
    assert loggers.has_wandb_key() == expected


@pytest.mark.parametrize(
    ("variable", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("run", "online")]
)
def test_variable_wins(monkeypatch: pytest.MonkeyPatch, variable: str, mode: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", variable)
    assert loggers.resolve_mode("auto") == mode


def test_failing_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_settings: object) -> None:
        raise RuntimeError("service is down\nmore")

    monkeypatch.setattr("wandb.init", fail)
    assert loggers.build_wandb_logger(run_name="x", folder=tmp_path, cfg={}) is None
    assert capsys.readouterr().err == "W&B: not available (service is down); metrics.jsonl has all scalars\n"


def test_run_is_told_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr("wandb.init", lambda **settings: asked.update(settings) or _run(tmp_path, id=settings["id"]))
    monkeypatch.setattr("wandb.run", None)
    cfg = {"seed": 1, "run": {"task": "tune", "tags": ["b"], "notes": "why"}}
    logger = loggers.build_wandb_logger(run_name="x", folder=tmp_path, cfg=cfg, tags=["a", "b"])
    assert logger is not None
    assert (asked["name"], asked["mode"], asked["dir"]) == ("x", "offline", str(tmp_path))
    assert asked["id"] == find_id(tmp_path)
    assert (asked["job_type"], asked["tags"], asked["notes"]) == ("tune", ["a", "b"], "why")
    config = asked["config"]
    assert isinstance(config, dict)
    assert set(config) == {"seed", "run", "git_revision", "command"}
    json.dumps(config)


def test_failure_later_stops_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def fail(*_arguments: object, **_more: object) -> None:
        calls.append(1)
        raise OSError("no space left")

    monkeypatch.setattr("wandb.init", lambda **_settings: _run(tmp_path, log=fail))
    monkeypatch.setattr("wandb.run", None)
    logger = loggers.build_wandb_logger(run_name="x", folder=tmp_path, cfg={})
    assert isinstance(logger, QuietWandbLogger)
    capsys.readouterr()
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"a": 2.0}, 2)
    logger.close(Results({}, (), tmp_path, 2))
    assert len(calls) == 1
    assert capsys.readouterr().err == "W&B: stopped (no space left); metrics.jsonl goes on\n"


def test_other_ranks_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert loggers.build_wandb_logger(run_name="x", folder=tmp_path, cfg={}) is None


def test_csv_logger_writes_into_the_run(tmp_path: Path) -> None:
    logger = loggers.build_csv_logger(folder=tmp_path, flush_every_n_steps=1)
    logger.log_metrics({"a": 1.0}, 3)
    logger.finalize("success")
    (path,) = (tmp_path / "csv").rglob("metrics.csv")
    assert path.read_text(encoding="utf-8").split() == ["a,step", "1.0,3"]
