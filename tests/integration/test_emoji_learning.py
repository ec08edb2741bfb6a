"""A sixth of the built-in run: learns in both languages, and ends with everything that a run leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 300


@pytest.mark.slow
def test_a_short_emoji_run_learns_in_both_languages(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "m2_encoder.cli.train", "+experiment=emoji", "logger=csv", f"run.folder={tmp_path}",
        f"data.folder={tmp_path / 'emoji-shards'}", f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "emoji"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "results.md",
        "retrieval.png",
        "checkpoints/last.ckpt",
    ):
        assert (run / name).is_file(), name
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    for language in ("zh", "en"):
        # Chance is 0.67 % of 1,494 drawings in an unseen style, and 3.7 % of the 267 concepts of the validation set.
        assert metrics[f"val/emoji_heldout_style_{language}/t2i_r@10"] > 8, language
        assert metrics[f"val/emoji_val_{language}/t2i_r@10"] > 12, language
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss/itc"] for line in lines if "train/loss/itc" in line]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.8
