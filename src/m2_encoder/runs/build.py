"""From plain values of a configuration to the objects of a run that Hydra does not build itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import instantiate
from torch import Tensor

from m2_encoder.checkpoints.visual_tokenizer import load_visual_tokenizer
from m2_encoder.config.model_choice import build_tokenizer, find_path, is_model_name
from m2_encoder.config.paths import anchor
from m2_encoder.data.masking.batch_masking import BatchMasking
from m2_encoder.errors import UserError
from m2_encoder.evaluation.tasks.base import EvaluationTask
from m2_encoder.evaluation.tasks.masked import Masked
from m2_encoder.evaluation.tasks.masked_picture import MaskedPicture
from m2_encoder.evaluation.tasks.reconstruction import Reconstruction
from m2_encoder.evaluation.tasks.retrieval import Retrieval
from m2_encoder.hub import load
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import LocalObjective, Objective
from m2_encoder.objectives.distillation import Distillation
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.patch_targets import VisualCodes
from m2_encoder.runs.folder import UNSAID
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.training.adaptation import Adaptation, check_adaptation


def build_initial_state(model: Mapping[str, Any], config: M2EncoderConfig) -> dict[str, Tensor] | None:
    """Parameters to start from, or None to train from scratch.

    Raises:
        UserError: if the file is missing, no checkpoint, or of another shape.
    """
    weights = model.get("weights")
    if weights is None:
        return None
    source = weights if str(weights).startswith(("http://", "https://")) else anchor(weights)
    return dict(load(config, weights=source, trainable=True).model.state_dict())


def build_tasks(nodes: Mapping[str, Any] | None) -> dict[str, EvaluationTask]:
    """Evaluation tasks by name.

    Args:
        nodes: that `evaluation` names; None for a run's configuration that is older than this group.
    """
    if nodes is None:
        tasks = {"retrieval": Retrieval(), "masked": Masked(), "masked_picture": MaskedPicture()}
        return {**tasks, "reconstruction": Reconstruction()}
    return {name: instantiate(node) for name, node in nodes.items()}


def build_masking(
    objectives: Mapping[str, Objective], tokenizer: SentencePieceTokenizer, config: M2EncoderConfig
) -> BatchMasking | None:
    """What the objectives want hidden of a batch; None if they want nothing.

    Raises:
        UserError: if they want different things.
    """
    wanted: dict[str, Any] = {}
    for key in ("word_ratio", "patch_ratio", "user_dictionary"):
        values = {
            name: getattr(objective, key)
            for name, objective in objectives.items()
            if isinstance(objective, LocalObjective) and objective.weight > 0 and getattr(objective, key) is not None
        }
        if len(set(values.values())) > 1:
            given = ", ".join(f"{name} {value}" for name, value in values.items())
            raise UserError(f"objectives want different {key} ({given}); they share one masked pass: give all the same")
        wanted[key] = next(iter(values.values()), None)
    if wanted["word_ratio"] is None and wanted["patch_ratio"] is None:
        return None
    if wanted["user_dictionary"] is not None:
        wanted["user_dictionary"] = str(find_path(wanted["user_dictionary"]))
    return BatchMasking(tokenizer, grid=config.image_size // config.patch_size, **wanted)


def build_adaptation(cfg: Mapping[str, Any], model: M2EncoderConfig) -> Adaptation:
    """What `adaptation` names.

    Raises:
        UserError: for something else, or what does not fit the model.
    """
    node = (UNSAID | dict(cfg))["adaptation"]
    adaptation = instantiate(node)
    if not isinstance(adaptation, Adaptation):
        raise UserError(
            f"adaptation._target_={node['_target_']}: must be a subclass of m2_encoder.training.adaptation.Adaptation; "
            "derive it from that"
        )
    check_adaptation(adaptation, model)
    return adaptation


def load_teachers(
    objectives: Mapping[str, Objective], model: Mapping[str, Any], config: M2EncoderConfig
) -> Mapping[str, Objective]:
    """Gives every distillation that counts its teacher, on the CPU until the first step.

    Args:
        objectives: by name.
        model: that of the configuration, whose tokenizer the teacher must share.
        config: the student's.

    Returns:
        The same objectives.

    Raises:
        UserError: for a teacher that cannot be loaded, or that reads another tokenizer's ids.
    """
    for name, objective in objectives.items():
        if not isinstance(objective, Distillation) or not objective.weight:
            continue
        tokenizer = build_tokenizer(model, config)
        named = is_model_name(objective.teacher_name)
        source = objective.teacher_name if named else str(find_path(objective.teacher_name))
        weights = None if objective.teacher_weights is None else find_path(objective.teacher_weights)
        with _named(f"objective.{name}.teacher={objective.teacher_name}"):
            teacher = load(source, weights=weights, tokenizer=tokenizer if named else None)
        read = teacher.tokenizer
        if not isinstance(read, SentencePieceTokenizer) or read.model_bytes != tokenizer.model_bytes:
            raise UserError(
                f"objective.{name}.teacher={objective.teacher_name}: must read the ids of model.tokenizer="
                f"{model['tokenizer']}; use the teacher's tokenizer, or another teacher"
            )
        objective.teach_with(teacher.model)
    return objectives


def load_visual_tokenizers(objectives: Mapping[str, Objective], config: M2EncoderConfig) -> Mapping[str, Objective]:
    """Gives every objective that predicts codes its visual tokenizer, on the CPU until the first step.

    Args:
        objectives: by name.
        config: the student's.

    Returns:
        The same objectives.

    Raises:
        UserError: for one that cannot be loaded, or that sees other patches than the student.
    """
    for name, objective in objectives.items():
        if not isinstance(objective, MaskedImage) or not objective.weight:
            continue
        if isinstance(targets := objective.targets, VisualCodes):
            with _named(f"objective.{name}.targets.tokenizer={targets.tokenizer_name}"):
                tokenizer = load_visual_tokenizer(find_path(targets.tokenizer_name))
            for key in ("image_size", "patch_size"):
                own, wanted = getattr(tokenizer, key), getattr(config, key)
                if own != wanted:
                    raise UserError(
                        f"objective.{name}.targets.tokenizer={targets.tokenizer_name}: has {key}={own}, the model "
                        f"{wanted}; train one with m2-train +experiment=visual_tokenizer model.{key}={wanted}"
                    )
            targets.read_with(tokenizer)
    return objectives


@contextlib.contextmanager
def _named(given: str) -> Iterator[None]:
    """Puts the key and the value in front of what cannot be loaded."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{given}: {error}") from error
