"""LightningDataModule over any torch Dataset of (image, caption) pairs, in an order that resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from m2_encoder.bounds import Rows, Workers, check_bounds
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.loading.collate import stack_images
from m2_encoder.data.loading.loader import PositionLoader
from m2_encoder.data.loading.stages import DECODING, READING, StageClock
from m2_encoder.data.loading.stream import Delivery
from m2_encoder.data.order.keyed_random import KeyedPermutation, mix
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.data.samples.language import detect_language
from m2_encoder.data.validation_chunks import ValidationChunks
from m2_encoder.data.webdataset_module import BatchSize
from m2_encoder.errors import UserError, in_one_line
from m2_encoder.pictures import STANDARD, read_policy
from m2_encoder.types import LANGUAGES, ImageTextBatch

_ORDER, _CAPTION = 1, 2  # streams of random numbers


class Pair(NamedTuple):
    """One item of a dataset, ready for a batch."""

    number: int  # in the dataset
    image: Tensor  # (3, S, S) uint8, or floating in 0..1
    captions: tuple[str, ...]  # at least one


class PairsModule(lightning.LightningDataModule):
    """Training batches and validation sets of map-style datasets, which have `len()` and items by number.

    An item is (image, caption), with a list in place of the caption where there are several, of which each step draws
    one. The image is a PIL image, an array, a path, or a tensor, (3, S, S), uint8 or floating in 0..1, that stays as it
    is: augmentation is the dataset's own. Every epoch is a shuffle of its own, and the same for all numbers of ranks.

    Args:
        tokenizer: of the captions.
        image_size: side of the model's images, pixels.
        seed: of the order.
        max_steps: optimizer steps of the whole run.
        train: the dataset to train on.
        global_batch_size: samples per step over all ranks.
        validation: datasets by the name of the set; the first one is watched during training.
        num_workers: loader processes per rank.
        eval_batch_size: images or texts per forward in validation.
        pictures: what the pixels of pictures are, as `read_policy` reads it.
    """

    @check_bounds
    def __init__(
        self,
        *,
        tokenizer: Any,
        image_size: int,
        seed: int,
        max_steps: int,
        train: Any,
        global_batch_size: BatchSize,
        validation: Mapping[str, Any] | None = None,
        num_workers: Workers = 0,
        eval_batch_size: Rows = 256,
        pictures: Any = STANDARD,
    ) -> None:
        super().__init__()
        self.tokenizer, self.global_batch_size = tokenizer, global_batch_size
        self._seed, self._max_steps, self._num_workers = seed, max_steps, num_workers
        self._eval_batch_size = eval_batch_size
        transform = EvalTransform(image_size, pictures=read_policy(pictures))
        self._train = _Pairs("train", train, transform)
        self._validation = {
            name: _Pairs(f"validation.{name}", each, transform) for name, each in (validation or {}).items()
        }
        self._sets: dict[str, RetrievalSet] = {}

    @property
    def validation_name(self) -> str:
        """Name of the first validation set; "val" where there is none."""
        return next(iter(self._validation), "val")

    def train_dataloader(self) -> PositionLoader:
        """Batches of this rank.

        Raises:
            UserError: if batches cannot be divided among the ranks.
        """
        rank, world_size = self._place()
        if self.global_batch_size % world_size:
            raise UserError(f"must be a multiple of the {world_size} ranks", key="data.global_batch_size")
        return PositionLoader(
            lambda _history, _start: _Shuffled(self._train, self._seed),
            collate=partial(_collate, tokenizer=self.tokenizer),
            num_steps=self._max_steps,
            global_batch_size=self.global_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            fingerprint={
                "seed": self._seed,
                "global_batch_size": self.global_batch_size,
                "items of data.train": len(self._train),
            },
        )

    def val_dataloader(self) -> ValidationChunks | list[Any]:
        """This rank's share of the first validation set; nothing where there is none."""
        if not self._validation:
            return []
        rank, world_size = self._place()
        return ValidationChunks(
            self._read(self.validation_name),
            tokenizer=self.tokenizer,
            chunk_size=self._eval_batch_size,
            rank=rank,
            world_size=world_size,
        )

    def retrieval_sets(self) -> dict[str, RetrievalSet]:
        """The sets that a report shows, by name."""
        return {name: self._read(name) for name in self._validation}

    def _read(self, name: str) -> RetrievalSet:
        if name not in self._sets:
            self._sets[name] = _read_set(name, self._validation[name])
        return self._sets[name]

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


