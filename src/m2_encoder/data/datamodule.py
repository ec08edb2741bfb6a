"""LightningDataModule over WebDataset tars; the embedded emoji set is one source of such tars."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from m2_encoder.data.captions import Caption, CaptionSampler
from m2_encoder.data.emoji import EMOJI_MARKER, write_emoji_shards
from m2_encoder.data.evaluation_set import RetrievalSet, read_retrieval_set
from m2_encoder.data.loader import PositionLoader
from m2_encoder.data.order import SampleOrder
from m2_encoder.data.shards import RawSample, SampleLocation, index_shards, read_sample
from m2_encoder.data.transforms import EvalTransform, TrainTransform, open_image
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import LANGUAGES, ImageTextBatch, RetrievalBatch

REPORTED_SPLITS = ("heldout_style", "heldout_families")
"""Splits of the embedded set that are for reporting; nothing is chosen by them."""

VALIDATION_SPLIT = "val"


class TrainingSample(NamedTuple):
    """A decoded, augmented sample with its drawn captions."""

    image: Tensor
    captions: tuple[Caption, ...]
    key: str
    source: str
    identity: int


class TrainingSamples(Dataset[TrainingSample]):
    """Samples by position: which one, which caption and which augmentation are a pure function of it.

    Args:
        locations: samples of an epoch.
        source: name of the source.
        seed: chooses order and randomness.
        captions: draws the captions of a step.
        transform: augments an image.
        keep_decoded: decode each image once and keep it; for small sources (emoji: 50 MB per process).
    """

    def __init__(
        self,
        locations: list[SampleLocation],
        *,
        source: str,
        seed: int,
        captions: CaptionSampler,
        transform: TrainTransform,
        keep_decoded: bool = False,
    ) -> None:
        self._decoded: dict[int, tuple[RawSample, Image.Image]] | None = {} if keep_decoded else None
        self._locations = locations
        self._source = source
        self._order = SampleOrder(len(locations), seed)
        self._captions = captions
        self._transform = transform

    def __getitem__(self, position: int) -> TrainingSample:
        index = self._order.index(position)
        rng = self._order.rng(position)
        raw, image = self._decode(index)
        with _errors_name(raw.origin):
            captions = self._captions(raw.metadata, rng=rng)
            pixels = self._transform(image, rng=rng)
        identity = content_identity(str(raw.metadata.get("key", raw.key)))
        return TrainingSample(pixels, captions, raw.key, self._source, identity)

    def _decode(self, index: int) -> tuple[RawSample, Image.Image]:
        if self._decoded is not None and index in self._decoded:
            return self._decoded[index]
        raw = read_sample(self._locations[index])
        with _errors_name(raw.origin):
            decoded = raw, open_image(raw.image)
        if self._decoded is not None:
            self._decoded[index] = decoded
        return decoded


@contextmanager
def _errors_name(origin: str) -> Iterator[None]:
    """Put the sample's place before the message of a user error."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{origin}: {error}") from error


def content_identity(content: str) -> int:
    """A number for what a sample shows, 0..2^63 - 1: equal for equal names, and practically never otherwise.

    32 bits would make strangers positives of each other in every eighth batch of 32,768.
    """
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") >> 1


def collate_samples(samples: list[TrainingSample], *, tokenizer: SentencePieceTokenizer) -> ImageTextBatch:
    """Stack samples to a batch; texts are padded to the longest."""
    captions = [caption for sample in samples for caption in sample.captions]
    return ImageTextBatch(
        images=torch.stack([sample.image for sample in samples]),
        text=tokenizer([caption.text for caption in captions]),
        language=torch.tensor([LANGUAGES.index(caption.language) for caption in captions]),
        identity=torch.tensor([sample.identity for sample in samples]),
        keys=tuple(sample.key for sample in samples),
        sources=tuple(sample.source for sample in samples),
    )


