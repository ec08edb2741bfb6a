"""Passes are of a model, whose class an objective does not need."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib.util, sys, types
package = types.ModuleType("m2_encoder")  # without its `__init__`, which offers the model
package.__path__ = importlib.util.find_spec("m2_encoder").submodule_search_locations
sys.modules["m2_encoder"] = package
import m2_encoder.objectives.captioning, m2_encoder.objectives.masked_image, m2_encoder.objectives.matching
print(*(name for name in sys.modules if name.startswith("m2_encoder.models.")))
"""


def test_importing_objectives_loads_no_model() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    light = ("config", "unpadded_text", "mixture")  # the last for what routers said
    assert done.stdout.split() == [f"m2_encoder.models.{name}" for name in light]
