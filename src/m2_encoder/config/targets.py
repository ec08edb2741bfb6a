"""What a `_target_` names; the error of one that is not found says how it can be."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from m2_encoder.config.problems import flatten, nearest
from m2_encoder.errors import UserError

_MOST_FOLDERS: Final = 200
"""Folders of the working directory that are looked into for a module that is not found."""


class TargetError(UserError):
    """A `_target_` that names nothing; with the rule and the fix apart."""

    def __init__(self, rule: str, fix: str) -> None:
        super().__init__(f"{rule}; {fix}")
        self.rule, self.fix = rule, fix


def find_target(name: str) -> Any:
    """The class or function of a dotted name, such as `my_parts.Towers` or `package.module.Class.method`.

    Raises:
        TargetError: if its module is not found, fails inside, or has no such name.
    """
    if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        raise TargetError("is no dotted name of a class or function", "give MODULE.NAME, such as my_parts.MyClass")
    module, rest = _import_longest(name.split("."))
    found: Any = module
    for part in rest:
        owner = getattr(found, "__name__", str(found))
        try:
            found = getattr(found, part)
        except AttributeError:
            rule = f"{owner} has no {part}{nearest(part, _names(found))}"
            raise TargetError(rule, f"name one that {_place(found)} defines") from None
        except Exception as error:  # of a module that loads its names when they are asked for
            raise TargetError(*_explain(f"{owner}.{part}", error)) from error
    return found


def add_to_path(folders: Iterable[Path]) -> None:
    """Let modules in these folders be found: last, so that none of them hides another of its name."""
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _import_longest(parts: list[str]) -> tuple[ModuleType, list[str]]:
    """The innermost module of a dotted name, and the names that are left."""
    module = _import(parts[0], above=None)
    for number in range(1, len(parts)):
        name = ".".join(parts[: number + 1])
        if not hasattr(module, "__path__") or (parts[number] in vars(module) and name not in sys.modules):
            return module, parts[number:]
        try:
            module = _import(name, above=module)
        except _NoModuleError:
            if number + 1 == len(parts):
                return module, parts[number:]
            rule = f"{module.__name__} has no module {parts[number]}{nearest(parts[number], _names(module))}"
            raise TargetError(rule, "check the dotted name") from None
    return module, []


class _NoModuleError(Exception):
    """A package has no such module."""


def _import(name: str, *, above: ModuleType | None) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise TargetError(*_explain(name, error)) from error
        if above is not None:
            raise _NoModuleError from error
        raise TargetError(*_explain_missing(name)) from error
    except Exception as error:  # importing a module can raise anything
        raise TargetError(*_explain(name, error)) from error


def _explain_missing(name: str) -> tuple[str, str]:
    """Why a top-level module is not found, with its folder if it lies near."""
    rule = f"there is no module {name} on Python's path{nearest(name, _top_level())}"
    folder = _find_folder(name)
    if folder is None:
        return rule, f"make its folder findable: PYTHONPATH=FOLDER m2-..., or --config-dir FOLDER with {name}.py in it"
    return rule, f"{folder}/{name} is there: start with PYTHONPATH={folder}, or with --config-dir {folder}"


def _explain(name: str, error: Exception) -> tuple[str, str]:
    """What failed inside a module, and at which line."""
    if isinstance(error, SyntaxError):
        file, line = error.filename, error.lineno
    else:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
        file, line = (own[-1].filename, own[-1].lineno) if own else (None, None)
    where = f" at {file}, line {line}" if file else ""
    said = error.msg if isinstance(error, SyntaxError) else flatten(error)
    return f"importing {name} fails{where}: {type(error).__name__}: {said}", "mend that first"


def _is_machinery(file: str) -> bool:
    return file.startswith("<frozen") or file in (__file__, importlib.__file__)


def _find_folder(name: str) -> str | None:
    """The folder with this module, of the working directory and those in it."""
    try:
        places = [Path(), *islice((each for each in sorted(Path().iterdir()) if each.is_dir()), _MOST_FOLDERS)]
    except OSError:
        return None
    for place in places:
        if (place / f"{name}.py").is_file() or (place / name / "__init__.py").is_file():
            return str(place)
    return None


def _top_level() -> list[str]:
    return [module.name for module in pkgutil.iter_modules()]


def _names(owner: object) -> list[str]:
    modules = [module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", []))]
    return [name for name in dir(owner) if not name.startswith("_")] + modules


def _place(owner: object) -> str:
    return str(getattr(owner, "__file__", None) or getattr(owner, "__name__", "it"))
