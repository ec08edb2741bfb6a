"""`m2-export`: a run's checkpoint as a folder that `m2_encoder.load` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from m2_encoder.checkpoints.matching_head import read_head
from m2_encoder.config.paths import anchor, default_run_folder
from m2_encoder.config.problems import UNSET
from m2_encoder.config.rules import Rule, check_rules, flag, text
from m2_encoder.runs.export import EXPORT_FOLDER, export_run, find_head, read_trained
from m2_encoder.runs.folder import CONFIG_FILE, LAST_CHECKPOINT, read_config

_RULES: Final[tuple[Rule, ...]] = (
    text("run.name", "emoji"),
    text("run.folder", "outputs"),
    text("checkpoint", "last"),
    text("output", "outputs/emoji/export", optional=True),
    flag("overwrite"),
)
_KEYS: Final = ("run", "checkpoint", "output", "overwrite")


def check_export(cfg: dict[str, Any]) -> list[str]:
    """What is wrong with a configuration of `m2-export`."""
    problems = [problem.text for problem in check_rules(cfg, _RULES)]
    problems += [f"{key}: unknown; known: {', '.join(_KEYS)}" for key in cfg if key not in _KEYS]
    if problems or UNSET in (cfg["run"]["name"], cfg["run"]["folder"]):
        return problems  # what is missing has been reported
    folder = default_run_folder(cfg)
    if not (folder / CONFIG_FILE).is_file():
        names = sorted(path.parent.name for path in folder.parent.glob(f"*/{CONFIG_FILE}"))
        known = f"; there is: {', '.join(names)}" if names else ""
        problems.append(f"run.name={cfg['run']['name']}: no run in {folder}{known}; train it first with m2-train")
    elif read_config(folder / CONFIG_FILE).get("task") is not None:
        return [
            f"run.name={cfg['run']['name']}: trained no encoder but what task= names; m2-train exports that itself, to "
            f"{folder / EXPORT_FOLDER}, unless run.export=false"
        ]
    elif not _checkpoint(cfg).is_file():
        problems.append(
            f"checkpoint={cfg['checkpoint']}: no file {_checkpoint(cfg)}; give `last` or the path of a checkpoint"
        )
    elif (owner := _find_owner(_checkpoint(cfg))) is not None and owner != folder.resolve():
        elsewhere = "" if owner.parent == folder.resolve().parent else f" run.folder={owner.parent}"
        problems.append(
            f"checkpoint={cfg['checkpoint']}: is of the run in {owner}; use run.name={owner.name}{elsewhere}"
        )
    if _output(cfg).exists() and not cfg["overwrite"]:
        problems.append(f"output={_output(cfg)}: exists already; add overwrite=true, or give another output")
    return problems


def _checkpoint(cfg: Mapping[str, Any]) -> Path:
    """`last`, the name of a checkpoint in the run's folder, or a path."""
    named = str(cfg["checkpoint"])
    folder = default_run_folder(dict(cfg))
    if named == "last":
        return folder / LAST_CHECKPOINT
    inside = (folder / LAST_CHECKPOINT).parent / named
    return inside if inside.is_file() else anchor(named)


def _find_owner(checkpoint: Path) -> Path | None:
    """The run in whose folder a checkpoint lies; None for one that was copied to where no run is."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / CONFIG_FILE).is_file() else None


def _output(cfg: Mapping[str, Any]) -> Path:
    return anchor(cfg["output"]) if cfg["output"] else default_run_folder(dict(cfg)) / EXPORT_FOLDER


def run_export(cfg: dict[str, Any]) -> int:
    """Exports and says where."""
    folder = default_run_folder(cfg)
    trained = read_config(folder / CONFIG_FILE)
    model = read_trained(trained, _checkpoint(cfg))
    found = find_head(trained)
    head = found and read_head(_checkpoint(cfg), name=found.name, text_expert=found.text_expert)
    output = export_run(
        folder, model=model, cfg=trained, matching=head, output=_output(cfg), overwrite=cfg["overwrite"]
    )
    print(f"exported to {output}; use it with m2_encoder.load({str(output)!r})")
    return 0
