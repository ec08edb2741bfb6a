"""Which policy of pictures a run gets, is continued with, and writes into its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning import LightningDataModule

from m2_encoder import load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.visual_tokenizer import save_visual_tokenizer
from m2_encoder.config.compose import open_composer
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import find_problems, format_problem
from m2_encoder.config.validate import validate_train
from m2_encoder.errors import UserError
from m2_encoder.hub import choose_pictures
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig
from m2_encoder.pictures import OFFICIAL, OLDER, STANDARD, PicturePolicy
from m2_encoder.runs.build import build_data
from m2_encoder.runs.folder import write_config
from m2_encoder.runs.pictures import describe_other_pictures, settle_pictures
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model, small_config

GREY = PicturePolicy(background="grey")


def model(weights: str | None = None, name: str = "tiny", **more: Any) -> dict[str, Any]:
    return {"model": {"name": name, "tokenizer": "emoji", "weights": weights, "pictures": None, **more}}


def settled(cfg: dict[str, Any], folder: Path = Path("nowhere"), *, resumes: bool = False) -> tuple[Any, list[str]]:
    found, lines = settle_pictures(cfg, folder, resumes=resumes)
    return found["model"]["pictures"], lines


@pytest.fixture(scope="module")
def exports(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export with a policy of its own, and one from before there were policies."""
    folder = tmp_path_factory.mktemp("exports")
    tokenizer = SentencePieceTokenizer(repo_root / "src/m2_encoder/assets/emoji/tokenizer.model", context_length=9)
    encoder = random_model(small_config(vocab_size=tokenizer.vocab_size))
    made = {"grey": export_model(folder / "grey", model=encoder, tokenizer=tokenizer, pictures=GREY)}
    made["older"] = export_model(folder / "older", model=encoder, tokenizer=tokenizer)
    content = json.loads((made["older"] / "config.json").read_text())
    del content["preprocess"]["pictures"]
    (made["older"] / "config.json").write_text(json.dumps(content))
    return made


def test_an_export_has_its_policy_and_an_older_one_that_of_its_training(exports: dict[str, Path]) -> None:
    assert load(exports["grey"]).preprocess.pictures == GREY
    assert "alpha on grey" in (exports["grey"] / "README.md").read_text()
    assert load(exports["older"]).preprocess.pictures == OLDER
    assert load(exports["older"], pictures="standard").preprocess.pictures == STANDARD


