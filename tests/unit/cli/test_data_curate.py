from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.cli import data
from tests.support.curation import draw, encode, export_scorer, write_corpus
from tests.support.shards import write_tar

Start = Callable[..., int]
ALL = "max_drop_share=1"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> Start:
    monkeypatch.chdir(repo_root)

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["m2-data", "curate", *argv])
        return data.main()

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "web", shards=2, samples=12)


def test_report_is_printed_and_written(
    start: Start, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (f"shards={corpus}", f"output={tmp_path / 'out'}", "images.min_side=16", "workers=0", ALL)
    assert start(*arguments) == 0
    printed = capsys.readouterr().out
    total = json.loads((tmp_path / "out" / "report.json").read_text())["total"]
    assert f"kept {total['kept_pairs']:,} of {total['pairs']:,} pairs" in printed
    assert "| too_short" in printed
    assert list((tmp_path / "out" / "web").glob("*.tar"))
    assert start(*arguments) == 0
    assert "was finished already" in capsys.readouterr().out
    assert start(*arguments, "duplicates.captions=1") == 2
    assert "overwrite=true" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_damaged_report_is_named(
    start: Start, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "curation.json").write_text("{}")
    (tmp_path / "report.json").write_text(content)
    assert start(f"shards={corpus}", f"output={tmp_path}", "workers=0") == 2
    assert f"{tmp_path}/report.json: is damaged; remove it and start again" in capsys.readouterr().err


def test_several_sources(start: Start, corpus: Path, tmp_path: Path) -> None:
    shards = f"shards={{a: {corpus}/000.tar, b: [{corpus}/001.tar]}}"
    options = ("language={b: zh}", "images.min_side=null", "workers=0", "evaluation.near=null", ALL)
    assert start(shards, f"output={tmp_path / 'out'}", *options) == 0
    assert sorted(json.loads((tmp_path / "out" / "report.json").read_text())["sources"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("folder", "argument", "source"),
    [
        ("数据", "shards={folder}", "main"),
        ("my tars [1]", "shards={folder}", "main"),
        ("decisions", "shards={folder}", "main"),
        ("2024", "shards={{2024: {folder}}}", "2024"),
    ],
)
def test_any_folder_can_be_read(
    start: Start, corpus: Path, tmp_path: Path, folder: str, argument: str, source: str
) -> None:
    shutil.copytree(corpus, tmp_path / folder)
    arguments = (argument.format(folder=tmp_path / folder), f"output={tmp_path / 'out'}", "images.min_side=null")
    assert start(*arguments, "workers=0", "evaluation.near=null", ALL) == 0
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["sources"]) == [source]


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("images.min_side=0", "1 or more"),
        ("duplicates.images=delete", "one of drop, mark, keep"),
        ("lengths.zh.unit=words", "use characters"),
        ("lengths=5", "lengths=5: must be a mapping"),
        ("lengths.en.min=9 lengths.en.max=3", "lengths.en.min=9: is above the longest, 3"),
        ("language=fr", "zh or en, or a tag of theirs"),
        ("score.model=no/such/folder", "score.model=no/such/folder: no such folder"),
        ("evaluation.images=[nowhere]", "nowhere: no such file or folder"),
        ("executor=slurm", "one of local, ray"),
        ("shards=nowhere", "no such file or folder"),
        ("shards=s3://bucket/{0..9}.tar", "download the shards first"),
        ("duplicates.near_image=3", "did you mean near_images"),
        ("languages.allowed=[zh,fr]", "tells apart en, zh, ja, ko, other"),
        ("languages.allowed=[]", "would drop every caption"),
        ("ray_models=0", "whole number, in 1.."),
        ("write=maybe", "true or false"),
    ],
)
def test_mistakes(
    start: Start, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, named: str
) -> None:
    assert start(f"shards={corpus}", f"output={tmp_path / 'out'}", *argument.split(" ")) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("score.device=cuda",), "add ray_gpus=1"),
        (("score.device=cuda:1", "ray_gpus=1"), "Ray says which GPU"),
    ],
)
def test_devices_on_ray(
    start: Start,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    named: str,
) -> None:
    model = export_scorer(tmp_path / "model")
    shared = (f"shards={corpus}", f"output={tmp_path / 'out'}", f"score.model={model}", "executor=ray")
    assert start(*shared, *arguments) == 2
    assert named in capsys.readouterr().err


def test_deciding_without_writing(
    start: Start, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (f"shards={corpus}", f"output={tmp_path / 'out'}", "images.min_side=16", "workers=0", ALL)
    assert start(*arguments, "write=false") == 0
    assert "write=true" in capsys.readouterr().out
    assert list((tmp_path / "out" / "decisions").iterdir())
    assert not list((tmp_path / "out").glob("*/*.tar"))
    assert start(*arguments) == 0
    assert list((tmp_path / "out" / "web").glob("*.tar"))


def test_nothing_kept_names_the_key(
    start: Start, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        start(
            f"shards={corpus}",
            f"output={tmp_path / 'out'}",
            "images.min_side=9999",
            "lengths.en.min=null",
            "lengths.zh.min=null",
            "workers=0",
        )
        == 2
    )
    captured = capsys.readouterr()
    assert "pairs fell by too_small; see images.min_side" in captured.err
    assert "kept 0 of" in captured.out


def test_a_large_loss_is_refused_before_anything_is_written(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = []
    for number in range(20):
        image = encode(draw(number) if number < 16 else draw(number, width=300, height=250))
        text = f"a drawing {number}" if number != 3 else "猫"
        members += [(f"{number}.png", image), (f"{number}.txt", text.encode())]
    write_tar(tmp_path / "web" / "0.tar", members)
    arguments = (f"shards={tmp_path / 'web'}", f"output={tmp_path / 'out'}", "workers=0")
    assert start(*arguments) == 2
    captured = capsys.readouterr()
    said = (
        "max_drop_share=0.5: 80.0% of 20 pairs would be dropped: 15 too_small (off with images.min_side=null), 1 too_"
    )
    assert said in captured.err
    assert not list((tmp_path / "out").glob("*/*.tar"))
    assert start(*arguments, "write=false") == 0
    assert start(*arguments, "max_drop_share=1") == 0
    assert "kept 4 of 20 pairs" in capsys.readouterr().out
    kept = (*arguments[:1], f"output={tmp_path / 'more'}", "workers=0", "images.min_side=null")
    assert start(*kept) == 0
    assert "kept 19 of 20 pairs" in capsys.readouterr().out


def test_missing_extra(
    start: Start, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else find(name))
    assert start(f"shards={corpus}", f"output={tmp_path / 'out'}", "executor=ray") == 2
    assert "pip install 'm2-encoder[ray]'" in capsys.readouterr().err
