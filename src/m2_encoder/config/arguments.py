"""The flags of a command line, before Hydra sees them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra._internal.utils import get_args_parser

from m2_encoder.errors import UserError


class Arguments(NamedTuple):
    """A command line, taken apart.

    Attributes:
        help: the user wants the help text.
        multirun: the user wants every combination of the swept values.
        shows_only: Hydra prints something (`--cfg`, `--info`, ...) and no job runs.
        config_path: absolute folder of another primary configuration, or None.
        config_name: name of another primary configuration, or None.
        config_dir: absolute folder with more groups and experiments, or None.
        flags: the flags that Hydra itself gets.
        overrides: the `key=value` part.
    """

    help: bool
    multirun: bool
    shows_only: bool
    config_path: Path | None
    config_name: str | None
    config_dir: Path | None
    flags: list[str]
    overrides: list[str]


def parse_arguments(command_name: str, argv: Sequence[str]) -> Arguments:
    """Takes a command line apart with Hydra's own parser.

    Paths count from the working directory and become absolute, because other ranks start elsewhere.

    Raises:
        UserError: for unknown flags, or flags that exclude each other.
    """
    parser = get_args_parser()
    parser.prog = command_name
    parser.exit_on_error = False
    parser.allow_abbrev = False  # --experiment must not become --experimental-rerun
    try:
        found, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see {command_name} --help") from error
    # argparse stops collecting overrides at the first flag after them; what follows comes back as the rest.
    unknown = [item for item in rest if item.startswith("-")]
    if unknown:
        raise UserError(f"{unknown[0]}: unknown flag; options are written key=value, see {command_name} --help")
    if found.experimental_rerun is not None:
        raise UserError(
            "--experimental-rerun: reads a pickle, which could run code; use --config-path and --config-name"
        )
    modes = {
        "--run": found.run, "--multirun": found.multirun, "--cfg": found.cfg, "--info": found.info,
        "--hydra-help": found.hydra_help, "--shell-completion": found.shell_completion,
    }  # fmt: skip
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise UserError(f"{' '.join(given)}: give only one of them")
    if found.resolve and not found.cfg:
        raise UserError("--resolve: only together with --cfg job")
    return Arguments(
        help=found.help,
        multirun=found.multirun,
        shows_only=bool(given) and given[0] not in {"--run", "--multirun"},
        config_path=_absolute(found.config_path),
        config_name=found.config_name and found.config_name.removesuffix(".yaml"),
        config_dir=_absolute(found.config_dir),
        flags=_flags(found),
        overrides=[*found.overrides, *rest],
    )


def _flags(found: argparse.Namespace) -> list[str]:
    switches = ("run", "multirun", "hydra_help", "shell_completion", "resolve")
    flags = [f"--{name.replace('_', '-')}" for name in switches if getattr(found, name)]
    for name in ("cfg", "info", "package"):
        if getattr(found, name) is not None:
            flags += [f"--{name}", getattr(found, name)]
    for name in ("config_path", "config_name"):
        if getattr(found, name) is not None:
            value = getattr(found, name)
            flags += [f"--{name.replace('_', '-')}", str(_absolute(value)) if name == "config_path" else value]
    return flags


def _absolute(path: str | None) -> Path | None:
    if path is None:
        return None
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give the folder that holds the configuration")
    return folder
