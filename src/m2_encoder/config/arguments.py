"""A command line taken apart: its flags, and its `key=value` overrides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from m2_encoder.errors import UserError


class Arguments(NamedTuple):
    """A command line, taken apart."""

    help: bool  # the user wants the help text
    multirun: bool  # the user wants every combination of the swept values
    shows_only: bool  # the configuration is printed and nothing runs
    config_path: Path | None  # absolute folder of another primary configuration, or None
    config_name: str | None  # name of another primary configuration, or None
    config_dir: Path | None  # absolute folder with more groups and experiments, or None
    flags: list[str]  # the flags that Hydra itself gets
    overrides: list[str]  # the `key=value` part


def parse_arguments(command_name: str, argv: Sequence[str]) -> Arguments:
    """Takes a command line apart.

    Paths count from the working directory and become absolute, because other ranks start elsewhere.

    Raises:
        UserError: for unknown flags, or flags that exclude each other.
    """
    # Without abbreviations: --conf must not become --config-path.
    parser = argparse.ArgumentParser(prog=command_name, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--config-path", "-cp", type=_find_folder)
    parser.add_argument("--config-name", "-cn", type=lambda name: name.removesuffix(".yaml"))
    parser.add_argument("--config-dir", "-cd", type=_find_folder)
    try:
        found, overrides = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see {command_name} --help") from error
    if unknown := next((item for item in overrides if item.startswith("-")), None):
        raise UserError(f"{unknown}: unknown flag; options are written key=value, see {command_name} --help")
    if found.multirun and found.cfg:
        raise UserError("--multirun --cfg: give only one of them")
    for name in ("resolve", "package"):
        if getattr(found, name) and not found.cfg:
            raise UserError(f"--{name}: only together with --cfg job")
    flags = [f"--{name}" for name in ("multirun", "resolve") if getattr(found, name)]
    for flag, value in {
        "--cfg": found.cfg,
        "--package": found.package,
        "--config-path": found.config_path,
        "--config-name": found.config_name,
    }.items():
        flags += [] if value is None else [flag, str(value)]
    return Arguments(
        help=found.help,
        multirun=found.multirun,
        shows_only=found.cfg is not None,
        config_path=found.config_path,
        config_name=found.config_name,
        config_dir=found.config_dir,
        flags=flags,
        overrides=overrides,
    )


def _find_folder(path: str) -> Path:
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: no such folder; give the folder that holds the configuration")
    return folder
