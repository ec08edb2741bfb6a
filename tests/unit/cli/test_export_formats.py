from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m2_encoder import M2Encoder, M2EncoderConfig, load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.cli import commands
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.exports.base import ExportSource
from m2_encoder.exports.native import Native
from m2_encoder.pictures import OLDER
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

Start = Callable[..., int]


class Empty(Native):
    """Forgets the weights of a model."""

    def write(self, folder: Path, source: ExportSource) -> None:
        torch.manual_seed(3)
        model = M2Encoder(source.model.config)
        export_model(folder, model=model, tokenizer=source.tokenizer)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """What m2-export has written, of a small random model."""
    torch.manual_seed(0)
    config = M2EncoderConfig.from_name("tiny", num_layers=1, embed_dim=16, num_heads=2, feature_dim=8)
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24)
    return export_model(tmp_path / "export", model=M2Encoder(config), tokenizer=tokenizer, pictures=OLDER)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> Start:
    monkeypatch.chdir(repo_root)

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["m2-export", *argv])
        return commands.EXPORT()

    return run


@pytest.mark.parametrize("has_more", [False, True])
def test_an_export_is_taken_as_it_is(start: Start, exported: Path, tmp_path: Path, has_more: bool) -> None:
    """What other formats have added to it is left out."""
    given = exported
    if has_more:
        given = Path(shutil.copytree(exported, tmp_path / "more"))
        content = json.loads((given / "config.json").read_text(encoding="utf-8"))
        (given / "config.json").write_text(json.dumps({**content, "auto_map": {"AutoModel": "modeling.Model"}}))
        (given / "README.md").write_text((given / "README.md").read_text() + "\n## Formats · 各工具的格式\n\nMany.\n")
    assert start(f"model={given}", f"output={tmp_path / 'copy'}") == 0
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in exported.iterdir()}
    for path in exported.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()


def test_weights_under_a_name_become_an_export(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = M2Encoder(M2EncoderConfig.from_name("tiny"))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "tokenizer.model").write_bytes(load_emoji_tokenizer_model())
    files = [f"weights={tmp_path / 'weights.safetensors'}", f"tokenizer={tmp_path / 'tokenizer.model'}"]
    assert start("model=tiny", *files, "pictures=older", f"output={tmp_path / 'out'}") == 0
    assert "native" in capsys.readouterr().out
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded.model.text_proj.weight, model.text_proj.weight)
    assert loaded.preprocess.pictures == OLDER
    origin = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["provenance"]
    assert origin["weights"] == "weights.safetensors", "no folder of this machine"
    assert len(origin["weights_sha256"]) == 64


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["model={export}", "output={new}", "to=[]"], "to=[]: writes nothing"),
        (["model={export}", "output={new}", "to=[onyx]"], "onyx"),
        (["model={export}"], "output=null: must be given"),
        (["model={export}", "output={new}", "run.name=emoji"], "run.name=emoji: model is given, too"),
        (["model={export}", "output={new}", "checkpoint=step=3"], "checkpoint=step=3: belongs to a run"),
        (["model={export}", "output={export}"], "exists already"),
        (["model=tiny", "weights={export}/model.safetensors", "output={new}"], "tokenizer=null"),
        (["model={export}", "output={new}", "to=[onnx]", "to.onnx.dtype=float8"], "to.onnx.dtype=float8"),
        (["model={export}", "output={new}", "to=[onnx]", "to.onnx.context_length=2"], "to.onnx.context_length=2"),
        (["model={export}", "output={new}", "to=[onnx]", "to.onnx.context_length=127"], "positions for 126 tokens"),
        (["model={export}", "output={new}", "to=[onnx]", "to.onnx.quantize=true"], "to.onnx.quantize"),
    ],
)
def test_mistakes(
    start: Start, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    if any("onnx" in each for each in argv):
        pytest.importorskip("onnxruntime", reason="needs the extra export")
    new = tmp_path / "new"
    assert start(*(each.format(export=exported, new=new) for each in argv)) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not new.exists()


def test_a_missing_extra_is_named(
    start: Start,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_args: None)
    assert start(f"model={exported}", f"output={tmp_path / 'new'}", "to=[onnx]") == 2
    assert "pip install 'm2-encoder[export]'" in capsys.readouterr().err


def test_exit_codes_tell_what_was_left_out(
    start: Start, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = f"+to.mine._target_={__name__}.Empty"
    output = tmp_path / "out"
    assert start(f"model={exported}", fault, f"output={output}") == 1
    captured = capsys.readouterr()
    assert "mine: smallest cosine -1.0000000, 0.99999 is the least: not written" in captured.out
    assert torch.equal(load(output).model.text_proj.weight, load(exported).model.text_proj.weight)
    assert start(f"model={exported}", fault, "~to.native", f"output={tmp_path / 'none'}") == 2
    captured = capsys.readouterr()
    assert "mine" in captured.out
    assert "nothing was written" in captured.err
    assert not (tmp_path / "none").exists()
