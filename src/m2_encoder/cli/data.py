"""`m2-data`: prepare data; one sub-command per task."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from m2_encoder.cli import commands
from m2_encoder.cli.sub_commands import run_sub_command
from m2_encoder.config.output import say
from m2_encoder.config.overrides import quote_value
from m2_encoder.errors import Problem, UserError


def check_emoji(cfg: dict[str, Any]) -> list[Problem]:
    """What is wrong with a configuration of `m2-data emoji`."""
    from m2_encoder.bounds import Text
    from m2_encoder.config.check import check_values, read_parameters
    from m2_encoder.config.emoji_folder import emoji_folder_problems
    from m2_encoder.data.emoji.dataset import write_emoji_shards

    parameters = {name: item for name, item in read_parameters(write_emoji_shards).items() if name != "styles"}
    parameters["folder"] = parameters["folder"].replace(annotation=Text | None)
    problems = list(check_values("", cfg, parameters, name="m2-data emoji"))
    return problems or list(emoji_folder_problems("folder", cfg["folder"], _settings(cfg)))


def run_emoji(cfg: dict[str, Any]) -> int:
    """Writes the tars and says where they are."""
    from m2_encoder.config.emoji_folder import find_emoji_folder
    from m2_encoder.data.emoji.dataset import EMOJI_SPLITS, write_emoji_shards

    folder = write_emoji_shards(find_emoji_folder(cfg["folder"], _settings(cfg)), **_settings(cfg))
    say(f"{folder}")
    for split in EMOJI_SPLITS:
        shards = sorted((folder / split).glob("*.tar"))
        say(f"  {split:<17} {len(shards):>2} tars, {sum(path.stat().st_size for path in shards) / 1e6:5.1f} MB")
    return 0


def _settings(cfg: dict[str, Any]) -> dict[str, Any]:
    return {name: cfg[name] for name in ("heldout_style", "samples_per_shard")}


_COMMANDS: Final = (
    commands.DATA_EMOJI, commands.DATA_PACK, commands.DATA_CHECK, commands.DATA_STATS, commands.DATA_CURATE,
    commands.DATA_SPLIT, commands.DATA_TOKENIZER,
)  # fmt: skip
SUB_COMMANDS: Final = {command.name.removeprefix("m2-data "): command for command in _COMMANDS}


def name_sources(argv: Sequence[str], key: str) -> list[str]:
    """Gives arguments without a key theirs.

    >>> name_sources(["tars", "full=true"], "source")
    ['source=tars', 'full=true']

    Several become a list. What is an option, or the value of one such as `--cfg job`, stays.

    Raises:
        UserError: if the key is given, too.
    """
    values = {"--cfg", "-c", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
    plain = [
        i
        for i, argument in enumerate(argv)
        if not argument.startswith(("-", "+", "~"))
        and ("=" not in argument or os.path.exists(argument))
        and not (i and argv[i - 1] in values)
    ]
    if not plain:
        return list(argv)
    if given := [argument for argument in argv if argument.startswith(f"{key}=")]:
        raise UserError(f"{argv[plain[0]]} and {given[0]} both name what to read; give one of them")
    quoted = [value if len(plain) == 1 else quote_value(value) for value in (argv[i] for i in plain)]
    named = f"{key}={quoted[0]}" if len(quoted) == 1 else f"{key}=[{','.join(quoted)}]"
    return [named, *(argument for i, argument in enumerate(argv) if i not in plain)]


def _name(sub_command: str, argv: Sequence[str]) -> list[str]:
    if sub_command == "emoji":  # the others read something: `m2-data check tars`
        return list(argv)
    return name_sources(argv, "shards" if sub_command == "curate" else "source")


def main() -> int:
    """Entry point of `m2-data`: the first argument names the sub-command."""
    example = "  m2-data emoji folder=emoji-tars"
    return run_sub_command("m2-data", sys.argv[1:], SUB_COMMANDS, _name, about="prepare data", example=example)


if __name__ == "__main__":
    sys.exit(main())
