"""Every shipped configuration composes, validates and builds, the large models on `meta`."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import Strategy
from omegaconf import OmegaConf

from m2_encoder.checkpoints.export import export_model
from m2_encoder.config import validate
from m2_encoder.config.compose import Composer, open_composer
from m2_encoder.config.model_choice import build_model_config
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import Problem
from m2_encoder.models.config import NAME_TO_CONFIG
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.runs.build import build_run
from m2_encoder.runs.folder import CONFIG_FILE, LAST_CHECKPOINT, read_config, write_config
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.shards import write_numbers
from tests.support.suites import captioned

CONF = Path(__file__).resolve().parents[2] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem not in ("base", "sentence"))
STRATEGIES = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
CLUSTERS = sorted(path.stem for path in (CONF / "cluster").glob("*.yaml"))


@pytest.fixture
def outputs(tmp_path: Path) -> str:
    return f"run.folder={tmp_path}"


@pytest.fixture
def spm(tmp_path: Path) -> str:
    """A SentencePiece file where the official one would be."""
    path = tmp_path / "sp.model"
    path.write_bytes(load_emoji_tokenizer_model())
    return f"model.tokenizer={path}"


def _compose(composer: Composer, *overrides: str) -> dict[str, Any]:
    composition = composer.compose(overrides)
    assert composition.problems == []
    assert validate.validate_train(composition.cfg) == []
    return composition.cfg


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_builds(composer: Composer, outputs: str, spm: str, experiment: str, tmp_path: Path) -> None:
    lines = [f"+experiment={experiment}", outputs, "logger=csv", "trainer.accelerator=cpu"]
    if experiment.startswith("pretrain"):
        # A cluster's ranks cannot be built here: its configuration is checked as it is, and built for one rank.
        composition = composer.compose([*lines, spm])
        assert composition.problems == []
        assert validate.validate_train(composition.cfg, on_this_machine=False) == []
        assert composition.cfg["trainer"]["num_nodes"] == 32
        lines += [spm, "strategy=single", "~strategy.group_nodes", "trainer.devices=1", "trainer.num_nodes=1"]
    is_adapted = experiment in ("adapt", "text_encoder")
    if is_adapted:  # what a user gives
        tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24)
        start = export_model(tmp_path / "start", model=M2Encoder(NAME_TO_CONFIG["tiny"]), tokenizer=tokenizer)
        (tmp_path / "tars").mkdir()
        (shard,) = write_numbers(tmp_path / "tars", [3])
        mine = captioned(tmp_path / "mine", 3)
        lines += [f"data.sources.main.shards={shard}", f"data.validation.mine={mine}"]
        lines += [f"model.weights={start}"] if experiment == "adapt" else [f"model.image.model={start}"]
    if experiment == "text_encoder":
        pytest.importorskip("sentence_transformers")
        from tests.support.sentence_folder import write_sentence_encoder

        lines += [f"model.text.folder={write_sentence_encoder(tmp_path / 'sentences')}", "model.image_size=32"]
    cfg = _compose(composer, *lines)
    run = build_run(cfg, tmp_path / "run")
    with torch.device("cpu" if is_adapted else "meta"):  # weights are no values on meta
        run.module.configure_model()
    optimizers = run.module.configure_optimizers()
    assert sum(parameter.numel() for group in optimizers["optimizer"].param_groups for parameter in group["params"]) > 0
    assert run.trainer.max_steps == cfg["trainer"]["max_steps"]
    assert run.datamodule.global_batch_size == cfg["data"]["global_batch_size"]
    assert not (tmp_path / "run").exists(), "building alone writes nothing"


@pytest.mark.parametrize("model", MODELS)
def test_model_builds_on_meta(composer: Composer, outputs: str, spm: str, model: str) -> None:
    cfg = _compose(composer, f"model={model}", outputs, *([] if model == "tiny" else [spm]))
    config = build_model_config(cfg["model"])
    assert config.name.replace("-", "_").replace(".", "_") == model
    with torch.device("meta"):
        built = M2Encoder(config)
    optimizer = instantiate(cfg["optimizer"])(built)
    scheduler = instantiate(cfg["scheduler"])(optimizer)
    assert scheduler.get_last_lr()[0] <= cfg["optimizer"]["lr"]


@pytest.mark.parametrize(("model", "strategy", "cluster"), list(product(MODELS, STRATEGIES, CLUSTERS)))
def test_combination_validates(
    composer: Composer,
    outputs: str,
    spm: str,
    model: str,
    strategy: str,
    cluster: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    devices = 1 if strategy == "single" else 2
    if cluster == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        monkeypatch.setenv("WORLD_SIZE", str(devices))
    if cluster == "slurm":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the slurm extra is not installed")
        srun = tmp_path / "bin" / "srun"
        srun.parent.mkdir()
        srun.touch(mode=0o755)
        monkeypatch.setenv("PATH", str(srun.parent))
    cfg = _compose(
        composer,
        f"model={model}",
        f"strategy={strategy}",
        f"cluster={cluster}",
        f"trainer.devices={devices}",
        "trainer.accelerator=cpu",
        outputs,
        *([] if model == "tiny" else [spm]),
    )
    assert isinstance(instantiate(cfg["strategy"]), Strategy)


@pytest.mark.parametrize("scheduler", sorted(path.stem for path in (CONF / "scheduler").glob("*.yaml")))
def test_scheduler_builds(composer: Composer, outputs: str, scheduler: str) -> None:
    cfg = _compose(composer, f"scheduler={scheduler}", outputs)
    optimizer = instantiate(cfg["optimizer"])(torch.nn.Linear(2, 2))
    built = instantiate(cfg["scheduler"])(optimizer)
    rates = []
    for _ in range(cfg["scheduler"]["warmup_steps"] + 1):
        rates.append(built.get_last_lr()[0])
        optimizer.step()
        built.step()
    assert rates[0] < rates[-1] == pytest.approx(cfg["optimizer"]["lr"])


def test_slurm_passes_its_settings_on(composer: Composer, outputs: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the slurm extra is not installed")
    composition = composer.compose(
        ["cluster=slurm", "cluster.partition=gpu", "trainer.devices=8", "trainer.num_nodes=4", outputs]
    )
    launcher = composition.hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.partition) == (4, 8, "gpu")
    assert composition.cfg["run"]["resume"] == "auto"


def test_launcher_of_slurm_is_not_loaded_unless_chosen(composer: Composer) -> None:
    assert composer.compose([]).hydra.launcher._target_.endswith("BasicLauncher")


def test_saved_configuration_composes_alone_and_is_the_same(outputs: str, tmp_path: Path) -> None:
    with open_composer(CONF, "train") as composer:
        cfg = _compose(composer, "+experiment=smoke", "optimizer.eps=1e-7", outputs)
    write_config(tmp_path / "saved" / "config.yaml", cfg)
    assert read_config(tmp_path / "saved" / "config.yaml") == cfg
    with open_composer(tmp_path / "saved", "config") as alone:
        again = alone.compose(["optimizer.lr=0.5"])
    assert again.problems == []
    assert again.cfg == {**cfg, "optimizer": {**cfg["optimizer"], "lr": 0.5}}
    assert validate.validate_train(again.cfg) == []


def test_command_line_beats_experiment_beats_defaults(composer: Composer) -> None:
    steps = [
        composer.compose(lines).cfg["trainer"]["max_steps"]
        for lines in ([], ["+experiment=smoke"], ["+experiment=smoke", "trainer.max_steps=7"])
    ]
    assert len(set(steps)) == 3
    assert steps[2] == 7


def test_every_yaml_is_reachable(composer: Composer) -> None:
    groups = composer.groups()
    for path in CONF.rglob("*.yaml"):
        OmegaConf.load(path)
        folder = path.relative_to(CONF).parts[0]
        is_group = (
            path.parent != CONF and folder not in {"commands", "hydra", "local"} and path.parent.name != "hardware"
        )
        if is_group and path.stem != "base":
            assert path.stem in groups[folder]


def test_validation_command(
    capsys: pytest.CaptureFixture[str], repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo_root)
    assert validate.main() == 0
    assert capsys.readouterr().out.splitlines() == ["defaults: ok", *(f"+experiment={x}: ok" for x in EXPERIMENTS)]


def test_runs_of_the_same_names_say_nothing_about_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_composer(CONF, "train") as composer:
        cfg = composer.compose(["optimizer=muon", "model.num_layers=1", "objective=[itc,cmlm]"]).cfg
    write_config(tmp_path / "outputs" / "emoji" / CONFIG_FILE, cfg)
    checkpoint = tmp_path / "outputs" / "emoji" / LAST_CHECKPOINT
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert not any(validate.validate_experiments().values())


def test_validation_command_reports(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "validate_train", lambda _cfg, **_: [Problem("seed", -1, "must be 0 or more")])
    assert validate.main() == 2
    assert "seed=-1" in capsys.readouterr().err
