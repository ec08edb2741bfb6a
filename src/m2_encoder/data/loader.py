"""A DataLoader that knows its place.

Lightning saves and restores the state of a loader that has `state_dict`. Under several ranks it keeps rank 0's state
only, so the state must not depend on the rank; the global position does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from m2_encoder.data.order import rank_positions
from m2_encoder.errors import UserError
from m2_encoder.types import ImageTextBatch


class PositionLoader:
    """Batches of one rank, from a position on, until the run's last step.

    Its length is that of the whole run, also after a resume: Lightning counts batches from the run's start. It draws
    nothing from torch's global generator, so that a resumed run finds that as an uninterrupted one does.

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
        self._batches = _Batches(dataset, collate)
        self._num_steps = num_steps
        self._global_batch_size = global_batch_size
        self._rank, self._world_size = rank, world_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._fingerprint = dict(fingerprint)
        self._position = 0

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[ImageTextBatch]:
        """Batches from the current place on.

        Raises:
            UserError: for a sample that cannot be read, also where a worker found it; or if all steps were given
                already: a trainer that asks for more would otherwise turn over empty epochs for ever.
        """
        if self._position >= self._stop:
            raise UserError(
                f"all {self._num_steps} steps of the data module were trained, and the trainer wants more; give both "
                "the same max_steps, and trainer.accumulate_grad_batches=1"
            )
        for batch in self._build():
            if isinstance(batch, UserError):
                raise batch
            # The place moves when the batch is handed over, so what workers prefetch is not counted as seen.
            self._position += self._global_batch_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position of the next sample, over all ranks, and what the order depends on."""
        return {"position": self._position, "fingerprint": dict(self._fingerprint)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            UserError: if the saved order is another one, with the difference, or the place is outside of this run.
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
        position = state["position"]
        if not isinstance(position, int) or position % self._global_batch_size or not 0 <= position <= self._stop:
            raise UserError(
                f"the checkpoint stands at position {position!r}, which must be a multiple of the global batch size "
                f"{self._global_batch_size} in 0..{self._stop} ({self._num_steps} steps)"
            )
        self._position = position

    @property
    def _stop(self) -> int:
        return self._num_steps * self._global_batch_size

    def _build(self) -> DataLoader[Any]:
        positions = rank_positions(
            start=self._position,
            stop=self._stop,
            global_batch_size=self._global_batch_size,
            rank=self._rank,
            world_size=self._world_size,
        )
        return DataLoader(
            self._batches,
            sampler=positions,  # one by one as needed: those of a long run would fill gigabytes
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_use_one_thread,
            generator=torch.Generator(),
        )


class _Batches(Dataset[Any]):
    """Whole batches by their positions. A user error is returned, because workers wrap what they raise in a traceback.

    Args:
        dataset: gives the sample that stands at a position.
        collate: makes a batch of samples.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], ImageTextBatch]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitem__(self, positions: list[int]) -> ImageTextBatch | UserError:
        try:
            return self._collate([self._dataset[position] for position in positions])
        except UserError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _use_one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
