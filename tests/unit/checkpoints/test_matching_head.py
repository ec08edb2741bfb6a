"""The matching head beside an exported encoder, and in a training checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from m2_encoder import CheckpointError, UserError, load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.io import save_official
from m2_encoder.checkpoints.matching_head import HEAD_FILE, MatchingHead, has_head, head_of_state, read_head
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model, small_config


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=9)


@pytest.fixture
def export(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> Callable[[MatchingHead | None], Path]:
    model = random_model(small_config(vocab_size=tokenizer.vocab_size))

    def write(head: MatchingHead | None) -> Path:
        return export_model(tmp_path / "export", model=model, tokenizer=tokenizer, matching=head)

    return write


@pytest.mark.parametrize("text_expert", [False, True])
def test_round_trip(export: Callable[[MatchingHead | None], Path], text_expert: bool) -> None:
    head = MatchingHead(nn.Linear(16, 1, dtype=torch.float64), text_expert)
    folder = export(head)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "matching.safetensors", "model.safetensors", "tokenizer.model",
    }  # fmt: skip
    assert has_head(folder)
    found = read_head(folder)
    assert found.text_expert is text_expert
    assert torch.equal(found.linear.weight, head.linear.weight.float())
    assert torch.equal(found.linear.bias, head.linear.bias.float())
    assert not any(parameter.requires_grad for parameter in found.linear.parameters())
    assert load(folder).model.config.vocab_size, "the encoder loads as ever"


def test_without_a_head_a_folder_is_what_it_was(export: Callable[[MatchingHead | None], Path]) -> None:
    folder = export(None)
    assert not (folder / HEAD_FILE).exists()
    assert "matching" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert not has_head(folder)
    with pytest.raises(CheckpointError, match=r"holds no matching head; train .* and export that run with m2-export"):
        read_head(folder)


def test_checkpoints(tmp_path: Path) -> None:
    head = nn.Linear(4, 1)
    state = {f"objectives.ranking.head.{name}": value for name, value in head.state_dict().items()}
    state["model.logit_scale"] = torch.zeros(())
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "last.ckpt")
    found = read_head(tmp_path / "last.ckpt", name="ranking", text_expert=True)
    assert found.text_expert
    assert torch.equal(found.linear.weight, head.weight)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: the checkpoint holds no objectives\.itm\.head"):
        read_head(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="name the matching objective"):
        head_of_state(state, name="other")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        read_head(tmp_path / "list.pt")
    save_official(random_model(small_config()), tmp_path / "official.ckpt")
    with pytest.raises(CheckpointError, match="holds no objectives"):
        read_head(tmp_path / "official.ckpt")


def flip(folder: Path) -> None:
    content = bytearray((folder / HEAD_FILE).read_bytes())
    content[-1] ^= 1
    (folder / HEAD_FILE).write_bytes(bytes(content))


def edit(**facts: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content["matching"] = {**content["matching"], **facts}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")

    return change


def replace_entry(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, "matching": "yes"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "matching.safetensors is not the file that was exported"),
        (lambda folder: (folder / HEAD_FILE).unlink(), "damaged or edited"),
        (edit(text_expert="no"), "text_expert='no'"),
        (edit(sha256=None), "is not the file"),
        (replace_entry, "damaged or edited"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
        (lambda folder: (folder / "config.json").unlink(), "not readable"),
    ],
)
def test_damage_is_one_clear_error(
    export: Callable[[MatchingHead | None], Path], damage: Callable[[Path], object], message: str
) -> None:
    folder = export(MatchingHead(nn.Linear(16, 1)))
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_head(folder)
    assert "\n" not in str(caught.value)
