"""What a fault of runs is: how it is injected into a small trained run, and what the commands make of it."""

from __future__ import annotations

import io
import logging
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from m2_encoder.cli import commands, train
from m2_encoder.cli import data as data_command
from m2_encoder.data.emoji.dataset import write_emoji_shards
from tests.support.fault_commands import Ended

RUN = "r"
STEPS = 2
_UNKEPT = (".hydra", "csv", "wandb")  # records of what was asked for, and other people's files
SMALL = (
    "+experiment=smoke",
    "scheduler.warmup_steps=0",
    "model.patch_size=8",
    "model.num_layers=1",
    "model.embed_dim=32",
    "data.global_batch_size=8",
    "trainer.limit_val_batches=0",
    "run.checkpoint_every=1",
    "logger=csv",
    "evaluation=[]",
    f"run.name={RUN}",
)


class Told(NamedTuple):
    """What came of a fault.

    Attributes:
        code: the exit code.
        said: everything that was printed.
        kept: what is left of the run's files, in words.
    """

    code: int
    said: str
    kept: str


class RunFault(NamedTuple):
    """A row of the table.

    Attributes:
        name: of the fault, in words.
        message: pattern of the line that is shown.
        act: injects the fault in a place and runs the command.
        code: the exit code it must have.
        kept: what must be left; `UNTOUCHED`, or a pattern.
        within_s: seconds that all of it may take.
        is_slow: needs several processes, waits, or is much like another one.
    """

    name: str
    message: str
    act: Callable[[Place], Told]
    code: int = 2
    kept: str = "all files as they were"
    within_s: int = 30
    is_slow: bool = False


class Place:
    """A folder with the base run, for one fault.

    Attributes:
        folder: everything that the fault makes.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self._base = base
        folder.mkdir(parents=True)

    @cached_property
    def run(self) -> Path:
        """The folder of a finished run of two steps, with a checkpoint of each."""
        return Path(shutil.copytree(self._base / RUN, self.folder / RUN))

    @cached_property
    def export(self) -> Path:
        """Its model."""
        return Path(shutil.copytree(self._base / RUN / "export", self.folder / "export"))

    @property
    def checkpoints(self) -> Path:
        """Of the run."""
        return self.run / "checkpoints"

    def where(self) -> tuple[str, str]:
        """Arguments of `m2-train`: where it writes, and where its data are."""
        return places(self.folder, self._base)

    def train(self, *lines: str) -> Ended:
        """`m2-train`, in this process."""
        given = {line.partition("=")[0] for line in lines}
        steps = () if "trainer.max_steps" in given else (f"trainer.max_steps={STEPS}",)
        return run_main(train.main, *SMALL, *steps, *self.where(), *lines)

    def plain_train(self, *lines: str) -> Ended:
        """`m2-train` with a configuration of its own."""
        return run_main(train.main, *lines, f"run.folder={self.folder}")

    def resume(self, *lines: str) -> Ended:
        """The run goes on, by default for a third step."""
        assert self.run.is_dir()
        return self.train("run.resume=must", *(lines or ("trainer.max_steps=3",)))

    def evaluate(self, *lines: str) -> Ended:
        """`m2-evaluate` of the export, on the built-in set unless lines say otherwise."""
        given = {line.partition("=")[0] for line in lines}
        more = [] if "model" in given else [f"model={self.export}"]
        return run_main(commands.EVALUATE, *more, f"folder={self._base / 'emoji'}", *lines)

    def export_run(self, *lines: str) -> Ended:
        """`m2-export` of the run, over its export."""
        assert self.run.is_dir()
        return run_main(commands.EXPORT, f"run.folder={self.folder}", f"run.name={RUN}", "overwrite=true", *lines)

    def embed(self, *lines: str) -> Ended:
        """`m2-embed` with the export."""
        return run_main(commands.EMBED, f"model={self.export}", *lines)

    def data(self, *lines: str) -> Ended:
        """`m2-data`."""
        return run_main(data_command.main, *lines)

    def told(self, command: Callable[..., Ended], *lines: str) -> Told:
        """Of a command that must leave all files as they were."""
        before = self._files()
        ended = command(*lines)
        after = self._files()
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        kept = f"changed: {', '.join(changed)}" if changed else "all files as they were"
        return Told(ended.code, f"{ended.out}\n{ended.err}", kept)

    def _files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and not path.is_symlink() and not set(_UNKEPT).intersection(path.parts)
        }


def run_main(main: Callable[[], int], *lines: str) -> Ended:
    """A console command in this process; what is logged goes to its stderr."""
    out, err = io.StringIO(), io.StringIO()
    handler, disabled = logging.StreamHandler(err), logging.root.manager.disable
    handler.setLevel(logging.WARNING)
    logging.root.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        with mock.patch.object(sys, "argv", ["m2", *lines]), redirect_stdout(out), redirect_stderr(err):
            code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        logging.root.removeHandler(handler)
        logging.disable(disabled)
    return Ended(code, out.getvalue(), err.getvalue())


def places(folder: Path, base: Path) -> tuple[str, str]:
    """Where `m2-train` writes, and where its data are."""
    return f"run.folder={folder}", f"data.folder={base / 'emoji'}"


def write_base(folder: Path) -> None:
    """The run that faults are injected into, and the built-in set."""
    write_emoji_shards(folder / "emoji")
    ended = run_main(train.main, *SMALL, f"trainer.max_steps={STEPS}", *places(folder, folder))
    assert ended.code == 0, ended.err


def line_of(told: Told, pattern: str) -> str:
    """The line that says what happened."""
    lines = [line for line in told.said.splitlines() if re.search(pattern, line)]
    assert lines, f"nobody says {pattern}:\n{told.said[-3000:]}"
    return lines[0]
