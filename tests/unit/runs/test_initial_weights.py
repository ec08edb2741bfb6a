"""Weights to start from, and the tokenizer that a run gives them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.positions import TEXT_POSITIONS
from m2_encoder.checkpoints.vocabulary import TOKEN_TABLE
from m2_encoder.config.compose import Composer, open_composer
from m2_encoder.config.model_choice import build_model_config, build_tokenizer
from m2_encoder.config.problems import format_problem
from m2_encoder.config.validate import validate_train
from m2_encoder.errors import UserError
from m2_encoder.hub import load
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.runs.build import build_module, build_objectives
from m2_encoder.runs.export import read_trained
from m2_encoder.runs.folder import LAST_CHECKPOINT, find_frozen, write_config
from m2_encoder.runs.resume import check_resume
from m2_encoder.runs.start import describe_temperature
from m2_encoder.tokenizers.training import train_tokenizer

SMALL = ("+experiment=smoke", "model.patch_size=8", "logger=csv", "run.name=r")
TEXTS = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "fish", "mountain")]


@pytest.fixture(scope="module")
def composer(repo_root: Path) -> Iterator[Composer]:
    with open_composer(repo_root / "conf", "train") as opened:
        yield opened


@pytest.fixture
def other(tmp_path: Path) -> Path:
    (tmp_path / "other.model").write_bytes(train_tokenizer(TEXTS, vocab_size=291))
    return tmp_path / "other.model"


def _build(composer: Composer, *lines: str) -> tuple[dict[str, Any], Any]:
    cfg = composer.compose([*SMALL, *lines]).cfg
    return cfg, build_module(cfg, build_objectives(cfg), validation_name="val")


def test_weights_want_their_tokenizer_or_are_mapped(composer: Composer, tmp_path: Path, other: Path) -> None:
    cfg = composer.compose([*SMALL]).cfg
    config = build_model_config(cfg["model"])
    tokenizer = build_tokenizer(cfg["model"], config)
    export_model(tmp_path / "own", model=M2Encoder(config), tokenizer=tokenizer)
    _, module = _build(composer, f"model.weights={tmp_path / 'own'}")
    assert module._initial_state[TOKEN_TABLE].shape[0] == tokenizer.vocab_size
    lines = (f"model.weights={tmp_path / 'own'}", f"model.tokenizer={other}", "model.vocab_size=291")
    with pytest.raises(UserError, match=r"291 pieces.* is not that of the weights .*model\.map_tokenizer=true"):
        _build(composer, *lines)
    _, module = _build(composer, *lines, "model.map_tokenizer=true")
    assert module._initial_state[TOKEN_TABLE].shape[0] == 291


def test_weights_keep_their_temperature(composer: Composer, tmp_path: Path) -> None:
    cfg, module = _build(composer)
    assert describe_temperature(cfg["model"], module) == []
    config = build_model_config(cfg["model"])
    model = M2Encoder(config)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(40))
    export_model(tmp_path / "own", model=model, tokenizer=build_tokenizer(cfg["model"], config))
    for lines, said in (
        ((), "starts from the temperature of the weights, 0.025 (a scale of 40)"),
        (("model.initial_temperature=0.2",), "… (a scale of 40); model.initial_temperature=0.2 changes nothing"),
    ):
        cfg, module = _build(composer, f"model.weights={tmp_path / 'own'}", *lines)
        (line,) = describe_temperature(cfg["model"], module)
        assert line.endswith(said.removeprefix("…"))
        module.configure_model()
        assert float(module.model.logit_scale.detach().exp()) == pytest.approx(40)


def test_checkpoints_hold_their_tokenizer(composer: Composer, tmp_path: Path, other: Path) -> None:
    where = (f"run.folder={tmp_path}", f"model.tokenizer={other}", "model.vocab_size=291")
    cfg, module = _build(composer, *where)
    write_config(tmp_path / "r" / "config.yaml", cfg)
    module.configure_model()
    content = {"global_step": 1, "state_dict": module.state_dict(), "optimizer_states": []}
    module.on_save_checkpoint(content)
    checkpoint = tmp_path / "r" / LAST_CHECKPOINT
    checkpoint.parent.mkdir(exist_ok=True)
    torch.save(content, checkpoint)
    assert torch.load(checkpoint, weights_only=True)["tokenizer"]["file"].numpy().tobytes() == other.read_bytes()
    read_trained(cfg, checkpoint)
    other.write_bytes(train_tokenizer([*TEXTS, "a red cat"], vocab_size=291))  # the same name and size
    with pytest.raises(UserError, match="is not that of the weights"):
        read_trained(cfg, checkpoint)
    cfg, module = _build(composer, *where)
    with pytest.raises(UserError, match="is not that of the weights") as caught:
        check_resume(module, cfg, tmp_path / "r", checkpoint)
    assert caught.value.key == "model.tokenizer"


def test_the_start_can_be_the_teacher(composer: Composer, tmp_path: Path) -> None:
    config = build_model_config(composer.compose([*SMALL]).cfg["model"])
    model = M2Encoder(config)
    tokenizer = build_tokenizer(composer.compose([*SMALL]).cfg["model"], config)
    export_model(tmp_path / "own", model=model, tokenizer=tokenizer)
    cfg, module = _build(composer, "objective=[itc,keep]", f"model.weights={tmp_path / 'own'}")
    (teacher,) = module.objectives["keep"]._teacher
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(name.startswith("objectives.keep") for name, _ in module.named_parameters()), "nothing to learn"
    frozen = find_frozen(cfg)["model.weights"]
    assert frozen.path == tmp_path / "own" / "model.safetensors", "a run does not go on with another teacher"


def test_without_weights_there_is_no_such_teacher(composer: Composer) -> None:
    problems = validate_train(composer.compose([*SMALL, "objective=[itc,keep]"]).cfg)
    assert [format_problem(problem) for problem in problems] == [
        "objective.keep.teacher=start: is the model of model.weights, and there is none; add model.weights=FOLDER, or "
        "give a folder of m2-export"
    ]


def test_positions_are_stretched(composer: Composer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Short texts keep their features to the bit; the table grows, the tokenizer cuts later, an export says it."""
    cfg = composer.compose([*SMALL]).cfg
    config = build_model_config(cfg["model"])
    torch.manual_seed(0)
    before = M2Encoder(config).eval()
    export_model(tmp_path / "own", model=before, tokenizer=build_tokenizer(cfg["model"], config))
    lines = (f"model.weights={tmp_path / 'own'}", "model.context_length=200", "model.stretch_positions=8")
    assert validate_train(composer.compose([*SMALL, *lines]).cfg) == []
    cfg, module = _build(composer, *lines)
    assert "of 24 text positions the first 8 are kept, the other 16 are stretched to 192" in caplog.text
    module.configure_model()
    after = module.model.eval()
    assert after.config.num_text_positions == 202
    tokenizer = build_tokenizer(cfg["model"], after.config)
    long = tokenizer(["a red cat on a blue mountain " * 20])
    assert long.ids.shape[1] > 100
    export_model(tmp_path / "long", model=after, tokenizer=tokenizer)
    loaded = load(tmp_path / "long")
    with torch.no_grad():
        assert torch.isfinite(after.encode_text(long)).all()
        torch.testing.assert_close(
            loaded.model.encode_text(loaded.require_tokenizer()(["a cat " * 50])),
            after.encode_text(tokenizer(["a cat " * 50])),
        )
        short = tokenizer(TEXTS)
        assert short.ids.shape[1] <= 8
        assert torch.equal(before.encode_text(short), after.encode_text(short))
        between = tokenizer(["a red cat and a green fish on a blue mountain"])
        assert 8 < between.ids.shape[1] < 24
        assert not torch.allclose(before.encode_text(between), after.encode_text(between), atol=1e-4)
    assert not torch.equal(before.state_dict()[TEXT_POSITIONS][10:26], after.state_dict()[TEXT_POSITIONS][10:26])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("model.stretch_positions=24",), "model.stretch_positions=24: must be below 24"),
        (("model.context_length=24",), "model.context_length=24: must be above 24"),
        (("model.weights=null",), "model.stretch_positions=8: there are no weights to stretch"),
        (("model.stretch_positions=0",), "model.stretch_positions=0: must be"),
        (("model.weights=nowhere",), "model.weights=nowhere: no such file"),
    ],
)
def test_what_cannot_be_stretched(composer: Composer, tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    config = build_model_config(composer.compose([*SMALL]).cfg["model"])
    tokenizer = build_tokenizer(composer.compose([*SMALL]).cfg["model"], config)
    export_model(tmp_path / "own", model=M2Encoder(config), tokenizer=tokenizer)
    given = (f"model.weights={tmp_path / 'own'}", "model.context_length=100", "model.stretch_positions=8")
    composition = composer.compose([*SMALL, *given, *lines])
    (problem,) = [*composition.problems, *validate_train(composition.cfg)]
    assert format_problem(problem).startswith(said)
