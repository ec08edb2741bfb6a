"""Names of released weights in commands, without a file: found on this machine, fetched, or missed with one line."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from m2_encoder import load
from m2_encoder.checkpoints import released
from m2_encoder.checkpoints.released import RELEASES, Release
from m2_encoder.cli import commands, search
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.evaluation.feature_file import read_features
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.picture_search.index import open_index
from tests.support.file_server import FileServer, serve
from tests.support.pictures import write_picture

Run = Callable[..., tuple[int, str, str]]
COMMANDS = {
    "m2-embed": ("m2-embed", "model=Tiny", "texts=texts.txt", "output=texts.safetensors", "device=cpu"),
    "m2-export": ("m2-export", "model=tiny", "output=export"),
    "m2-evaluate": ("m2-evaluate", "model=tiny", "data=pairs", "device=cpu", "output=numbers.json"),
    "m2-search": ("m2-search", "index", "photos", "model=tiny", "num_workers=0", "device=cpu"),
    "m2-serve": ("m2-serve", "model=tiny", "device=cpu", "port=0"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command by its name, where there are pictures and texts; a server ends as soon as it could serve."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        write_picture(tmp_path / "photos" / f"{number}.png", number)
        write_picture(tmp_path / "pairs" / f"{number}.png", number)
        (tmp_path / "pairs" / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    (tmp_path / "texts.txt").write_text("a cat\n一只猫\n", encoding="utf-8")
    mains = {"m2-embed": commands.EMBED, "m2-export": commands.EXPORT, "m2-evaluate": commands.EVALUATE,
             "m2-search": search.main, "m2-serve": commands.SERVE}  # fmt: skip
    monkeypatch.setattr("m2_encoder.serving.server.serve", lambda app, opened, on_start: on_start())

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", list(arguments))
        code = mains[arguments[0]]()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> M2Encoder:
    """Released weights as `tiny`, whose file lies nowhere yet; no cache of the developer's is read."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "MODELSCOPE_CACHE", "M2_ENCODER_CACHE", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "127.0.0.1:1")  # where nobody listens
    monkeypatch.setitem(RELEASES, "tiny", Release("M2Cognition/Tiny", "tiny.ckpt"))  # type: ignore[arg-type]
    monkeypatch.setattr(released, "TOKENIZER_SHA256", hashlib.sha256(load_emoji_tokenizer_model()).hexdigest())
    monkeypatch.setattr(released, "_TOKENIZER_SOURCE", "http://127.0.0.1:1/sp.model")
    torch.manual_seed(0)
    return M2Encoder(M2EncoderConfig.from_name("tiny"))


@pytest.fixture
def folder(model: M2Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights and tokenizer in a folder of one's own."""
    folder = tmp_path / "released"
    folder.mkdir()
    torch.save({"state_dict": model.state_dict()}, folder / "tiny.ckpt")
    (folder / "sp.model").write_bytes(load_emoji_tokenizer_model())
    monkeypatch.setenv("M2_ENCODER_WEIGHTS", str(folder))
    return folder


@pytest.fixture
def mirror(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A hub that has both, in place of the folder."""
    monkeypatch.delenv("M2_ENCODER_WEIGHTS")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with serve((folder / "tiny.ckpt").read_bytes()) as server:
        server.others = {"sp.model": (folder / "sp.model").read_bytes()}
        monkeypatch.setenv("HF_ENDPOINT", server.url("hub"))
        yield server


@pytest.mark.slow
def test_every_command_finds_them(run: Run, folder: Path, tmp_path: Path) -> None:
    for command in COMMANDS.values():
        code, _, err = run(*command)
        assert code == 0, err
    expected, _, tokenizer = load("tiny")
    features = read_features("texts.safetensors")
    with torch.no_grad():
        wanted = expected.encode_text(tokenizer(["a cat", "一只猫"]))
    assert torch.allclose(torch.as_tensor(features.features), wanted, atol=1e-6)
    digest = hashlib.sha256((folder / "tiny.ckpt").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "export" / "config.json").read_text())["provenance"]["weights_sha256"] == digest
    assert torch.equal(load("export").model.logit_scale, expected.logit_scale)
    assert open_index("photos.index").made_by.model == "tiny"
    assert run("m2-search", "query", "photos.index", "a cat")[0] == 0
    code, out, _ = run("m2-serve", "index=photos.index", "port=0")
    assert (code, out.startswith("2 pictures, tiny on torch")) == (0, True)


def test_they_are_fetched_once_and_that_is_said(run: Run, mirror: FileServer, caplog: pytest.LogCaptureFixture) -> None:
    code, _, err = run(*COMMANDS["m2-search"])
    assert code == 0, err
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2, "less is not shown by commands"
    assert f"downloading {mirror.url('hub')}/M2Cognition/Tiny/resolve/main/tiny.ckpt to " in caplog.messages[0]
    asked = len(mirror.paths)
    assert run(*COMMANDS["m2-export"])[0] == 0
    assert len(mirror.paths) == asked


@pytest.mark.parametrize("command", COMMANDS)
def test_offline_and_nowhere(run: Run, model: M2Encoder, command: str) -> None:
    code, out, err = run(*COMMANDS[command])
    assert (code, out) == (2, "")
    assert (
        "tiny.ckpt is not on this machine, and could not be fetched (no hub is asked, as HF_HUB_OFFLINE is set)" in err
    )
    assert "set M2_ENCODER_WEIGHTS to its folder" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_without_their_tokenizer(run: Run, folder: Path, command: str) -> None:
    (folder / "sp.model").unlink()
    code, _, err = run(*COMMANDS[command])
    assert code == 2
    assert "sp.model is not on this machine" in err
    assert f"put it beside {folder}/tiny.ckpt, or pass tokenizer=FILE" in err
    assert len(err.splitlines()) == 1


def test_pictures_need_no_tokenizer(run: Run, folder: Path) -> None:
    (folder / "sp.model").unlink()
    assert run("m2-embed", "model=tiny", "images=photos", "output=p.safetensors", "num_workers=0")[0] == 0


@pytest.mark.parametrize("command", ["m2-embed", "m2-serve"])
def test_hubs_that_have_nothing(run: Run, mirror: FileServer, command: str) -> None:
    mirror.status = 404
    code, _, err = run(*COMMANDS[command])
    assert code == 2
    assert f"{mirror.url('hub')}/M2Cognition/Tiny/resolve/main/tiny.ckpt: the server says 404" in err
    assert "Traceback" not in err
