"""`m2-train`: one run, from a configuration to a trained, evaluated and exported model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2_encoder.cli.commands import TRAIN
from m2_encoder.config.paths import default_run_folder


def run_train(cfg: dict[str, Any]) -> None:
    """Trains; Lightning is imported only now, when the configuration is known to be fine."""
    from m2_encoder.runs.run import train

    train(cfg)


def name_repetition(cfg: dict[str, Any], folder: Path, lines: Sequence[str]) -> list[str]:
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


def main() -> int:
    """Entry point of `python -m m2_encoder.cli.train`, which is `m2-train`."""
    return TRAIN()


if __name__ == "__main__":
    sys.exit(main())
