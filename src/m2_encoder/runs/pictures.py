"""Which policy of pictures a run has: that of its settings, or of the run that goes on, or of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2_encoder.checkpoints.download import is_url
from m2_encoder.checkpoints.exported import find_pictures
from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER
from m2_encoder.checkpoints.weight_files import find_weights
from m2_encoder.config.model_choice import build_model_config, is_model_name
from m2_encoder.config.objective_files import find_files
from m2_encoder.config.paths import find_path
from m2_encoder.config.problems import show
from m2_encoder.config.schema import is_foreign
from m2_encoder.errors import Problem, UserError
from m2_encoder.hub import choose_pictures
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.pictures import STANDARD, PicturePolicy, read_policy
from m2_encoder.runs.folder import CONFIG_FILE, read_run


def settle_pictures(cfg: Mapping[str, Any], folder: Path, *, resumes: bool) -> tuple[dict[str, Any], list[str]]:
    """A run's configuration with `model.pictures` filled in, and a line on it where it starts from weights.

    Raises:
        UserError: if a run that goes on would see other pixels than before.
    """
    model = cfg["model"]
    given = None if (setting := model.get("pictures")) is None else read_policy(setting)
    begun = folder / CONFIG_FILE
    if resumes and begun.is_file():
        before = read_policy(read_run(begun, needed=("model",))["model"].get("pictures") or STANDARD)
        if given not in (None, before):
            rule = f"must be {show(before.to_setting())}, as in the run that is continued: its pixels would change"
            problem = Problem("model.pictures", setting, rule, "leave it out, or give another run.name")
            raise UserError("the run that is continued does not fit", problems=[problem])
        return _settle(cfg, before), []
    if (weights := model.get("weights")) is None:
        return _settle(cfg, given or STANDARD), []
    trained = pictures_of_weights(model)
    chosen = given or trained
    source = f"the weights of model.weights={weights}"
    if chosen == trained:
        return _settle(cfg, chosen), [f"pictures: {chosen}, as with {source}"]
    return _settle(cfg, chosen), [f"pictures: {chosen}, unlike {source}, whose were {trained}"]


def pictures_of_weights(model: Mapping[str, Any]) -> PicturePolicy:
    """What the pixels were that `model.weights` were trained with.

    A checkpoint in a run's folder has that run's; an export its own; what is neither is taken for official weights, or
    of `tiny` for trained here.

    Raises:
        UserError: if the configuration of that run, or that export, is damaged.
    """
    weights = model["weights"]
    if is_foreign(model):
        return find_pictures(find_path(weights)) or STANDARD
    if is_url(weights):
        return choose_pictures(build_model_config(model), weights)
    path = find_weights(find_path(weights))
    run = path.parent.parent / CONFIG_FILE
    if path.parent.name == CHECKPOINT_FOLDER and run.is_file():
        return read_policy(read_run(run, needed=("model",))["model"].get("pictures") or STANDARD)
    return choose_pictures(build_model_config(model), path)


def describe_other_pictures(cfg: Mapping[str, Any]) -> list[str]:
    """A line for each teacher and visual tokenizer of a settled configuration that was trained on other pixels.

    They see the pictures of the batch, whose pixels are the run's.

    Raises:
        UserError: if an export is damaged.
    """
    own = read_policy(cfg["model"]["pictures"])
    lines = []
    for file in find_files(cfg.get("objective") or {}):
        if file.kind.content == "file":
            continue
        if is_model_name(file.value):
            trained = choose_pictures(M2EncoderConfig.from_name(file.value), file.weights and find_path(file.weights))
        else:
            trained = find_pictures(find_path(file.value)) or own
        if trained != own:
            lines.append(
                f"pictures: {file.key}={file.value} was trained with {trained}, and sees those of this run, {own}; "
                f"'model.pictures={show(trained.to_setting())}' shows all models what it knows"
            )
    return lines


def _settle(cfg: Mapping[str, Any], policy: PicturePolicy) -> dict[str, Any]:
    return {**cfg, "model": {**cfg["model"], "pictures": policy.to_setting()}}
