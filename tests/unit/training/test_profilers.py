from __future__ import annotations

import json
from pathlib import Path

import pytest

from m2_encoder.runs.lightning_loggers import JsonlLogger
from m2_encoder.training.profilers import StepProfiler, TraceProfiler
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


def test_a_step_in_its_parts(tmp_path: Path, emoji_folder: Path) -> None:
    profiler, logger = StepProfiler(tmp_path), JsonlLogger(tmp_path / "metrics.jsonl")
    profiler.watch([logger])
    trainer = make_trainer(tmp_path, max_steps=4, profiler=profiler, loggers=[logger])
    trainer.fit(make_module(max_steps=4), datamodule=make_datamodule(emoji_folder, max_steps=4))
    parts = profiler.parts()
    assert list(parts) == ["data", "forward", "backward", "optimizer", "callbacks", "logging", "rest", "step"]
    assert parts.pop("step") == pytest.approx(sum(parts.values()))
    assert min(parts["data"], parts["forward"], parts["backward"], parts["optimizer"], parts["logging"]) > 0
    text = (tmp_path / "profile.txt").read_text()
    assert text.startswith("part of a step          ms    share\ndata ")
    assert "run_training_batch" in text  # Lightning's own table
    assert "steps" not in StepProfiler(tmp_path).parts()
    assert "not measured" in StepProfiler(tmp_path).describe_step()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_a_few_steps(tmp_path: Path, emoji_folder: Path) -> None:
    profiler = TraceProfiler(tmp_path, skip_steps=2, steps=2, rows=5)
    trainer = make_trainer(tmp_path, max_steps=6, profiler=profiler)
    trainer.fit(make_module(max_steps=6), datamodule=make_datamodule(emoji_folder, max_steps=6))
    trace = json.loads((tmp_path / "profile.trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name == "[pl][profile][Strategy]LocalStrategy.backward" for name in names) in (2, 4)
    assert any("aten::" in name for name in names)
    assert "Self CPU" in (tmp_path / "profile.txt").read_text()
