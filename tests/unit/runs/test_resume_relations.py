"""What a continued run may not change is said with the setting that changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m2_encoder.config import validate
from m2_encoder.config.compose import Composer, open_composer
from m2_encoder.runs.folder import CONFIG_FILE, LAST_CHECKPOINT, write_config

Resume = Callable[[tuple[str, ...], tuple[str, ...]], list[str]]
TOKENIZER = ("+experiment=visual_tokenizer", "task.num_codes=128")
CODES = "objective.cmim.targets.tokenizer"
TARGETS = "m2_encoder.objectives.patch_targets"
AS_BEFORE = "as in the run that is continued"


@pytest.fixture(scope="module")
def composer(repo_root: Path) -> Iterator[Composer]:
    with open_composer(repo_root / "conf", "train") as opened:
        yield opened


@pytest.fixture
def resume(composer: Composer, tmp_path: Path) -> Resume:
    """What is wrong with going on with some lines where a run began with others."""

    def find(begun: tuple[str, ...], now: tuple[str, ...]) -> list[str]:
        shared = ("logger=csv", "run.name=r", f"run.folder={tmp_path}", "run.resume=must", "trainer.accelerator=cpu")
        write_config(tmp_path / "r" / CONFIG_FILE, composer.compose([*begun, *shared]).cfg)
        checkpoint = tmp_path / "r" / LAST_CHECKPOINT
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()
        composition = composer.compose([*now, *shared])
        return composition.without_echoes([*composition.problems, *validate.validate_train(composition.cfg)])

    return find


@pytest.mark.parametrize(
    ("now", "key", "value", "before"),
    [
        (("objective.cmlm.decoder=own",), "objective.cmlm.decoder", "own", "tied"),
        (
            ("objective.cmlm.mask_ratio=0.3", "objective.cmlm.decoder=own", "objective.itc.label_smoothing=0.1"),
            "objective.cmlm.decoder",
            "own",
            "tied",
        ),
        (("objective.cmlm.text_expert=true",), "objective.cmlm.text_expert", "true", "false"),
        (
            ("objective.itc.heads=[features,backbone_features]",),
            "objective.itc.heads",
            "[features, backbone_features]",
            "[features]",
        ),
    ],
)
def test_the_setting_that_changed_is_named(
    resume: Resume, now: tuple[str, ...], key: str, value: str, before: str
) -> None:
    chosen = ("objective=[itc,cmlm]",)
    (problem,) = resume(chosen, (*chosen, *now))
    assert problem == f"{key}={value}: must be {before}, {AS_BEFORE}; use {key}={before}, or give another run.name"


def test_codes_in_place_of_pixels(resume: Resume, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (problem,) = resume(("objective=[itc,cmim]",), ("objective=[itc,cmim_codes]", f"{CODES}={tmp_path}"))
    assert problem == (
        f"objective.cmim.targets._target_={TARGETS}.VisualCodes: must be {TARGETS}.NormalizedPixels, {AS_BEFORE}; "
        "choose the objective it began with, or give another run.name"
    )


def test_the_place_of_a_visual_tokenizer_is_free(resume: Resume, tmp_path: Path) -> None:
    """Its content is compared when the run starts."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    first, second = (("objective=[itc,cmim_codes]", f"{CODES}={tmp_path}{way}") for way in ("/one", "/one/../one"))
    assert resume(first, second) == []


def test_objectives_come_and_go_by_name(resume: Resume) -> None:
    own = "+objective.mine={_target_: tests.support.own_objectives.Prototypes}"
    assert resume((own,), (own,)) == []
    (problem,) = resume((own,), ())
    assert problem.startswith("objective=[itc]: must train the same parameters as [itc,mine], whose run is continued;")
    (problem,) = resume((), (own,))
    assert problem.startswith("objective=[itc,mine]: must train the same parameters as [itc], whose run is continued;")
    (problem,) = resume((own,), (own.replace("Prototypes", "FromFile"),))
    assert problem.startswith("objective.mine._target_=tests.support.own_objectives.FromFile: must be ")


@pytest.mark.parametrize("change", ["num_codes=32", "num_heads=2", "num_layers=1", "code_dim=16"])
def test_a_visual_tokenizer_keeps_its_sizes(resume: Resume, change: str) -> None:
    assert resume(TOKENIZER, (*TOKENIZER, "task.decay=0.9")) == []
    (problem,) = resume(TOKENIZER, (*TOKENIZER, f"task.{change}"))
    assert problem.startswith(f"task.{change}: must be ")
    assert problem.endswith(", as in the run that is continued; leave it out, or give another run.name")


def test_an_optimizer_has_a_state(resume: Resume) -> None:
    assert resume((), ("optimizer.lr=1e-4",)) == []
    (problem,) = resume((), ("optimizer=muon",))
    assert problem.startswith("optimizer._target_=m2_encoder.training.optim.build_muon: must be ")
    assert problem.endswith(f"{AS_BEFORE}; leave optimizer=... out, or give another run.name")
