"""Files of a run's folder that several commands read: `config.yaml` and the last checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from omegaconf import OmegaConf

from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import write_text

CONFIG_FILE: Final = "config.yaml"
LAST_CHECKPOINT: Final = "checkpoints/last.ckpt"

_HEADER: Final = """\
# Resolved configuration of a run. To repeat it, in a folder of its own:
#   m2-train --config-path {folder} --config-name config
"""
UNSAID: Final = {"adaptation": {"_target_": "m2_encoder.training.adaptation.Full"}}
"""What configurations of earlier versions leave out."""


def write_config(path: Path, cfg: Mapping[str, Any]) -> None:
    """Writes the resolved configuration, which composes alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create(dict(cfg)))
    write_text(path, _HEADER.format(folder=f"outputs/{path.parent.name}") + text)


def read_config(path: Path) -> dict[str, Any]:
    """Reads what `write_config` wrote.

    Raises:
        UserError: if there is no such file, or it is no YAML mapping.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the run.name of a run that m2-train has started")
    try:
        # OmegaConf's reader, because YAML's own takes 1e-05 for a text.
        cfg = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(cfg, dict):
        raise UserError(f"{path}: must hold a mapping")
    return {str(key): value for key, value in cfg.items()}


def read_content(checkpoint: Path) -> dict[str, Any]:
    """What a training checkpoint holds, its tensors without their values, which are not read.

    Raises:
        CheckpointError: if the file is damaged or something else.
    """
    try:
        content = torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)
        return {**content, "global_step": int(content["global_step"]), "state_dict": dict(content["state_dict"])}
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: no training checkpoint, or a damaged one; start again with another run.name"
        ) from error


def read_step(checkpoint: Path) -> int:
    """Optimizer steps that a training checkpoint has done; its tensors are not read.

    Raises:
        CheckpointError: if the file is damaged or something else.
    """
    return int(read_content(checkpoint)["global_step"])