class ValidationChunks:
    """One rank's share of a retrieval set, in chunks that are encoded together: items rank, rank + world size, ...

    All ranks have the same number of chunks (unless a chunk is one item), because ranks that share split weights must
    encode together.

    No DataLoader: all of it is in memory, and a DataLoader would draw from torch's global generator, which a resumed
    run must find as an uninterrupted one does.

    Args:
        retrieval_set: what is split.
        tokenizer: makes ids of captions.
        chunk_size: images per chunk.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        retrieval_set: RetrievalSet,
        *,
        tokenizer: SentencePieceTokenizer,
        chunk_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._set = retrieval_set
        self._tokenizer = tokenizer
        numbers = {key: number for number, key in enumerate(dict.fromkeys(retrieval_set.keys))}
        self._identity = torch.tensor([numbers[key] for key in retrieval_set.keys])
        own, first = (range(r, len(retrieval_set.keys), world_size) for r in (rank, 0))
        self._chunks = [list(own[start : start + chunk_size]) for start in range(0, len(own), chunk_size)]
        if len(self._chunks) * chunk_size < len(first) and chunk_size > 1:  # the first rank has a chunk more
            *others, last = self._chunks
            self._chunks = [*others, last[:-1], last[-1:]]

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[RetrievalBatch]:
        return map(self._read, self._chunks)

    def _read(self, rows: list[int]) -> RetrievalBatch:
        return RetrievalBatch(
            images=self._set.images[rows],
            identity=self._identity[rows],
            texts={
                language: self._tokenizer([captions[row] for row in rows])
                for language, captions in self._set.captions.items()
            },
        )


class EmojiDataModule(lightning.LightningDataModule):
    """The embedded bilingual set: training batches, a validation split, two splits for reporting.

    Args:
        tokenizer: makes ids of captions.
        image_size: side of the images the model takes, pixels.
        seed: chooses order, captions and augmentation.
        max_steps: optimizer steps of the whole run.
        folder: where the tars are unpacked, once.
        global_batch_size: samples per step over all ranks.
        num_workers: loader processes per rank.
        heldout_style: drawing style that is never trained on.
        captions: draws the captions of a sample.
        transform: builds the augmentation for an image size.
        eval_batch_size: images or texts per forward in validation.

    Raises:
        UserError: for numbers that are too small.
    """

    def __init__(
        self,
        *,
        tokenizer: SentencePieceTokenizer,
        image_size: int,
        seed: int,
        max_steps: int,
        folder: str,
        global_batch_size: int,
        num_workers: int,
        heldout_style: str,
        captions: CaptionSampler,
        transform: Callable[[int], TrainTransform],
        eval_batch_size: int = 256,
    ) -> None:
        super().__init__()
        _check_least("max_steps", max_steps, 1)
        _check_least("global_batch_size", global_batch_size, 1)
        _check_least("num_workers", num_workers, 0)
        _check_least("eval_batch_size", eval_batch_size, 1)
        self.tokenizer = tokenizer
        self.global_batch_size = global_batch_size
        self._image_size = image_size
        self._seed = seed
        self._max_steps = max_steps
        self._folder = Path(folder)
        self._num_workers = num_workers
        self._heldout_style = heldout_style
        self._captions = captions
        self._transform = transform(image_size)
        self._eval_batch_size = eval_batch_size

    def prepare_data(self) -> None:
        """Unpack the tars (one process per machine; does nothing when they are there)."""
        write_emoji_shards(self._folder, heldout_style=self._heldout_style)

    def train_dataloader(self) -> PositionLoader:
        """Batches of this rank; see `PositionLoader`.

        Raises:
            UserError: if batches cannot be divided among the ranks, or the trainer will want more of them than there
                are.
        """
        rank, world_size = self._place()
        if (trainer := self.trainer) is not None:
            self._check_trainer(trainer)
        if self.global_batch_size % world_size:
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} must be a multiple of the {world_size} ranks"
            )
        locations = index_shards(self._folder / "train")
        if len(locations) < self.global_batch_size:
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} exceeds the {len(locations)} training samples"
            )
        samples = TrainingSamples(
            locations,
            source="emoji",
            seed=self._seed,
            captions=self._captions,
            transform=self._transform,
            keep_decoded=True,
        )
        return PositionLoader(
            samples,
            collate=partial(collate_samples, tokenizer=self.tokenizer),
            num_steps=self._max_steps,
            global_batch_size=self.global_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            fingerprint=self._fingerprint(len(locations)),
        )

    def val_dataloader(self) -> ValidationChunks:
        """This rank's share of the validation split."""
        rank, world_size = self._place()
        return ValidationChunks(
            self.retrieval_set(VALIDATION_SPLIT),
            tokenizer=self.tokenizer,
            chunk_size=self._eval_batch_size,
            rank=rank,
            world_size=world_size,
        )

    def retrieval_set(self, split: str) -> RetrievalSet:
        """One split as images and captions, decoded once."""
        return read_retrieval_set(
            self._folder / split, name=f"emoji_{split}", transform=EvalTransform(self._image_size)
        )

    def retrieval_sets(self) -> dict[str, RetrievalSet]:
        """The splits that a report shows, by name."""
        return {split: self.retrieval_set(split) for split in (VALIDATION_SPLIT, *REPORTED_SPLITS)}

    def _place(self) -> tuple[int, int]:
        """This process's rank, and how many there are; without a trainer it is alone."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _check_trainer(self, trainer: lightning.Trainer) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1: the negatives of a step "
                "are one batch; raise data.global_batch_size instead"
            )
        if trainer.max_steps > self._max_steps:
            raise UserError(
                f"trainer.max_steps={trainer.max_steps} exceeds the {self._max_steps} steps of the data module; "
                "give both the same number"
            )

    def _fingerprint(self, num_samples: int) -> Mapping[str, Any]:
        marker = (self._folder / EMOJI_MARKER).read_bytes()
        return {
            "data": f"{zlib.crc32(marker):08x}",
            "num_samples": num_samples,
            "seed": self._seed,
            "global_batch_size": self.global_batch_size,
        }


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name}={value!r} must be {least} or more")