class _Pairs:
    """A dataset, with its items checked."""

    def __init__(self, key: str, dataset: Any, transform: EvalTransform) -> None:
        self.key, self._dataset, self._transform = key, dataset, transform
        for method in ("__len__", "__getitem__"):
            if not hasattr(dataset, method):
                rule = f"has no {method}: give a map-style dataset, whose items are pairs"
                raise UserError(rule, key=f"data.{key}", value=type(dataset).__name__)
        if not len(self):
            raise UserError("has no items", key=f"data.{key}", value=type(dataset).__name__)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Pair:
        try:
            item = self._dataset[index]
        except Exception as error:
            raise self._refuse(index, f"cannot be read: {in_one_line(error)}") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise self._refuse(index, f"is {type(item).__name__}, no pair (image, caption)")
        image, said = item
        captions = (said,) if isinstance(said, str) else tuple(said) if isinstance(said, list | tuple) else ()
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise self._refuse(index, f"has the caption {said!r:.60}, no text, nor a list of texts")
        return Pair(index, self._fit(index, image), captions)

    def _fit(self, index: int, image: Any) -> Tensor:
        if not isinstance(image, Tensor):
            return self._transform.to_uint8(image)
        side = self._transform.image_size
        if image.shape != (3, side, side):
            raise self._refuse(index, f"has an image {tuple(image.shape)}; a tensor must be {(3, side, side)}")
        return image

    def _refuse(self, index: int, said: str) -> UserError:
        return UserError(f"item {index} {said}", key=f"data.{self.key}", value=type(self._dataset).__name__)


class _Shuffled:
    """Items by position, each epoch in an order of its own."""

    def __init__(self, pairs: _Pairs, seed: int) -> None:
        self._pairs, self._seed = pairs, seed
        self.clock = StageClock()

    def deliver(self, positions: Sequence[int]) -> Iterator[Delivery]:
        """The items of some positions, in their order."""
        for position in positions:
            epoch, place = divmod(position, len(self._pairs))
            index = KeyedPermutation(len(self._pairs), mix(_ORDER, self._seed, epoch))(place)
            self.clock.enter(READING, f"item {index}")
            pair = self._pairs[index]
            self.clock.enter(DECODING)
            drawn = mix(_CAPTION, self._seed, position) % len(pair.captions)
            yield Delivery(pair._replace(captions=(pair.captions[drawn],)))


def _collate(pairs: Sequence[Pair], *, tokenizer: Any) -> ImageTextBatch:
    captions = [pair.captions[0] for pair in pairs]
    return ImageTextBatch(
        images=stack_images([pair.image for pair in pairs]),
        text=tokenizer(captions),
        language=torch.tensor([LANGUAGES.index(_language(caption)) for caption in captions]),
        identity=torch.tensor([pair.number for pair in pairs]),
        keys=tuple(str(pair.number) for pair in pairs),
        sources=("train",) * len(pairs),
    )


def _read_set(name: str, pairs: _Pairs) -> RetrievalSet:
    items = [pairs[index] for index in range(len(pairs))]
    images = [pair.image for pair in items]
    levels = [image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8) for image in images]
    captions = {
        language: [tuple(each for each in pair.captions if _language(each) == language) for pair in items]
        for language in LANGUAGES
    }
    found = {language: rows for language, rows in captions.items() if any(rows)}
    return RetrievalSet(name, tuple(str(pair.number) for pair in items), torch.stack(levels), found)


def _language(caption: str) -> str:
    found = detect_language(caption)
    return found if found in LANGUAGES else LANGUAGES[0]
