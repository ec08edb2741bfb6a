"""Where the commands find `conf/` and where they write `outputs/`.

They work from any folder of a checkout, from elsewhere with an editable install, and after `pip install .`.
"""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from m2_encoder.errors import UserError

LAST_CHECKPOINT: Final = "checkpoints/last.ckpt"
"""In a run's folder: the newest training state."""

RUN_LOCK: Final = ".lock"
"""In a run's folder, while a process trains there: which one (`files.hold_lock`)."""

DEBUG_FOLDER: Final = "debug"
"""In `run.folder`: runs that are only tries, each replaced by the next one of its name."""

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def find_checkout(start: Path | None = None) -> Path | None:
    """The nearest folder at or above `start` (the working directory) that holds this project's `conf/` and `src/`."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "conf" / "train.yaml").is_file() and (folder / "src" / "m2_encoder").is_dir():
            return folder
    return None


def find_conf(start: Path | None = None) -> Path:
    """The folder of configurations that the commands compose from.

    The checkout around `start` comes first, then the copy inside an installed package, then the checkout that
    an editable install points to.

    Raises:
        FileNotFoundError: if the installation is damaged: none of the three exists.
    """
    checkout = find_checkout(start)
    candidates = [checkout / "conf"] if checkout else []
    candidates += [PACKAGE_FOLDER / "conf", PACKAGE_FOLDER.parents[1] / "conf"]
    for folder in candidates:
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configurations in {' or '.join(map(str, candidates))}: install m2-encoder again")


def check_checkout(start: Path | None = None) -> None:
    """Refuse to read `conf/` of one checkout with the code of another; a copy of the same code is as good.

    Raises:
        UserError: naming both.
    """
    checkout = find_checkout(start)
    if checkout is None or (own := checkout / "src" / "m2_encoder").resolve() == PACKAGE_FOLDER:
        return
    if (differing := _find_difference(own, PACKAGE_FOLDER)) is not None:
        rule = f"its conf/ would be read by other code, that of {PACKAGE_FOLDER} (such as {differing})"
        fix = f"start with PYTHONPATH={checkout / 'src'}, install this checkout, or start from another folder"
        raise UserError(f"the working directory is in the checkout {checkout}: {rule}; {fix}")


def _find_difference(one: Path, other: Path) -> str | None:
    """The first Python file that is not the same in both packages."""
    names = {str(path.relative_to(folder)) for folder in (one, other) for path in folder.rglob("*.py")}
    for name in sorted(names):
        files = (one / name, other / name)
        if not all(file.is_file() for file in files) or not filecmp.cmp(*files, shallow=False):
            return name
    return None


def anchor(path: str | Path, start: Path | None = None) -> Path:
    """Absolute form of a path of outputs or data.

    A relative one counts from the checkout's root, so that a command does the same from any of its folders;
    outside of a checkout it counts from the working directory.
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    return (find_checkout(start) or (start or Path.cwd()).resolve()) / path


def find_path(path: str | Path) -> Path:
    """A path that is read: from the working directory or, if nothing is there, from the checkout's root."""
    here = Path(path).expanduser()
    return here if os.path.exists(here) else anchor(path)


def find_pattern(pattern: str) -> str:
    """The same for a path with braces or wildcards, which is where its folder is; urls stay as they are."""
    fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
    folder = pattern if fixed == pattern else os.path.dirname(fixed)
    if "://" in pattern or os.path.exists(Path(folder).expanduser()) or not os.path.exists(anchor(folder)):
        return pattern
    return str(anchor(pattern))


def find_patterns(patterns: str | Sequence[str]) -> str | list[str]:
    """The same for one, or for each of a list."""
    return find_pattern(patterns) if isinstance(patterns, str) else [find_pattern(each) for each in patterns]


def has_checkpoint(run_folder: Path) -> bool:
    """Whether a run has saved anything; partial files begin with a dot."""
    return any(not path.name.startswith(".") for path in (run_folder / LAST_CHECKPOINT).parent.glob("*.ckpt"))


def is_debug(cfg: Mapping[str, Any]) -> bool:
    """Whether a run is only a try: `debug=...`, or Lightning's `fast_dev_run`."""
    trainer = cfg.get("trainer")
    return bool(cfg["run"].get("debug") or (isinstance(trainer, Mapping) and trainer.get("fast_dev_run")))


def default_run_folder(cfg: Mapping[str, Any]) -> Path:
    """`<run.folder>/<run.name>` of a configuration that has both; tries lie in a folder of their own, `debug`."""
    folder = anchor(cfg["run"]["folder"])
    return (folder / DEBUG_FOLDER if is_debug(cfg) else folder) / str(cfg["run"]["name"])
