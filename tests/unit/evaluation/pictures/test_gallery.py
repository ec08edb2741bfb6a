"""The page: what it shows, and that it is really drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.pictures.drawing import text_width, wrap_text
from m2_encoder.evaluation.pictures.gallery import GallerySection, draw_gallery, find_concepts
from m2_encoder.evaluation.retrieval import SetFeatures, TextFeatures

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200), (9, 9, 9)]


@pytest.fixture
def dataset() -> RetrievalSet:
    images = torch.tensor(COLORS, dtype=torch.uint8)[:, :, None, None].expand(-1, 3, 8, 8)
    names = tuple(f"colour number {n}" for n in range(len(COLORS)))
    return RetrievalSet("colours", tuple("abcdefg"), images, {"zh": tuple("红绿蓝黄青紫黑"), "en": names})


def make_features(dataset: RetrievalSet, scores: list[float]) -> SetFeatures:
    """Every query gives image i the score `scores[i]`."""
    images = torch.tensor(scores)[:, None]
    ids = torch.arange(len(scores))
    texts = {k: TextFeatures(v, ids, torch.ones(len(scores), 1)) for k, v in dataset.captions.items()}
    return SetFeatures(images, ids, texts)


def test_hits_are_the_best_and_ranks_are_pessimistic(dataset: RetrievalSet) -> None:
    features = make_features(dataset, [0.1, 0.9, 0.5, 0.5, 0.2, 0.3, 0.0])
    columns = find_concepts(dataset, features, ["b", "c", "g"])
    assert list(columns) == ["zh", "en"]
    first, tied, last = columns["zh"]
    assert (first.query, first.rank) == ("绿", 1)
    assert [round(hit.score, 1) for hit in first.hits] == [0.9, 0.5, 0.5, 0.3, 0.2]
    assert [hit.is_right for hit in first.hits] == [True, False, False, False, False]
    assert tied.rank == 3  # the wrong image with the same score stands before it
    assert [hit.is_right for hit in tied.hits] == [False, False, True, False, False]
    assert last.rank == 7
    assert not any(hit.is_right for hit in last.hits)


def test_page_shows_the_images_in_order(dataset: RetrievalSet, tmp_path: Path) -> None:
    features = make_features(dataset, [0.1, 0.9, 0.5, 0.4, 0.2, 0.3, 0.0])
    rows = find_concepts(dataset, features, ["b"])
    section = GallerySection("Section", "a note", rows, {"zh": "R@1 100.0 %"}, 7)
    path = tmp_path / "page.png"
    draw_gallery(path, [section], title="标题", subtitle="run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.png"]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 400
    centres = []
    for index in (1, 2, 3, 5, 4):  # by score
        found = (np.abs(pixels - np.array(COLORS[index])).max(axis=2) <= 2).nonzero()
        assert len(found[0]) > 2 * 100 * 100, f"image {index} is missing"
        centres.append(np.median(found[1][found[1] < pixels.shape[1] // 2]))
    assert centres == sorted(centres)
    black = (np.abs(pixels - np.array(COLORS[6])).max(axis=2) == 0).sum()
    assert black < 100, "the seventh image is no hit"


@pytest.mark.parametrize(
    "text", ["迎面驶来的公交车", "person in steamy room facing right", "旗：French Southern Territories", "x" * 90]
)
def test_wrapped_lines_fit_and_lose_nothing(text: str) -> None:
    lines = wrap_text(text, 17, 130, max_lines=99)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(text_width(line, 17) <= 130 for line in lines)
    short = wrap_text(text, 17, 130, max_lines=1)
    assert len(short) == 1
    assert text_width(short[0], 17) <= 130
    assert short[0].endswith("…") == (len(lines) > 1)
