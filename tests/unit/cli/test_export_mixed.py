from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from m2_encoder import M2Encoder, M2EncoderConfig, load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.cli import commands
from m2_encoder.config.compose import open_composer
from m2_encoder.config.model_choice import build_model_config
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.pictures import OLDER, STANDARD
from m2_encoder.runs.folder import write_config
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.training import train_tokenizer

Start = Callable[..., int]


def _export(
    folder: Path, seed: int, *, pictures: object = STANDARD, tokenizer: bytes | None = None, **more: int
) -> Path:
    torch.manual_seed(seed)
    content = tokenizer or load_emoji_tokenizer_model()
    config = M2EncoderConfig.from_name("tiny", num_layers=1, embed_dim=16, num_heads=2, **{"feature_dim": 8, **more})
    text = SentencePieceTokenizer(content, context_length=24)
    return export_model(folder, model=M2Encoder(config), tokenizer=text, pictures=pictures)  # type: ignore[arg-type]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> Start:
    monkeypatch.chdir(repo_root)

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["m2-export", *argv])
        return commands.EXPORT()

    return run


def test_the_mean_is_written_and_says_of_what(start: Start, tmp_path: Path) -> None:
    first, second = _export(tmp_path / "first", 1), _export(tmp_path / "second", 2)
    output = tmp_path / "mixed"
    assert start(f"model=[{first},{second}]", "shares=[0.25,0.75]", f"output={output}") == 0
    models = [load(folder).model.state_dict() for folder in (first, second, output)]
    for name, value in models[2].items():
        torch.testing.assert_close(value, 0.25 * models[0][name] + 0.75 * models[1][name])
    origin = json.loads((output / "config.json").read_text(encoding="utf-8"))["provenance"]
    assert origin["mixed"] == "0.25 first, 0.75 second"


def test_equal_shares_of_three(start: Start, tmp_path: Path) -> None:
    folders = [_export(tmp_path / name, seed) for seed, name in enumerate("abc")]
    assert start(f"model=[{','.join(map(str, folders))}]", "shares=equal", f"output={tmp_path / 'mixed'}") == 0
    scales = [load(folder).model.vl_text_proj.weight for folder in folders]
    torch.testing.assert_close(load(tmp_path / "mixed").model.vl_text_proj.weight, sum(scales) / 3)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["shares=[0.5,0.6]"], "shares=[0.5, 0.6]: must be at least 0 each, with the sum 1"),
        (["shares=[1.0]"], "has 1 numbers for 2 models"),
        (["shares=half"], "shares=half: is no list of numbers"),
        ([], "shares=null: must be given with several models"),
        (["shares=greedy"], "does not lie in the folder of its run"),
        (["shares=equal", "tokenizer=sp.model"], "tokenizer=sp.model: goes with one model"),
    ],
)
def test_wrong_shares_are_one_line(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], said: str
) -> None:
    folders = [_export(tmp_path / "place" / name, seed) for seed, name in enumerate("ab")]
    assert start(f"model=[{','.join(map(str, folders))}]", *lines, f"output={tmp_path / 'mixed'}") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mixed").exists()


def test_models_that_do_not_go_together_are_refused(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _export(tmp_path / "first", 1)
    texts = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "fish", "mountain")]
    others = {
        "feature_dim is 8 and 16": _export(tmp_path / "wide", 2, feature_dim=16),
        "read pictures differently": _export(tmp_path / "older", 2, pictures=OLDER),
        "different tokenizers": _export(tmp_path / "words", 2, tokenizer=train_tokenizer(texts, vocab_size=291)),
    }
    for said, other in others.items():
        assert start(f"model=[{first},{other}]", "shares=equal", f"output={tmp_path / 'mixed'}") == 2
        assert said in capsys.readouterr().err
    assert start(f"model=[{first},{tmp_path / 'nowhere'}]", "shares=equal", f"output={tmp_path / 'mixed'}") == 2
    assert "no such folder" in capsys.readouterr().err
    assert start(f"model={first}", "shares=equal", f"output={tmp_path / 'mixed'}") == 2
    assert "shares=equal: is of several models" in capsys.readouterr().err


def test_greedy_soups_ask_the_validation_set_of_the_run(
    start: Start, tmp_path: Path, emoji_folder: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_composer(repo_root / "conf", "train") as composer:
        lines = ["+experiment=smoke", "run.name=a", f"data.folder={emoji_folder}", f"run.folder={tmp_path}"]
        cfg = composer.compose(lines).cfg
    model = build_model_config(cfg["model"])
    folders = []
    for seed, name in enumerate("ab"):
        write_config(tmp_path / name / "config.yaml", cfg)
        torch.manual_seed(seed)
        text = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24)
        folders.append(export_model(tmp_path / name / "export", model=M2Encoder(model), tokenizer=text))
    assert start(f"model=[{folders[0]},{folders[1]}]", "shares=greedy", f"output={tmp_path / 'soup'}") == 0
    said = capsys.readouterr().out
    assert said.count("on emoji_val; in the soup") >= 1
    assert "the soup: " in said
