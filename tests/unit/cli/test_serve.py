"""What m2-serve refuses before it loads a model, and what it says."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.checkpoints.export import export_model
from m2_encoder.cli import commands, serve
from m2_encoder.data.emoji.drawings import write_drawings
from m2_encoder.picture_search.model import open_search_model
from m2_encoder.picture_search.update import update_index
from tests.support.graphs import small_graphs
from tests.support.serving import small_encoder, small_tokenizer, write_picture

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in a folder of its own; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["m2-serve", *arguments])
        code = commands.SERVE()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = small_tokenizer()
    return export_model(
        tmp_path_factory.mktemp("model") / "export", model=small_encoder(tokenizer), tokenizer=tokenizer
    )


@pytest.fixture(scope="module")
def index(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexed")
    for seed in range(3):
        write_picture(folder / "photos" / f"{seed}.png", seed)
    update_index(folder / "photos.index", folder / "photos", open_search_model(exported), num_workers=0)
    return folder / "photos.index"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "model: must be given; add model=FOLDER, one that m2-export wrote"),
        (["index=drawings"], "model: must be given"),
        (["index=drawings", "model=outputs/none/export"],
         "model=outputs/none/export: there is no trained model yet; `make train` trains one"),
        (["model=nowhere"], "model=nowhere: no such folder"),
        (["model=m2-encoder-0.4b"], "m2_encoder_0.4B.ckpt is not on this machine"),
        (["model=tiny"], "a named model needs its checkpoint"),
        (["index=nowhere.index"], "nowhere.index; write it with m2-search index PHOTOS output="),
        (["index=INDEX", "tokenizer=x"], "tokenizer=x: belongs to a model; add model="),
        (["index=INDEX", "device=tpu"], "device=tpu"),
        (["index=INDEX", "runtime=tensorrt"], "runtime=tensorrt"),
        (["index=INDEX", "runtime=onnx"],
         "runtime=onnx: MODEL: onnx/vision_model.onnx and onnx/text_model.onnx missing; write them with m2-export "
         "model=MODEL 'to=[native,onnx]' output=NEW"),
        (["index=INDEX", "runtime=onnx", "device=meta"], "device"),
        (["model=m2-encoder-0.4b", "weights=INDEX/index.json", "tokenizer=INDEX/index.json", "runtime=onnx"],
         "runtime=onnx: m2-encoder-0.4b is a name, and graphs lie in a folder"),
        (["model=MODEL", "weights=INDEX/index.json", "runtime=onnx"], "graphs have their own; leave it out"),
        (["index=INDEX", "port=70000"], "port=70000: must be a whole number, in 0..65535"),
        (["index=INDEX", "max_waiting=0"], "max_waiting=0"),
        (["index=INDEX", "max_body_mb=0"], "max_body_mb=0"),
        (["index=INDEX", "api_key=密钥"], "api_key: must be of ASCII"),
        (["index=INDEX", "host=no.such.host.invalid", "port=0"], "host=no.such.host.invalid: is no name"),
        (["index=INDEX", "host=192.0.2.1", "port=0"], 'host="192.0.2.1": is no address of this machine'),
        (["index=INDEX", "ports=3"], "ports"),
    ],
)  # fmt: skip
def test_one_line_says_what_to_mend(run: Run, index: Path, exported: Path, arguments: list[str], said: str) -> None:
    code, out, err = run(*(each.replace("INDEX", str(index)).replace("MODEL", str(exported)) for each in arguments))
    assert (code, out) == (2, "")
    assert said.replace("MODEL", str(exported)) in err
    assert "Traceback" not in err


def test_a_port_that_is_taken(run: Run, index: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = run(f"index={index}", f"port={port}")
    assert code == 2
    assert f"port={port}: another program listens there; choose another" in err


def test_others_are_told_of_what_there_is(
    run: Run, index: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2_encoder.serving.server.serve", lambda _app, _opened, *, on_start: on_start())
    for given, can in ((f"index={index}", "see the pictures"), (f"model={exported}", "use the model")):
        assert run(given, "host=0.0.0.0", "port=0")[2].endswith(f"of this machine can {can}\nm2-serve: ended\n")


def test_pictures_that_were_moved(run: Run, index: Path) -> None:
    photos = index.parent / "photos"
    photos.rename(index.parent / "moved")
    try:
        code, _, err = run(f"index={index}", "port=0")
    finally:
        (index.parent / "moved").rename(photos)
    assert code == 2
    assert (
        f"its pictures were in {photos}, which is not there; if they were moved, run m2-search index PHOTOS output="
        in err
    )


def test_the_model_must_be_that_of_the_index(run: Run, index: Path, tmp_path: Path) -> None:
    import torch

    tokenizer = small_tokenizer()
    other = small_encoder(tokenizer)
    with torch.no_grad():
        other.logit_scale.add_(1)
    folder = export_model(tmp_path / "other", model=other, tokenizer=tokenizer)
    code, _, err = run(f"index={index}", f"model={folder}", "port=0")
    assert code == 2
    assert "is not the model of" in err


def test_graphs_must_be_of_the_model_of_the_index(
    run: Run, exported: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    graphs = small_graphs(tmp_path_factory)  # whose pictures are read in another way, so that its features are others
    write_picture(tmp_path / "photos" / "0.png", 0)
    update_index(tmp_path / "photos.index", tmp_path / "photos", open_search_model(exported), num_workers=0)
    code, _, err = run("index=photos.index", f"model={graphs}", "runtime=onnx", "port=0")
    assert code == 2
    assert "is not the model of" in err
    assert "fingerprint" in err


def test_without_onnx_runtime(
    run: Run, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, find = small_graphs(tmp_path_factory), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    code, _, err = run(f"model={graphs}", "runtime=onnx", "port=0")
    assert code == 2
    assert "runtime=onnx: needs an extra (onnxruntime); install it with pip install 'm2-encoder[export]'" in err


def test_without_the_extra(run: Run, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    code, _, err = run(f"index={index}")
    assert code == 2
    assert "needs an extra (uvicorn); install it with pip install 'm2-encoder[serve]'" in err


def test_drawings_are_files_with_names_that_every_disk_takes(tmp_path: Path) -> None:
    folder = write_drawings(tmp_path / "drawings")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.webp")]
    assert len(names) > 7000
    assert {name.split("/")[0] for name in names} == {"noto", "twemoji", "fluent", "openmoji"}
    assert not [name for name in names if set(name) & set('\\:*?"<>|') or any(p.strip() != p for p in name.split("/"))]
    assert len({name.lower() for name in names}) == len(names), "some disks do not tell cases apart"
    (folder / "noto").rename(folder / "mine")
    assert write_drawings(folder) == folder
    assert not (folder / "noto").exists(), "what is there is left as it is"
