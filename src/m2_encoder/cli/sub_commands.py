"""Commands whose first argument names what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from m2_encoder.config.command import Command, run_command
from m2_encoder.config.job import EXIT_USER_ERROR, report_problems
from m2_encoder.config.output import lasting_output, say
from m2_encoder.errors import UserError, abridge

NameArguments = Callable[[str, Sequence[str]], Sequence[str]]
"""Gives arguments of a sub-command that have no key theirs; raises `UserError` if it cannot."""


def run_sub_command(
    program: str,
    arguments: Sequence[str],
    commands: Mapping[str, Command],
    name: NameArguments,
    *,
    about: str,
    example: str,
) -> int:
    """Runs the sub-command that the first argument names, or shows all of them; gives the exit code.

    Args:
        program: such as "m2-data".
        arguments: of the command line.
        commands: by the names of sub-commands.
        name: gives the arguments behind the first one their keys.
        about: one line of help.
        example: lines of help.
    """
    with lasting_output():
        if not arguments or arguments[0] in {"--help", "-h"}:
            width = max(map(len, commands))
            print(f"{program}: {about}\n\nSub-commands (each has its own --help):")
            print("\n".join(f"  {called:<{width}}  {command.summary}" for called, command in commands.items()))
            print(f"\nExample:\n{example}")
            return 0 if arguments else EXIT_USER_ERROR
        command = commands.get(arguments[0])
        if command is None:
            known = ", ".join(commands)
            say(f"{program}: {abridge(arguments[0], 100)}: no such sub-command; choose from {known}", error=True)
            return EXIT_USER_ERROR
        try:
            argv = name(arguments[0], arguments[1:])
        except UserError as error:
            report_problems(command.name, error)
            return EXIT_USER_ERROR
        return run_command(command, list(argv))
