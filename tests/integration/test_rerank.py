"""From a trained run with the objective itm through its export to `m2-evaluate rerank=K`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from m2_encoder import load
from m2_encoder.checkpoints.matching_head import HEAD_FILE, read_head
from m2_encoder.cli import commands, evaluate, train
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import read_retrieval_set
from m2_encoder.evaluation.rerank import rerank_set
from m2_encoder.evaluation.retrieval import encode_set, evaluate_features
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

Start = Callable[..., int]
SPLIT = "heldout_families"


def call(main: Callable[[], int], *argv: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["m2", *argv])
        return main()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, emoji_folder: Path, repo_root: Path) -> Path:
    """Runs `with` a matching head and `without`."""
    folder = tmp_path_factory.mktemp("outputs")
    common = ("+experiment=smoke", f"run.folder={folder}", f"data.folder={emoji_folder}", "trainer.max_steps=6")
    common += ("trainer.val_check_interval=6", "run.checkpoint_every=6", "model.num_layers=1", "run.export=true")
    common += ("model.embed_dim=32", "model.num_heads=2", "model.image_size=32")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo_root)
        assert call(train.main, *common, "run.name=with", "objective=[itc,itm]") == 0
        assert call(train.main, *common, "run.name=without") == 0
    return folder


def test_the_head_of_a_run_reaches_its_export(outputs: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)
    head = read_head(outputs / "with" / "export")
    trained = read_head(outputs / "with" / "checkpoints" / "last.ckpt")
    assert torch.equal(head.linear.weight, trained.linear.weight)
    assert torch.equal(head.linear.bias, trained.linear.bias)
    assert head.linear.bias.item() != 0, "it was trained"
    assert "rerank=16" in (outputs / "with" / "export" / "README.md").read_text(encoding="utf-8")
    assert not (outputs / "without" / "export" / HEAD_FILE).exists()
    assert "rerank" not in (outputs / "without" / "export" / "README.md").read_text(encoding="utf-8")
    assert call(commands.EXPORT, f"run.folder={outputs}", "run.name=with", f"output={outputs / 'again'}") == 0
    assert (outputs / "again" / HEAD_FILE).read_bytes() == (outputs / "with" / "export" / HEAD_FILE).read_bytes()


def test_both_recalls_stand_side_by_side(
    outputs: Path, emoji_folder: Path, tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(repo_root)
    monkeypatch.setenv("COLUMNS", "80")
    model, data, output = outputs / "with" / "export", emoji_folder / SPLIT, tmp_path / "numbers.json"
    assert call(commands.EVALUATE, f"model={model}", f"data={data}", "rerank=12", f"output={output}") == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    loaded, head = load(model), read_head(model)
    dataset = read_retrieval_set(data, name=SPLIT, transform=EvalTransform(loaded.model.config.image_size))
    features = encode_set(loaded.model, dataset, loaded.tokenizer)
    plain = evaluate_features(features)
    again = rerank_set(loaded.model, head.linear, dataset, features, loaded.tokenizer, k=12)
    assert report["rerank"] == 12
    for language in ("zh", "en"):
        for name in ("t2i_r@1", "t2i_r@5", "i2t_r@10", "mean_recall"):
            own, new = plain[language][name], again[language][name]
            assert report["metrics"][f"val/{SPLIT}_{language}/{name}"] == pytest.approx(own)
            assert report["metrics"][f"val/{SPLIT}_{language}/reranked_{name}"] == pytest.approx(new)
            assert report["table"][SPLIT][language][name] == pytest.approx(own)
            assert report["table"][SPLIT][f"{language} reranked"][name] == pytest.approx(new)
    assert list(report["table"][SPLIT]) == ["zh", "zh reranked", "en", "en reranked", "chance"]
    assert again != {language: {name: plain[language][name] for name in again[language]} for language in again}
    lines = capsys.readouterr().out.splitlines()
    assert any("zh reranked" in line for line in lines)
    assert max(map(len, lines)) <= 80 or "numbers:" in max(lines, key=len), "nothing is cut off"
    assert sum("…" in line for line in lines) == 0


def test_more_candidates_than_there_are_is_said(
    outputs: Path, emoji_folder: Path, tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(repo_root)
    number = len(read_retrieval_set(emoji_folder / SPLIT, name=SPLIT, transform=EvalTransform(8)).keys)
    line = [f"model={outputs / 'with' / 'export'}", f"data={emoji_folder / SPLIT}", f"rerank={number + 1}"]
    assert call(commands.EVALUATE, *line) == 0
    said = capsys.readouterr().out
    assert f"rerank={number + 1}: {SPLIT} has {number:,} images, so all of them are ranked again" in said


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (["model={outputs}/with/export", "rerank=1"], ["rerank=1: must be a whole number, 2 or more, or null"]),
        (["model={outputs}/with/export", "rerank=true"], ["rerank=true: must be a whole number"]),
        (["model={outputs}/with/export", "rerank=2.5"], ["rerank=2.5: must be a whole number"]),
        (["model={outputs}/with/export", "rerank=many"], ["rerank=many: must be a whole number"]),
        (
            ["model={outputs}/without/export", "rerank=16"],
            ["rerank=16", "without/export has no matching head", "objective itm", "m2-export run.name="],
        ),
        (
            ["model={outputs}/with/export", "weights={outputs}/without/checkpoints/last.ckpt", "rerank=16"],
            ["rerank=16: weights=", "brings no matching head"],
        ),
        (["model=tiny", "weights={outputs}/with/checkpoints/last.ckpt", "rerank=4"], ["brings no matching head"]),
    ],
)
def test_what_cannot_be_is_said_before_data_is_loaded(
    outputs: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    line: list[str], parts: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(repo_root)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(evaluate, "_read_sets", refuse)
    monkeypatch.setattr(evaluate, "load_from", refuse)
    assert call(commands.EVALUATE, *(word.format(outputs=outputs) for word in line)) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    for part in parts:
        assert part in said
