"""Every objective on two ranks, in one piece or several, gives the losses and gradients of one process with all rows.

Real gloo processes and the real training module, in fp64; gradients are averaged over the ranks as DDP does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist

from m2_encoder.objectives.base import Objective, ObjectiveInputs
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.distillation import Distillation
from m2_encoder.objectives.long_captions import LongCaptions
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.matching import Matching
from m2_encoder.objectives.passes import HardPairs
from m2_encoder.objectives.sigmoid import SigmoidContrastive
from m2_encoder.objectives.soft_targets import SoftTargetContrastive
from m2_encoder.objectives.text_contrast import TextContrast
from tests.support.models import random_model, small_config
from tests.support.objectives import Numbers, build_bench, make_batch, part_of, take_numbers
from tests.support.ranks import run_ranks

RANKS, ROWS = 2, 8  # of all ranks

Objectives = dict[str, Objective]


class BlockMatching(Matching):
    """Draws wrong images among a rank's rows in one process, too, which holds the rows of all ranks."""

    def select(self, inputs: ObjectiveInputs) -> HardPairs:
        wrong = super().select(inputs)
        if inputs.group is not None:
            return wrong
        captions = len(inputs.text_features) // ROWS
        image_of = torch.arange(ROWS).repeat_interleave(captions)
        own = image_of[:, None] // (ROWS // RANKS) == torch.arange(ROWS) // (ROWS // RANKS)
        allowed = own & (inputs.identity[image_of][:, None] != inputs.identity)
        scores = inputs.logit_scale.exp() * inputs.text_features @ inputs.image_features.t()
        sums = scores.softmax(dim=1).where(allowed, 0.0).cumsum(dim=1)
        generator = torch.Generator().manual_seed(0)  # seed 0, step 0
        places = torch.rand((2, len(scores)), dtype=torch.float64, generator=generator)[1]
        return wrong._replace(image_rows=(sums <= places[:, None] * sums[:, -1:]).sum(dim=1))


def distillation() -> Objectives:
    """With a teacher that is the same on every rank."""
    torch.manual_seed(12)
    objective = Distillation(teacher="none")
    objective.teach_with(random_model(small_config(num_layers=1, feature_dim=7), dtype=torch.float64))
    return {"distillation": objective}


def mixture() -> Objectives:
    """Contrastive and local objectives on shared passes, as a run has them."""
    return {
        "itc": ImageTextContrastive(),
        "captioning": Captioning(),
        "sigmoid": SigmoidContrastive(weight=0.5),
        "matching": BlockMatching(),
    }


def published() -> Objectives:
    """Contrast, hidden words, of which the second rank has none, and hidden patches."""
    return {"itc": ImageTextContrastive(), "cmlm": MaskedLanguage(weight=0.5), "cmim": MaskedImage()}


def text_experts() -> Objectives:
    """Local objectives alone, with texts in the text experts."""
    image = MaskedImage(masking="attentive", mask_ratio=0.5, text_expert=True)
    return {"cmlm": MaskedLanguage(decoder="own", text_expert=True), "cmim": image}


CASES: dict[str, tuple[Callable[[], Objectives], int]] = {
    "captioning": (lambda: {"captioning": Captioning(decoder="own")}, 2),
    "sigmoid": (lambda: {"sigmoid": SigmoidContrastive(initial_bias=-2.0)}, 2),
    "soft targets": (lambda: {"soft_targets": SoftTargetContrastive(softness=0.3)}, 2),
    "text contrast": (lambda: {"text_contrast": TextContrast(hard_negatives=5, max_similarity=0.9)}, 2),
    "long": (lambda: {"long": LongCaptions(components=3, short_share=0.4)}, 4),
    "matching": (lambda: {"matching": BlockMatching()}, 2),
    "distillation": (distillation, 2),
    "mixture": (mixture, 1),
    "published mixture": (published, 2),
    "text experts": (text_experts, 1),
}
PIECES = ((1, True), (2, False), (4, True))


def work(rank: int) -> dict[str, Numbers]:
    """Numbers of all cases, means over the ranks."""
    assert dist.get_world_size() == RANKS
    return run_cases(rank, dist.group.WORLD)


def run_cases(rank: int, group: dist.ProcessGroup | None) -> dict[str, Numbers]:
    found = {}
    ranks = 1 if group is None else RANKS
    for name, (build, captions) in CASES.items():
        batch = part_of(make_batch(ROWS, captions), rank, ranks)
        for pieces, recompute in PIECES if ranks > 1 else PIECES[:1]:
            module = build_bench(build(), contrastive_group=group, micro_batches=pieces, recompute=recompute)
            found[f"{name} {pieces}" if ranks > 1 else name] = take_numbers(module, batch)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Numbers]:
    return run_cases(0, None)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Numbers]]:
    return run_ranks(work, RANKS, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("pieces", [pieces for pieces, _ in PIECES])
@pytest.mark.parametrize("name", list(CASES))
def test_ranks_and_pieces_equal_one_process(
    name: str, pieces: int, alone: dict[str, Numbers], together: list[dict[str, Numbers]]
) -> None:
    expected = alone[name]
    moved = sum(float(np.abs(value).max()) > 1e-6 for key, value in expected.items() if not key.startswith("loss/"))
    assert moved > 20, "gradients near 0 would prove nothing"
    for result in together:
        found = result[f"{name} {pieces}"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-8, atol=1e-11, err_msg=key)


def test_uneven_terms_are_weighed_by_their_number() -> None:
    """Captions of the second half are longer: a mean of the ranks' means would be another number."""
    batch = make_batch(ROWS, 2)
    mask = batch.text.mask.clone()
    mask[ROWS:] = True
    batch = batch._replace(text=batch.text._replace(mask=mask))
    whole = build_bench({"captioning": Captioning()}).evaluate(batch)["captioning"]
    halves = [build_bench({"captioning": Captioning()}).evaluate(part_of(batch, rank, 2)) for rank in range(2)]
    mean_of_means = torch.stack([half["captioning"].loss for half in halves]).mean()
    assert (whole.loss - mean_of_means).abs().item() > 1e-3
