"""W&B with a server that stops answering: nothing waits for it beyond a limit, nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from m2_encoder.runs import loggers, wandb_logger
from m2_encoder.runs.ending import Results
from m2_encoder.runs.wandb_logger import QuietWandbLogger
from m2_encoder.runs.wandb_service import find_services
from tests.support.wandb_server import serve_wandb


@pytest.fixture
def _account(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # a run of an earlier test leaves its service, which knows another server
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.mark.usefixtures("_account")
def test_a_server_that_hangs_in_the_run_does_not_keep_it_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    with serve_wandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        logger = loggers.build_wandb_logger(run_name="x", folder=tmp_path, cfg={}, finish_timeout_s=2)
        assert isinstance(logger, QuietWandbLogger)
        assert capsys.readouterr().err == "", "it is online"
        server.hangs.set()
        for step in range(20):
            logger.log_metrics({"a": 1.0}, step)
        started = time.monotonic()
        logger.close(Results({"b": 2.0}, (), tmp_path, 20))
        wandb.teardown()  # as at the end of the process
        assert time.monotonic() - started < 15
    said = capsys.readouterr().err
    (folder,) = (tmp_path / "wandb").glob("run-*")
    line = f"W&B: its server did not take everything in time; upload the rest with: wandb sync {folder}\n"
    assert said.endswith(line)
    assert next(folder.glob("*.wandb")).stat().st_size > 1000


def test_a_stopped_process_of_its_own_does_not_keep_the_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    wandb.teardown()
    monkeypatch.setattr(wandb_logger, "_SERVICE_TIMEOUT_S", 1.0)
    logger = loggers.build_wandb_logger(run_name="x", folder=tmp_path, cfg={}, mode="offline", finish_timeout_s=1)
    assert isinstance(logger, QuietWandbLogger)
    logger.log_metrics({"a": 1.0}, 1)
    (service,) = find_services()
    process = wandb.setup()._connection._proc
    os.kill(service, signal.SIGSTOP)
    started = time.monotonic()
    logger.close(Results({"b": 2.0}, (), tmp_path, 20))
    wandb.teardown()  # as at the end of the process
    assert time.monotonic() - started < 15
    process.join()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith(f"was ended; upload what it wrote with: wandb sync {folder}")
    )


@pytest.mark.usefixtures("_account")
def test_a_server_that_hangs_at_the_start_leaves_an_offline_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setattr(loggers, "_INIT_TIMEOUT_S", 2.0)
    with serve_wandb(hangs=True) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        started = time.monotonic()
        logger = loggers.build_wandb_logger(run_name="x", folder=tmp_path, cfg={}, finish_timeout_s=2)
        assert isinstance(logger, QuietWandbLogger)
        logger.log_metrics({"a": 1.0}, 1)
        logger.close(Results({"b": 2.0}, (), tmp_path, 20))
        wandb.teardown()
        assert time.monotonic() - started < 20
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("W&B: its server cannot be used (")
    assert said[0].endswith("; staying offline")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert said[1:] == [f"W&B: offline, upload later with: wandb sync {file.parent}"]
    assert file.stat().st_size > 0
