"""Configurations that cannot work: each ends in one clear message and exit code 2, before any data is read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from m2_encoder.cli import train as train_command
from m2_encoder.data.emoji import dataset as emoji
from m2_encoder.data.emoji import emoji_module as datamodule
from tests.support.slow_parts import mark_most


class Outcome(NamedTuple):
    """What a command line ended in."""

    code: int
    problems: list[str]
    text: str


Command = Callable[..., Outcome]


@pytest.fixture
def m2_train(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs m2-train in this process; fails if it reads data, writes anything or shows a traceback."""
    outputs = tmp_path / "outputs"

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("data was touched although the configuration is wrong")

    monkeypatch.chdir(repo_root)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(emoji, "write_emoji_shards", refuse)
    monkeypatch.setattr(emoji, "load_emoji_images", refuse)
    monkeypatch.setattr(datamodule, "write_emoji_shards", refuse)
    monkeypatch.setattr(datamodule.EmojiDataModule, "prepare_data", refuse)
    monkeypatch.setattr("m2_encoder.runs.run.train", refuse)

    def run(*overrides: str, folder: bool = True) -> Outcome:
        before = _content(tmp_path)
        own = [f"run.folder={outputs}"] if folder else []
        monkeypatch.setattr(sys, "argv", ["m2-train", *overrides, *own])
        code = train_command.main()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert _content(tmp_path) == before, "something was written"
        return Outcome(code, _problems(captured.err), captured.err)

    return run


