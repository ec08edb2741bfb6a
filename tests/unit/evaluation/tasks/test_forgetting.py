"""Every number of the table is what the mixed model itself gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.checkpoints.mixing import mix_models
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.errors import UserError
from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.evaluation.models.own import wrap_towers
from m2_encoder.evaluation.tables import CellTable
from m2_encoder.evaluation.tasks.base import EvaluationContext
from m2_encoder.evaluation.tasks.forgetting import Forgetting
from m2_encoder.evaluation.tasks.retrieval import Retrieval
from m2_encoder.evaluation.tasks.suite import Suite
from m2_encoder.models.m2_encoder import M2Encoder
from tests.support.suites import captioned
from tests.support.training import make_tokenizer, tiny_config

MEAN = "mean_recall"


def _model(seed: int, **more: Any) -> M2Encoder:
    torch.manual_seed(seed)
    return M2Encoder(tiny_config(vocab_size=make_tokenizer().vocab_size, **more)).eval()


def _context(model: M2Encoder, start: M2Encoder | None) -> EvaluationContext:
    tokenizer, keys = make_tokenizer(), tuple("abcdefgh")
    torch.manual_seed(5)
    images = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8)
    mine = RetrievalSet("mine", keys, images, {"en": keys, "zh": tuple("甲乙丙丁戊己庚辛")})
    wrapped = wrap_towers(model, EvalTransform(model.config.image_size), tokenizer, name="model")
    give = None if start is None else lambda: start
    return EvaluationContext(model, tokenizer, {"mine": mine}, files=FeatureEncoder(wrapped), start=give)


def _prepared(task: Suite) -> Suite:
    task.prepare()
    return task


@pytest.fixture
def known(tmp_path: Path) -> dict[str, Any]:
    return {"known": {"layout": "own", "path": str(captioned(tmp_path / "known", 6))}}


def test_shares_are_the_mixed_models(known: dict[str, Any]) -> None:
    start, trained = _model(1), _model(2)
    context = _context(trained, start)
    found = _prepared(Forgetting(sets=known, shares=[0, 0.5, 1])).measure(context)
    value = {(each.dataset, each.language, each.model): each.value for each in found.records if each.metric == MEAN}
    models = {"before": start, "50 %": mix_models([start, trained], [0.5, 0.5]), "after": trained}
    for label, model in models.items():
        own = _context(model, None)
        recalls = Retrieval().measure(own).metrics
        assert value["mine", "zh", label] == pytest.approx(recalls["val/mine_zh/mean_recall"])
        suite = _prepared(Suite(sets=known, measures=["retrieval"])).measure(own)
        expected = {each.language: each.value for each in suite.records if each.metric == MEAN}
        assert value["known", "en", label] == expected["en"]
    change = found.metrics["forgetting/known_en/mean_recall"]
    assert change == pytest.approx(value["known", "en", "after"] - value["known", "en", "before"])
    table = found.rows[0]
    assert isinstance(table, CellTable)
    assert list(table.headings[3:6]) == ["before", "50 %", "after"]
    assert {row[0] for row in table.rows} == {"mine (yours)", "known"}


def test_a_model_that_did_not_move_forgot_nothing(known: dict[str, Any]) -> None:
    model = _model(1)
    found = _prepared(Forgetting(sets=known)).measure(_context(model, model))
    assert set(found.metrics.values()) == {0.0}
    table = found.rows[0]
    assert isinstance(table, CellTable)
    assert {row[-2] for row in table.rows} == {"(+0.0)"}


def test_without_a_line_both_ends_are_measured(known: dict[str, Any]) -> None:
    found = _prepared(Forgetting(sets=known)).measure(_context(_model(2, num_layers=2), _model(1)))
    assert {each.model for each in found.records} == {"before", "after"}
    table = found.rows[0]
    assert isinstance(table, CellTable)
    assert any("no line between" in note for note in table.notes)


def test_it_applies_to_runs_with_a_start(known: dict[str, Any]) -> None:
    task = Forgetting(sets=known)
    assert not task.applies(_context(_model(1), None))
    assert task.applies(_context(_model(1), _model(1)))


@pytest.mark.parametrize("shares", [[0.5], [1, 0], [0, 2], [0, 0.5, 0.5, 1]])
def test_shares_that_are_no_line_are_refused(known: dict[str, Any], shares: list[float]) -> None:
    with pytest.raises(UserError, match="shares"):
        Forgetting(sets=known, shares=shares)
