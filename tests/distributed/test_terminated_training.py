"""`m2-train` that is told to end: it saves the step it is in, leaves with its own exit code, and is continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from m2_encoder.runs.folder import read_config
from tests.support.resuming import digest_rows, read_rows
from tests.support.training import make_tokenizer

pytestmark = pytest.mark.slow

STEPS = 400  # too many to be done before the signal comes


def start(folder: Path, emoji_folder: Path, *, devices: int, workers: int, steps: int) -> subprocess.Popen[bytes]:
    """The command line, in a process group of its own."""
    arguments = [
        "+experiment=smoke", f"run.name={folder.name}", f"run.folder={folder.parent}", f"data.folder={emoji_folder}",
        "run.resume=auto", "run.checkpoint_every=1000", "run.export=false", f"trainer.max_steps={steps}",
        "trainer.val_check_interval=1000", f"trainer.devices={devices}", f"data.num_workers={workers}",
        f"strategy={'ddp' if devices > 1 else 'single'}", "model.num_layers=1",
        "+callbacks.rows._target_=tests.support.resuming.RowRecorder", f"+callbacks.rows.folder={folder}/rows",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "m2_encoder.cli.train", *arguments]
    with (folder.parent / "log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen[bytes], folder: Path, *, timeout_s: float) -> str:
    """Wait until it ends; what it said."""
    try:
        process.wait(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return (folder.parent / "log").read_text()


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    path = folder / "rows" / "rank0.jsonl"
    deadline = time.monotonic() + 240
    while not path.is_file() or path.read_bytes().count(b"\n") < step:
        assert process.poll() is None, finish(process, folder, timeout_s=1)[-3000:]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("number", "whom"),
    [(signal.SIGTERM, "every process"), (signal.SIGTERM, "the first rank"), (signal.SIGINT, "every process")],
)
def test_a_signal_to_end_saves_the_step_and_is_continued(
    emoji_folder: Path, tmp_path: Path, number: signal.Signals, whom: str
) -> None:
    folder = tmp_path / "run"
    process = start(folder, emoji_folder, devices=2, workers=1, steps=STEPS)
    wait_for_step(folder, 7, process)
    (os.killpg if whom == "every process" else os.kill)(process.pid, number)
    output = finish(process, folder, timeout_s=120)
    assert process.returncode == 128 + number, output[-3000:]
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    step = state["global_step"]
    assert 7 <= step < STEPS
    assert f"m2-train: ended by {number.name}, step {step} is saved; run.resume=auto goes on" in output
    assert "Traceback" not in output

    process = start(folder, emoji_folder, devices=1, workers=0, steps=step + 5)
    output = finish(process, folder, timeout_s=300)
    assert process.returncode == 0, output[-3000:]
    assert f"continuing at step {step} of {step + 5}" in output
    assert "strategy._target_:" in output, "what changed is told"
    rows = read_rows(folder / "rows")
    assert sorted(rows) == list(range(step + 5))
    assert all(len(times) == 1 for times in rows.values())
    cfg = read_config(folder / "config.yaml")
    assert rows[step - 1][0] == rows_of_step(cfg, emoji_folder, step - 1)
    assert rows[step][0] == rows_of_step(cfg, emoji_folder, step)


def rows_of_step(cfg: dict[str, Any], emoji_folder: Path, step: int) -> list[str]:
    """Of the global batch that a process alone loads, without any training."""

    data = {**cfg["data"], "folder": str(emoji_folder), "num_workers": 0}
    module = instantiate(
        data, tokenizer=make_tokenizer(), image_size=cfg["model"]["image_size"], seed=cfg["seed"], max_steps=STEPS
    )
    loader = module.train_dataloader()
    state = loader.state_dict()
    loader.load_state_dict({**state, "position": step * cfg["data"]["global_batch_size"]})
    return digest_rows(next(iter(loader)))
