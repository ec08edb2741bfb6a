"""What a person sees: a live bar in a terminal, a few plain lines in a log file."""

from __future__ import annotations

import io
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from m2_encoder.training.callbacks import progress as subject
from m2_encoder.training.callbacks.progress import TrainingProgress

METRICS = {
    "perf/samples_per_s": 1234.5,
    "train/loss/total": 3.14159,
    "train/loss/itc_en": 3.25,
    "train/loss/itc_zh": 3.01,
}
RECALLS = {"val/emoji_val_zh/t2i_r@10": 41.27, "val/emoji_val_en/t2i_r@10": 26.04, "val/emoji_val_en/i2t_r@10": 99.0}


class Screen:
    """A run of some steps, and what it printed."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, terminal: bool, max_steps: int = 100, start: int = 0, **metrics: float
    ) -> None:
        self.now = 0.0
        monkeypatch.setattr(subject.time, "monotonic", lambda: self.now)
        self.output = io.StringIO()
        console = Console(file=self.output, force_terminal=terminal, width=140, color_system=None, legacy_windows=False)
        self.progress = TrainingProgress(console=console)
        values = {name: torch.tensor(value) for name, value in {**METRICS, **metrics}.items()}
        self.trainer: Any = SimpleNamespace(max_steps=max_steps, global_step=start, callback_metrics=values)

    def run(self, until: int) -> None:
        while self.trainer.global_step < until:
            self.now += 2.0
            self.trainer.global_step += 1
            self.progress.on_train_batch_end(self.trainer, None, None, None, 0)  # type: ignore[arg-type]

    def start(self) -> None:
        self.progress.on_train_start(self.trainer, None)  # type: ignore[arg-type]

    def validate(self) -> None:
        self.trainer.callback_metrics |= {name: torch.tensor(value) for name, value in RECALLS.items()}
        self.progress.on_validation_end(self.trainer, None)  # type: ignore[arg-type]

    def end(self) -> None:
        self.progress.on_train_end(self.trainer, None)  # type: ignore[arg-type]

    @property
    def text(self) -> str:
        return self.output.getvalue()


def test_a_log_file_gets_about_twenty_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False, max_steps=403)
    screen.start()
    screen.run(403)
    screen.end()
    lines = screen.text.splitlines()
    assert 19 <= len(lines) <= 22
    assert lines[0] == "step  20/403 · 0:00:40, 0:12:46 left · 1,234 samples/s · loss 3.142 (zh 3.01 en 3.25)"
    assert lines[-1].startswith("step 403/403 · 0:13:26, 0:00:00 left · ")
    assert "\x1b" not in screen.text
    assert "\r" not in screen.text


def test_validation_shows_in_the_next_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False, max_steps=20)
    screen.start()
    screen.run(1)
    screen.validate()
    screen.run(2)
    first, second = screen.text.splitlines()
    assert "val" not in first
    assert second.endswith(" · val R@10 zh 41.3 en 26.0")


def test_recalls_of_the_last_validation_are_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # It comes after the last step, whose line is written already.
    screen = Screen(monkeypatch, terminal=False, max_steps=4)
    screen.start()
    screen.run(4)
    screen.validate()
    screen.end()
    assert screen.text.splitlines()[-1] == "val R@10 zh 41.3 en 26.0"
    assert screen.text.count("val R@10") == 1


def test_remaining_time_of_a_resumed_run_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False, max_steps=100, start=90)
    screen.start()
    screen.run(95)
    assert screen.text.splitlines()[-1].startswith("step  95/100 · 0:00:10, 0:00:10 left · ")


def test_a_terminal_gets_a_live_bar_and_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=True, max_steps=10)
    screen.start()
    screen.run(7)
    screen.validate()
    screen.run(10)
    screen.end()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.text)
    bar, numbers = plain.replace("\r", "\n").strip().splitlines()[-2:]
    assert "training" in bar
    assert "10/10" in bar
    assert numbers.strip() == "1,234 samples/s · loss 3.142 (zh 3.01 en 3.25) · val R@10 zh 41.3 en 26.0"
    assert "step 10/10" not in plain, "no plain lines beside the live ones"
    assert screen.text.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in screen.text, "the cursor is back"


def test_an_exception_leaves_the_terminal_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=True)
    screen.start()
    assert "\x1b[?25l" in screen.text, "the cursor is hidden while the line lives"
    screen.progress.on_exception(screen.trainer, None, KeyboardInterrupt())  # type: ignore[arg-type]
    assert screen.text.rindex("\x1b[?25h") > screen.text.rindex("\x1b[?25l")


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    screen = Screen(monkeypatch, terminal=terminal)
    screen.progress.disable()
    screen.start()
    screen.run(100)
    screen.validate()
    screen.end()
    assert screen.text == ""


def test_a_language_without_rows_is_not_shown_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False, max_steps=1, **{"train/loss/itc_zh": math.nan})
    screen.start()
    screen.run(1)
    assert "(en 3.25)" in screen.text
    assert "nan" not in screen.text


def test_long_runs_say_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False, max_steps=10_000)
    screen.start()
    screen.now = 3600 * 30 + 61
    screen.trainer.global_step = 499
    screen.run(500)
    assert "30:01:03, " in screen.text
