"""m2-embed from the command line on, with a small exported model and files as users have them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2_encoder import M2Encoder, M2EncoderConfig, load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.cli import commands
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.evaluation.feature_file import read_features
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.closeness import assert_close_in_ulps

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24)
    config = M2EncoderConfig.from_name(
        "tiny", embed_dim=32, num_heads=2, num_layers=1, feature_dim=16, image_size=32,
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    torch.manual_seed(0)
    return export_model(tmp_path_factory.mktemp("model") / "export", model=M2Encoder(config), tokenizer=tokenizer)


@pytest.fixture
def run(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        given = arguments if any(a.startswith("model=") for a in arguments) else (f"model={exported}", *arguments)
        monkeypatch.setattr(sys, "argv", ["m2-embed", *given])
        code = commands.EMBED()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write_image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_images_equal_the_model_called_by_hand(run: Run, exported: Path, tmp_path: Path, suffix: str) -> None:
    paths = [write_image(tmp_path / "我的 图片" / name, n) for n, name in enumerate(["b.png", "a.jpg", "c/d.webp"])]
    output = f"new/f.{suffix}"
    code, out, _ = run("images=我的 图片", f"output={output}", "batch_size=2", "num_workers=2")
    assert code == 0
    assert f"3 features of 16 numbers: {output}" in out
    found = read_features(output)
    assert found.names == ("a.jpg", "b.png", "c/d.webp")
    assert found.places.tolist() == [0, 1, 2]
    model, preprocess, _ = load(exported)
    images = torch.stack([preprocess(paths[n]) for n in (1, 0, 2)])
    assert_close_in_ulps(found.features, model.encode_image(images))
    assert found.provenance["model"] == str(exported)
    assert len(found.provenance["weights_sha256"]) == 64


def test_texts_equal_the_model_called_by_hand(run: Run, exported: Path, tmp_path: Path) -> None:
    texts = ["一只猫", "a much longer text about a cat", "a cat"]
    (tmp_path / "captions.txt").write_text("\n".join(texts), encoding="utf-8")
    assert run("texts=captions.txt", "output=f.safetensors", "batch_size=2")[0] == 0
    found = read_features("f.safetensors")
    model, _, tokenizer = load(exported)
    assert found.names == tuple(texts)
    assert_close_in_ulps(found.features, model.encode_text(tokenizer(texts)))


def test_bad_images_are_reported_and_skipped(run: Run, tmp_path: Path) -> None:
    good = write_image(tmp_path / "photos" / "good.png", 0)
    folder = good.parent
    (folder / "cut.png").write_bytes(good.read_bytes()[:500])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no image")
    (folder / "gone.png").symlink_to("nowhere")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    (folder / "notes.txt").write_text("not an image by name, so not reported")
    code, out, err = run("images=photos", "output=f.safetensors", "batch_size=2")
    assert code == 1
    assert "1 features" in out
    found = read_features("f.safetensors")
    assert found.names == ("good.png",)
    assert found.places.tolist() == [3]
    reported = {line.split(":")[0].strip(): line for line in err.splitlines() if line.startswith("  ")}
    assert sorted(reported) == ["cut.png", "empty.jpg", "gone.png", "huge.png", "text.png"]
    assert "5 skipped:" in err
    assert "empty" in reported["empty.jpg"]
    assert "too large" in reported["huge.png"] or "pixels" in reported["huge.png"]
    assert "Traceback" not in err


def test_blank_lines_leave_a_gap(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("猫\n\nbad ".encode() + b"\xff\ndog\n")
    code, _, err = run("texts=t.txt", "output=f.parquet")
    assert code == 1
    assert "line 2: blank" in err
    assert "line 3: not UTF-8 at byte 5" in err
    found = read_features("f.parquet")
    assert (found.names, found.places.tolist()) == (("猫", "dog"), [0, 3])


def test_nothing_usable_writes_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("no image")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "void").mkdir()
    expected = {
        "images=photos": "nothing could be used: a.png: not an image",
        "images=void": "no image in it; known suffixes: .jpg",
        "texts=blank.txt": "nothing could be used: line 1: blank; line 2: blank",
        "texts=empty.txt": "the file is empty",
    }
    for argument, message in expected.items():
        code, out, err = run(argument, "output=f.safetensors")
        assert (code, out) == (2, "")
        assert message in err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".f", "f."))]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["output=f.safetensors"], ["images, texts: neither given"]),
        (["images=.", "texts=t.txt", "output=f.safetensors"], ["both given"]),
        (["images=nowhere", "output=f.safetensors"], ["images=nowhere: no such folder"]),
        (["texts=t.txt"], ["output=???: must be given"]),
        (["texts=t.txt", "output=f.csv"], ["output=f.csv: must end in .safetensors or .parquet"]),
        (["texts=t.txt", "output=t.txt/f.parquet"], ["no folder that you may write to"]),
        (["texts=t.txt", "output=old.parquet"], ["old.parquet: exists", "overwrite=true"]),
        (["texts=t.txt", "output=f.parquet", "batchsize=3"], ["batchsize=3", "did you mean batch_size?"]),
        (["texts=t.txt", "output=f.parquet", "model=nowhere/export"], ["model=nowhere/export: no such folder"]),
        (
            ["texts=t.txt", "output=f.parquet", "model=tiny", "weights=t.txt"],
            ["texts need the SentencePiece file", "tokenizer=FILE"],
        ),
        (
            ["texts=no.txt", "output=f.csv", "batch_size=0", "num_workers=-1", "device=tpu", "overwrite=maybe"],
            ["texts=no.txt", "f.csv", "batch_size=0", "num_workers=-1", "device=tpu", "overwrite=maybe"],
        ),
    ],
)
def test_user_errors_exit_2_with_words(run: Run, tmp_path: Path, arguments: list[str], messages: list[str]) -> None:
    (tmp_path / "t.txt").write_text("cat\n")
    (tmp_path / "old.parquet").touch()
    before = sorted(tmp_path.iterdir())
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert all(message in err for message in messages), err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_export_is_one_line(run: Run, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "t.txt").write_text("cat\n")
    code, _, err = run("model=broken", "texts=t.txt", "output=f.parquet")
    assert code == 2
    assert "model.safetensors" in err
    assert "Traceback" not in err


def test_same_input_same_bytes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("cat\n狗\n", encoding="utf-8")
    assert run("texts=t.txt", "output=a.safetensors")[0] == 0
    assert run("texts=t.txt", "output=b.safetensors")[0] == 0
    assert run("texts=t.txt", "output=b.safetensors", "overwrite=true")[0] == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_console_script(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("cat\n\n")
    script = Path(sys.executable).with_name("m2-embed")
    command = [script, f"model={exported}", "texts=t.txt", "output=f.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "line 2: blank" in done.stderr
    helped = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert helped.returncode == 0
    assert "Exit codes: 0 everything embedded, 1 something was skipped" in helped.stdout


def test_every_suffix_of_a_picture_is_embedded_and_the_rest_is_listed(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    picture = Image.new("RGB", (16, 16), (200, 30, 30))
    kinds = {"a.png": "PNG", "b.jfif": "JPEG", "c.JPE": "JPEG", "deep/d.avif": "AVIF", "e.dat": "PNG"}
    for name, kind in kinds.items():
        picture.save(folder / name, kind)
    (folder / "f.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "g.svg").write_text("<svg/>")
    (folder / "zero.png").symlink_to("/dev/zero")
    for beside in ("a.txt", "a.json", "Thumbs.db", "._a.png"):
        (folder / beside).touch()
    code, out, err = run("images=mixed", "output=f.safetensors")
    assert (code, out.startswith("4 features")) == (1, True)
    for said in (
        "f.heic: ",
        "e.dat: its content is PNG, but .dat",
        "g.svg: is an SVG drawing",
        "zero.png: not a regular file",
    ):
        assert said in err
    assert "4 skipped" in err
