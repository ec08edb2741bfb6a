"""`m2-export to=[transformers]`: what is tried before it is kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from m2_encoder import load
from m2_encoder.errors import UserError
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.native import Native
from m2_encoder.exports.transformers_format import Transformers
from m2_encoder.exports.writing import MissedError, write_export
from tests.support.models import small_config

for _name in ("transformers", "torchvision"):
    pytest.importorskip(_name, reason="needs the extra export")


class Spoilt(Transformers):
    """A folder with a fault in one of its files."""

    def __init__(self, name: str, before: str, after: str) -> None:
        self.name, self.before, self.after = name, before, after

    def write(self, folder: Path, source: ExportSource) -> None:
        super().write(folder, source)
        content = (folder / self.name).read_text(encoding="utf-8")
        assert self.before in content
        (folder / self.name).write_text(content.replace(self.before, self.after), encoding="utf-8")


def test_both_formats_share_a_folder_in_any_order(source: ExportSource, tmp_path: Path) -> None:
    parity = write_export(tmp_path / "out", source=source, formats={"transformers": Transformers(), "native": Native()})
    found = {each.name: each.measured for each in parity.results}
    assert found["transformers"].smallest_cosine >= 0.99999
    assert found["transformers"].image_ms > 0 < found["transformers"].peak_bytes
    ((note, _),) = found["transformers"].notes
    assert "of 32 sample pictures have other features" in note
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "m2_encoder"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.count("| model.safetensors |") == 1
    assert "SentenceTransformer(folder" in card
    assert load(tmp_path / "out").model.config == source.model.config


@pytest.mark.slow
def test_what_the_card_shows_runs(source: ExportSource, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="the card shows it")
    each = Transformers()
    each.write(tmp_path / "export", source)
    (code,) = re.findall(r"```python\n(.+?)```", each.usage(source), re.DOTALL)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "cat.jpg")
    code = code.replace("path/to/this/folder", "export")
    apart = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **apart}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor(") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        ("preprocessor_config.json", "0.5", "0.4"),
        ("modeling_m2_encoder.py", "self.vl_text_proj(self", "self.text_proj(self"),
        ("tokenizer.json", '"prepend":" "', '"prepend":"a"'),
    ],
    ids=["levels", "code", "characters"],
)
def test_other_features_are_noticed(source: ExportSource, tmp_path: Path, fault: tuple[str, str, str]) -> None:
    with pytest.raises(MissedError, match="transformers"):
        write_export(tmp_path / "out", source=source, formats={"transformers": Spoilt(*fault)})
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_folder_that_does_not_open_is_an_error(source: ExportSource, tmp_path: Path) -> None:
    spoilt = Spoilt("config.json", "M2EncoderModel", "M2EncoderModell")
    with pytest.raises(UserError, match=r"to\.transformers.*cannot open the folder"):
        write_export(tmp_path / "out", source=source, formats={"transformers": spoilt})
    assert not [*tmp_path.iterdir()]


def test_older_versions_are_a_problem_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [*Transformers().problems(small_config())]
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "4.57.6")
    (problem,) = Transformers().problems(small_config())
    assert "4.57.6" in str(problem)
