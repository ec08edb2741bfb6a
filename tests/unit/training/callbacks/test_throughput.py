"""Rates and shares with a clock that the test moves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
        self.trainer: Any = SimpleNamespace(global_step=0, world_size=world_size)
        self.logged: dict[str, float] = {}
        self.module: Any = SimpleNamespace(log=lambda name, value: self.logged.update({name: float(value)}))
        self.batch: Any = SimpleNamespace(keys=("k",) * batch)

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
