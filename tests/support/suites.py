"""`m2-evaluate` of suites in this process, and small exports, sets and files of features for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from m2_encoder.checkpoints.export import export_model
from m2_encoder.cli.commands import EVALUATE
from m2_encoder.config.command import run_command
from m2_encoder.models.m2_encoder import M2Encoder
from tests.support.training import make_tokenizer, tiny_config


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str
    report: dict[str, Any]  # of its output file; empty if there is none

    def numbers(self, metric: str, **wanted: str) -> list[dict[str, Any]]:
        """Records of a metric with some values."""
        records = self.report["records"]
        return [
            each
            for each in records
            if each["metric"] == metric and all(each.get(key, "") == value for key, value in wanted.items())
        ]

    def number(self, metric: str, **wanted: str) -> dict[str, Any]:
        """The only one."""
        (found,) = self.numbers(metric, **wanted)
        return found


class Evaluate:
    """Runs the command; features and outputs are in one folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.page = folder / "page.html"

    def __call__(self, *lines: str, features: str = "features", number: str = "report") -> Outcome:
        """`lines` are those of the command line; features go to a folder of that name."""
        output = self.folder / f"{number}.json"
        output.unlink(missing_ok=True)
        more = [f"output={output}", f"features={self.folder / features}", "num_workers=0", "batch_size=4", "device=cpu"]
        code = run_command(EVALUATE, [*lines, *(each for each in more if each.split("=")[0] not in _keys(lines))])
        said = self._capsys.readouterr()
        report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        return Outcome(code, said.out, said.err, report)


def _keys(lines: tuple[str, ...]) -> list[str]:
    return [line.split("=")[0] for line in lines]


def own(path: Path, *lines: str) -> list[str]:
    """The suite `own` on a set."""
    return ["evaluation=[own]", f"evaluation.own.sets.own.path={path}", *lines]


def small_export(folder: Path, *, seed: int = 0, **more: Any) -> Path:
    """A random model as m2-export writes it."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = M2Encoder(tiny_config(vocab_size=tokenizer.vocab_size))
    return export_model(folder, model=model, tokenizer=tokenizer, **more)


def draw(number: int) -> Image.Image:
    """No two alike."""
    image = Image.new("RGB", (20 + number % 7, 20), (number * 40 % 256, number * 90 % 256, 200 - number))
    ImageDraw.Draw(image).ellipse((2, 2, 9 + number % 8, 12), fill=(255 - number, number * 30 % 256, 99))
    return image


def captions_of(number: int) -> dict[str, list[str]]:
    return {"en": [f"a circle of number {number}", f"round thing {number}"], "zh": [f"第{number}个圆"]}


def captioned(folder: Path, number: int, *, broken: tuple[int, ...] = ()) -> Path:
    """Pictures 0.png, 1.png, … with captions beside them; those in `broken` hold no picture."""
    folder.mkdir()
    for row in range(number):
        draw(row).save(folder / f"{row}.png")
        (folder / f"{row}.json").write_text(json.dumps({"captions": captions_of(row)}), encoding="utf-8")
    for row in broken:
        (folder / f"{row}.png").write_bytes(b"no picture %d" % row)
    return folder


def by_class(folder: Path, classes: int, each: int) -> Path:
    """Folders c0, c1, … of pictures 0.png, 1.png, …."""
    for number in range(classes * each):
        place = folder / f"c{number // each}"
        place.mkdir(parents=True, exist_ok=True)
        draw(number).save(place / f"{number % each}.png")
    return folder


def save_features(path: Path, features: Mapping[str, Tensor]) -> Path:
    """A file of features by name, (E,) each."""
    np.savez(path, features=torch.stack([*features.values()]).numpy(), names=np.array([*features]))
    return path
