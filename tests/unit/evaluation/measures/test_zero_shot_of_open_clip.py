"""Zero-shot accuracy against open_clip's own zero-shot code, with the same model, names and templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.evaluation.measures.classification import class_vectors, measure_classification
from m2_encoder.evaluation.models.opening import open_model
from m2_encoder.evaluation.prompts import check_templates, expand
from tests.support.once import build_once
from tests.support.peer_models import picture, save_open_clip

NAMES = ("cat", "red square", "一只猫", "a dog's house", "tall tree", "blue bird", "{odd} name", "猫", "A B", "x")
TEMPLATES = ("a photo of a {}.", "{}", "这是{}。", "the {} here", "{}")  # one comes twice, and counts twice
NUMBER = 60

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("open_clip")
    return build_once(tmp_path_factory, "zero-shot-open_clip", lambda path: save_open_clip(path, seed=5))


def theirs(folder: Path, build: str, templates: Any) -> tuple[Tensor, Tensor]:
    """Class vectors, (C, E), and logits, (n, C), of open_clip alone."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    classifier = getattr(open_clip, build)(model, open_clip.get_tokenizer(f"local-dir:{folder}"), NAMES, templates)
    pixels = torch.stack([transform(picture(number)) for number in range(NUMBER)])
    with torch.inference_mode():  # as `open_clip_train.zero_shot.run` computes them
        return classifier.T, 100.0 * model(image=pixels)[0] @ classifier


def own_vectors(encoder: FeatureEncoder) -> Tensor:
    prompts = expand(NAMES, check_templates(TEMPLATES, "here"))
    features = encoder.encode_texts([text for texts in prompts for text in texts])
    return class_vectors(features.view(len(NAMES), len(TEMPLATES), -1))


def fill(template: str) -> Callable[[str], str]:
    return lambda name: template.replace("{}", name)


@pytest.mark.parametrize("build", ["build_zero_shot_classifier", "build_zero_shot_classifier_legacy"])
@pytest.mark.parametrize("kind", ["strings", "functions"])
def test_accuracy_is_that_of_open_clip(folder: Path, build: str, kind: str) -> None:
    vectors, logits = theirs(folder, build, TEMPLATES if kind == "strings" else [*map(fill, TEMPLATES)])
    opened = open_model(f"open_clip:{folder}")
    with FeatureEncoder(opened) as encoder:
        own = own_vectors(encoder)
    torch.testing.assert_close(own, vectors, atol=2e-6, rtol=0)
    pixels = torch.stack([opened.preprocess(picture(number)) for number in range(NUMBER)])
    assert opened.model is not None
    with torch.no_grad():
        images = opened.model.encode_image(pixels)
    targets = logits.argsort(dim=1, descending=True)[torch.arange(NUMBER), torch.arange(NUMBER) % 7]
    found = {each.metric: each.value for each in measure_classification(images, own, targets).measurements}
    for k in (1, 5):
        wanted = 100 * float(MulticlassAccuracy(len(NAMES), top_k=k, average="micro")(logits, targets))
        assert found[f"top{k}"] == pytest.approx(wanted, abs=1e-4)
    per_class = MulticlassAccuracy(len(NAMES), average=None)(logits, targets)
    present = torch.bincount(targets, minlength=len(NAMES)) > 0
    assert found["mean_per_class"] == pytest.approx(100 * float(per_class[present].mean()), abs=1e-4)
    assert 5 < found["top1"] < 50 < found["top5"] < 95
