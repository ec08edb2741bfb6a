"""The rank processes of `grouped_training.py`, seen from the one that gives the orders (see `_rank.py`)."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from _network import Network

_RANK = Path(__file__).with_name("_rank.py")
# An order reaches all ranks well within this; they start together then.
_LEAD_S = 0.008
_START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 120.0


class RankError(RuntimeError):
    """A rank has died or does not answer; its own message is on standard error."""


class Ranks:
    """One process in each namespace, for a `with` statement.

    Args:
        network: where they live.
        num_ranks: how many.
        rows: per rank and optimizer step.
        threads: of each rank.

    Attributes:
        text_tokens: mean tokens of a caption.
    """

    def __init__(self, network: Network, *, num_ranks: int, rows: int, threads: int) -> None:
        numbers = (num_ranks, rows, threads)
        # The log level hides that namespaces have no host names.
        environment = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._processes = [
            subprocess.Popen(
                [*network.command(rank), sys.executable, str(_RANK), *map(str, (rank, *numbers)), network.address(0)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is for the process that gives the orders; it ends them
            )
            for rank in range(num_ranks)
        ]
        self.text_tokens = 0.0

    def __enter__(self) -> Ranks:
        try:
            ready = self._answers(_START_TIMEOUT_S)
            self.text_tokens = sum(answer["text_tokens"] for answer in ready) / len(ready)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def together(self, **order: Any) -> dict[str, float]:
        """Let all ranks do the same at the same moment.

        Returns:
            `seconds` until the slowest was ready, the mean of what they returned as `value`, and the bytes that a
            rank has sent on average as `sent`.
        """
        at = time.monotonic() + _LEAD_S
        answers = self.each([{**order, "at": at}] * len(self._processes))
        mean = {key: sum(answer[key] for answer in answers) / len(answers) for key in ("value", "sent")}
        return {"seconds": max(answer["seconds"] for answer in answers), **mean}

    def each(self, orders: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Give every rank its own order; their answers."""
        for process, order in zip(self._processes, orders, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        return self._answers(_ANSWER_TIMEOUT_S)

    def _answers(self, timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        answers = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            line = process.stdout.readline() if ready else None
            if not line:
                raise RankError(f"rank {rank} " + ("has ended" if ready else f"did not answer in {timeout_s:.0f} s"))
            answers.append(json.loads(line))
        return answers

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
