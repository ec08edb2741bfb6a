"""Measured masked objectives of a small model, against predictions for one image at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.masked import MaskedResults
from m2_encoder.evaluation.tables import print_table
from m2_encoder.evaluation.tasks.base import EvaluationContext
from m2_encoder.evaluation.tasks.masked import ORDER, Masked, make_batch, make_passes, masked_table
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig
from m2_encoder.objectives.base import LocalObjective, Objective
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.patch_targets import VisualCodes
from m2_encoder.runs.build import build_masking
from m2_encoder.types import ImageTextBatch, MaskedText, TextTokens
from tests.support.training import make_tokenizer, tiny_config

NUMBER = 10
END = make_tokenizer().end_id
ENGLISH = ("red apple pie", "blue car", "small green tree", "happy cat", "black dog", "a red car", "green apple", "dog",
           "sad cat", "tall tree")  # fmt: skip
CHINESE = (
    "红苹果派",
    "蓝色的汽车",
    "绿色的小树",
    "开心的猫",
    "黑色的狗",
    "红色的汽车",
    "绿苹果",
    "狗",
    "难过的猫",
    "高高的树",
)
IMAGES = np.random.default_rng(0).integers(0, 256, (NUMBER, 3, 16, 16)).astype(np.uint8)
IMAGES[2] = 200  # one colour
SET = RetrievalSet(
    name="things",
    keys=tuple(f"k{i}" for i in range(NUMBER)),
    images=torch.from_numpy(IMAGES),
    captions={"en": ENGLISH, "zh": CHINESE},
)


def build(objectives: dict[str, Objective]) -> M2Encoder:
    """A model whose predictions depend on image and text, and are sometimes right."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=make_tokenizer().vocab_size)
    model = M2Encoder(config)
    for objective in objectives.values():
        objective.build(config)
    with torch.no_grad():
        for parameter in (*model.parameters(), *(p for o in objectives.values() for p in o.parameters())):
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        used = make_tokenizer()([*ENGLISH, *CHINESE]).ids.unique()
        for objective in objectives.values():
            if isinstance(objective, MaskedLanguage | Captioning):
                objective.head.bias[used] += 4.0
    return model.train()


def make_context(model: M2Encoder, objectives: dict[str, Objective]) -> EvaluationContext:
    tokenizer = make_tokenizer()
    masking = build_masking(objectives, tokenizer, model.config)
    return EvaluationContext(model, tokenizer, {"val": SET}, objectives=objectives, masking=masking)


def measure(model: M2Encoder, objectives: dict[str, Objective]) -> MaskedResults:
    return Masked().measure_sets(make_context(model, objectives))["val"]


def whole(model: M2Encoder, objective: LocalObjective) -> ImageTextBatch:
    return make_batch(make_context(model, {"it": objective}), SET, range(NUMBER))


def single(batch: ImageTextBatch, image: int, row: int) -> ImageTextBatch:
    """One image beside one caption."""
    masked, patches = batch.masked_text, batch.patch_mask
    return batch._replace(
        images=batch.images[[image]],
        text=TextTokens(batch.text.ids[[row]], batch.text.mask[[row]]),
        language=batch.language[[row]],
        identity=batch.identity[[image]],
        masked_text=None if masked is None else MaskedText(masked.ids[[row]], masked.predicted[[row]]),
        patch_mask=None if patches is None else patches[[image]],
    )


@torch.no_grad()
def count_hits(model: M2Encoder, objective: MaskedLanguage, batch: ImageTextBatch, place: int, step: int) -> int:
    """Hidden tokens of a language said right beside the image `step` places on."""
    hits = 0
    for item in range(NUMBER):
        row = len(ORDER) * item + place
        one = single(batch, (item + step) % NUMBER, row)
        passes = make_passes(model, one, {"cmlm": objective})
        said = objective.predict(passes, model.text_embed.tokens.weight)[0]
        assert batch.masked_text is not None
        hidden = batch.masked_text.predicted[row, : len(said)]
        hits += int((said == batch.text.ids[row, : len(said)])[hidden].sum())
    return hits


