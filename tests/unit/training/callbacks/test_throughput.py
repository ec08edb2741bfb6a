"""Rates and shares with a clock that the test moves."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m2_encoder.errors import UserError
from m2_encoder.training.callbacks import throughput as subject
from m2_encoder.training.callbacks.throughput import Throughput


class Bench:
    """A trainer, a module and a clock, as far as the callback sees them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, world_size: int = 1, batch: int = 8, **arguments: Any
    ) -> None:
        self.now = 100.0
        monkeypatch.setattr(subject.time, "perf_counter", lambda: self.now)
        self.callback = Throughput(**arguments)
        self.trainer: Any = SimpleNamespace(
            global_step=0, world_size=world_size, is_global_zero=True, train_dataloader=object()
        )
        self.logged: dict[str, float] = {}
        self.module: Any = SimpleNamespace(log=lambda name, value: self.logged.update({name: float(value)}))
        self.batch = {"pixels": torch.zeros(batch, 1)}

    def step(self, *, wait: float, work: float) -> None:
        self.now += wait
        self.callback.on_train_batch_start(self.trainer, self.module, self.batch, 0)
        self.now += work
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, self.module, None, self.batch, 0)


def test_rate_and_share_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, window_steps=2, world_size=4)
    bench.step(wait=50.0, work=30.0)  # the first one, with its warm-up costs, is left out
    assert bench.logged == {"samples_seen": 32}
    bench.step(wait=0.5, work=1.5)
    assert bench.logged == {"samples_seen": 64, "perf/samples_per_s": 16, "perf/data_wait": 0.25}
    bench.step(wait=0.0, work=1.0)
    assert bench.logged["perf/samples_per_s"] == 16, "published once per window"
    bench.step(wait=1.0, work=2.0)
    assert bench.logged["perf/samples_per_s"] == pytest.approx(64 / 4)
    assert bench.logged["perf/data_wait"] == pytest.approx(1 / 4)
    assert (bench.callback.samples, bench.callback.seconds) == (96, 6.0)
    assert bench.callback.samples_per_s == 16


@pytest.mark.parametrize("pause", ["on_validation_start", "on_save_checkpoint", "on_train_end"])
def test_validation_and_saving_neither_slow_training_nor_count_as_waiting(
    monkeypatch: pytest.MonkeyPatch, pause: str
) -> None:
    bench = Bench(monkeypatch, window_steps=1)
    bench.step(wait=0, work=1)
    bench.step(wait=0, work=2)
    getattr(bench.callback, pause)(bench.trainer, bench.module, *([{}] if pause == "on_save_checkpoint" else []))
    bench.now += 1000
    bench.step(wait=0, work=2)
    bench.step(wait=0, work=2)
    assert bench.logged["perf/samples_per_s"] == 4
    assert bench.logged["perf/data_wait"] == 0
    assert bench.callback.samples_per_s == 4


def test_samples_seen_counts_the_whole_run_and_beyond_what_fp32_can(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, batch=3)
    bench.trainer.global_step = 10_000_000
    bench.step(wait=0, work=1)
    assert bench.logged["samples_seen"] == 30_000_003


def test_nothing_measured_is_no_rate() -> None:
    assert Throughput().samples_per_s == 0.0


class Loader:
    """Says what its stages took; each call once, as the real one."""

    def __init__(self, **seconds_per_call: float) -> None:
        self.seconds = seconds_per_call
        self.calls = 0

    def take_stage_seconds(self) -> dict[str, float]:
        self.calls += 1
        return dict(self.seconds)


def starved(monkeypatch: pytest.MonkeyPatch, *, wait: float = 3.0, **arguments: Any) -> Bench:
    """A run in which a step of 10 s waits for data for some of them, after a first one that is not counted."""
    bench = Bench(monkeypatch, window_steps=1, **arguments)
    bench.trainer.train_dataloader = Loader(reading=0.5, decoding=2.0, transforming=1.0, tokenising=0.5)
    bench.step(wait=500, work=500)
    return bench


def test_a_starved_run_is_told_which_stage_is_the_slowest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = starved(monkeypatch, warn_after_s=25)
    for _ in range(2):
        bench.step(wait=3, work=7)
    assert not caplog.messages, "20 s are not long enough"
    bench.step(wait=3, work=7)
    (message,) = caplog.messages
    assert "waited for data in 30 % of the last 30 s" in message
    assert "slowest stage is decoding (reading 12 %, decoding 50 %, transforming 25 %, tokenising 12 %)" in message
    assert "data.num_workers" in message
    assert caplog.records[0].levelno == logging.WARNING


def test_stages_are_published_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = starved(monkeypatch, batch=8, world_size=4)
    bench.step(wait=0, work=1)
    # 2 s for the 8 samples of this rank, whatever the other three do.
    assert bench.logged["perf/load_ms/decoding"] == pytest.approx(250)
    assert bench.logged["perf/load_ms/reading"] == pytest.approx(62.5)


def test_warnings_become_rarer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    bench = starved(monkeypatch, warn_after_s=60)
    times = []
    for second in range(10, 36_001, 10):
        caplog.clear()
        bench.step(wait=5, work=5)
        times += [second] * len(caplog.messages)
    assert times[:4] == [60, 180, 420, 900]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert max(gaps) == 3600


@pytest.mark.parametrize(("wait", "warn_share", "warns"), [(1.9, 0.2, 0), (2.1, 0.2, 1), (9.9, 1.0, 0), (0.1, 0.0, 1)])
def test_the_share_that_is_too_much_can_be_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wait: float, warn_share: float, warns: int
) -> None:
    bench = starved(monkeypatch, warn_share=warn_share, warn_after_s=60)
    for _ in range(6):
        bench.step(wait=wait, work=10 - wait)
    assert len(caplog.messages) == warns


def test_other_ranks_and_short_runs_are_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = starved(monkeypatch)
    bench.step(wait=50, work=9)
    bench.trainer.is_global_zero = False
    for _ in range(50):
        bench.step(wait=50, work=50)
    assert not caplog.messages


def test_a_loader_without_stages_is_named_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(monkeypatch, window_steps=1)
    for _ in range(2):
        bench.step(wait=50, work=50)
    (message,) = caplog.messages
    assert message.endswith("waited for data in 50 % of the last 100 s. Make data.num_workers larger")
    assert not [name for name in bench.logged if name.startswith("perf/load_ms")]


@pytest.mark.parametrize("arguments", [{"warn_share": 1.5}, {"warn_share": -0.1}, {"warn_after_s": 0}])
def test_impossible_limits_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        Throughput(**arguments)
