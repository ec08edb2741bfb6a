"""Whether a run can have the metric that `run.metric` names, as far as that is known before it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from m2_encoder.config.emoji_folder import EMOJI_TARGET
from m2_encoder.config.problems import nearest
from m2_encoder.config.trusted import find_targets
from m2_encoder.errors import Problem, name_some
from m2_encoder.evaluation.metrics import RECALL_KS
from m2_encoder.types import LANGUAGES

EMOJI_SETS: Final = ("emoji_val", "emoji_heldout_style", "emoji_heldout_families")
"""The sets of the built-in data; the first one is validated while training, as of all data."""

WEBDATASET_TARGET: Final = "m2_encoder.data.webdataset_module.WebDatasetModule"
_RECALLS: Final = ("mean_recall", *(f"{way}_r@{k}" for way in ("i2t", "t2i") for k in RECALL_KS))
_LOGS: Final = ("callbacks", "evaluation", "objective", "task")
"""Nodes whose classes may log what they like, if they are somebody's own."""


def check_metric(cfg: Mapping[str, Any]) -> list[Problem]:
    """The problem of a metric that cannot be there; of what own classes log nothing is known."""
    run, data = cfg.get("run"), cfg.get("data")
    name = run.get("metric") if isinstance(run, Mapping) else None
    if not isinstance(name, str) or not isinstance(data, Mapping) or cfg.get("task") is not None:
        return []
    sets = _find_sets(data)
    if sets is None:
        return []
    if not cfg.get("evaluation"):
        sets = sets[:1]
    columns = [f"val/{each}_{language}" for each in sets for language in LANGUAGES]
    known = [f"{column}/{recall}" for column in columns for recall in _RECALLS]
    if name in known or _is_possible(name, columns, cfg):
        return []
    fix = f"for example {known[0]}" if known else "name what is logged, such as train/loss/total"
    sets_there = f"the sets are {name_some(sets)}" if sets else "no set is validated"
    return [Problem("run.metric", name, f"no run has it{nearest(name, known)}; {sets_there}", fix)]


def _find_sets(data: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the sets that are measured; None for a data module of somebody's own."""
    if data.get("_target_") == EMOJI_TARGET:
        return EMOJI_SETS
    validation = data.get("validation")
    return tuple(validation) if data.get("_target_") == WEBDATASET_TARGET and isinstance(validation, Mapping) else None


def _is_possible(name: str, columns: list[str], cfg: Mapping[str, Any]) -> bool:
    above, _, last = name.rpartition("/")
    if last in _RECALLS:
        return False  # of a set that is not there
    own = [each for node in _LOGS for each in find_targets(cfg.get(node)) if not each.startswith("m2_encoder.")]
    if own:
        return True
    if not name.startswith("val"):
        return bool(above)
    places = {*columns, *(column.rpartition("_")[0] for column in columns)}
    return above in places and not difflib.get_close_matches(last, _RECALLS, cutoff=0.8)
