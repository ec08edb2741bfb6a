"""A DataLoader that knows its place.

Lightning saves and restores the state of a loader that has `state_dict`. Under several ranks it keeps rank 0's state
only, so the state must not depend on the rank; the global position does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from m2_encoder.data.order import rank_positions
from m2_encoder.errors import UserError
from m2_encoder.types import ImageTextBatch


class PositionLoader:
    """Batches of one rank, from a position on, until the run's last step.

    Its length is that of the whole run, also after a resume: Lightning counts batches from the run's start.

    Args:
        dataset: gives the sample that stands at a position.
        collate: makes a batch of samples.
        num_steps: steps of the whole run.
        global_batch_size: samples of a step over all ranks.
        rank: of this process.
        world_size: number of processes.
        num_workers: worker processes; 0 loads in this one.
        pin_memory: copy batches to page-locked memory, for transfers to an accelerator.
        fingerprint: what the order depends on; a saved state of another order is refused.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        collate: Callable[[list[Any]], ImageTextBatch],
        num_steps: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
        fingerprint: Mapping[str, Any],
    ) -> None:
        self._num_steps = num_steps
        self._global_batch_size = global_batch_size
        self._rank, self._world_size = rank, world_size
        self._fingerprint = dict(fingerprint)
        self._position = 0
        self._build = partial(
            DataLoader,
            dataset,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_use_one_thread,
        )

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[ImageTextBatch]:
        batches = list(
            rank_positions(
                start=self._position,
                stop=self._num_steps * self._global_batch_size,
                global_batch_size=self._global_batch_size,
                rank=self._rank,
                world_size=self._world_size,
            )
        )
        for batch in self._build(batch_sampler=batches):
            # The place moves when the batch is handed over, so what workers prefetch is not counted as seen.
            self._position += self._global_batch_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position of the next sample, over all ranks, and what the order depends on."""
        return {"position": self._position, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            UserError: if the saved order is another one, with the difference.
        """
        saved = state["fingerprint"]
        differences = [
            f"{key}: {saved.get(key)!r} then, {self._fingerprint.get(key)!r} now"
            for key in sorted({*saved, *self._fingerprint})
            if saved.get(key) != self._fingerprint.get(key)
        ]
        if differences:
            raise UserError(
                f"the checkpoint was trained on another order of data ({'; '.join(differences)}); "
                "give these settings their old values, or start a new run with another run.name"
            )
        self._position = int(state["position"])


def _use_one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
