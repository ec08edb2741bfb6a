"""The record of a run."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from m2_encoder.record import describe_run


def test_record_is_plain_and_its_command_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/m2-train", "run.name=a b", "hydra.run.dir=x", "hydra/job_logging=none"])
    record = describe_run()
    assert json.loads(json.dumps(record)) == record
    assert list(record) == ["peak_memory_bytes", "git_revision", "versions", "machine", "command"]
    assert record["command"] == "m2-train 'run.name=a b'"
    assert record["peak_memory_bytes"]["process"] > 10 * 2**20
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["git_revision"] is None or len(record["git_revision"].removesuffix("-dirty")) == 40
