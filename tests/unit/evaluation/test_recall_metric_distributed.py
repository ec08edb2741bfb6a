"""Two processes give the recalls of one, however unequal their shares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2_encoder.evaluation.metrics import retrieval_metrics

_WORKER = """
import json, sys
import torch, torch.distributed as dist
from m2_encoder.evaluation.recall_metric import RetrievalRecall

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
images, image_ids, texts, text_ids = torch.load(store + ".pt", weights_only=True)
found = []
for split in json.loads(sys.argv[3]):
    metric = RetrievalRecall()
    mine = slice(0, split) if rank == 0 else slice(split, None)
    if len(images[mine]):
        metric.update(images[mine], image_ids[mine], texts[mine], text_ids[mine])
    found.append({name: float(value) for name, value in metric.compute().items()})
    again = {name: float(value) for name, value in metric.compute().items()}
    assert found[-1] == again
print(json.dumps(found))
dist.destroy_process_group()
"""


# How many items the first process has of 40: half, a few, all of them (so that the other is never updated).
SPLITS = [20, 3, 40]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    images, texts = torch.randn(2, 40, 12, generator=generator).unbind()
    images[30] = images[2]
    image_ids, text_ids = torch.arange(40), (torch.arange(40) * 7) % 40
    store = tmp_path / "store"
    torch.save((images, image_ids, texts, text_ids), f"{store}.pt")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(rank), str(store), json.dumps(SPLITS)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    expected = retrieval_metrics(images, image_ids, texts, text_ids)
    try:
        outputs = [worker.communicate(timeout=100) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (out, err) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, err
        found = json.loads(out)
        assert len(found) == len(SPLITS)
        assert all(one == pytest.approx(expected) for one in found)
