"""Which changes of a continued run are told, and which are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.config.compose import Composer, open_composer
from m2_encoder.config.problems import find_problems, format_problem
from m2_encoder.errors import UserError
from m2_encoder.runs.build import build_module, build_objectives
from m2_encoder.runs.folder import CONFIG_FILE, LAST_CHECKPOINT, write_config
from m2_encoder.runs.resume import _refuse_strangers, check_resume, describe_changes

Resume = Callable[[tuple[str, ...], tuple[str, ...]], list[str]]
TOKENIZER = ("+experiment=visual_tokenizer", "task.num_codes=16")
SMALL = ("+experiment=smoke", "model.patch_size=8")
AS_BEFORE = "as in the run that is continued"

CONFIG: dict[str, Any] = {
    "seed": 0,
    "run": {"name": "a", "resume": "never"},
    "trainer": {"devices": 1, "max_steps": 20},
    "strategy": {"_target_": "m2_encoder.strategies.single.LocalStrategy"},
    "data": {
        "num_workers": 0,
        "sources": {"a": {"shards": ["x.tar"], "weight": None}},
        "transform": {"flip": 0.5, "scale": [0.5, 1.0]},
    },
    "optimizer": {"lr": 1e-05},
}


def changed(tmp_path: Path, key: str, value: Any) -> list[str]:
    write_config(tmp_path / "config.yaml", CONFIG)
    cfg = copy.deepcopy(CONFIG)
    *parents, last = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    node[last] = value
    return describe_changes(tmp_path / "config.yaml", cfg)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("data.transform.flip", 0.0, "data.transform.flip: 0.5 then, 0.0 now"),
        ("data.transform.scale", [0.6, 1.0], "data.transform.scale: [0.5, 1.0] then, [0.6, 1.0] now"),
        ("trainer.max_steps", 30, "trainer.max_steps: 20 then, 30 now"),
        ("data.sources.b", {"shards": "y"}, "data.sources.b: None then, {'shards': 'y'} now"),
        ("data.sources.a", None, "data.sources.a: {'shards': ['x.tar'], 'weight': None} then, None now"),
    ],
)
def test_what_changes_the_result_is_told(tmp_path: Path, key: str, value: Any, line: str) -> None:
    assert changed(tmp_path, key, value) == [line]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.num_workers", 4),
        ("trainer.devices", 8),
        ("run.resume", "auto"),
        ("optimizer.lr", 0.00001),
        ("data.new_segment", True),
    ],
)
def test_what_does_not_is_not(tmp_path: Path, key: str, value: Any) -> None:
    assert changed(tmp_path, key, value) == []


def test_a_run_without_its_configuration_tells_nothing(tmp_path: Path) -> None:
    assert describe_changes(tmp_path / "config.yaml", CONFIG) == []


@pytest.fixture(scope="module")
def composer(repo_root: Path) -> Iterator[Composer]:
    with open_composer(repo_root / "conf", "train") as opened:
        yield opened


@pytest.fixture
def resume(composer: Composer, tmp_path: Path) -> Resume:
    """What is wrong with going on with some lines where a run began with others."""

    def build(lines: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
        cfg = composer.compose([*lines, "logger=csv", "run.name=r", f"run.folder={tmp_path}"]).cfg
        return cfg, build_module(cfg, build_objectives(cfg), validation_name="val")

    def find(begun: tuple[str, ...], now: tuple[str, ...]) -> list[str]:
        cfg, module = build(begun)
        write_config(tmp_path / "r" / CONFIG_FILE, cfg)
        module.configure_model()
        optimizer = module.configure_optimizers()["optimizer"]
        states = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
        (tmp_path / "r" / LAST_CHECKPOINT).parent.mkdir(exist_ok=True)
        torch.save({"global_step": 2, **states}, tmp_path / "r" / LAST_CHECKPOINT)
        cfg, module = build(now)
        try:
            check_resume(module, cfg, tmp_path / "r", tmp_path / "r" / LAST_CHECKPOINT)
        except UserError as error:
            return [format_problem(problem) for problem in find_problems(error)]
        return []

    return find


def test_a_size_that_is_written_out_is_no_change(tmp_path: Path, composer: Composer) -> None:
    cfgs = [composer.compose(["+experiment=smoke", *lines]).cfg for lines in ((), ("model.patch_size=8",))]
    write_config(tmp_path / CONFIG_FILE, cfgs[0])
    assert describe_changes(tmp_path / CONFIG_FILE, cfgs[1]) == []


def test_a_run_that_names_a_strangers_code_is_not_gone_on_with() -> None:
    own: dict[str, Any] = {"optimizer": {"_target_": "mine.Sgd"}}
    _refuse_strangers(own, own)
    with pytest.raises(UserError, match=r"optimizer\._target_=mine\.Sgd: is named by a saved config.*--config-dir"):
        _refuse_strangers(own, {})


def test_what_only_looked_at_a_run_may_be_left_out(resume: Resume) -> None:
    assert resume((*SMALL, "+callbacks.own={_target_: lightning.pytorch.callbacks.Timer}"), SMALL) == []


def test_steps_that_are_done_are_said_once(resume: Resume) -> None:
    few = (*SMALL, "scheduler.warmup_steps=1")
    (problem,) = resume((*few, "trainer.max_steps=9"), (*few, "trainer.max_steps=2"))
    assert problem.startswith("trainer.max_steps=2: changes nothing, as all 2 steps are done; it was 9")


@pytest.mark.parametrize(
    ("now", "key", "before"),
    [
        ("objective.cmlm.decoder=own", "objective.cmlm.decoder", "tied"),
        ("objective.cmlm.text_expert=true", "objective.cmlm.text_expert", "false"),
        ("objective.itc.heads=[features, backbone_features]", "objective.itc.heads", "[features]"),
    ],
)
def test_the_setting_that_changed_is_named(resume: Resume, now: str, key: str, before: str) -> None:
    chosen = (*SMALL, "objective=[itc,cmlm]")
    assert resume(chosen, (*chosen, "objective.itc.weight=0.5", "scheduler.warmup_steps=1")) == []
    (problem,) = resume(chosen, (*chosen, now.replace(", ", ",")))
    rule = f"was {before} in the run that is continued, whose checkpoint does not fit"
    assert problem == f"{now}: {rule}; leave it as it was, or give another run.name"


@pytest.mark.parametrize(
    ("now", "fits"),
    [
        (("objective=[itc,cmlm]", "objective.cmlm.weight=0.1", "objective.cmlm.schedule=[[0,1],[9,0]]"), True),
        (("objective=[itc,cmlm,soft_targets]",), True),
        (("objective=[soft_targets,cmlm]",), True),
        (("objective=[itc,cmlm,cmim]", "objective.cmim.weight=0"), True),
        (("objective=[itc]",), False),
        (("objective=[cmlm]",), False),
        (("objective=[itc,cmlm]", "objective.cmlm.weight=0"), False),
        (("objective=[itc,cmlm,sigmoid]",), False),
        (("objective=[itc,cmlm,cmim]",), False),
    ],
)
def test_objectives_that_train_nothing_else_may_change(resume: Resume, now: tuple[str, ...], fits: bool) -> None:
    found = resume((*SMALL, "objective=[itc,cmlm]"), (*SMALL, *now))
    assert len(found) == (not fits)
    assert all("must train the same parameters as [itc,cmlm], whose run is continued" in problem for problem in found)


def test_codes_in_place_of_pixels(resume: Resume) -> None:
    own = "{_target_: tests.support.own_objectives.Brightness}"
    begun = (*SMALL, "objective=[itc,cmim]")
    (problem,) = resume(begun, (*begun, f"objective.cmim.targets={own}"))
    assert problem.startswith("objective.cmim.targets")


def test_objectives_come_and_go_by_name(resume: Resume) -> None:
    own = "+objective.mine={_target_: tests.support.own_objectives.Prototypes}"
    assert resume((*SMALL, own), (*SMALL, own)) == []
    (problem,) = resume((*SMALL, own), SMALL)
    assert problem.startswith("objective=[itc]: must train the same parameters as [itc,mine], whose run is continued;")
    (problem,) = resume(SMALL, (*SMALL, own))
    assert problem.startswith("objective=[itc,mine]: must train the same parameters as [itc], whose run is continued;")


def test_a_model_keeps_its_sizes(resume: Resume) -> None:
    found = resume(SMALL, (*SMALL, "model.num_heads=4", "model.embed_dim=128", "model.drop_path_rate=0.1"))
    assert found == [
        f"{key}: must be {before}, {AS_BEFORE}; leave it out, or give another run.name"
        for key, before in (("model.embed_dim=128", 64), ("model.num_heads=4", 2))
    ]


@pytest.mark.parametrize("change", ["num_codes=32", "num_heads=2", "num_layers=1", "code_dim=16"])
def test_a_visual_tokenizer_keeps_its_sizes(resume: Resume, change: str) -> None:
    assert resume(TOKENIZER, (*TOKENIZER, "task.decay=0.9")) == []
    (problem,) = resume(TOKENIZER, (*TOKENIZER, f"task.{change}"))
    assert problem.startswith(f"task.{change}: must be ")
    assert problem.endswith(f"{AS_BEFORE}; leave it out, or give another run.name")


def test_an_optimizer_has_a_state(resume: Resume) -> None:
    (problem,) = resume(SMALL, (*SMALL, "optimizer=muon"))
    assert problem.startswith("optimizer._target_=m2_encoder.training.optim.build_muon: must be ")
    assert problem.endswith(f"{AS_BEFORE}; leave optimizer=... out, or give another run.name")


@pytest.mark.parametrize(
    ("shared", "line", "was"),
    [
        ((), "optimizer.lr=0.02", "0.001"),
        ((), "optimizer.betas=[0.5,0.9]", "[0.9, 0.98]"),
        ((), "optimizer.weight_decay=0.0", "0.2"),
        ((), "optimizer.logit_scale_lr_ratio=3.0", "1.0"),
        (("optimizer=muon",), "optimizer.momentum=0.5", "0.95"),
        (("optimizer=muon",), "optimizer.matrix_lr=0.5", "0.002"),
        ((), "model.initial_temperature=0.5", "0.25"),
        ((), "model.position_init_std=0.5", "0.02"),
        ((), "seed=4", "0"),
        (("objective=[sigmoid]",), "objective.sigmoid.initial_bias=-5.0", "-10.0"),
    ],
)
def test_what_the_checkpoint_decides_is_refused(
    resume: Resume, tmp_path: Path, shared: tuple[str, ...], line: str, was: str
) -> None:
    assert resume((*SMALL, *shared), (*SMALL, *shared)) == []
    (problem,) = resume((*SMALL, *shared), (*SMALL, *shared, line))
    shown = line.replace(",", ", ")
    assert problem.startswith(f"{shown}: is {was} in the run that is continued, whose checkpoint decides; leave it out")
    assert problem.endswith(f" model.weights={tmp_path / 'r' / LAST_CHECKPOINT} {line}")


def test_fewer_steps_than_are_done_are_refused(resume: Resume) -> None:
    done = (*SMALL, "scheduler.warmup_steps=0", "scheduler.max_steps=2")
    (problem,) = resume((*done, "trainer.max_steps=2"), (*done, "trainer.max_steps=1"))
    assert problem.startswith("trainer.max_steps=1: must be 2 or more: so many steps are done already; leave it out")
    assert problem.endswith("m2-export run.name=r checkpoint=step=N")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("objective.itc.label_smoothing=0.1", "it was 0.0; leave it out, or train on with trainer.max_steps above 2"),
        ("trainer.gradient_clip_val=0.5", "it was 1.0; leave it out, or train on with trainer.max_steps above 2"),
    ],
)
def test_where_all_steps_are_done_nothing_else_may_change(resume: Resume, line: str, said: str) -> None:
    done = (*SMALL, "trainer.max_steps=2", "scheduler.warmup_steps=0", "scheduler.max_steps=2")
    assert resume(done, (*done, "evaluation=[]", "run.checkpoint_every=3", "data.num_workers=1")) == []
    last = tuple(each for each in done if each.partition("=")[0] != line.partition("=")[0])
    assert resume(done, (*last, line)) == [f"{line}: changes nothing, as all 2 steps are done; {said}"]
