"""Runs as data, for notebooks: read what `m2-train` wrote, compare runs, load their models.

>>> from m2_encoder.analysis import read_runs
>>> runs = read_runs("outputs/lr-*")                          # doctest: +SKIP
>>> runs.table("val/emoji_val_zh/mean_recall")                # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

from m2_encoder.analysis.benchmarks import Benchmark, read_benchmark, read_grouped_speedups
from m2_encoder.analysis.effects import Difference
from m2_encoder.analysis.masked import PARTNERS, load_masked, predict_patches, predict_words
from m2_encoder.analysis.planned import plan_training, tabulate_plans
from m2_encoder.analysis.recorded import Curve, RecordedRun, read_run
from m2_encoder.analysis.runs import Runs, read_runs
from m2_encoder.analysis.style import INK, LANGUAGE_COLORS, MUTED, use_font, use_style
from m2_encoder.analysis.table import Table
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.evaluation.encode import encode_images, encode_texts
from m2_encoder.evaluation.feature_file import FeatureFile, open_feature_file, read_features
from m2_encoder.evaluation.inputs import list_images
from m2_encoder.evaluation.retrieval import SetFeatures, encode_set, evaluate_features
from m2_encoder.hub import load


def __getattr__(name: str) -> Any:
    """`plot_effects`, which loads matplotlib, when it is asked for."""
    if name == "plot_effects":
        return importlib.import_module("m2_encoder.analysis.picture").plot_effects
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "INK",
    "LANGUAGE_COLORS",
    "MUTED",
    "PARTNERS",
    "Benchmark",
    "Curve",
    "Difference",
    "EvalTransform",
    "FeatureFile",
    "RecordedRun",
    "RetrievalSet",
    "Runs",
    "SetFeatures",
    "Table",
    "encode_images",
    "encode_set",
    "encode_texts",
    "evaluate_features",
    "list_images",
    "load",
    "load_masked",
    "open_feature_file",
    "plan_training",
    "plot_effects",
    "predict_patches",
    "predict_words",
    "read_benchmark",
    "read_features",
    "read_grouped_speedups",
    "read_retrieval_set",
    "read_run",
    "read_runs",
    "tabulate_plans",
    "use_font",
    "use_style",
]
