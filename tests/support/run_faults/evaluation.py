"""Odd evaluation sets: folders of pictures and tars, as people have them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.faults import EPS
from tests.support.run_faults.case import Place, RunFault, Told
from tests.support.shards import make_image, make_sample, write_tar

Act = Callable[[Place], Told]


def sets() -> tuple[RunFault, ...]:
    """What `m2-evaluate` makes of them."""
    return (
        RunFault(
            "names that begin again in every shard", "^nothing beside", _tars(_restart), 0, "6 images, 6 zh, 6 en"
        ),
        RunFault(
            "the same picture packed twice", "show 3 different pictures", _tars(_twice), 0, "3 images, 3 zh, 3 en"
        ),
        RunFault("five captions of a picture", "15 en captions", _tars(_five), 0, "3 images, 3 zh, 15 en"),
        RunFault("captions in one language only", "^nothing beside", _tars(_english), 0, "3 images, 3 en"),
        RunFault(
            "one picture without a caption in Chinese",
            "pictures without one: 1",
            _tars(_partly),
            0,
            "3 images, 2 zh, 3 en",
        ),
        RunFault("one sample without a caption", "missing_caption", _tars(_without_caption), 2, "no numbers"),
        RunFault("one picture that is cut", "cannot be decoded", _tars(_cut), 2, "no numbers"),
        RunFault("captions in another language alone", "fr", _tars(_french), 2, "no numbers"),
        RunFault("folder without a picture", "m2-evaluate", _folder(lambda _: None), 2, "no numbers"),
        RunFault("folder with an EPS named .jpg", "EPS", _folder(_eps), 2, "no numbers"),
        RunFault("folder with a pipe", "pipe", _folder(_pipe), 2, "no numbers"),
        RunFault(
            "folder that is not there", "no such", lambda place: _measure(place, place.folder / "x"), 2, "no numbers"
        ),
    )


Members = list[tuple[str, bytes]]


def _captions(number: int, **changes: Any) -> dict[str, Any]:
    captions = {"zh": [f"数字 {number}"], "en": [f"the number {number}"], **changes}
    return {"captions": {name: texts for name, texts in captions.items() if texts}}


def _samples(numbers: range, **changes: Any) -> Members:
    return [m for n in numbers for m in make_sample(f"{n:06d}", n, metadata=_captions(n, **changes))]


def _restart() -> list[Members]:
    second = [m for n in range(3) for m in make_sample(f"{n:06d}", n + 3, metadata=_captions(n + 3))]
    return [_samples(range(3)), second]


def _twice() -> list[Members]:
    again = [m for n in range(3) for m in make_sample(f"again{n}", n, metadata=_captions(n))]
    return [_samples(range(3)), again]


def _five() -> list[Members]:
    return [
        [
            m
            for n in range(3)
            for m in make_sample(f"{n}", n, metadata=_captions(n, en=[f"{n} number {i}" for i in range(5)]))
        ]
    ]


def _english() -> list[Members]:
    return [_samples(range(3), zh=[])]


def _partly() -> list[Members]:
    return [_samples(range(2)), make_sample("last", 2, metadata=_captions(2, zh=[]))]


def _without_caption() -> list[Members]:
    return [_samples(range(3)), [("last.png", make_image(3))]]


def _cut() -> list[Members]:
    whole = dict(make_sample("last", 3, metadata=_captions(3)))
    return [_samples(range(3)), [(name, c[:60] if name.endswith("png") else c) for name, c in whole.items()]]


def _french() -> list[Members]:
    return [[m for n in range(3) for m in make_sample(f"{n}", n, metadata={"captions": {"fr": [f"le nombre {n}"]}})]]


def _tars(make: Callable[[], list[Members]]) -> Act:
    def act(place: Place) -> Told:
        for number, members in enumerate(make()):
            write_tar(place.folder / "set" / f"{number}.tar", members)
        return _measure(place, place.folder / "set")

    return act


def _eps(folder: Path) -> None:
    (folder / "eps.jpg").write_bytes(EPS)
    (folder / "eps.txt").write_text("a square")


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "pipe.txt").write_text("a pipe")


def _folder(add: Callable[[Path], object]) -> Act:
    def act(place: Place) -> Told:
        folder = place.folder / "set"
        folder.mkdir()
        if add is _eps or add is _pipe:
            for number in range(2):
                (folder / f"{number}.png").write_bytes(make_image(number))
                (folder / f"{number}.txt").write_text(f"the number {number}")
        add(folder)
        return _measure(place, folder)

    return act


def _measure(place: Place, folder: Path) -> Told:
    output = place.folder / "numbers.json"
    ended = place.evaluate(f"data={folder}", f"output={output}")
    kept = "no numbers"
    if output.is_file():
        found: Mapping[str, Any] = next(iter(json.loads(output.read_text())["evaluation"].values()))
        images = {metrics["num_images"] for metrics in found.values()}
        counts = [f"{metrics['num_texts']:.0f} {language}" for language, metrics in found.items()]
        kept = ", ".join([f"{'/'.join(f'{count:.0f}' for count in images)} images", *counts])
    lines = [line for line in f"{ended.out}\n{ended.err}".splitlines() if line.startswith((f"{folder.name}: ", "m2-"))]
    return Told(ended.code, "\n".join(lines or ["nothing beside the numbers"]), kept)
