"""The end of a run and m2-evaluate, on a small random model and a small emoji-like set."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.export import export_model
from m2_encoder.cli import commands
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.runs.build import build_tasks
from m2_encoder.runs.ending import RunEnd
from m2_encoder.runs.report import report_run
from m2_encoder.runs.times import FitTimes
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

SPLITS = ("val", "heldout_style", "heldout_families")


class Data:
    """What the report needs of a datamodule."""

    def __init__(self, folder: Path, tokenizer: SentencePieceTokenizer) -> None:
        self._folder = folder
        self.tokenizer = tokenizer

    def retrieval_sets(self) -> dict[str, RetrievalSet]:
        return {
            split: read_retrieval_set(
                self._folder / split, name=f"emoji_{split}", transform=EvalTransform(16), split=split
            )
            for split in SPLITS
        }


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24)


@pytest.fixture(scope="module")
def model(tokenizer: SentencePieceTokenizer) -> M2Encoder:
    config = M2EncoderConfig.from_name(
        "tiny", embed_dim=32, num_heads=2, num_layers=1, feature_dim=16, image_size=16,
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    torch.manual_seed(0)
    return M2Encoder(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three splits of 40 coloured squares with captions in both languages."""
    root = tmp_path_factory.mktemp("data")
    for split in SPLITS:
        (root / split).mkdir()
        with tarfile.open(root / split / "000000.tar", "w") as tar:
            for number in range(40):
                stream = io.BytesIO()
                Image.new("RGB", (64, 64), (6 * number, 255 - 6 * number, 128)).save(stream, "WEBP")
                captions = {"en": [f"square number {number}"], "zh": [f"方块{number}"]}
                record = json.dumps({"key": f"k{number}", "captions": captions}).encode()
                for suffix, content in {"webp": stream.getvalue(), "json": record}.items():
                    info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


