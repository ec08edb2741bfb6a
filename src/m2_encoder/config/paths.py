"""Where the commands find `conf/` and where they write `outputs/`.

They work from any folder of a checkout, from elsewhere with an editable install, and after `pip install .`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

LAST_CHECKPOINT: Final = "checkpoints/last.ckpt"
"""In a run's folder: the newest training state."""

RUN_LOCK: Final = ".lock"
"""In a run's folder, while a process trains there: which one (`files.hold_lock`)."""

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


def anchor(path: str | Path, start: Path | None = None) -> Path:
    """Absolute form of a path of outputs or data.

    A relative one counts from the checkout's root, so that a command does the same from any of its folders;
    outside of a checkout it counts from the working directory.
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    return (find_checkout(start) or (start or Path.cwd()).resolve()) / path


def has_checkpoint(run_folder: Path) -> bool:
    """Whether a run has saved anything; partial files begin with a dot."""
    return any(not path.name.startswith(".") for path in (run_folder / LAST_CHECKPOINT).parent.glob("*.ckpt"))


def default_run_folder(cfg: Mapping[str, Any]) -> Path:
    """`<run.folder>/<run.name>` of a configuration that has both."""
    return anchor(cfg["run"]["folder"]) / str(cfg["run"]["name"])
