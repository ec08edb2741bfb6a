"""Builds the logger that a configuration names beside `metrics.jsonl`: Weights & Biases, or CSV.

Lightning and wandb are imported by the functions: checking their arguments needs neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import netrc
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlparse

from m2_encoder.bounds import Count, Seconds, Text
from m2_encoder.config.output import say
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.record import describe_run

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger, WandbLogger

_INIT_TIMEOUT_S: Final = 15.0
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
    project: Text = "m2-encoder",
    entity: Text | None = None,
    group: Text | None = None,
    tags: Sequence[str] = (),
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    finish_timeout_s: Seconds = 60.0,
) -> WandbLogger | None:
    """Starts a W&B run with the run's name and an id made of it, so that a requeued job continues its curves.

    Without a key it stays offline: files in the run's folder that `wandb sync` uploads later. It never asks
    for a key. A server that does not answer within 15 s makes it stay offline, too. If W&B cannot start at all, a
    warning says why and None is returned; `metrics.jsonl` has the same scalars.

    Args:
        run_name: its name; `wandb_id` makes its id.
        folder: the run's; W&B's own files go to its sub-folder `wandb`.
        cfg: logged with the git revision and the command.
        project: like `entity`, `group` and `tags`, an argument of `wandb.init`.
        entity: a user or team; None is the account's default.
        group: of runs.
        tags: of the run.
        mode: `auto` is online with a key, else offline. The variable `WANDB_MODE` overrides it.
        finish_timeout_s: for the upload of what is left at the end of the run; the rest is for `wandb sync`.
    """
    resolved = resolve_mode(mode)
    if resolved == "disabled" or not is_first_rank():
        return None
    os.environ.setdefault("WANDB_SILENT", "true")  # its own remarks come before its settings are read
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its own telemetry waits for the server at the end
    given = {"project": project, "entity": entity, "group": group, "tags": list(tags)}
    given |= {"name": run_name, "id": wandb_id(run_name)}
    try:
        logger = _start(resolved, finish_timeout_s, cfg, save_dir=str(folder), **given)
    except Exception as error:  # its client, its service, the disk and the network raise what they like
        if resolved == "offline":
            _give_up(error)
            return None
        say(f"W&B: its server cannot be used ({first_line(error)}); staying offline", error=True)
        resolved = "offline"
        try:
            import wandb

            wandb.teardown()  # else the name would be in use
            logger = _start(resolved, finish_timeout_s, cfg, save_dir=str(folder), **given)
        except Exception as second:
            _give_up(second)
            return None
    if resolved == "offline":
        say(f"W&B: offline, upload later with: wandb sync {folder}/wandb/offline-run-*", error=True)
    return logger


def forget_service() -> None:
    """Drop the connection to a W&B process that is gone; else its error would come up when this process ends."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def wandb_id(run_name: str) -> str:
    """The id of a run: its name, or for one with other letters than those of English one that addresses can hold.

    >>> wandb_id("emoji-lr=0.001"), wandb_id("实验一-b")
    ('emoji-lr=0.001', 'b-86295e8f')
    """
    if run_name.isascii():
        return run_name
    plain = re.sub(r"[^A-Za-z0-9]+", "-", run_name).strip("-") or "run"
    return f"{plain}-{hashlib.sha256(run_name.encode()).hexdigest()[:8]}"


def _start(mode: str, finish_timeout_s: float, cfg: Mapping[str, Any], **given: Any) -> WandbLogger:
    """Starts the run now, where a failure can still be told from one of the training."""
    import wandb  # a second, which runs without it need not wait

    from m2_encoder.runs.lightning_loggers import QuietWandbLogger

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


def _give_up(error: Exception) -> None:
    say(f"W&B: not available ({first_line(error)}); metrics.jsonl has all scalars", error=True)


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
