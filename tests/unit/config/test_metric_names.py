from __future__ import annotations

from typing import Any

import pytest

from m2_encoder.config.metric_names import EMOJI_SETS, check_metric
from m2_encoder.data.emoji.emoji_module import REPORTED_SPLITS, VALIDATION_SPLIT

EMOJI = {"_target_": "m2_encoder.data.emoji.emoji_module.EmojiDataModule"}
TARS = {"_target_": "m2_encoder.data.webdataset_module.WebDatasetModule", "validation": {"coco": "x", "muge": "y"}}
SHIPPED = {"retrieval": {"_target_": "m2_encoder.evaluation.tasks.retrieval.Retrieval"}}


def _check(name: str | None, data: Any = EMOJI, **more: Any) -> list[str]:
    cfg = {"run": {"metric": name}, "data": data, "evaluation": SHIPPED, **more}
    return [f"{each.key}={each.value}: {each.rule}; {each.fix}" for each in check_metric(cfg)]


def test_the_sets_are_those_of_the_data() -> None:
    assert set(EMOJI_SETS) == {f"emoji_{split}" for split in (VALIDATION_SPLIT, *REPORTED_SPLITS)}


@pytest.mark.parametrize(
    "name",
    [None, "val/emoji_val_zh/mean_recall", "val/emoji_heldout_style_en/t2i_r@10", "train/loss/total", "perf/x",
     "val/emoji_val_zh/cmlm_loss", "val/emoji_val/psnr", "val/emoji_val_en/reranked_mean_recall"],
)  # fmt: skip
def test_what_may_be_there(name: str | None) -> None:
    assert _check(name) == []


@pytest.mark.parametrize(
    "name", ["val/emoji_val_zh/mean_recal", "val/emoji_vale_zh/mean_recall", "val/loss", "val_loss", "accuracy",
             "val/emoji_val_de/mean_recall", "val/emoji_val_zh/t2i_r@3"],
)  # fmt: skip
def test_what_cannot_be_there(name: str) -> None:
    (line,) = _check(name)
    assert line.startswith(f"run.metric={name}: no run has it")
    assert line.endswith("; for example val/emoji_val_en/mean_recall")


def test_near_names_are_said() -> None:
    assert "did you mean val/emoji_val_zh/mean_recall" in _check("val/emoji_val_zh/mean_recal")[0]


def test_sets_of_shards_are_named_by_the_user() -> None:
    assert _check("val/coco_en/mean_recall", TARS) == []
    assert "the sets are coco, muge" in _check("val/cocoo_en/mean_recall", TARS)[0]
    assert "no set is validated" in _check("val/coco_en/mean_recall", {**TARS, "validation": {}})[0]


def test_without_an_evaluation_only_the_first_set_is_measured() -> None:
    assert _check("val/emoji_val_en/mean_recall", evaluation={}) == []
    assert _check("val/emoji_heldout_style_en/mean_recall", evaluation={})


def test_of_what_others_log_nothing_is_known() -> None:
    for node in ("callbacks", "objective", "evaluation"):
        assert _check("val/loss", **{node: {"mine": {"_target_": "mine.Own"}}}) == []
    assert _check("val/x_en/mean_recall", {"_target_": "mine.Data"}) == []
    assert _check("val/mse", task={"_target_": "mine.Task"}) == []
