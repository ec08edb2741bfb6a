"""Hidden words beside the right picture, a wrong one and none; hidden patches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from m2_encoder.analysis import PARTNERS, load_masked, predict_patches, predict_words, read_run
from m2_encoder.errors import UserError
from m2_encoder.evaluation.tasks.base import EvaluationContext
from m2_encoder.evaluation.tasks.masked import ORDER, make_batch, make_passes
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from tests.unit.analysis.test_recorded import write_run
from tests.unit.evaluation.tasks.test_masked import NUMBER, SET, build, make_context, single


@pytest.fixture(scope="module")
def context() -> EvaluationContext:
    objectives = {"itc": ImageTextContrastive(), "cmlm": MaskedLanguage(), "cmim": MaskedImage()}
    return make_context(build(objectives), objectives)


def test_words_have_the_probabilities_of_one_pair_at_a_time(context: EvaluationContext) -> None:
    words = predict_words(context, SET)
    objective = context.objectives["cmlm"]
    assert isinstance(objective, MaskedLanguage)
    model, batch = context.encoder.eval(), make_batch(context, SET, range(NUMBER))
    for place, language in enumerate(ORDER):
        for item in range(NUMBER):
            rows = [row for row in words if (row["image"], row["language"]) == (item, language)]
            assert rows, "each caption has a hidden word"
            assert {row["other"] for row in rows} == {(item + NUMBER // 2) % NUMBER}
            for partner, image in (("right", item), ("wrong", rows[0]["other"])):
                passes = make_passes(model, single(batch, image, len(ORDER) * item + place), {"it": objective})
                with torch.no_grad():
                    loss = float(objective.terms(passes).sums.sum())
                together = math.prod(row[partner] for row in rows)
                assert together == pytest.approx(math.exp(-loss), rel=1e-4)


def test_without_a_picture_no_picture_is_seen(context: EvaluationContext) -> None:
    words = predict_words(context, SET)
    others = predict_words(context, SET._replace(images=255 - SET.images))
    assert [row["none"] for row in words] == pytest.approx([row["none"] for row in others])
    assert [row["right"] for row in words] != pytest.approx([row["right"] for row in others], rel=1e-3)


def test_captions_show_what_is_hidden(context: EvaluationContext) -> None:
    words = predict_words(context, SET, [0, 3])
    assert {row["image"] for row in words} == {0, 3}
    for row in words:
        true = SET.captions_of(row["image"], row["language"])[0]
        assert row["caption"].replace("[", "").replace("]", "") == true
        assert row["word"] in row["caption"].replace("] [", " ").replace("[", "").replace("]", "")
        assert " " not in row["word"]
        assert all(0 <= row[partner] <= 1 for partner in PARTNERS)


def test_patches_are_drawn_beside_each_caption(context: EvaluationContext) -> None:
    drawn = predict_patches(context, SET, [1, 4])
    assert list(drawn) == ["original", "hidden", "with 中文", "with English"]
    assert all((images.shape, images.dtype) == ((2, 3, 16, 16), torch.uint8) for images in drawn.values())
    assert torch.equal(drawn["original"], SET.images[[1, 4]])
    visible = (drawn["hidden"] == drawn["original"]) & (drawn["original"] != 214)  # grey that was there before
    assert visible.any()
    assert torch.equal(drawn["with English"][visible], drawn["original"][visible])


def test_what_a_run_lacks_is_said(context: EvaluationContext, tmp_path: Path) -> None:
    words_alone = make_context(context.encoder, {"cmlm": MaskedLanguage()})
    with pytest.raises(UserError, match="no objective MaskedImage; it has cmlm"):
        predict_patches(words_alone, SET, [0])
    with pytest.raises(UserError, match="images of two things"):
        predict_words(context, SET._replace(keys=("k",) * NUMBER))
    run = read_run(write_run(tmp_path / "a", data={"_target_": "mine.Module"}, model={"name": "tiny"}))
    with pytest.raises(UserError, match="no validation set"):
        run.read_set()
    with pytest.raises(UserError, match="no checkpoint 'last'"):
        load_masked(run, {})


def test_sets_of_a_run_at_two_sizes(emoji_folder: Path, tmp_path: Path) -> None:
    data = {
        "_target_": "m2_encoder.data.emoji.emoji_module.EmojiDataModule",
        "folder": str(emoji_folder),
        "heldout_style": "twemoji",
    }
    run = read_run(write_run(tmp_path / "a", data=data, model={"name": "tiny"}))
    small, large = run.read_set("heldout_families"), run.read_set("heldout_families", image_size=100)
    assert (small.split, small.images.shape, large.images.shape) == (
        "heldout_families",
        (153, 3, 32, 32),
        (153, 3, 100, 100),
    )
    assert small.keys == large.keys
    with pytest.raises(UserError, match="there are heldout_style, heldout_families, val"):
        run.read_set("heldout_famlies")
    given = {"_target_": "m2_encoder.data.webdataset_module.WebDatasetModule"}
    given["validation"] = {"mine": str(emoji_folder / "heldout_families")}
    own = read_run(write_run(tmp_path / "b", data=given, model={"name": "tiny"})).read_set()
    assert (own.name, own.split) == ("mine", "")
