"""A gallery of a million in little memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_SEARCH = """
import json, pathlib, re, sys
import torch
from torch.nn.functional import normalize
from m2_encoder.evaluation.measures.nearest import find_nearest
from m2_encoder.evaluation.measures.ranks import rank_queries

def memory(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", status).group(1))

torch.set_num_threads(1)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = memory("VmRSS")
gallery = torch.empty(1_000_000, 256, dtype=torch.float16)
for part in gallery.split(10_000):
    part.copy_(normalize(torch.randn(part.shape), dim=1))
rows = torch.arange(64) * 15_001
asked = gallery[rows].float() + 0.02 * torch.randn(64, 256)
ranks = rank_queries(asked, gallery, torch.stack([torch.arange(64), rows], dim=1))
nearest = find_nearest(asked, gallery, 10)
print(json.dumps({
    "bytes": memory("VmHWM") - before,
    "recall": ranks.recall(1),
    "found": bool((nearest.rows[:, 0] == rows).all()),
}))
"""


@pytest.mark.slow
def test_a_million_items_of_width_256_within_one_gigabyte() -> None:
    ended = subprocess.run([sys.executable, "-c", _SEARCH], check=True, capture_output=True, text=True)
    found = json.loads(ended.stdout)
    assert (found["recall"], found["found"]) == (100, True)
    assert 512e6 < found["bytes"] < 1e9  # the gallery itself is 512 MB
