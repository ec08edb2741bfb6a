"""Builds the loggers of the package that a configuration names beside `metrics.jsonl`: Weights & Biases, and CSV.

Lightning and wandb are imported by the functions: checking their arguments needs neither.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlparse

from m2_encoder.bounds import Count, Seconds, Text
from m2_encoder.config.output import say
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.record import describe_run
from m2_encoder.runs.wandb_files import find_id, keep_id, new_id, set_aside

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger, WandbLogger

_INIT_TIMEOUT_S: Final = 15.0
_DELETED: Final = "previously created and deleted"  # W&B's word for an id that it does not take again
_SHOWN: Final = 200  # characters of a message
_WANDB_MODES: Final = ("online", "offline", "disabled")


def build_csv_logger(*, folder: Path, flush_every_n_steps: Count = 100) -> CSVLogger:
    """Scalars as CSV, in `<run folder>/csv/version_<n>/metrics.csv`."""
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(save_dir=folder, name="csv", flush_logs_every_n_steps=flush_every_n_steps)


def build_wandb_logger(
    *,
    run_name: str,
    folder: Path,
    cfg: Mapping[str, Any],
    resumes: bool = False,
    project: Text = "m2-encoder",
    entity: Text | None = None,
    group: Text | None = None,
    job_type: Text | None = None,
    tags: Sequence[str] = (),
    artifact: Literal["export", "checkpoint"] | None = None,
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    finish_timeout_s: Seconds = 60.0,
) -> WandbLogger | None:
    """Starts a W&B run with the run's name and an id of its own, kept in the run's folder.

    A run that goes on has the same id. One that was deleted at W&B gets another one. Without a key it stays offline:
    files in the run's folder that `wandb sync` uploads later. It never asks for a key. A server that does not answer
    within 15 s makes it stay offline, too. If W&B cannot start at all, a warning says why and None is returned;
    `metrics.jsonl` has the same scalars.

    Args:
        run_name: its name.
        folder: the run's; W&B's own files go to its sub-folder `wandb`.
        cfg: logged with the git revision and the command; `run.task`, `run.notes` and `run.tags` are W&B's, too.
        resumes: whether the run goes on from a checkpoint.
        project: like `entity`, `group` and `tags`, an argument of `wandb.init`.
        entity: a user or team; None is the account's default.
        group: of runs; None is the variable `WANDB_RUN_GROUP`, which the jobs of a sweep have.
        job_type: None is `run.task`, or "train".
        tags: of the run.
        artifact: what is uploaded when the run ends.
        mode: `auto` is online with a key, else offline. The variable `WANDB_MODE` overrides it.
        finish_timeout_s: for the upload of what is left at the end of the run; the rest is for `wandb sync`.
    """
    resolved = resolve_mode(mode)
    if resolved == "disabled" or not is_first_rank():
        return None
    os.environ.setdefault("WANDB_SILENT", "true")  # its own remarks come before its settings are read
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its own telemetry waits for the server at the end
    given: dict[str, Any] = {"project": project, "entity": entity, "group": group, "job_type": job_type, "tags": tags}
    given = _with_keys_of_run(given, cfg.get("run") or {})
    given |= {"cfg": cfg, "save_dir": str(folder), "name": run_name, "artifact": artifact}
    start = partial(_start, finish_timeout_s=finish_timeout_s, **given)
    started = _start_somewhere(start, resolved, find_id(folder), resumes=resumes)
    if started is None:
        return None
    logger, mode_of_start = started
    place = Path(logger.experiment.dir).parent
    with contextlib.suppress(OSError):  # a full disk is said by those who write what matters
        keep_id(folder, logger.experiment.id)
        set_aside(folder, place)
    if mode_of_start == "offline":
        say(f"W&B: offline, upload later with: wandb sync {place}", error=True)
    return logger


def _with_keys_of_run(given: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `wandb.init`, with what `run` says of itself."""
    tags = list(dict.fromkeys((*given["tags"], *(run.get("tags") or ()))))
    return {
        **given,
        "tags": tags,
        "job_type": given["job_type"] or run.get("task") or "train",
        "notes": run.get("notes"),
    }


def _start_somewhere(
    start: Callable[..., WandbLogger], mode: str, known_id: str | None, *, resumes: bool
) -> tuple[WandbLogger, str] | None:
    """Starts online if that is possible, else offline; None if W&B does not start at all.

    Offline, and from the beginning, W&B is told of no run that goes on: what it gets is whole, and replaces what it
    may have of the run. Told so, `wandb sync` would add the same steps once more.
    """
    run_id = known_id or new_id()
    tries = [("online", run_id), ("offline", run_id)] if mode == "online" else [("offline", run_id)]
    while tries:
        mode, run_id = tries.pop(0)
        try:
            resume = "allow" if mode == "online" and resumes and run_id == known_id else None
            return start(mode, id=run_id, resume=resume), mode
        except Exception as error:  # its client, its service, the disk and the network raise what they like
            if not tries and mode == "offline":
                say(f"W&B: not available ({first_line(error)}); metrics.jsonl has all scalars", error=True)
                return None
            forget_service()  # else the name would be in use
            if _DELETED in str(error) and run_id == known_id:
                say("W&B: the run was deleted there; it begins again as another one, with all its steps", error=True)
                other = new_id()
                tries = [("online", other), ("offline", other)]
            else:
                say(f"W&B: its server cannot be used ({first_line(error)}); staying offline", error=True)
    return None


def forget_service() -> None:
    """Drop the connection to a W&B process that is gone; else its error would come up when this process ends."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # W&B ends the process with the code of its own one
        wandb.teardown()
    wandb.run = None  # else Lightning's logger would take the next run for a part of it


def _start(mode: str, *, finish_timeout_s: float, cfg: Mapping[str, Any], **given: Any) -> WandbLogger:
    """Starts the run now, where a failure can still be told from one of the training."""
    import wandb  # a second, which runs without it need not wait

    from m2_encoder.runs.wandb_logger import QuietWandbLogger

    facts = describe_run()
    logger = QuietWandbLogger(
        mode=mode,
        config={**cfg, "git_revision": facts["git_revision"], "command": facts["command"]},
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=finish_timeout_s,  # wandb's hook at the end of the process keeps to it, too
            finish_timeout_raises=True,
        ),
        **given,
    )
    _ = logger.experiment
    return logger


def resolve_mode(mode: str) -> str:
    """What "auto" means here: online with a key, offline without; `WANDB_MODE` wins where it says something usable."""
    wanted = os.environ.get("WANDB_MODE", "").strip().lower()
    if wanted in {"dryrun", "offline"}:
        return "offline"
    if wanted in _WANDB_MODES:
        mode = wanted
    if mode in {"offline", "disabled"}:
        return mode
    if has_wandb_key():
        return "online"
    if mode == "online":
        say("W&B: no key found (WANDB_API_KEY, or `wandb login`); staying offline", error=True)
    return "offline"


def has_wandb_key() -> bool:
    """Whether W&B can log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY", "").strip():
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        entry = netrc.netrc(str(path)).authenticators(host or "api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(entry and entry[2])


def first_line(error: BaseException) -> str:
    """The beginning of an error's message; its type where it has none."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], _SHOWN) if lines else type(error).__name__
