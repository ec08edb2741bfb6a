"""The recall gate of graphs of 8 bits."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from m2_encoder.exports.base import ExportFormat, ExportSource, Features, Measured
from m2_encoder.exports.native import Native
from m2_encoder.exports.parity import FormatResult, print_parity
from m2_encoder.exports.recall import NUM_PICTURES, Recall, compare_recall, measure_recall, recall_concepts
from m2_encoder.exports.writing import write_export

WAYS = ("zh t2i", "zh i2t", "en t2i", "en i2t")


def _recall(ours: float, theirs: float) -> Recall:
    return Recall(dict.fromkeys(WAYS, ours), dict.fromkeys(WAYS, theirs), 1.04)


def _result(cosine: float, recall: Recall | None, bound: float = 0.99) -> FormatResult:
    return FormatResult("onnx", bound, Measured(0.1, cosine, recall=recall), {}, "")


def test_pictures_are_drawings_that_training_leaves_out() -> None:
    concepts = recall_concepts()
    assert len({each.key for each in concepts}) == NUM_PICTURES
    assert {each.split for each in concepts} == {"train", "heldout"}


def test_recall_is_counted_both_ways_in_both_languages() -> None:
    """Against ranks by sorting: the first hundred pictures are shown as another, and Chinese names are all right."""
    torch.manual_seed(0)
    names = torch.nn.functional.normalize(torch.randn(NUM_PICTURES, 32), dim=1)
    images = names.clone()
    images[:100] = torch.nn.functional.normalize(torch.randn(100, 32), dim=1)
    found = compare_recall(Features(names, names.repeat(2, 1)), Features(images, torch.cat([images, names])))
    assert found.ours == dict.fromkeys(WAYS, 100.0)
    order = (names @ images.T).argsort(dim=1, descending=True)
    places = (order == torch.arange(NUM_PICTURES).unsqueeze(1)).int().argmax(dim=1)
    expected = sum(100 * float((places < k).float().mean()) for k in (1, 5, 10)) / 3
    assert found.theirs["en t2i"] == pytest.approx(expected)
    assert found.theirs["zh t2i"] == found.theirs["zh i2t"] == 100
    assert 75 < found.theirs["en i2t"] < 85
    assert found.chance == pytest.approx(100 * (1 + 5 + 10) / 3 / NUM_PICTURES)


def test_a_model_with_itself_loses_nothing(source: ExportSource) -> None:
    def encode(pixels: torch.Tensor, texts: list[str]) -> Features:
        assert texts[0] == recall_concepts()[0].captions["zh"].name
        with torch.inference_mode():
            return Features(source.model.encode_image(pixels), source.text_features(texts, context_length=9))

    found = measure_recall(source, encode, context_length=9)
    assert found.lost == pytest.approx(0, abs=0.2), "up to how batches round"
    assert not found.decides, "its weights are random"


@pytest.mark.parametrize(
    ("cosine", "recall", "rule"),
    [
        (0.995, _recall(55.0, 54.1), ""),
        (0.995, _recall(55.0, 56.0), ""),
        (0.9999, _recall(55.0, 53.9), "mean recall falls from 55.0 to 53.9 %, 1.0 points are the most"),
        (0.9999, _recall(1.2, 0.1), ""),
        (0.995, _recall(1.2, 1.2), "recall says nothing: the model itself finds 1.2 % of the built-in drawings"),
        (0.98, _recall(55.0, 55.0), "smallest cosine 0.9800000, 0.99 is the least"),
        (float("nan"), _recall(55.0, 55.0), "smallest cosine nan"),
    ],
)
def test_what_decides(cosine: float, recall: Recall, rule: str) -> None:
    found = _result(cosine, recall)
    assert found.holds == (not rule)
    assert found.rule.startswith(rule)


def test_formats_without_recall_are_decided_by_the_cosine_alone() -> None:
    assert _result(0.99, None).holds
    assert not _result(0.98999, None).holds


class Found(ExportFormat):
    """Writes one file, which is said to find so much."""

    bound = 0.99

    def __init__(self, recall: Recall) -> None:
        self.recall = recall

    def write(self, folder: Path, source: ExportSource) -> None:
        (folder / "onnx").mkdir(parents=True)
        (folder / "onnx" / "text_model.onnx").write_bytes(b"")

    def measure(self, folder: Path, source: ExportSource) -> Measured:
        return Measured(0.1, 0.9999, recall=self.recall)

    def usage(self, source: ExportSource) -> str:
        return ""


def test_graphs_that_find_less_are_left_out_and_the_table_shows_both(source: ExportSource, tmp_path: Path) -> None:
    formats: dict[str, ExportFormat] = {"native": Native(), "onnx": Found(_recall(55.0, 53.25))}
    parity = write_export(tmp_path / "out", source=source, formats=formats)
    assert [each.name for each in parity.missed] == ["onnx"]
    assert not (tmp_path / "out" / "onnx").exists()
    out = io.StringIO()
    print_parity(Console(file=out, width=120), parity)
    said = out.getvalue()
    assert "55.00" in said
    assert "53.25" in said
    assert "onnx: mean recall falls from 55.0 to 53.2 %, 1.0 points are the most: not written" in said
    stored = json.loads((tmp_path / "out" / "parity.json").read_text(encoding="utf-8"))["formats"]
    assert stored["onnx"]["recall"]["theirs"]["zh t2i"] == 53.25
    assert stored["native"]["recall"] is None
    assert "53.25" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_card_has_both(source: ExportSource, tmp_path: Path) -> None:
    write_export(tmp_path / "out", source=source, formats={"onnx": Found(_recall(55.0, 54.5))})
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| torch, fp32 | 55.00 |" in card
    assert "| onnx | 54.50 |" in card
    assert "| chance | 1.04 |" in card
