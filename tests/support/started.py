"""`m2-train` as a process of its own, started as often as a test wants, and killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


class StartedCommand:
    """A command line whose runs lie in a folder and are called `s-…`."""

    def __init__(self, folder: Path, repo_root: Path, *words: str) -> None:
        self.folder, self._root = folder, repo_root
        self._line = [sys.executable, "-m", "m2_encoder.cli.train", *words, f"run.folder={folder}"]

    def start(self) -> subprocess.Popen[str]:
        paths = [str(self._root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with (self.folder.parent / f"{self.folder.name}.log").open("a") as log:
            return subprocess.Popen(
                self._line, cwd=self._root, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
            )

    def saved(self) -> int:
        """How many checkpoints its runs have."""
        return len(list(self.folder.glob("s-*/checkpoints/step=*.ckpt")))

    def wait_for(self, process: subprocess.Popen[str], checkpoints: int) -> None:
        while self.saved() < checkpoints:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
