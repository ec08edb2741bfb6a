"""Validation over any number of ranks: each row once, and every rank encodes in every chunk."""

from __future__ import annotations

import pytest
import torch

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.data.validation_chunks import ValidationChunks
from m2_encoder.evaluation.retrieval import encode_set, evaluate_features
from m2_encoder.types import RetrievalBatch
from tests.support.training import make_module, make_tokenizer, tiny_config

TOKENIZER = make_tokenizer()
SET = RetrievalSet(
    "toy",
    keys=("a", "b", "b", "c"),
    images=torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2),
    captions={"en": [tuple(f"{row} {n}" for n in range(5)) for row in "abcd"], "zh": ["猫", (), "狗", ()]},
)


def read(world_size: int, chunk_size: int) -> list[list[RetrievalBatch]]:
    return [
        list(ValidationChunks(SET, tokenizer=TOKENIZER, chunk_size=chunk_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_every_picture_and_caption_is_measured_once(world_size: int, chunk_size: int) -> None:
    ranks = read(world_size, chunk_size)
    assert len({len(chunks) for chunks in ranks}) == 1
    batches = [batch for chunks in ranks for batch in chunks]
    images = [
        (int(image[0, 0, 0]), int(number))
        for batch in batches
        for image, number in zip(batch.images, batch.identity, strict=False)
    ]
    assert sorted(images) == [(0, 0), (1, 1), (2, 1), (3, 2)]
    for language in ("en", "zh"):
        found = [
            (int(number), ids[mask].tolist())
            for batch in batches
            for number, ids, mask in zip(batch.text_identity[language], *batch.texts[language], strict=False)
        ]
        assert sorted(found) == sorted((n, TOKENIZER([text]).ids[0].tolist()) for n, text in SET.queries(language))


def test_every_rank_encodes_every_side_in_every_chunk() -> None:
    for chunks in read(world_size=6, chunk_size=1):
        for batch in chunks:
            assert list(batch.texts) == ["zh", "en"]
            sides = [(batch.images, batch.identity)]
            sides += [(text.ids, batch.text_identity[language]) for language, text in batch.texts.items()]
            assert all(len(rows) > 0 for rows, _ in sides)
            assert all(len(numbers) in (0, len(rows)) for rows, numbers in sides)


def test_no_chunk_is_larger_than_asked_for() -> None:
    assert max(len(batch.texts["en"].ids) for chunks in read(2, 3) for batch in chunks) == 3


@pytest.mark.parametrize(("world_size", "chunk_size"), [(1, 100), (3, 2), (6, 1)])
def test_validation_measures_what_the_evaluation_measures(world_size: int, chunk_size: int) -> None:
    torch.manual_seed(0)
    module = make_module(model=tiny_config(vocab_size=TOKENIZER.vocab_size))
    module.configure_model()
    module.eval()
    shown = SET._replace(images=torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8))
    wanted = evaluate_features(encode_set(module.model, shown, TOKENIZER))
    for rank in range(world_size):
        chunks = ValidationChunks(shown, tokenizer=TOKENIZER, chunk_size=chunk_size, rank=rank, world_size=world_size)
        with torch.no_grad():
            for number, batch in enumerate(chunks):
                module.validation_step(batch, number)
    for language, metrics in wanted.items():
        recall = module.validation_recall[language]
        found = {name: float(value) for name, value in recall.compute().items()}  # type: ignore[operator]
        assert found == pytest.approx(metrics)


def test_a_language_that_the_set_lacks_is_not_measured() -> None:
    module = make_module(model=tiny_config(vocab_size=TOKENIZER.vocab_size))
    module.configure_model()
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    chinese = SET._replace(
        images=torch.zeros(4, 3, 16, 16, dtype=torch.uint8), captions={"zh": ["猫", "狗", "鱼", "鸟"]}
    )
    for batch in ValidationChunks(chinese, tokenizer=TOKENIZER, chunk_size=9, rank=0, world_size=1):
        module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    assert {name.split("/")[1] for name in logged if name != "step"} == {"emoji_val", "emoji_val_zh"}
