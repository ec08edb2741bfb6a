"""`m2-search`: search in a folder of pictures; one sub-command per task."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Final

from m2_encoder.cli import commands
from m2_encoder.cli.sub_commands import run_sub_command
from m2_encoder.config.help import read_values
from m2_encoder.config.overrides import quote_value
from m2_encoder.config.paths import find_conf
from m2_encoder.errors import UserError, abridge

_COMMANDS: Final = (
    commands.SEARCH_INDEX, commands.SEARCH_QUERY, commands.SEARCH_SIMILAR, commands.SEARCH_DUPLICATES,
)  # fmt: skip
SUB_COMMANDS: Final = {command.name.removeprefix("m2-search "): command for command in _COMMANDS}

PLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "index": ("photos",),
    "query": ("index", "query"),
    "similar": ("index", "picture"),
    "duplicates": ("index",),
}
"""What arguments without a key are, by sub-command and in their order."""


def name_places(argv: Sequence[str], places: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Gives arguments without a key theirs; a text may hold anything, also "=" and Hydra's signs.

    >>> name_places(["photos.index", "E=mc2", "top=5"], ["index", "query"], ["index", "query", "top"])
    ['index="photos.index"', 'query="E=mc2"', 'top=5']

    Args:
        argv: arguments.
        places: keys of those without one, in their order.
        keys: of the command: what begins with one of them and "=" has its key.

    Raises:
        UserError: if there are more arguments than places, or a key is given, too.
    """
    values = {"--cfg", "-c", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
    named: list[str] = []
    given = [argument.partition("=")[0] for argument in argv if argument.partition("=")[0] in keys and "=" in argument]
    left = [key for key in places if key not in given]
    for i, argument in enumerate(argv):
        key, equals, _ = argument.partition("=")
        is_option = argument.startswith("--") or argument in {"-h", "-m", *values} or (i > 0 and argv[i - 1] in values)
        if is_option or (equals and key.lstrip("+~") in keys):
            named.append(argument)
        elif left:
            named.append(f"{left.pop(0)}={quote_value(_escape(argument))}")
        else:
            raise UserError(f"{abridge(argument, 100)}: expected {' '.join(map(str.upper, places))}, then key=value")
    return named


def _escape(text: str) -> str:
    r"""A text in which nothing refers to other values: `${x}` is `\${x}` for OmegaConf."""
    return text.replace("${", "\\${")


def _name(sub_command: str, argv: Sequence[str]) -> list[str]:
    values = read_values(find_conf() / "commands" / f"{SUB_COMMANDS[sub_command].config_name}.yaml")
    return name_places(argv, PLACES[sub_command], [line.partition("=")[0] for line, _ in values])


def main() -> int:
    """Entry point of `m2-search`: the first argument names the sub-command."""
    return run_sub_command(
        "m2-search",
        sys.argv[1:],
        SUB_COMMANDS,
        _name,
        about="search in a folder of pictures",
        example="  m2-search index photos model=outputs/emoji/export\n  m2-search query photos.index 红色的水果",
    )


if __name__ == "__main__":
    sys.exit(main())