def test_a_damaged_policy_is_named(exports: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads((exports["grey"] / "config.json").read_text())
    content["preprocess"]["pictures"] = {"background": "red"}
    for name in ("model.safetensors", "tokenizer.model"):
        (tmp_path / name).symlink_to(exports["grey"] / name)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config\.json: damaged or edited .*must be one of standard"):
        load(tmp_path)


def test_teachers_and_visual_tokenizers_of_other_pictures_are_said(exports: dict[str, Path], tmp_path: Path) -> None:
    codes = VisualTokenizer(VisualTokenizerConfig(image_size=8, patch_size=8, num_codes=2, embed_dim=4))
    for name, policy in (("grey", GREY), ("standard", STANDARD)):
        save_visual_tokenizer(tmp_path / name, codes, pictures=policy)
    older = json.loads((tmp_path / "standard" / "config.json").read_text())
    assert older.pop("preprocess") == {"pictures": STANDARD.to_dict()}
    save_visual_tokenizer(tmp_path / "older", codes)
    (tmp_path / "older" / "config.json").write_text(json.dumps(older))

    def said(policy: object, teacher: str, tokenizer: str, weights: str | None = None) -> list[str]:
        distillation = {"_target_": "m2_encoder.objectives.distillation.Distillation", "teacher": teacher}
        distillation |= {} if weights is None else {"teacher_weights": weights}
        targets = {"_target_": "m2_encoder.objectives.patch_targets.VisualCodes", "tokenizer": tokenizer}
        cmim = {"_target_": "m2_encoder.objectives.masked_image.MaskedImage", "targets": targets}
        cfg = {"model": {"pictures": policy}, "objective": {"d": distillation, "c": cmim}}
        return describe_other_pictures(cfg)

    grey, standard = str(exports["grey"]), str(tmp_path / "standard")
    assert said({"background": "grey"}, grey, str(tmp_path / "grey")) == []
    assert said("older", str(exports["older"]), str(tmp_path / "older")) == []
    teacher, tokenizer = said("older", grey, standard)
    assert teacher.startswith(
        f"pictures: objective.d.teacher={grey} was trained with orientation obeyed, alpha on grey"
    )
    assert "those of this run, older (" in teacher
    assert "'model.pictures={background: grey, orientation: obeyed, depth: scaled}'" in teacher
    assert tokenizer.startswith(f"pictures: objective.c.targets.tokenizer={standard} was trained with standard (")
    (official,) = said("standard", "m2-encoder-0.4b", standard, "m2_encoder_0.4B.ckpt")
    assert "'model.pictures=official'" in official


def test_official_models_have_the_official_policy() -> None:
    assert choose_pictures(M2EncoderConfig.from_name("m2-encoder-0.4b"), "m2_encoder_0.4B.ckpt") == OFFICIAL
    assert choose_pictures(M2EncoderConfig.from_name("m2-encoder-10b"), None) == OFFICIAL
    assert choose_pictures(M2EncoderConfig.from_name("tiny"), None) == STANDARD


def test_from_scratch_it_is_standard_whatever_the_size() -> None:
    assert settled(model()) == ("standard", [])
    assert settled(model(name="m2-encoder-1b")) == ("standard", [])
    assert settled(model(pictures={"background": "grey"})) == (GREY.to_dict(), [])


def test_fine_tuning_keeps_the_policy_of_the_weights_and_says_so(exports: dict[str, Path], tmp_path: Path) -> None:
    file = str(exports["grey"] / "model.safetensors")
    setting, (line,) = settled(model(file))
    assert setting == GREY.to_dict()
    assert line == f"pictures: {GREY}, as with the weights of model.weights={file}"
    assert settled(model(str(exports["older"])))[0] == "older"
    official = str(tmp_path / "m2_encoder_1B.ckpt")
    setting, (line,) = settled(model(official, name="m2-encoder-1b"))
    assert (setting, "official (orientation ignored, alpha dropped, 16 bits clipped)" in line) == ("official", True)


def test_another_policy_than_the_weights_is_said_in_one_line(exports: dict[str, Path]) -> None:
    setting, (line,) = settled(model(str(exports["older"] / "model.safetensors"), pictures="standard"))
    assert setting == "standard"
    assert line.startswith(f"pictures: {STANDARD}, unlike the weights of model.weights=")
    assert line.endswith(f"whose were {OLDER}")


def test_a_checkpoint_in_a_runs_folder_has_that_runs_policy(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    write_config(tmp_path / "config.yaml", model(pictures="official"))
    assert settled(model(str(last)))[0] == "official"


def test_a_run_goes_on_with_its_own_policy_and_with_no_other(tmp_path: Path) -> None:
    older = model()
    del older["model"]["pictures"]
    write_config(tmp_path / "config.yaml", older)
    assert settled(model(), tmp_path, resumes=True) == ("older", [])
    assert settled(model(pictures=OLDER.to_dict()), tmp_path, resumes=True) == ("older", [])
    with pytest.raises(UserError) as caught:
        settled(model(pictures="standard"), tmp_path, resumes=True)
    (line,) = map(format_problem, find_problems(caught.value))
    assert "model.pictures=standard: must be older, as in the run that is continued" in line


@pytest.mark.parametrize("data", ["emoji", "webdataset"])
def test_training_and_validation_get_the_policy(data: str, tmp_path: Path) -> None:
    lines = [f"data={data}", *(["data.sources.main.shards=x.tar"] if data == "webdataset" else [])]
    with open_composer(find_conf(), "train") as composer:
        cfg = composer.compose([*lines, "model.pictures={background: black}", f"run.folder={tmp_path}"]).cfg
    assert cfg["model"]["pictures"] == {"background": "black"}
    module = build_data(cfg, {})
    wanted = PicturePolicy(background="black")
    assert module._eval_transform().pictures == wanted
    assert module._decode.keywords["pictures"] == wanted
    assert module._transform.pictures == wanted
    assert module._needs.pictures == wanted


def test_a_wrong_policy_is_refused_before_anything_starts() -> None:
    with open_composer(find_conf(), "train") as composer:
        cfg = composer.compose(["model.pictures=white"]).cfg
    found = [problem for problem in validate_train(cfg, on_this_machine=False) if problem.key == "model.pictures"]
    assert len(found) == 1
    assert "must be one of standard, official, older" in found[0].rule


def test_a_data_module_that_takes_no_policy_has_the_standard_one() -> None:
    with open_composer(find_conf(), "train") as composer:
        cfg = composer.compose(["model.pictures=older"]).cfg
    cfg["data"] = {"_target_": f"{__name__}.Plain"}
    with pytest.raises(UserError, match=r"cannot obey model\.pictures=older"):
        build_data(cfg, {})
    cfg["model"]["pictures"] = "standard"
    assert isinstance(build_data(cfg, {}), Plain)


class Plain(LightningDataModule):
    def __init__(self, *, tokenizer: Any, image_size: int, seed: int, max_steps: int, masking: Any) -> None:
        super().__init__()