def test_report_of_a_run(
    model: M2Encoder, tokenizer: SentencePieceTokenizer, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lines = [{"step": 10 * n, "samples_seen": 320 * n, "perf/samples_per_s": 100.0 + n} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = {
        "model": {"name": "tiny"},
        "data": {"folder": str(folder), "heldout_style": "openmoji"},
        "trainer": {"max_steps": 30},
        "run": {"export": True},
    }
    metrics = report_run(
        build_tasks(None),
        model=model.train(),
        objectives={},
        datamodule=Data(folder, tokenizer),
        tokenizer=tokenizer,
        best=None,
        run_folder=tmp_path,
        cfg=cfg,
        end=RunEnd(30, 40, "trainer.max_time"),
        times=FitTimes(time.time() - 5),
    ).metrics
    assert model.training, "the report leaves the model as it was"
    names = {f"{d}_r@{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)} | {"mean_recall"}
    expected = {f"val/emoji_{s}_{language}/{n}" for s in SPLITS for language in ("zh", "en") for n in names}
    assert set(metrics) == expected
    assert all(0 <= value <= 100 for value in metrics.values())
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["metrics"] == metrics
    assert summary["throughput"] == {"step": 30, "samples_seen": 960, "samples_per_s": 102.0}
    assert summary["wall_time_s"] >= 5
    assert summary["timing"].keys() == {"from_step", "evaluation_s"}
    ending = {"finished": False, "steps": 30, "planned_steps": 40, "ended_by": "trainer.max_time"}
    assert {key: summary[key] for key in ending} == ending
    assert summary["peak_memory_bytes"]["process"] > 10 * 2**20
    assert summary["versions"]["torch"] == torch.__version__.partition("+")[0] or summary["versions"]["torch"]
    assert list(summary["table"]["heldout_style"]) == ["zh", "en", "chance"]
    assert summary["table"]["heldout_style"]["chance"]["t2i_r@10"] == pytest.approx(25)
    assert summary["table"]["val"]["zh"]["i2t_r@1"] == metrics["val/emoji_val_zh/i2t_r@1"]
    with Image.open(tmp_path / "retrieval.png") as picture:
        picture.load()
        assert min(picture.size) > 2000
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert table.index("unseen style") < table.index("unseen concepts and style") < table.index("validation")
    out = capsys.readouterr().out
    assert "unseen concepts" in out
    assert "30 of 40, ended early (trainer.max_time); run.resume=auto goes on" in out
    assert "chance" in out
    assert "retrieval.png" in out
    assert "checkpoints" not in out, "only what exists is listed"
    assert not list(tmp_path.glob(".*"))


def test_report_refuses_a_broken_model(
    tokenizer: SentencePieceTokenizer, model: M2Encoder, folder: Path, tmp_path: Path
) -> None:
    broken = M2Encoder(model.config)
    with torch.no_grad():
        broken.vl_image_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"vl_image_proj\.weight holds values that are NaN or infinite"):
        report_run(
            build_tasks(None), model=broken, objectives={}, datamodule=Data(folder, tokenizer), run_folder=tmp_path,
            tokenizer=tokenizer, best=None, cfg={}, end=RunEnd(1, 1), times=FitTimes(time.time()),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.fixture
def exported(tmp_path: Path, model: M2Encoder, tokenizer: SentencePieceTokenizer) -> Path:
    return export_model(tmp_path / "export", model=model, tokenizer=tokenizer)


def test_evaluate_command(
    exported: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = [f"model={exported}", f"data={folder / 'val'}", "output=new/results.json"]
    monkeypatch.setattr(sys, "argv", ["m2-evaluate", *arguments])
    assert commands.EVALUATE() == 0
    out = capsys.readouterr().out
    assert "chance" in out
    report = json.loads(Path("new/results.json").read_text(encoding="utf-8"))
    assert set(report["evaluation"]) == {"val"}
    assert report["metrics"]["val/val_zh/t2i_r@10"] == report["evaluation"]["val"]["zh"]["t2i_r@10"]
    assert report["protocol"]["name"] == "standard"
    assert report["protocol"]["sets"]["val"]["images"] == report["evaluation"]["val"]["zh"]["num_images"]
    assert commands.EVALUATE() == 2
    assert "overwrite=true" in capsys.readouterr().err


def test_numbers_that_cannot_be_written_are_printed(
    exported: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["m2-evaluate", f"model={exported}", f"data={folder / 'val'}", "output=r.json"])
    monkeypatch.setattr(os, "replace", refuse)
    assert commands.EVALUATE() == 2
    out, err = capsys.readouterr()
    report = json.loads(out[out.index("{\n") :])
    assert report["metrics"]["val/val_zh/t2i_r@10"] == report["evaluation"]["val"]["zh"]["t2i_r@10"]
    assert "chance" in out
    assert err == (
        "m2-evaluate: output=r.json: cannot be written (No space left on device); give another place; its content is "
        "printed above\n"
    )
    assert not list(tmp_path.glob("*.json"))
    assert not list(tmp_path.glob(".*"))


def test_a_style_that_the_model_was_trained_on_is_said(
    model: M2Encoder, tokenizer: SentencePieceTokenizer, emoji_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    said = "warning: no style is unseen here: export was trained with heldout_style=noto, on drawings of twemoji"
    for trained, remark in (("noto", f"{said}; evaluate it with heldout_style=noto"), ("twemoji", None)):
        origin = {"heldout_style": trained}
        export_model(tmp_path / "export", model=model, tokenizer=tokenizer, provenance=origin, overwrite=True)
        words = ["model=export", f"folder={emoji_folder}", "splits=[heldout_families]", "output=r.json"]
        monkeypatch.setattr(sys, "argv", ["m2-evaluate", *words, "overwrite=true"])
        assert commands.EVALUATE() == 0
        report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
        assert (report["heldout_style"], report.get("remark")) == ("twemoji", remark)
        assert (said in capsys.readouterr().out) == (remark is not None)


def test_evaluate_leaves_data_of_another_style_alone(
    emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in emoji_folder.rglob("*")}
    words = ["model=nowhere", f"folder={emoji_folder}", "heldout_style=noto"]
    monkeypatch.setattr(sys, "argv", ["m2-evaluate", *words])
    assert commands.EVALUATE() == 2
    err = capsys.readouterr().err
    assert f"folder={emoji_folder}: holds the built-in set with heldout_style=twemoji, and heldout_style=noto is" in err
    assert {path: path.stat().st_mtime_ns for path in emoji_folder.rglob("*")} == before


def test_evaluate_finds_all_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = ["model=nowhere", "data=nothing", "splits=[tset]", "heldout_style=apple", "batch_size=0", "x=1"]
    monkeypatch.setattr(sys, "argv", ["m2-evaluate", *wrong])
    assert commands.EVALUATE() == 2
    err = capsys.readouterr().err
    assert "6 problems" in err
    for text in ("model=nowhere", "data=nothing", "splits=[tset]", "heldout_style=apple", "batch_size=0", "x=1"):
        assert text in err
    assert not list(tmp_path.iterdir())
