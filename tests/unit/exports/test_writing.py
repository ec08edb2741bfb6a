from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from m2_encoder import load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.errors import UserError
from m2_encoder.exports.base import ExportFormat, ExportSource, Features, Measured, compare
from m2_encoder.exports.native import Native
from m2_encoder.exports.onnx_format import Onnx
from m2_encoder.exports.parity import print_parity, without_formats
from m2_encoder.exports.samples import TEXTS, make_pictures
from m2_encoder.exports.writing import MissedError, write_export
from tests.support.models import random_model
from tests.unit.exports.conftest import CARD, Exported


class Spoilt(Onnx):
    """Graphs of a format with a fault in them."""

    def __init__(self, fault: str, graphs: Path) -> None:
        super().__init__()
        self.fault, self.graphs = fault, graphs

    def write(self, folder: Path, source: ExportSource) -> None:
        onnx = pytest.importorskip("onnx", reason="needs the extra export")
        (folder / "onnx").mkdir(parents=True)
        for path in (self.graphs / "onnx").iterdir():
            (folder / "onnx" / path.name).write_bytes(path.read_bytes())
        text = folder / self.text_file
        if self.fault == "truncated":
            text.write_bytes(text.read_bytes()[:1000])
            return
        model = onnx.load(text)
        weight = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        values = onnx.numpy_helper.to_array(weight).copy()
        values[source.tokenizer(["猫"]).ids[0, 1]] = float("nan") if self.fault == "nan" else 0
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, text)


def test_the_folder_for_load_is_that_of_export_model(exported: Exported, source: ExportSource, tmp_path: Path) -> None:
    before = export_model(tmp_path / "before", model=source.model, tokenizer=source.tokenizer)
    write_export(tmp_path / "now", source=source, formats={"native": Native()})
    names = {path.name for path in before.iterdir()}
    assert {path.name for path in (tmp_path / "now").iterdir()} == names
    for name in names:
        assert (tmp_path / "now" / name).read_bytes() == (before / name).read_bytes()
        if name != "README.md":
            assert (exported.folder / name).read_bytes() == (before / name).read_bytes()
    assert {path.name for path in exported.folder.iterdir()} == names | {"clip", "onnx", "parity.json"}
    assert torch.equal(load(exported.folder).model.text_proj.weight, source.model.text_proj.weight)


def test_numbers_are_printed_stored_and_in_the_card(exported: Exported) -> None:
    stored = json.loads((exported.folder / "parity.json").read_text(encoding="utf-8"))
    found = stored["formats"]["onnx"]
    assert found["written"]
    assert found["smallest_cosine"] >= 0.99999
    assert 0 < found["largest_difference"] < 1e-5
    assert 20e6 < found["peak_bytes"] < 400e6, "of ONNX Runtime alone: no torch in it"
    assert found["files"] == {
        f"onnx/{name}": (exported.folder / "onnx" / name).stat().st_size
        for name in ("text_model.onnx", "vision_model.onnx")
    }
    assert stored["formats"]["native"]["largest_difference"] == 0
    assert {"torch", "onnxruntime"} <= stored["versions"].keys()
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert without_formats(card) == CARD
    assert "onnx/text_model.onnx" in card
    out = io.StringIO()
    print_parity(Console(file=out, width=100), exported.parity)
    assert "onnx" in out.getvalue()
    assert "1.0000000" in out.getvalue()


def test_a_card_has_one_list_of_files(source: ExportSource, tmp_path: Path) -> None:
    native = source.write_native
    native(tmp_path / "native")
    card = (tmp_path / "native" / "README.md").read_text(encoding="utf-8")
    again = ExportSource(source.loaded, card, native)
    write_export(tmp_path / "out", source=again, formats={"native": Native(), "more": Added("{}", "more.json")})
    written = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert written.count("| model.safetensors |") == card.count("| model.safetensors |") == 1
    assert written.startswith(without_formats(card))
    assert without_formats(written) == without_formats(card)


