"""`import m2_encoder` costs torch and little else: an embedding service needs no training stack."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache

import pytest

HEAVY = [
    "hydra",
    "jieba",
    "lightning",
    "omegaconf",
    "pyarrow",
    "pytorch_lightning",
    "rich",
    "torchmetrics",
    "wandb",
    "webdataset",
]


@lru_cache(maxsize=1)
def _modules_after_import() -> frozenset[str]:
    """Names in sys.modules of a new interpreter that imports what loops elsewhere need, and all the package exports."""
    program = (
        "import json, sys, m2_encoder, m2_encoder.objectives, m2_encoder.distributed.groups\n"
        "[getattr(m2_encoder, name) for name in m2_encoder.__all__]\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()  # an import that printed would add to it
    return frozenset(json.loads(line))


@pytest.mark.parametrize("name", HEAVY)
def test_import_prints_nothing_and_does_not_load(name: str) -> None:
    assert name not in _modules_after_import()
