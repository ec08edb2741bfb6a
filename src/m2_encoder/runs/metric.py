"""The one number of a run that `run.metric` names: what sweeps compare, and searches maximize."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from typing import Final

from m2_encoder.config.problems import nearest
from m2_encoder.errors import UserError, name_some

MEAN_RECALL: Final = "/mean_recall"
_KEY: Final = "run.metric"


def find_metric(name: str | None, values: Mapping[str, float], validated: Collection[str] = ()) -> float | None:
    """The value that `run.metric` names.

    Args:
        name: of a metric, such as `val/emoji_val_zh/mean_recall`; None for the mean of the mean recalls of what is
            validated while training, of all sets where nothing is; None is returned if there are no recalls.
        values: the last value of each metric.
        validated: the names of those that were measured while training.

    Raises:
        UserError: if there is no such metric, or it is not finite.
    """
    if name is None:
        recalls = [each for each in values if each.endswith(MEAN_RECALL) and not _sums_up(each, values)]
        chosen = [each for each in recalls if each in validated] or recalls
        return statistics.fmean(values[each] for each in chosen) if chosen else None
    if name not in values:
        rule = f"the run has no such metric{nearest(name, values)}"
        raise UserError(f"{rule}; it has {name_some(list(values), 12) or 'none'}", key=_KEY, value=name)
    if not math.isfinite(values[name]):
        raise UserError(f"is {values[name]} at the end of the run; lower optimizer.lr", key=_KEY, value=name)
    return float(values[name])


def _sums_up(name: str, names: Collection[str]) -> bool:
    """Whether a recall is the mean over languages of a validation, which are there themselves."""
    return any(other.startswith(f"{name.removesuffix(MEAN_RECALL)}_") for other in names)
