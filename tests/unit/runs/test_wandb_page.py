"""What W&B's own client writes for a run, read back: every step of `metrics.jsonl` once, whatever happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m2_encoder.runs import loggers
from m2_encoder.runs.ending import Results
from m2_encoder.runs.lightning_loggers import JsonlLogger, read_rows
from m2_encoder.runs.wandb_files import find_id, keep_id
from m2_encoder.runs.wandb_logger import QuietWandbLogger
from m2_encoder.runs.wandb_service import find_services
from tests.support.wandb_file import read_page
from tests.support.wandb_server import serve_wandb

CONFIG = {"optimizer": {"lr": 1e-3}, "model": {"embed_dim": 64}, "run": {"task": "tune", "notes": "why", "tags": ["b"]}}


@pytest.fixture(autouse=True)
def _own_service() -> Iterator[None]:
    loggers.forget_service()  # that of an earlier test may know another server
    yield
    loggers.forget_service()


class Run:
    """A run with `metrics.jsonl` and W&B, without training."""

    def __init__(self, folder: Path, *, resumes_at: int | None = None, **settings: Any) -> None:
        folder.mkdir(exist_ok=True)
        made = loggers.build_wandb_logger(
            run_name=folder.name, folder=folder, cfg=CONFIG, resumes=resumes_at is not None, **settings
        )
        assert isinstance(made, QuietWandbLogger)
        self.wandb, self.folder = made, folder
        self.metrics = JsonlLogger(folder / "metrics.jsonl")
        self.metrics.resume_at(resumes_at or 0)
        self.wandb.replay(self.metrics.path)

    def log(self, *steps: int) -> None:
        for step in steps:
            values = {"train/loss/itc": 10.0 / step, "samples_seen": 16.0 * step, "epoch": 0.0}
            for part in (values, {"val/x_zh/i2t_r@1": 50.0 - step, "val/x_zh/cmlm_loss": 1.0 * step}):
                for sink in (self.metrics, self.wandb):
                    sink.log_metrics(part, step)

    def close(self, metrics: dict[str, float] | None = None, *pictures: Path) -> None:
        step = max(expected(self.folder))
        self.wandb.close(None if metrics is None else Results(metrics, pictures, self.folder, step))
        loggers.forget_service()  # which writes the last of it

    @property
    def place(self) -> Path:
        return Path(self.wandb.experiment.dir).parent


def kill_service() -> None:
    """As with the process of the run, which takes W&B's own with it."""
    import wandb

    process = wandb.setup()._connection._proc
    for service in find_services():
        os.kill(service, signal.SIGKILL)
    loggers.forget_service()
    process.join()


def expected(folder: Path) -> dict[int, dict[str, float]]:
    return {step: {**row, "trainer/global_step": step} for step, row in read_rows(folder / "metrics.jsonl")}


def test_a_finished_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "r", group="g", tags=["a", "b"], artifact="export")
    run.log(1, 2, 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "r" / "retrieval.png")
    (tmp_path / "r" / "export").mkdir()
    (tmp_path / "r" / "export" / "config.json").write_text("{}", encoding="utf-8")
    metrics = {"val/x_zh/i2t_r@1": 44.0, "val/x_en/i2t_r@1": 45.0}
    place = run.place
    run.close(metrics, tmp_path / "r" / "retrieval.png")
    page = read_page(place)
    assert {key: page.config[key] for key in CONFIG} == CONFIG
    assert page.config.keys() == {*CONFIG, "git_revision", "command", "_wandb"}
    record = page.run
    assert (record.display_name, record.run_group, record.job_type, record.notes) == ("r", "g", "tune", "why")
    assert list(record.tags) == ["a", "b"]
    rows = page.rows
    media = {name: rows[3].pop(name) for name in ("results", "pictures/retrieval")}
    assert all(media.values())
    assert rows == expected(tmp_path / "r")
    assert page.goals == {"val/x_zh/i2t_r@1": "max", "val/x_zh/cmlm_loss": "min"}
    assert {key: page.summary[key] for key in metrics} == metrics
    assert page.summary["best/val/x_zh/i2t_r@1"] == 49
    assert page.summary["best/val/x_zh/cmlm_loss"] == 1
    assert page.tables["results"]["columns"] == ["split", "language", "i2t_r@1"]
    assert page.tables["results"]["data"] == [["x", "zh", 44], ["x", "en", 45]]
    with Image.open(page.images["pictures/retrieval"]) as picture:
        assert picture.size == (8, 8)
    assert page.artifacts[f"export-{record.run_id}"] == ["config.json"]


