"""A run repeated is the same run; a run interrupted and continued is the same run; whatever kills it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from m2_encoder.runs.lightning_loggers import JsonlLogger
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.callbacks.throughput import Throughput
from m2_encoder.training.module import PretrainModule
from m2_encoder.training.optim import build_muon
from tests.support.training import (
    LIGHTNING_WARNINGS,
    make_captions,
    make_datamodule,
    make_module,
    make_trainer,
    tiny_config,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

STEPS = 12
MIDDLE = 6


class Seen(Callback):
    """The keys of every batch that was trained on, by step."""

    def __init__(self) -> None:
        self.keys: dict[int, tuple[str, ...]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.keys[trainer.global_step] = batch.keys


class Outcome(NamedTuple):
    weights: dict[str, Tensor]
    records: list[dict[str, Any]]
    keys: dict[int, tuple[str, ...]]
    module: PretrainModule


def run(
    emoji_folder: Path,
    folder: Path,
    *,
    max_steps: int = STEPS,
    resume_at: int | None = None,
    every_n_steps: int = MIDDLE,
    num_workers: int = 0,
    seed: int = 3,
) -> Outcome:
    """As `m2-train` does it, without Hydra; stochastic depth on, so that the random state of layers matters."""
    lightning.seed_everything(seed, workers=True, verbose=False)
    seen, checkpoint, metrics = (
        Seen(),
        RunCheckpoint(folder=folder / "checkpoints", every_n_steps=every_n_steps),
        JsonlLogger(folder / "metrics.jsonl"),
    )
    # Muon and a caption per language, as the shipped experiment has them.
    module = make_module(
        model=tiny_config(num_layers=2, drop_path_rate=0.3),
        max_steps=STEPS,
        optimizer=partial(build_muon, lr=1e-3, matrix_lr=2e-3, logit_scale_lr_ratio=20),
    )
    trainer = make_trainer(
        folder,
        max_steps=max_steps,
        callbacks=[Throughput(window_steps=2), seen, checkpoint],
        loggers=[metrics],
        limit_val_batches=1.0,
        val_check_interval=4,
        log_every_n_steps=2,
    )
    if resume_at is not None:
        metrics.resume_at(resume_at)
    trainer.fit(
        module,
        datamodule=make_datamodule(
            emoji_folder,
            max_steps=STEPS,
            num_workers=num_workers,
            eval_batch_size=400,
            captions=make_captions(every_language=True),
        ),
        ckpt_path=None if resume_at is None else checkpoint.last,
        weights_only=True,
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]
    return Outcome(dict(module.model.state_dict()), records, seen.keys, module)


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, such as {different[:3]}"


@pytest.fixture(scope="module")
def whole(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(emoji_folder, tmp_path_factory.mktemp("whole"))


def test_the_records_of_a_run(whole: Outcome) -> None:
    assert [record["step"] for record in whole.records] == [2, 4, 6, 8, 10, 12]
    for record in whole.records:
        assert record["samples_seen"] == 32 * record["step"]
        assert record["train/loss/itc"] == record["train/loss/total"]
        assert {"train/loss/itc_zh", "train/loss/itc_en", "train/grad_norm", "train/logit_scale"} <= record.keys()
        assert record["train/skipped_steps"] == 0
        assert ("val/emoji_val_zh/t2i_r@10" in record) == (record["step"] % 4 == 0)
        assert "epoch" not in record
    assert whole.keys.keys() == set(range(STEPS))


def test_repeated_with_the_same_seed_every_number_is_the_same(
    whole: Outcome, emoji_folder: Path, tmp_path: Path
) -> None:
    again = run(emoji_folder, tmp_path, num_workers=2)
    assert again.records == whole.records
    assert again.keys == whole.keys
    assert_same_weights(again.weights, whole.weights)


def test_another_seed_is_another_run(whole: Outcome, emoji_folder: Path, tmp_path: Path) -> None:
    other = run(emoji_folder, tmp_path, seed=4, max_steps=2)
    assert other.records[0] != whole.records[0]


@pytest.mark.parametrize(
    ("stop", "workers"),
    [(MIDDLE, 0), (MIDDLE, 2), pytest.param(5, 0, marks=pytest.mark.slow), (4, 0)],
    ids=["middle", "workers", "between-logs", "at-validation"],
)
def test_interrupted_and_continued_is_bit_identical(
    whole: Outcome, emoji_folder: Path, tmp_path: Path, stop: int, workers: int
) -> None:
    first = run(emoji_folder, tmp_path, max_steps=stop, num_workers=2 - workers if stop == MIDDLE else 0)
    assert first.keys == {step: keys for step, keys in whole.keys.items() if step < stop}
    rest = run(emoji_folder, tmp_path, resume_at=stop, num_workers=workers)
    assert rest.keys == {step: keys for step, keys in whole.keys.items() if step >= stop}
    assert_same_weights(rest.weights, whole.weights)
    assert rest.records == whole.records


def test_a_crash_after_the_checkpoint_repeats_no_line(whole: Outcome, emoji_folder: Path, tmp_path: Path) -> None:
    # It went on to step 8, logged and validated there, and died while it wrote the line of step 10.
    run(emoji_folder, tmp_path, max_steps=8, every_n_steps=100)
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "samples_se')
    run(emoji_folder, tmp_path / "twin", max_steps=MIDDLE)
    (tmp_path / "twin" / "checkpoints" / "last.ckpt").rename(tmp_path / "checkpoints" / "last.ckpt")
    rest = run(emoji_folder, tmp_path, resume_at=MIDDLE)
    assert rest.records == whole.records


def test_the_checkpoint_is_plain_and_complete(emoji_folder: Path, tmp_path: Path) -> None:
    outcome = run(emoji_folder, tmp_path, max_steps=5, every_n_steps=2)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=5.ckpt"]
    state = torch.load(folder / "last.ckpt", weights_only=True)
    assert state["global_step"] == 5
    assert state["random_states"][0]["cpu"].dtype == torch.uint8
    assert state["non_finite"] == {"total": 0, "in_a_row": 0}
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader["position"] == 5 * 32
    assert loader["fingerprint"]["seed"] == 5
    for name, value in outcome.weights.items():
        assert torch.equal(state["state_dict"][f"model.{name}"], value)
    assert torch.load(folder / "step=4.ckpt", weights_only=True)["global_step"] == 4
    assert (folder / "last.ckpt").samefile(folder / "step=5.ckpt"), "twice the time and space for the same bytes"


def test_a_finished_run_continues_with_nothing_to_do(emoji_folder: Path, tmp_path: Path) -> None:
    first = run(emoji_folder, tmp_path, max_steps=MIDDLE)
    again = run(emoji_folder, tmp_path, max_steps=MIDDLE, resume_at=MIDDLE)
    assert again.keys == {}
    assert_same_weights(again.weights, first.weights)
    assert again.records == first.records


_KILLED = """
import os, signal, sys, torch
from pathlib import Path
from m2_encoder.training.callbacks.checkpoint import AtomicCheckpointIO

