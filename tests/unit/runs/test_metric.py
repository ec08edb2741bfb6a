from __future__ import annotations

import math

import pytest

from m2_encoder.errors import UserError
from m2_encoder.runs.metric import find_metric

ZH, EN, OTHER = "val/a_zh/mean_recall", "val/a_en/mean_recall", "val/b_en/mean_recall"
VALUES = {"train/loss/total": 3.0, ZH: 10.0, EN: 20.0, OTHER: 60.0, "own": math.nan}


def test_by_default_it_is_the_mean_recall_of_what_is_validated() -> None:
    assert find_metric(None, VALUES, {ZH, EN}) == 15
    assert find_metric(None, VALUES) == 30
    assert find_metric(None, {"train/loss/total": 1.0}) is None


def test_a_metric_by_its_name() -> None:
    assert find_metric("train/loss/total", VALUES) == 3


def test_one_that_is_not_there_names_near_ones() -> None:
    with pytest.raises(
        UserError, match=r"no such metric \(did you mean val/a_zh/mean_recall or .*it has train/"
    ) as error:
        find_metric("val/a_zh/mean_recal", VALUES)
    assert (error.value.key, error.value.value) == ("run.metric", "val/a_zh/mean_recal")


def test_nan_is_no_result() -> None:
    with pytest.raises(UserError, match="is nan at the end of the run"):
        find_metric("own", VALUES)