def test_words_are_counted_one_by_one() -> None:
    objective = MaskedLanguage()
    objectives: dict[str, Objective] = {"itc": ImageTextContrastive(), "cmlm": objective}
    model = build(objectives)
    found = measure(model, objectives)
    assert model.training, "left as it was"
    assert list(found) == ["cmlm"]
    batch = whole(model.eval(), objective)
    masked = batch.masked_text
    assert masked is not None
    assert (masked.ids[masked.predicted] == make_tokenizer().mask_id).all(), "nothing is left for copying"
    hits: list[int] = []
    for place, language in enumerate(ORDER):
        numbers = found["cmlm"][language]
        hidden = batch.text.ids[place :: len(ORDER)][masked.predicted[place :: len(ORDER)]].tolist()
        own, other = (count_hits(model, objective, batch, place, step) for step in (0, NUMBER // 2))
        assert numbers["count"] == len(hidden)
        assert numbers["accuracy"] == pytest.approx(own / len(hidden))
        assert numbers["other_accuracy"] == pytest.approx(other / len(hidden))
        assert numbers["commonest_accuracy"] == pytest.approx(Counter(hidden).most_common(1)[0][1] / len(hidden))
        hits += [own, other]
    assert any(hits), "or nothing was compared"
    assert hits[0::2] != hits[1::2], "the image matters to a random model"


@pytest.mark.parametrize("masking", ["block", "attentive"])
def test_patches_are_the_same_beside_either_caption(masking: Any) -> None:
    objective = MaskedImage(masking=masking, mask_ratio=0.5)
    objectives: dict[str, Objective] = {"cmim": objective}
    model = build(objectives)
    found = measure(model, objectives)["cmim"]
    batch = whole(model.eval(), objective)
    with torch.no_grad():
        masks = objective.choose(make_passes(model, batch, {"cmim": objective}))
    assert (masks.sum(dim=1) == 2).all()
    plain = MaskedImage(mask_ratio=0.5)  # hides what it is told
    plain.targets = objective.targets
    fixed = batch._replace(patch_mask=masks)
    pixels = IMAGES.astype(np.float64) / 255
    for place, language in enumerate(ORDER):
        losses: dict[str, list[float]] = {"loss": [], "other_loss": [], "mean_loss": []}
        for image in range(NUMBER):
            for key, step in (("loss", 0), ("other_loss", NUMBER // 2)):
                one = single(fixed, image, len(ORDER) * ((image + step) % NUMBER) + place)
                with torch.no_grad():
                    terms = plain.terms(make_passes(model, one, {"cmim": plain}))
                losses[key].append(float(terms.sums) / int(terms.counts))
            for patch in masks[image].nonzero().flatten().tolist():
                top, left = 8 * (patch // 2), 8 * (patch % 2)
                cut = pixels[image, :, top : top + 8, left : left + 8]
                losses["mean_loss"].append(float(((cut - cut.mean()) ** 2).mean() / (cut.var(ddof=1) + 1e-6)))
        numbers = found[language]
        assert numbers == {
            "count": 2 * NUMBER,
            **{key: pytest.approx(float(np.mean(values)), rel=1e-4) for key, values in losses.items()},
        }
        assert numbers["loss"] != numbers["other_loss"]
        assert numbers["mean_loss"] == pytest.approx(1 - 1 / NUMBER, abs=0.01), "nothing to say of one colour"


@pytest.mark.parametrize("masking", ["block", "attentive"])
def test_codes_have_an_accuracy_beside_either_caption_and_blind(masking: Any) -> None:
    torch.manual_seed(1)
    sizes = {"image_size": 16, "patch_size": 8, "num_codes": 3, "code_dim": 4, "embed_dim": 16, "num_heads": 2}
    tokenizer = VisualTokenizer(VisualTokenizerConfig(**sizes, num_layers=1, num_decoder_layers=1))
    targets = VisualCodes(tokenizer="here")
    targets.read_with(tokenizer)
    objective = MaskedImage(masking=masking, mask_ratio=0.5, targets=targets)
    objectives: dict[str, Objective] = {"cmim": objective}
    model = build(objectives)
    found = measure(model, objectives)["cmim"]
    batch = whole(model.eval(), objective)
    shared = make_passes(model, batch, {"cmim": objective})
    with torch.no_grad():
        terms = objective.terms(shared)
        hidden = tokenizer.encode(batch.images)[objective.choose(shared)].tolist()
    commonest = Counter(hidden).most_common(1)[0][1] / (2 * NUMBER)
    assert 1 / 3 < commonest < 1
    for place, language in enumerate(ORDER):
        numbers = found[language]
        assert set(numbers) == {"count", "loss", "accuracy", "other_loss", "other_accuracy", "commonest_accuracy"}
        assert numbers["commonest_accuracy"] == pytest.approx(commonest)
        assert numbers["accuracy"] == pytest.approx(float(terms.scores["accuracy"][place::2].sum()) / (2 * NUMBER))
        assert 0 < (numbers["accuracy"] or 0) < 1


def test_captions_are_measured_too() -> None:
    objective = Captioning()
    objectives: dict[str, Objective] = {"captioning": objective}
    found = measure(build(objectives), objectives)["captioning"]
    for language in ORDER:
        tokens = [token for ids in map(make_tokenizer().encode, SET.captions[language]) for token in [*ids, END]]
        assert found[language]["count"] == len(tokens)
        commonest = Counter(tokens).most_common(1)[0][1]
        assert found[language]["commonest_accuracy"] == pytest.approx(commonest / len(tokens))


def test_nothing_masked_nothing_measured() -> None:
    objectives: dict[str, Objective] = {"itc": ImageTextContrastive(), "cmlm": MaskedLanguage(weight=0.0)}
    assert not Masked().applies(make_context(build({}), objectives))


def test_names_of_metrics_and_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"count": 4567, "accuracy": 0.5, "other_accuracy": 0.25, "loss": 2.0, "commonest_accuracy": 0.125}
    patches = {"count": 12, "loss": 0.8125, "other_loss": 0.875, "mean_loss": None}
    results: Any = {"heldout_families": {"cmlm": {"zh": words}, "cmim": {"en": patches}}}
    monkeypatch.setattr(Masked, "measure_sets", lambda *_: results)
    found = Masked().measure(dataclasses.replace(make_context(build({}), {}), sets={"heldout_families": SET}))
    assert found.metrics == {
        "val/things_zh/cmlm_accuracy": 0.5,
        "val/things_zh/cmlm_other_accuracy": 0.25,
        "val/things_zh/cmlm_commonest_accuracy": 0.125,
        "val/things_zh/cmlm_loss": 2.0,
        "val/things_en/cmim_loss": 0.8125,
        "val/things_en/cmim_other_loss": 0.875,
    }
    assert found.record == {"masked": results}
    console = Console(width=80)
    with console.capture() as shown:
        print_table(
            console,
            masked_table(results),
            num_images={"heldout_families": 1494},
            titles={"heldout_families": "unseen concepts and style"},
        )
    lines = [line.split() for line in shown.get().splitlines()]
    assert ["unseen", "concepts", "cmlm", "zh", "%", "right", "50.0", "25.0", "12.5", "4,567"] in lines
    assert ["and", "style", "cmim", "en", "loss", "0.812", "0.875", "–", "12"] in lines
    assert ["1,494", "images"] in lines


def test_each_language_is_measured_on_the_images_that_have_it() -> None:
    objectives: dict[str, Objective] = {"cmlm": MaskedLanguage(), "captioning": Captioning()}
    model = build(objectives)
    both = measure(model, objectives)
    context = make_context(model, objectives)

    def measure_part(captions: dict[str, tuple[Any, ...]]) -> MaskedResults:
        sets = {"val": SET._replace(captions=captions)}
        return Masked().measure_sets(dataclasses.replace(context, sets=sets))["val"]

    alone = measure_part({"en": tuple((caption, "more") for caption in ENGLISH)})
    assert {name: list(found) for name, found in alone.items()} == {"cmlm": ["en"], "captioning": ["en"]}
    assert alone["cmlm"]["en"] == pytest.approx(both["cmlm"]["en"]), "the first caption, with the same masks"
    partly = measure_part({"en": ENGLISH, "zh": (*CHINESE[:6], *((),) * 4)})
    assert partly["captioning"]["en"] == pytest.approx(both["captioning"]["en"])
    fewer = make_tokenizer()(CHINESE[:6]).mask[:, 1:].sum()
    assert partly["captioning"]["zh"]["count"] == fewer