def _content(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def _problems(text: str) -> list[str]:
    """The lines of problems: the only one behind the command's name, or the indented list."""
    lines = text.strip().splitlines()
    if len(lines) == 1:
        return [lines[0].removeprefix("m2-train: ")]
    assert lines[0] == f"m2-train: {len(lines) - 1} problems:"
    return [line.removeprefix("  ") for line in lines[1:]]


# One fault each: the override, and what its message must name besides the override itself: the rule or the way out.
ONE_FAULT = [
    # numbers
    ("optimizer.lr=-1", "above 0"),
    ("optimizer.lr=0", "optimizer.lr=1e-3"),
    ("optimizer.lr=nan", "a number"),
    ("optimizer.lr=inf", "a number"),
    ("optimizer.lr='\"0.1\"'", "a number"),
    ("optimizer.lr=true", "a number"),
    ("optimizer.lr=null", "a number"),
    ("optimizer.betas=[0.9]", "2 numbers, each 0 or more and below 1"),
    ("optimizer.betas=[0.9,1.0]", "[0.9, 0.98]"),
    ("optimizer.eps=0", "1e-16 or more"),
    ("optimizer.weight_decay=-0.1", "0 or more"),
    ("scheduler.warmup_steps=-1", "0 or more"),
    ("scheduler.warmup_steps=1.5", "whole number"),
    ("scheduler.warmup_steps=1000000", "0..trainer.max_steps"),
    ("scheduler.min_lr_ratio=2", "at most 1"),
    ("trainer.max_steps=0", "1 or more"),
    ("trainer.max_steps=true", "whole number"),
    ("trainer.max_steps=1e3", "whole number"),
    ("trainer.gradient_clip_val=0", "above 0, or null"),
    ("trainer.val_check_interval=0", "1 or more"),
    ("trainer.val_check_interval=1.5", "(0, 1]"),
    ("trainer.limit_val_batches=-1", "a share in 0..1"),
    ("trainer.log_every_n_steps=0", "1 or more"),
    ("seed=-1", "0..4294967295"),
    ("seed=1.5", "whole number"),
    ("run.checkpoint_every=0", "1 or more"),
    # data
    ("data.global_batch_size=1", "2 or more"),
    ("data.global_batch_size=1000000", "training samples"),
    ("data.num_workers=-1", "0 or more"),
    ("data.num_workers=two", "whole number"),
    ("data.eval_batch_size=0", "1 or more"),
    ("data.heldout_style=openmoij", "did you mean openmoji"),
    ("data.folder=''", "a text"),
    ("data.captions.max_keywords=0", "1 or more"),
    ("data.captions.language_weights={zh: 0, en: 0}", "not all 0"),
    ("data.captions.language_weights={zh: -1, en: 1}", "0 or more"),
    ("data.captions.role_weights={nome: 1}", "did you mean name"),
    ("+data.captions.role_weights.nome=1", "name, alias"),
    ("data.transform.flip=1.5", "flip"),
    ("data.transform.scale=[0.9,0.1]", "scale"),
    ("+data.transform.num_opps=1", "did you mean num_ops"),
    ("+data.seed=3", "set by the command itself"),
    # model
    ("model.image_size=65", "for example 64"),
    ("model.image_size=-8", "in 1..16384"),
    ("model.embed_dim=130", "num_heads=4"),
    ("model.context_length=1000", "2..126"),
    ("model.vocab_size=100", "model.tokenizer=emoji"),
    ("model.drop_path_rate=1", "below 1"),
    ("model.name=huge", "tiny"),
    ("model.tokenizer=nowhere.model", "no such file"),
    ("model.weights=nowhere.ckpt", "no such file"),
    ("model.map_tokenizer=true", "there are no weights to map; add model.weights=FILE"),
    ("model.map_tokenizer=3", "must be"),
    # objectives
    ("objective=[]", "objective=[itc]"),
    ("objective=[itc,cmlmm]", "choose from"),
    ("objective.itc.weight=-1", "0 or more"),
    ("objective.itc.weight=0", "at least one of itc"),
    ("objective.itc.label_smoothing=1", "below 1"),
    ("objective.itc.multi_positive=1", "true or false"),
    ("objective.itc.schedule=[[0,0],[5,1]]", "must not be 0 at step 0"),
    ("objective.itc.schedule=[[0,0]]", "[[0,0],[1000,1]]"),
    ("objective.itc.schedule=[[0,-1]]", "[[0,0],[1000,1]]"),
    # machine
    ("trainer.precision=17", "bf16-mixed"),
    ("trainer.precision=16-mixed", "the CPU"),
    ("trainer.accelerator=tpuu", "auto, cpu"),
    ("trainer.devices=0", "1 or more"),
    ("trainer.devices=1000", "must not exceed"),
    ("trainer.devices='\"2\"'", "whole number"),
    ("trainer.num_nodes=0", "1 or more"),
    # run
    ("run.name=a/b", "my-run"),
    ("run.name=''", "my-run"),
    ("run.name=data", "none of data"),
    ("run.resume=atuo", "did you mean auto"),
    ("run.resume=must", "run.resume=auto"),
    ("run.export=1", "true or false"),
    ("logger.mode=onlin", "did you mean online"),
    # names
    ("trainer.max_step=3", "did you mean max_steps"),
    ("optimzer.lr=1", "did you mean optimizer"),
    ("model.image_sise=64", "did you mean image_size"),
    ("+trainer.max_step=3", "did you mean max_steps"),
    ("+optimzer.lr=1", "did you mean optimizer"),
    ("+run.naem=x", "did you mean name"),
    ("+model.depth=3", "num_layers"),
    ("+trainer.max_steps=3", "leave out the +"),
    ("+trainer.callbacks=[]", "set by the command itself"),
    ("~optimizer.lr", "add optimizer.lr=1e-3"),
    ("~run.name", "add run.name=my-run"),
    ("model=tinny", "did you mean tiny"),
    ("modle=tiny", "did you mean model"),
    ("+experiment=smokee", "did you mean smoke"),
    ("experiment=smoke", "+experiment=smoke"),
    ("+model=tiny", "leave out the +"),
    ("strategy=fsdp", "single"),
    ("strategy=groupd_ddp", "did you mean grouped_ddp"),
    ("+trainer.accumulate_grad_batches=2", "strategy.micro_batches accumulates"),
    ("+trainer.overfit_batches=-1", "a number of batches in 0..1000000000, or a share in 0..1"),
    ("+trainer.gradient_clip_algorithm=all", "one of norm, value"),
    ("objective.itc.heads=[backbone_features]", "[features] or [features, backbone_features]"),
    ("strategy.micro_batches=0", "a whole number, 1 or more"),
    ("strategy.micro_batches=3", "must divide the 128 rows of a rank"),
    ("strategy.recompute=maybe", "true or false"),
    ("strategy.activation_checkpointing=1", "true or false"),
    ("+strategy.group_size=2", "unknown argument"),
    ("strategy.micro_batch=2", "did you mean micro_batches"),
    ("logger=tensorbord", "tensorboard"),
    # syntax and references
    ("optimizer.lr", "key=value"),
    ("optimizer.lr=[1", "key=value"),
    ("optimizer.lr=1e-3,2e-3", "--multirun"),
    ("optimizer.lr=${run.nothing}", "cannot be resolved"),
    ("run.name=???", "must be given"),
    ("optimizer._target_=m2_encoder.training.optim.build_optimiser", "did you mean build_optimizer"),
    ("trainer=3", "choose from default"),
    ("cluster=torchrun", "torchrun --nproc-per-node"),
    ("--config-name=nothing", "train"),
    ("--nonsense", "m2-train --help"),
]


@pytest.mark.parametrize(("override", "named"), mark_most(ONE_FAULT))
def test_one_fault_gives_one_line(m2_train: Command, override: str, named: str) -> None:
    machine = [] if "accelerator" in override else ["trainer.accelerator=cpu"]
    outcome = m2_train(*machine, override)
    key, _, value = override.lstrip("+~").partition("=")
    assert outcome.code == 2
    assert len(outcome.problems) == 1, outcome.text
    assert named in outcome.problems[0]
    assert key.rpartition(".")[2] in outcome.problems[0]
    if value:
        bare = value.strip("'\"[]{}$").split(",")[0].split(":")[0].removesuffix("e3")
        assert bare in outcome.problems[0], "the value is not named"


SEVERAL_FAULTS = [
    (["model.image_size=65", "model.embed_dim=130"], 2),
    (["strategy=single", "trainer.devices=2"], 1),
    (["trainer.num_nodes=2", "strategy=ddp"], 1),
    (["trainer.devices=2", "strategy=ddp", "data.global_batch_size=255"], 1),
    (["model=m2_encoder_0_4b"], 1),
    (["model=m2_encoder_0_4b", "model.tokenizer=nowhere.model"], 1),
    (["optimizer.lr=-1", "foo=1", "model=tinny", "trainer.max_step=3", "run.name=a b", "seed=x"], 6),
    (["optimizer.lr=-1", "model.weights=no.ckpt", "model.embed_dim=x", "data.heldout_style=no", "run.resume=no"], 5),
    (["trainer.accelerator=gpu"], 1),
    (["--cfg", "job", "foo=1", "seed=[1"], 2),
    (["-m", "foo=1,2"], 2),
    (["-m", "optimizer.lr=-2,-1"], 2),
    (["--cfg", "job", "--multirun"], 1),
    (["--resolve"], 1),
    (["--experimental-rerun", "x.pickle"], 1),
    (["--config-path", "nowhere"], 1),
]


@pytest.mark.parametrize(("overrides", "count"), mark_most(SEVERAL_FAULTS))
def test_every_fault_has_its_line(
    m2_train: Command, overrides: list[str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    outcome = m2_train(*overrides)
    assert outcome.code == 2
    assert len(outcome.problems) == count, outcome.text


def test_data_of_another_style_take_one_line(m2_train: Command, emoji_folder: Path) -> None:
    outcome = m2_train("+experiment=emoji", "data.heldout_style=noto", f"data.folder={emoji_folder}")
    assert outcome.code == 2
    said = f"data.folder={emoji_folder}: holds the built-in set with heldout_style=twemoji, and heldout_style=noto is "
    assert [problem[: len(said)] for problem in outcome.problems] == [said]


RANKS = [
    (["strategy=grouped_ddp", "trainer.devices=4", "strategy.group_size=3"], "use one of 1, 2, 4"),
    (["strategy=grouped_fsdp", "trainer.devices=4", "strategy.group_size=8"], "use one of 1, 2, 4"),
    (["strategy=grouped_ddp", "trainer.devices=2", "strategy.group_size=0"], "1 or more"),
    (
        ["strategy=grouped_ddp", "trainer.devices=2", "strategy.group_nodes=2"],
        "must divide the 1 node(s); use one of 1",
    ),
    (["strategy=grouped_ddp", "strategy.group_size=2"], "must divide the 1 rank(s); use one of 1"),
    (
        ["strategy=grouped_ddp", "trainer.devices=2", "strategy.group_size=1", "strategy.group_nodes=1"],
        "keep one of the two",
    ),
    (["strategy=grouped_ddp", "trainer.devices=2", "strategy.micro_batches=5"], "for example strategy.micro_batches=4"),
    (["strategy=grouped_fsdp", "trainer.devices=2", "optimizer=muon"], "use optimizer=adamw"),
    (["strategy=grouped_fsdp", "trainer.devices=2", "trainer.precision=64-true"], "32-true, bf16-mixed, bf16-true"),
    (["strategy=grouped_fsdp", "trainer.devices=2", "data.eval_batch_size=1"], "must be 2 or more"),
    (["strategy=grouped_fsdp", "strategy.reshard_after_forward=2"], "true or false"),
    (["trainer.devices=2"], "use strategy=ddp or grouped_ddp"),
]


@pytest.mark.parametrize(("overrides", "named"), mark_most(RANKS))
def test_what_ranks_cannot_do_takes_one_line(
    m2_train: Command, overrides: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    outcome = m2_train(*overrides)
    assert outcome.code == 2
    assert len(outcome.problems) == 1, outcome.text
    assert named in outcome.problems[0]


def test_groups_respect_nodes(m2_train: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "12")
    cluster = ("cluster=torchrun", "trainer.num_nodes=2", "trainer.devices=6", "data.global_batch_size=120")
    outcome = m2_train(*cluster, "strategy=grouped_ddp", "strategy.group_size=4")
    assert outcome.problems[0].endswith("lie in one node of 6, or be whole nodes; use one of 1, 2, 3, 6, 12")


INDEPENDENT = [
    "optimizer.lr=-1", "seed=-1", "run.checkpoint_every=0", "data.num_workers=-1", "model.drop_path_rate=2",
    "objective.itc.label_smoothing=1", "trainer.gradient_clip_val=-1", "logger.wandb.mode=no", "foo=1",
    "model.image_size=65", "trainer.max_step=3", "run.resume=no", "data.transform.flip=2", "+run.naem=x",
    "+trainer.max_step=3",
]  # fmt: skip


@pytest.mark.parametrize("count", [2, 5, len(INDEPENDENT)])
def test_k_faults_give_k_lines(m2_train: Command, count: int) -> None:
    chosen = INDEPENDENT[-count:]
    outcome = m2_train(*chosen)
    assert outcome.code == 2
    assert len(outcome.problems) == count, outcome.text
    for override in chosen:
        key = override.lstrip("+").partition("=")[0]
        assert sum(problem.lstrip("+").startswith(f"{key}=") for problem in outcome.problems) >= 1


def test_existing_run_says_what_to_do(m2_train: Command, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "emoji"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    outcome = m2_train()
    assert outcome.code == 2
    for way_out in ("run.resume=auto", "another run.name", f"delete {folder}"):
        assert way_out in outcome.text


def test_folder_with_hydra_records_alone_is_no_run(m2_train: Command, tmp_path: Path) -> None:
    (tmp_path / "outputs" / "emoji" / ".hydra").mkdir(parents=True)
    assert len(m2_train("seed=-1").problems) == 1


def test_outputs_that_are_a_file(m2_train: Command, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("", encoding="utf-8")
    outcome = m2_train()
    assert outcome.code == 2
    assert "is not a folder" in outcome.text


def test_outputs_that_take_no_file(m2_train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    outcome = m2_train("trainer.accelerator=cpu")
    assert outcome.code == 2
    assert f"run.folder={tmp_path / 'outputs'}: {tmp_path} may not be written" in outcome.text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optimzer: {lr: 5}\n", "did you mean optimizer"),
        ("trainer: {max_step: 5}\n", "did you mean max_steps"),
        ("defaults: [{override /model: huge}]\n", "huge"),
        ("seed: [1\n", "not valid YAML"),
        ("data: {captions: 3}\n", "data.captions"),
    ],
)
def test_faulty_experiment_file(m2_train: Command, tmp_path: Path, text: str, named: str) -> None:
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
    outcome = m2_train("--config-dir", str(tmp_path / "own"), "+experiment=mine")
    assert outcome.code == 2
    assert named in outcome.text


def test_saved_configuration_without_a_group(m2_train: Command, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\nmodel: tiny\n", encoding="utf-8")
    outcome = m2_train("--config-path", str(tmp_path), "--config-name", "config", folder=False)
    assert outcome.code == 2
    assert any(problem.startswith("model=tiny: must be a mapping") for problem in outcome.problems)
    assert any(problem.startswith("trainer: is missing") for problem in outcome.problems)


def test_console_script(tmp_path: Path, repo_root: Path) -> None:
    script = Path(sys.executable).with_name("m2-train")
    if not script.is_file():
        pytest.skip(f"no {script}: the project is not installed in this environment")
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [str(script), "optimizer.lr=-1", "trainer.max_step=3", f"run.folder={tmp_path / 'outputs'}"],
        cwd=repo_root / "conf",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "2 problems" in done.stderr
    assert "did you mean max_steps" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_full_error_shows_the_traceback(m2_train: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"optimizer\.lr=-1"):
        m2_train("optimizer.lr=-1")
