"""The two peers of `evaluation.py`: their own code from checkouts, or what they compute, written again.

Written again they do no more work than their originals: the official script also looks every first ten up in Python
loops, CLIP_benchmark also builds a one-hot tensor of all items for each k.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KS = (1, 5, 10)
BATCH = 64  # CLIP_benchmark's default

Recalls = dict[str, float]


def load_module(path: Path, *, absent: Mapping[str, str]) -> Any:
    """A file of a checkout as a module; `absent` are modules that it imports without need here, with a name each."""
    for name, attribute in absent.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[name], attribute, None)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clip_benchmark_recall(folder: Path | None) -> Callable[[Tensor, Tensor, Tensor], Recalls]:
    """CLIP_benchmark's part of a retrieval evaluation that follows encoding."""
    module = None
    if folder is not None:
        module = load_module(folder / "clip_benchmark" / "metrics" / "zeroshot_retrieval.py", absent={})

    def recalls(images: Tensor, texts: Tensor, pictures: Tensor) -> Recalls:
        scores = texts @ images.t()
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[torch.arange(len(texts)), pictures] = True
        found = {}
        for k in KS:
            for name, table, right in (("t2i", scores, positive), ("i2t", scores.T, positive.T)):
                if module is not None:
                    shares = module.batchify(module.recall_at_k, table, right, BATCH, "cpu", k=k)
                else:
                    parts = zip(table.split(BATCH), right.split(BATCH), strict=True)
                    shares = torch.cat([r.gather(1, s.topk(k, dim=1).indices).sum(dim=1) for s, r in parts])
                found[f"{name}_r@{k}"] = 100.0 * float((shares > 0).float().mean())
        return found

    return recalls


def official_recall(folder: Path | None) -> Callable[[Any, Any, Any, Any], Recalls]:
    """The official script's part that follows encoding; it takes features in fp64 and both tables of right answers."""
    if folder is None:
        return _official_by_definition
    path = folder / "prj" / "M2_Encoder" / "eval_retrieval.py"
    module = load_module(path, absent={"nn4k.consts": "NN_EXECUTOR_KEY", "nn4k.invoker": "LLMInvoker"})

    def recalls(texts: Any, images: Any, t2i: Any, i2t: Any) -> Recalls:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            module.calu_recall(texts, images, t2i, i2t)
        found = {}
        for name in ("t2i", "i2t"):
            line = re.search(rf"{name}_topk (.*)", printed.getvalue())
            assert line is not None
            found |= {f"{name}_r@{k}": float(value) for k, value in zip(KS, line[1].split(), strict=True)}
        return found

    return recalls


def _official_by_definition(texts: Any, images: Any, t2i: Any, i2t: Any) -> Recalls:
    found = {}
    for name, queries, gallery, right in (("t2i", texts, images, t2i), ("i2t", images, texts, i2t)):
        order = np.argsort(-(queries @ gallery.T), axis=1)[:, : max(KS)]
        hits = np.take_along_axis(right, order, axis=1) == 1
        for k in KS:
            found[f"{name}_r@{k}"] = 100.0 * float(hits[:, :k].any(axis=1).mean())
    return found