def test_offline_and_killed_the_newest_files_are_whole(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    run = Run(folder)
    run.log(1, 2, 3, 4)
    first = run.wandb.experiment.id
    for at, then in ((2, (3, 4, 5)), (4, (5, 6, 7))):
        kill_service()
        run = Run(folder, resumes_at=at)
        run.log(*then)
    place = run.place
    run.close()
    assert read_page(place).rows == expected(folder)
    assert sorted(expected(folder)) == [1, 2, 3, 4, 5, 6, 7]
    assert read_page(place).run.run_id == first
    assert [path.parent for path in (folder / "wandb").rglob("*.wandb")] == [place], "no other is for `wandb sync`"
    assert len(list((folder / "wandb").rglob("*.wandb.replaced"))) == 2


def test_what_others_log_without_a_step_costs_no_row(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    for step in (1, 2, 3):
        run.log(step)
        run.wandb.experiment.log({"mine": step})
        run.wandb.experiment.log({"mine": -step})
    place = run.place
    run.close()
    found: dict[int, dict[str, Any]] = {}
    for row in read_page(place).history:
        step = row.get("trainer/global_step")
        found.setdefault(step, {}).update({k: v for k, v in row.items() if k != "mine" and not k.startswith("_")})
    assert {step: row for step, row in found.items() if step is not None} == expected(tmp_path / "r")


@pytest.fixture
def _account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.mark.usefixtures("_account")
def test_a_broken_connection_leaves_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "r"
    with serve_wandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        run = Run(folder)
        run.log(1, 2, 3)
        run.close()
        run_id = find_id(folder)
        assert run_id is not None
        assert server.rows(run_id) == expected(folder)

        run = Run(folder, resumes_at=2, finish_timeout_s=1)  # W&B has step 3 already
        server.breaks.set()
        run.log(3, 4, 5)
        run.close()
        assert sorted(server.rows(run_id)) == [1, 2, 3]

        server.breaks.clear()
        run = Run(folder, resumes_at=5)
        run.log(6)
        run.close({"val/x_zh/i2t_r@1": 44.0})
        found = server.rows(run_id)
        found[6].pop("results", None)  # a table is an artifact, which this server does not take
        assert found == expected(folder)
        assert sorted(found) == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("_account")
def test_a_validation_that_was_broken_off_comes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_wandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        run = Run(tmp_path / "r")
        run.log(10)
        run.wandb.log_metrics({"train/loss/itc": 0.5}, 20)
        run.metrics.log_metrics({"train/loss/itc": 0.5}, 20)
        run.close()
        run = Run(tmp_path / "r", resumes_at=20)
        for sink in (run.metrics, run.wandb):
            sink.log_metrics({"train/loss/itc": 0.5, "val/x_zh/i2t_r@1": 30.0}, 20)
        run.log(30)
        run.close()
        rows = server.rows(str(find_id(tmp_path / "r")))
    assert rows[20] == {"train/loss/itc": 0.5, "trainer/global_step": 20}
    assert rows[21] == {"val/x_zh/i2t_r@1": 30, "trainer/global_step": 20}
    assert {step: rows[step] for step in (10, 30)} == {s: r for s, r in expected(tmp_path / "r").items() if s != 20}


@pytest.mark.usefixtures("_account")
def test_a_run_that_was_deleted_at_wandb_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    monkeypatch.setattr(loggers, "_INIT_TIMEOUT_S", 3.0)
    with serve_wandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        run = Run(folder)
        run.log(1, 2)
        run.close()
        before = find_id(folder)
        assert before is not None
        server.deleted.add(before)
        capsys.readouterr()
        run = Run(folder, resumes_at=2)
        run.log(3)
        run.close()
        assert capsys.readouterr().err == (
            "W&B: the run was deleted there; it begins again as another one, with all its steps\n"
        )
        after = find_id(folder)
        assert after not in (None, before)
        assert server.rows(str(after)) == expected(folder)


def test_an_id_belongs_to_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    assert find_id(folder) is None
    keep_id(folder, "abc")
    assert find_id(folder) == "abc"
    shutil.copytree(folder, tmp_path / "r-2")
    assert find_id(tmp_path / "r-2") is None, "another run"
    folder.rename(tmp_path / "moved")
    assert find_id(tmp_path / "moved") == "abc"
    shutil.rmtree(tmp_path / "moved")
    folder.mkdir()
    assert find_id(folder) is None, "begun again"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 1}', '{"id": "../x", "folder": "FOLDER", "inode": 1}', "5"])
def test_a_damaged_id_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "wandb.json").write_text(content.replace("FOLDER", json.dumps(str(tmp_path))[1:-1]), encoding="utf-8")
    assert find_id(tmp_path) is None


@pytest.mark.slow
@pytest.mark.usefixtures("_account")
def test_wandb_sync_uploads_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was offline, killed, went on, and was uploaded in between by W&B's own command."""

    def sync() -> None:
        places = [path.parent for path in (folder / "wandb").glob("offline-run-*/*.wandb")]
        command = [str(Path(sys.executable).with_name("wandb")), "sync", *map(str, places)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr

    folder = tmp_path / "r"
    with serve_wandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        run = Run(folder, mode="offline")
        run.log(1, 2, 3)
        run.close()
        sync()
        run_id = str(find_id(folder))
        assert server.rows(run_id) == expected(folder)
        run = Run(folder, resumes_at=2, mode="offline")
        run.log(3, 4)
        kill_service()
        run = Run(folder, resumes_at=4, mode="offline")
        run.log(5)
        run.close()
        sync()
        assert server.rows(run_id) == expected(folder)
        assert sorted(expected(folder)) == [1, 2, 3, 4, 5]
        run = Run(folder, resumes_at=5, mode="online")
        run.log(6)
        run.close()
        assert server.rows(run_id) == expected(folder)