path = Path(sys.argv[1])
io = AtomicCheckpointIO()
io.save_checkpoint({"global_step": 1, "weights": torch.ones(4)}, path)
torch_save = torch.save

def die_in_the_middle(content, target):
    torch_save(content, target)
    os.truncate(target, os.path.getsize(target) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = die_in_the_middle
io.save_checkpoint({"global_step": 2, "weights": torch.ones(200_000)}, path)
"""


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(path, weights_only=True)["global_step"] == 1
    left = [entry for entry in path.parent.iterdir() if entry != path]
    assert len(left) == 1
    # The next run of the folder clears it away.
    trainer = make_trainer(tmp_path)
    RunCheckpoint(folder=path.parent, every_n_steps=1).setup(trainer, make_module(), "fit")
    assert list(path.parent.iterdir()) == [path]


def test_a_kill_at_any_time_while_training_leaves_a_whole_checkpoint(emoji_folder: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import sys; from tests.integration.test_training_determinism import run;"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), every_n_steps=1)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(emoji_folder), str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    last = tmp_path / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    state = torch.load(last, weights_only=True)
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"] == 32 * state["global_step"]


def test_a_folder_where_a_checkpoint_belongs_is_moved_aside(emoji_folder: Path, tmp_path: Path) -> None:
    taken = tmp_path / "checkpoints" / "step=2.ckpt"
    (taken / "mine").mkdir(parents=True)
    run(emoji_folder, tmp_path, max_steps=3, every_n_steps=2)
    assert taken.is_file()
    (aside,) = taken.parent.glob("step=2.ckpt.*.aside")
    assert (aside / "mine").is_dir()
