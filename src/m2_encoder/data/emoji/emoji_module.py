"""The built-in emoji set as one source of shards, with its own splits for validation and reporting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from m2_encoder.bounds import Example, Rows, Text, Workers
from m2_encoder.data.emoji.dataset import (
    EmojiStyle,
    count_training_samples,
    default_emoji_folder,
    emoji_settings,
    write_emoji_shards,
)
from m2_encoder.data.emoji.folder import digest_files
from m2_encoder.data.file_watch import refuse_changed
from m2_encoder.data.images.transforms import TrainTransform, open_image
from m2_encoder.data.loading.loader import PositionLoader
from m2_encoder.data.masking.batch_masking import BatchMasking
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.data.samples.captions import CaptionSampler
from m2_encoder.data.samples.sample import Column
from m2_encoder.data.webdataset_module import BatchSize, WebDatasetModule
from m2_encoder.errors import UserError
from m2_encoder.files import describe_changes
from m2_encoder.pictures import STANDARD
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

REPORTED_SPLITS = ("heldout_style", "heldout_families")
"""Splits for reporting only."""

VALIDATION_SPLIT = "val"

_WHOLE_EPOCH = 1 << 40  # a window that no source fills: every epoch is one shuffle


class EmojiDataModule(WebDatasetModule):
    """The built-in bilingual set: training batches, a validation split, two splits for reporting.

    It is small: one lane and one window shuffle all of it, and images are decoded once. An unusable sample ends the
    run. The tars are unpacked to `folder`, None for `default_emoji_folder`, which no other settings share;
    `heldout_style` is never trained on. The other arguments are the base class's.
    """

    def __init__(
        self,
        *,
        tokenizer: SentencePieceTokenizer,
        image_size: int,
        seed: int,
        max_steps: int,
        folder: Annotated[Text, Example("emoji-tars")] | None,
        global_batch_size: BatchSize,
        num_workers: Annotated[Workers, Example("0")],
        heldout_style: EmojiStyle,
        captions: CaptionSampler,
        transform: Callable[[int], TrainTransform],
        eval_batch_size: Rows = 256,
        masking: BatchMasking | None = None,
        columns: Mapping[str, Column | None] | None = None,
        pictures: Any = STANDARD,
    ) -> None:
        unpacked = Path(folder or default_emoji_folder(emoji_settings(heldout_style=heldout_style)))
        super().__init__(
            tokenizer=tokenizer,
            image_size=image_size,
            seed=seed,
            max_steps=max_steps,
            sources={"emoji": {"shards": str(unpacked / "train" / "*.tar")}},
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            captions=captions,
            decode=open_image,
            transform=transform,
            lanes=1,
            window=_WHOLE_EPOCH,
            keep_decoded=True,
            validation={f"emoji_{VALIDATION_SPLIT}": str(unpacked / VALIDATION_SPLIT)},
            eval_batch_size=eval_batch_size,
            masking=masking,
            columns=columns,
            pictures=pictures,
            max_bad_share=0.0,
            new_segment=None,
        )
        self.folder = unpacked
        self._heldout_style = heldout_style
        self._digests: dict[str, str] | None = None  # of all files, when they were prepared

    def prepare_data(self) -> None:
        """Unpack the tars and index them (one process per machine; does nothing when they are there).

        Raises:
            UserError: as `write_emoji_shards`.
        """
        try:
            write_emoji_shards(self.folder, heldout_style=self._heldout_style)
        except UserError as error:
            raise error.under("data") from error
        self._digests = digest_files(self.folder)
        super().prepare_data()

    def count_samples(self) -> int:
        """Training samples; reads no file."""
        return count_training_samples(self._heldout_style)

    def train_dataloader(self) -> PositionLoader:
        """Batches of this rank; see `PositionLoader`.

        Raises:
            UserError: as the base class, or if a batch would hold a sample twice.
        """
        samples = self.manifest.sources[0].samples
        if samples < self.global_batch_size:
            raise UserError(f"data.global_batch_size={self.global_batch_size} exceeds the {samples} training samples")
        return super().train_dataloader()

    def retrieval_sets(self) -> dict[str, RetrievalSet]:
        """The splits that a report shows, by name.

        Raises:
            UserError: if any file of the set, also of `train`, is not what it was in `prepare_data`.
        """
        self._check_unchanged()
        sets = {split: self.retrieval_set(f"emoji_{split}") for split in (VALIDATION_SPLIT, *REPORTED_SPLITS)}
        self._check_unchanged()
        return sets

    def _check_unchanged(self) -> None:
        if self._digests is not None:
            changes = describe_changes(self._digests, digest_files(self.folder))
            refuse_changed("data.folder", str(self.folder), changes)

    def _read_set(self, name: str) -> RetrievalSet:
        split = name.removeprefix("emoji_")
        return read_retrieval_set(self.folder / split, name=name, transform=self._eval_transform(), split=split)
