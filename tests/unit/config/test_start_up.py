"""What commands import before they work: the help needs no torch, the refusal of a value no Lightning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMPOSING = {"antlr4", "hydra", "hydra_plugins", "omegaconf", "yaml"}
"""Hydra and what it is made of."""
CHECKING = COMPOSING | {"annotated_types", "numpy", "PIL", "pydantic", "pydantic_core", "safetensors", "sentencepiece",
                        "torch", "torchgen", "typing_extensions", "typing_inspection"}  # fmt: skip
"""What values are compared with."""
ENVIRONMENT = {"_distutils_hack", "attr", "cuda", "packaging", "pkg_resources", "setuptools", "submitit",
               "cloudpickle", "tqdm", "triton", "mpmath", "sympy"}  # fmt: skip
"""What these import where it is installed."""

PROGRAM = """
import importlib.metadata, pkgutil, sys
from pathlib import Path
entry, sys.argv = sys.argv[1], sys.argv[1:]
code = pkgutil.resolve_name(entry)()
folders = {Path(path).resolve() for path in sys.path if path.endswith("-packages")}
files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if "." not in name}
found = [name for name, file in files.items() if file and folders & set(Path(file).resolve().parents)]
print("LOADED", code, *found)
"""


def load(entry: str, *arguments: str) -> tuple[str, set[str]]:
    """The exit code of a command and the packages that it imported, its own and Python's left out."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"m2_encoder.cli.{entry}", *arguments],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    _, code, *found = done.stdout.splitlines()[-1].split()
    return code, {name for name in found if not name.startswith(("_", "m2_encoder"))} - ENVIRONMENT


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        *((f"commands:{name}", ("--help",)) for name in ("TRAIN", "EVALUATE", "EXPORT", "EMBED", "PLAN", "SERVE")),
        ("data:main", ("pack", "--help")),
        ("data:main", ("--help",)),
        *(
            pytest.param("data:main", (name, "--help"), marks=pytest.mark.slow)  # sub-commands as pack is
            for name in ("emoji", "check", "stats", "curate")
        ),
    ],
)
def test_help_needs_no_torch(entry: str, arguments: tuple[str, ...]) -> None:
    code, found = load(entry, *arguments)
    assert code == "0"
    assert found <= COMPOSING


@pytest.mark.parametrize(
    "line",
    [
        "optimizer.lr=-1",
        pytest.param("optimzer.lr=1", marks=pytest.mark.slow),
        pytest.param("model=huge", marks=pytest.mark.slow),
        "model.image_size=65",
        pytest.param("trainer.max_steps=0", marks=pytest.mark.slow),
        "+experiment=emoji trainer.accelerator=cpu seed=-1",
    ],
)
def test_the_refusal_of_a_value_needs_no_lightning(line: str) -> None:
    code, found = load("commands:TRAIN", *line.split())
    assert code == "2"
    assert found <= CHECKING


def test_what_commands_name_is_there() -> None:
    """Their functions are given by name, which no type checker looks at."""
    program = """
import pkgutil
from m2_encoder.cli import commands
for command in vars(commands).values():
    if isinstance(command, commands.Command):
        for name in (command.check, command.run, command.complete, command.check_late):
            assert not name or callable(pkgutil.resolve_name(name)), name
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
