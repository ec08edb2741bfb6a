"""`m2-export`: a run's checkpoint as a folder that `m2_encoder.load` reads."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from m2_encoder.checkpoints.matching_head import HEAD_FILE, MatchingHead, read_head
from m2_encoder.cli.build import build_model_config, build_tokenizer
from m2_encoder.cli.card import build_card
from m2_encoder.cli.compose import UNSET
from m2_encoder.cli.main import Command, default_run_folder, run_command
from m2_encoder.cli.path_values import protect_paths
from m2_encoder.cli.paths import anchor
from m2_encoder.cli.provenance import command_line, git_revision, versions
from m2_encoder.cli.reranking import find_head
from m2_encoder.cli.rules import Rule, check_rules, flag, text
from m2_encoder.cli.run_folder import CONFIG_FILE, LAST_CHECKPOINT, read_config
from m2_encoder.errors import UserError
from m2_encoder.export import CardInfo, export_model
from m2_encoder.hub import load
from m2_encoder.models.m2_encoder import M2Encoder

EXPORT_FOLDER: Final = "export"
SUMMARY_FILE: Final = "summary.json"
_RULES: Final[tuple[Rule, ...]] = (
    text("run.name", "emoji"),
    text("run.folder", "outputs"),
    text("checkpoint", "last"),
    text("output", "outputs/emoji/export", optional=True),
    flag("overwrite"),
)
_PATH_KEYS: Final = ("run.folder", "checkpoint", "output")
_KEYS: Final = ("run", "checkpoint", "output", "overwrite")


def export_run(
    run_folder: Path,
    *,
    model: M2Encoder,
    cfg: Mapping[str, Any],
    matching: MatchingHead | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Exports a model with what its run's folder knows about it.

    Args:
        run_folder: `summary.json` in it gives the metrics, if it is there.
        model: what is exported.
        cfg: the run's resolved configuration.
        matching: the trained head, where the run had one.
        output: where; `<run_folder>/export` by default.
        overwrite: replace an existing folder.

    Returns:
        The folder written.
    """
    return export_model(
        output or run_folder / EXPORT_FOLDER,
        model=model,
        tokenizer=build_tokenizer(cfg["model"], model.config),
        metrics=read_metrics(run_folder / SUMMARY_FILE),
        provenance={
            "run": cfg["run"]["name"],
            "git_revision": git_revision(),
            "command": command_line(),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        },
        card=_card(cfg, matching),
        matching=matching,
        overwrite=overwrite,
    )


def _card(cfg: Mapping[str, Any], matching: MatchingHead | None) -> CardInfo:
    card = build_card(cfg)
    if matching is None:
        return card
    use = f"{HEAD_FILE}; it orders retrieved candidates anew: m2-evaluate model=FOLDER rerank=16"
    return dataclasses.replace(card, training={**card.training, "matching head": use})


def read_metrics(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Final metrics of a `summary.json` as split, language, metric; empty if there is no such file.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["table"]
        return {
            split: {
                language: {name: float(value) for name, value in values.items()}
                for language, values in languages.items()
            }
            for split, languages in table.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged; evaluate again with m2-train ... run.resume=auto") from error


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


def _run(cfg: dict[str, Any]) -> int:
    folder = default_run_folder(cfg)
    trained = read_config(folder / CONFIG_FILE)
    model = load(build_model_config(trained["model"]), weights=_checkpoint(cfg)).model
    found = find_head(trained)
    head = found and read_head(_checkpoint(cfg), name=found.name, text_expert=found.text_expert)
    output = export_run(
        folder, model=model, cfg=trained, matching=head, output=_output(cfg), overwrite=cfg["overwrite"]
    )
    print(f"exported to {output}; use it with m2_encoder.load({str(output)!r})")
    return 0


COMMAND: Final = Command(
    name="m2-export",
    config_name="export",
    config_folder="commands",
    summary="Write a run's checkpoint as a folder for m2_encoder.load: configuration, weights, tokenizer, model card.",
    examples=(
        "m2-export run.name=emoji",
        "m2-export run.name=emoji checkpoint=step=500.ckpt output=outputs/emoji/export-500",
    ),
    check=check_export,
    run=_run,
    notes=("checkpoint: `last`, the name of a file in the run's checkpoints/, or the path of a copy of one.",),
)


def main() -> int:
    """Entry point of `m2-export`."""
    return run_command(COMMAND, protect_paths(sys.argv[1:], _PATH_KEYS))


if __name__ == "__main__":
    sys.exit(main())
