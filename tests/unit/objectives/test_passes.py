"""Passes are objects of the model, which an objective need not load."""

from __future__ import annotations

import subprocess
import sys


def test_importing_objectives_loads_no_model() -> None:
    program = (
        "import sys, m2_encoder.objectives.base, m2_encoder.objectives.captioning, m2_encoder.objectives.matching\n"
        "print('m2_encoder.models.m2_encoder' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
