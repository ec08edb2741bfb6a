"""docs/objectives.md says what is so: names, commands, and the objective that it adds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional

import m2_encoder.objectives
from m2_encoder.config import validate
from m2_encoder.config.compose import open_composer
from m2_encoder.types import TextTokens
from tests.support.objectives import build_bench, make_batch
from tests.support.readme import commands, inline_code, links, split_blocks

ROOT = Path(__file__).resolve().parents[2]
BLOCKS, PROSE = split_blocks((ROOT / "docs" / "objectives.md").read_text(encoding="utf-8"))
FILES = {block.file: block for block in BLOCKS if block.file}
COMMANDS = [words for block in BLOCKS if block.kind == "bash" for words in commands(block)]


def test_every_objective_has_its_row() -> None:
    table = PROSE.split("## What there is")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(rows) == sorted(path.stem for path in (ROOT / "conf" / "objective").glob("*.yaml"))


def test_the_new_objective_takes_what_all_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path
) -> None:
    """The two blocks where they say they belong, and the keys that every objective has."""
    for name, block in FILES.items():
        assert name is not None
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(block.text, encoding="utf-8")
    package = tmp_path / "src" / "m2_encoder" / "objectives"
    monkeypatch.setattr(m2_encoder.objectives, "__path__", [*m2_encoder.objectives.__path__, str(package)])
    own = [f'hydra.searchpath=["file://{tmp_path / "conf"}"]']
    keys = ["objective.first_token.weight=0.5", "objective.first_token.schedule=[[0,0],[9,1]]"]
    with open_composer(repo_root / "conf", "train", own) as composer:
        composition = composer.compose(["objective=[itc,first_token]", "logger=csv", f"run.folder={tmp_path}", *keys])
    assert [*composition.problems, *validate.validate_train(composition.cfg)] == []
    (file,) = (Path(name) for name in FILES if name and name.endswith(".yaml"))
    assert set(composition.cfg["objective"]) == {"itc", file.stem}


def test_commands_are_valid(tmp_path: Path) -> None:
    assert {words[0] for words in COMMANDS} == {"m2-train", "m2-evaluate"}
    for words in (words for words in COMMANDS if words[0] == "m2-train"):
        with open_composer(ROOT / "conf", "train") as composer:
            composition = composer.compose([*words[1:], "logger=csv", f"run.folder={tmp_path}"])
        assert composition.problems == []
        problems = [
            each
            for each in validate.validate_train(composition.cfg)
            if "visual_tokenizer/export" not in str(each.value)
        ]
        assert problems == []  # but for the folder that the command before it writes


def test_keys_of_evaluation_exist() -> None:
    known = yaml.safe_load((ROOT / "conf" / "commands" / "evaluate.yaml").read_text(encoding="utf-8"))
    for words in (words for words in COMMANDS if words[0] == "m2-evaluate"):
        assert {word.partition("=")[0] for word in words[1:]} <= set(known)


def test_named_files_and_links_exist() -> None:
    for code in inline_code(PROSE):
        if re.match(r"(src|conf|tests|benchmarks)/", code):
            assert (ROOT / code).exists(), code
        elif re.fullmatch(r"(tokenizers|models|objectives|training)/\w+\.py", code):
            assert (ROOT / "src" / "m2_encoder" / code).exists(), code
    for link in links(PROSE):
        assert link.startswith("https://") or (ROOT / "docs" / link.split("#")[0]).exists(), link


def test_the_new_objective_is_what_it_says(tmp_path: Path) -> None:
    """Against the whole sequence of image and caption, under a mask by which the template's token sees no other."""
    block = FILES["src/m2_encoder/objectives/first_token.py"]
    assert block.file is not None
    assert not (ROOT / block.file).exists()
    path = tmp_path / "first_token.py"
    path.write_text(block.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("first_token", path)
    assert spec is not None
    assert spec.loader is not None
    shown = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shown)

    module = build_bench({"first": shown.FirstToken()})
    batch = make_batch(4, 2)
    ids, mask = batch.text
    mask[1, 1:] = False  # a caption of the template's token alone has no first token
    output = module.evaluate(batch._replace(text=TextTokens(ids, mask)))["first"]

    model, head = module.model, module.objectives["first"].head
    image = model.encode_image_backbone(batch.images).repeat_interleave(2, dim=0)
    alone = model.encode_text_backbone(TextTokens(ids[:, :1], mask[:, :1]))
    hidden = model.vl_encoder(
        torch.cat([image, alone], dim=1),
        num_image_tokens=image.shape[1] + 1,
        attention_mask=(torch.arange(image.shape[1] + 1) < image.shape[1]).expand(image.shape[1] + 1, -1)
        | torch.eye(image.shape[1] + 1, dtype=torch.bool),
    )[:, -1]
    states = head.norm(functional.gelu(head.transform(hidden)))
    losses = functional.cross_entropy(
        states @ model.text_embed.tokens.weight.t() + head.bias, ids[:, 1], reduction="none"
    )
    expected = torch.where(mask[:, 1], losses, 0)
    torch.testing.assert_close(output.per_sample, expected.detach())
    torch.testing.assert_close(output.loss, expected.sum() / 7)
    assert output.counts is not None
    assert output.counts.tolist() == mask[:, 1].long().tolist()
