"""Re-ranking as a task; its recalls are those of `evaluation.rerank`, which is tested there."""

from __future__ import annotations

import torch
from torch import nn

from m2_encoder.checkpoints.matching_head import MatchingHead
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.tasks.base import EvaluationContext
from m2_encoder.evaluation.tasks.rerank import Rerank
from m2_encoder.evaluation.tasks.retrieval import Retrieval
from m2_encoder.models.m2_encoder import M2Encoder
from tests.support.training import make_tokenizer, tiny_config


def make_context(head: MatchingHead | None) -> EvaluationContext:
    tokenizer, keys = make_tokenizer(), ("a", "b", "c")
    model = M2Encoder(tiny_config(vocab_size=tokenizer.vocab_size))
    images = torch.randint(0, 255, (3, 3, 16, 16), dtype=torch.uint8)
    mine = RetrievalSet("mine", keys, images, {"en": keys, "zh": ("甲", "乙", "丙")})
    return EvaluationContext(model, tokenizer, {"mine": mine}, matching=head)


def test_without_a_head_it_is_retrieval_and_says_so() -> None:
    context = make_context(None)
    found = Rerank().measure(context)
    assert found.metrics == Retrieval().measure(context).metrics
    assert found.rows[-1] == "rerank: the model has no matching head; the objective itm trains one"


def test_both_recalls_are_in_every_table() -> None:
    context = make_context(MatchingHead(nn.Linear(32, 1)))
    found = Rerank(candidates=4).measure(context)
    rows = ["zh", "zh reranked", "en", "en reranked"]
    assert list(found.record["evaluation"]["mine"]) == rows
    assert list(found.record["table"]["mine"]) == [*rows, "chance"]
    assert found.metrics["val/mine_zh/reranked_t2i_r@10"] == found.metrics["val/mine_zh/t2i_r@10"] == 100
    assert "rerank=4: mine has 3 images, so all of them are ranked again" in found.rows
