"""`m2-train`: one run, from a configuration to a trained, evaluated and exported model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from m2_encoder.config.command import Command, run_command
from m2_encoder.config.paths import default_run_folder
from m2_encoder.config.validate import validate_train
from m2_encoder.runs.run import train


def _run(cfg: dict[str, Any]) -> int:
    train(cfg)
    return 0


def _name_repetition(cfg: dict[str, Any], folder: Path, lines: Sequence[str]) -> list[str]:
    """A free name for `--config-path outputs/<name> --config-name config`, which repeats a run beside itself."""
    run = cfg.get("run")
    if not isinstance(run, dict) or not all(isinstance(run.get(key), str) for key in ("name", "folder")):
        return []  # something is missing, which validation will say
    original = default_run_folder(cfg)
    named = any(line.startswith(("run.name=", "run.resume=")) for line in lines)
    if named or folder != original:
        return []
    number = 2
    while (name := f"{original.name}-{number}") and (original.parent / name).exists():
        number += 1
    print(f"m2-train: repeating {original.name} as {name}", file=sys.stderr)
    return [f"run.name={name}"]


COMMAND: Final = Command(
    name="m2-train",
    config_name="train",
    summary="Train, evaluate and export an image-text encoder; one folder in outputs/ per run.",
    examples=(
        "m2-train +experiment=emoji",
        "m2-train +experiment=emoji run.name=wide model.embed_dim=256 optimizer.lr=5e-4",
        "m2-train +experiment=emoji run.name=two strategy=ddp trainer.devices=2",
        "m2-train data=webdataset data.sources.main.shards='/data/{000..099}.tar' model.tokenizer=sp.model",
        "m2-train ... strategy=grouped_ddp strategy.group_size=8   # negatives from 8 ranks instead of from all",
        "m2-train -m +experiment=smoke optimizer.lr=1e-3,2e-3      # smoke-lr=0.001, smoke-lr=0.002",
        "m2-train --config-path outputs/emoji --config-name config  # repeats a run",
    ),
    check=validate_train,
    run=_run,
    run_folder=default_run_folder,
    complete=_name_repetition,
    notes=(
        "A run's folder must not exist; run.resume=auto continues one, run.resume=must insists on a checkpoint.",
        "Exit codes: 0 done, 2 something to mend (listed on stderr before anything starts), 130 interrupted, 143 saved",
        "and ended by SIGTERM.",
    ),
)


def main() -> int:
    """Entry point of `m2-train`."""
    return run_command(COMMAND)


if __name__ == "__main__":
    sys.exit(main())