@pytest.mark.parametrize("fault", ["zero", "nan"])
def test_a_format_that_misses_its_bound_is_left_out(
    exported: Exported, source: ExportSource, tmp_path: Path, fault: str
) -> None:
    formats = {"native": Native(), "onnx": Spoilt(fault, exported.folder)}
    parity = write_export(tmp_path / "out", source=source, formats=formats)
    assert [each.name for each in parity.missed] == ["onnx"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "parity.json", "tokenizer.model",
    ]  # fmt: skip
    assert "onnx" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    stored = json.loads((tmp_path / "out" / "parity.json").read_text(encoding="utf-8"))
    assert not stored["formats"]["onnx"]["written"]


def test_nothing_is_written_if_all_formats_miss(exported: Exported, source: ExportSource, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    formats: dict[str, ExportFormat] = {"onnx": Spoilt("zero", exported.folder)}
    with pytest.raises(MissedError, match="onnx") as caught:
        write_export(tmp_path / "out", source=source, formats=formats, overwrite=True)
    assert caught.value.parity.results[0].measured.smallest_cosine < 0.99999
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_graph_that_does_not_run_is_an_error(exported: Exported, source: ExportSource, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"to\.onnx.*cannot run"):
        write_export(tmp_path / "out", source=source, formats={"onnx": Spoilt("truncated", exported.folder)})
    assert not [*tmp_path.iterdir()]


def test_weights_that_are_not_the_model_s_are_noticed(source: ExportSource, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = random_model(source.model.config)
    spoilt = ExportSource(source.loaded, CARD, partial(export_model, model=other, tokenizer=source.tokenizer))
    with pytest.raises(MissedError, match="native"):
        write_export(tmp_path / "out", source=spoilt, formats={"native": Native()})
    assert not [*tmp_path.iterdir()]


def test_what_is_compared() -> None:
    ours = Features(torch.eye(3), torch.eye(3))
    assert compare(ours, ours) == (0, 1)
    other = torch.eye(3)
    other[2] = torch.tensor([0.0, 1.0, 0.0])
    assert compare(ours, Features(torch.eye(3), other)) == (1, 0)
    other[1, 1] = float("nan")
    assert compare(ours, Features(torch.eye(3), other)) == (float("inf"), -1)
    assert Measured(0.0, 1.0).notes == ()


def test_samples_have_what_trips_tools() -> None:
    assert len(TEXTS) == len({*TEXTS}) == 64
    assert "" in TEXTS
    pictures = {name: Image.open(io.BytesIO(content)) for name, content in make_pictures()}
    assert len(pictures) == 32
    modes = {image.mode for image in pictures.values()}
    assert {"RGB", "RGBA", "L", "LA", "P", "CMYK", "1"} <= modes
    assert any(image.mode.startswith("I") for image in pictures.values()), "16 bits"
    assert any(image.getexif().get(0x0112) == 6 for image in pictures.values())
    assert any(image.width >= 10 * image.height for image in pictures.values())
    assert make_pictures.__wrapped__() == make_pictures()


class Added(ExportFormat):
    """Writes one file."""

    def __init__(self, text: str, name: str = "config.json") -> None:
        self.text, self.name = text, name

    def write(self, folder: Path, source: ExportSource) -> None:
        folder.mkdir()
        (folder / self.name).write_text(self.text, encoding="utf-8")

    def measure(self, folder: Path, source: ExportSource) -> Measured:
        return Measured(0.0, 1.0)

    def usage(self, source: ExportSource) -> str:
        return ""


def test_the_folder_for_load_may_be_added_to_in_any_order(source: ExportSource, tmp_path: Path) -> None:
    formats: dict[str, ExportFormat] = {"more": Added("{}"), "native": Native(), "same": Added("{}")}
    parity = write_export(tmp_path / "out", source=source, formats=formats)
    assert (tmp_path / "out" / "config.json").read_text(encoding="utf-8") == "{}"
    assert [each.name for each in parity.results] == ["native", "more", "same"]
    assert all(each.files["config.json"] == 2 for each in parity.results)


def test_two_formats_cannot_write_one_file(source: ExportSource, tmp_path: Path) -> None:
    formats: dict[str, ExportFormat] = {"one": Added("1"), "other": Added("2")}
    with pytest.raises(UserError, match=r"to\.other: one and other both write config\.json"):
        write_export(tmp_path / "out", source=source, formats=formats)
    assert not [*tmp_path.iterdir()]
