"""LightningDataModule over any WebDataset tars: a weighted mixture of sources, resumed exactly."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import lightning
import torch
from annotated_types import Ge, Le

from m2_encoder.bounds import Example, Fraction, Index, KeysOf, Many, Rows, Rule, Seconds, Text, Workers, check_bounds
from m2_encoder.data.epoch import check_ranks, limit_epoch
from m2_encoder.data.file_watch import FileWatch
from m2_encoder.data.images.limits import limits_of
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.inspect.source_report import SourceReport
from m2_encoder.data.inspect.start_check import StartCheck, TrainingNeeds, check_manifest, describe_problems
from m2_encoder.data.loading.collate import collate_samples
from m2_encoder.data.loading.faults import FaultLog
from m2_encoder.data.loading.loader import PositionLoader
from m2_encoder.data.loading.stream import ImageTransform, SampleStream, list_index_faults
from m2_encoder.data.masking.batch_masking import BatchMasking
from m2_encoder.data.order.cache_size import check_cache
from m2_encoder.data.order.manifest import Manifest, SourceSpec, build_manifest
from m2_encoder.data.order.plan import PositionPlan, Segment
from m2_encoder.data.retrieval_set import RetrievalSet, check_retrieval_set, read_retrieval_set
from m2_encoder.data.samples.captions import CaptionSampler
from m2_encoder.data.samples.sample import Column
from m2_encoder.data.shards.reader import ShardReader
from m2_encoder.data.shards.remote import RemoteShards
from m2_encoder.data.validation_chunks import ValidationChunks
from m2_encoder.data.worker_pool import STALL_TIMEOUT_S
from m2_encoder.errors import UserError
from m2_encoder.pictures import STANDARD, bind_pictures, read_policy
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

logger = logging.getLogger(__name__)

BAD_SAMPLES_FILE = "bad_samples.jsonl"
"""List of unusable samples in the run's folder."""


BatchSize = Annotated[Rows, Ge(2), Example("256")]
_SOURCES = Rule(
    lambda sources: any(values is not None for values in sources.values()),
    "sources by name, each a mapping of keys, or null to leave it out, and at least one not null",
    "{main: {shards: PATHS}}",
)
_FOLDERS = Rule(lambda folders: True, "folders of tars by name", "{my: tars/val}")


class WebDatasetModule(lightning.LightningDataModule):
    """Training batches from sources of shards, and validation sets.

    Args:
        tokenizer: of the captions.
        image_size: side of the model's images, pixels.
        seed: of order, captions and augmentation.
        max_steps: optimizer steps of the whole run.
        masking: hides words and patches for masked objectives.
        sources: values of `SourceSpec` by name; None leaves one out.
        global_batch_size: samples per step over all ranks.
        num_workers: loader processes per rank.
        captions: samples the captions of an image.
        decode: makes of an image file what the transform takes.
        transform: builds the augmentation for an image size.
        lanes: L of `m2_encoder.data.order.plan`; a power of two, at least the number of ranks if they are to read
            different shards.
        window: samples of a lane that are shuffled together; its shards are open at the same time.
        keep_decoded: decode each image once and keep it.
        check: values of `StartCheck`: how much of each source is checked before training; None checks nothing.
        validation: folders of tars by the name of the set; the first one is watched during training.
        eval_batch_size: images or texts per forward in validation.
        cache: arguments of `RemoteShards`, for urls.
        max_bad_share: the run ends if more of the samples are unusable.
        max_bad_samples: the run ends if more unusable samples are listed; None sets no limit.
        new_segment: continue a checkpoint of another mixture with this one; None never offers it.
        stall_timeout_s: time without progress after which loading is an error.
        columns: more tensors of a batch by name; None leaves one out.
        pictures: what the pixels of images are, as `read_policy` reads it. `decode` and `transform` get it if they
            take it; others decide for themselves.
    """

    @check_bounds
    def __init__(
        self,
        *,
        tokenizer: SentencePieceTokenizer,
        image_size: int,
        seed: int,
        max_steps: int,
        sources: Annotated[
            Mapping[str, Mapping[str, Any] | None], _SOURCES, KeysOf(SourceSpec, each=True, given=("name",))
        ],
        global_batch_size: BatchSize,
        num_workers: Annotated[Workers, Example("0")],
        captions: CaptionSampler,
        decode: Callable[[bytes], Any],
        transform: Callable[[int], ImageTransform],
        lanes: Annotated[Index, Ge(1), Le(2**20)] = 64,
        window: Many = 65_536,
        keep_decoded: bool = False,
        check: Annotated[Mapping[str, Any] | None, KeysOf(StartCheck)] = None,
        validation: Annotated[Mapping[str, Text] | None, _FOLDERS] = None,
        eval_batch_size: Rows = 256,
        masking: BatchMasking | None = None,
        cache: Annotated[Mapping[str, Any] | None, KeysOf(RemoteShards)] = None,
        max_bad_share: Fraction = 0.05,
        max_bad_samples: Index | None = None,
        new_segment: bool | None = False,
        stall_timeout_s: Seconds = STALL_TIMEOUT_S,
        columns: Mapping[str, Column | None] | None = None,
        pictures: Any = STANDARD,
    ) -> None:
        super().__init__()
        used = {name: values for name, values in sources.items() if values is not None}
        self.tokenizer = tokenizer
        self._masking = masking
        self.global_batch_size = global_batch_size
        self._specs = [SourceSpec(name, **values) for name, values in used.items()]
        self._image_size, self._seed, self.max_steps = image_size, seed, max_steps
        self._num_workers, self._eval_batch_size = num_workers, eval_batch_size
        self._captions, self._pictures = captions, read_policy(pictures)
        self._decode = bind_pictures(decode, self._pictures)
        self._transform: ImageTransform = bind_pictures(transform, self._pictures)(image_size)
        self._lanes, self._window, self._keep_decoded = lanes, window, keep_decoded
        self._check = None if check is None else StartCheck(**check)
        self._needs = TrainingNeeds(
            global_batch_size, captions.languages, limits_of(decode), max_bad_share, tokenizer, self._pictures
        )
        self._validation = dict(validation or {})
        self._remote = None if cache is None else RemoteShards(**cache)
        self._max_bad_share, self._max_bad_samples = max_bad_share, max_bad_samples
        self._new_segment, self._stall_timeout_s = new_segment, stall_timeout_s
        self._columns = {name: column for name, column in (columns or {}).items() if column is not None}
        made: Mapping[str, Any] = self._columns
        for name, column in made.items():
            if not isinstance(column, Column):
                rule = f"must be a subclass of {Column.__module__}.{Column.__name__}; derive it from that"
                raise UserError(rule, key=f"data.columns.{name}._target_", value=type(column).__name__)
        self._is_fresh = False
        self._loader: tuple[lightning.Trainer, PositionLoader] | None = None  # of training, and whose it is
        self._watch = FileWatch({})  # of the validation sets; from `prepare_data` on
        self.fault_log = self._build_fault_log(None)

    def count_samples(self) -> int:
        """Training samples of all sources together; reads their index.

        Raises:
            UserError: if the shards cannot be read.
        """
        if "manifest" not in self.__dict__:
            self._is_fresh = self.trainer is None  # read for the start of a run, which need not read it again
        return sum(source.samples for source in self.manifest.sources)

    def count_steps(self) -> int:
        """Steps of an epoch: whole ones, and at least one."""
        return max(1, self.count_samples() // self.global_batch_size)

    def epoch_steps(self) -> int:
        """Steps of an epoch as the trainer limits it."""
        return limit_epoch(self.count_steps(), getattr(self.trainer, "limit_train_batches", 1.0))

    @property
    def validation_name(self) -> str:
        """Name of the first validation set; "val" where there is none."""
        return next(iter(self._validation), "val")

    def prepare_data(self) -> None:
        """Index the shards and check some of their samples; runs in one process per machine.

        Raises:
            UserError: if the shards cannot be read, or cannot be trained on.
        """
        if self._check is not None and self._place()[0] == 0 and (problems := describe_problems(self.check_sources())):
            raise UserError("; ".join(problems))
        if not self._is_fresh:
            self.__dict__.pop("manifest", None)  # what was there before may have changed
        self._is_fresh = False
        self._watch = FileWatch(self._validation)
        logger.info("%d sources", len(self.manifest.sources))

    def check_sources(self) -> dict[str, SourceReport]:
        """Check a small part of each source and the texts of the validation sets, once; reports by source.

        Raises:
            UserError: if the shards or a validation set cannot be read.
        """
        check, self._check = self._check, None
        if check is None:
            return {}
        if not self._is_fresh:
            self.__dict__.pop("manifest", None)
        held_out = {name: check_retrieval_set(folder, name=name) for name, folder in self._validation.items()}
        needs = self._needs._replace(held_out=held_out)
        reports = check_manifest(
            self.manifest, check, needs, remote=self._remote, stall_timeout_s=self._stall_timeout_s
        )
        self._is_fresh = True
        return reports

    def check_order(self, *, resumes: bool) -> None:
        """Check that the sources can be mixed; a resumed run's `max_epochs` are checked later, with its checkpoint.

        Raises:
            UserError: with the numbers, if they cannot.
        """
        plan = self._plan((), 0)
        if not resumes:
            plan.check_repeats(self.max_steps * self.global_batch_size)

    def skip_check(self) -> None:
        """Skip the check of the sources: they were checked before, or by another process."""
        self._check = None
        self._is_fresh = True

    @property
    def is_checked_at_start(self) -> bool:
        """Whether the sources are still to be checked."""
        return self._check is not None

    @cached_property
    def manifest(self) -> Manifest:
        """All sources with their shards."""
        return build_manifest(self._specs, measure=self._reader().measure, stall_timeout_s=self._stall_timeout_s)

    def train_dataloader(self) -> PositionLoader:
        """Batches of this rank; see `PositionLoader`.

        Raises:
            UserError: if batches cannot be divided among the ranks, or the trainer needs more batches than there are.
        """
        rank, world_size = self._place()
        folder = None
        if (trainer := self.trainer) is not None:
            self._check_trainer(trainer)
            folder = Path(trainer.default_root_dir)
        if self.global_batch_size % world_size:
            raise UserError(
                f"data.global_batch_size={self.global_batch_size} must be a multiple of the {world_size} ranks"
            )
        check_ranks(self.manifest.fingerprint())
        plan = self._plan((), 0)
        self.fault_log = self._build_fault_log(folder)
        self._check_cache(plan)
        self._report_faults(plan, is_first=rank == 0)
        loader = PositionLoader(
            self._build_stream,
            epoch_steps=self.count_steps(),
            keeps_workers=self.epoch_steps() < self.max_steps,
            repeat_steps=self.epoch_steps() if getattr(trainer, "overfit_batches", 0) else None,
            collate=partial(collate_samples, tokenizer=self.tokenizer, masking=self._masking, columns=self._columns),
            num_steps=self.max_steps,
            global_batch_size=self.global_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            fingerprint={
                "seed": self._seed,
                "global_batch_size": self.global_batch_size,
                "lanes": self._lanes,
                "window": self._window,
                **self.manifest.fingerprint(),
            },
            segment=plan.segments[-1].sources,
            record=self.manifest.record(),
            new_segment=self._new_segment,
            on_faults=lambda faults, drawn: self.fault_log.add(faults, drawn=drawn),
            stall_timeout_s=self._stall_timeout_s,
        )
        if self._loader is not None and self._loader[0] is trainer:  # of reload_dataloaders_every_n_epochs
            loader.load_state_dict(self._loader[1].state_dict())
            self._loader[1].close()
        self._loader = None if trainer is None else (trainer, loader)
        return loader

    def teardown(self, stage: str) -> None:
        """End the workers of training, which live through all epochs."""
        if stage == "fit" and self._loader is not None:
            self._loader[1].close()
            self._loader = None

    def val_dataloader(self) -> ValidationChunks | list[Any]:
        """This rank's share of the first validation set; nothing where there is none."""
        if not self._validation:
            return []
        rank, world_size = self._place()
        return ValidationChunks(
            self.retrieval_set(self.validation_name),
            tokenizer=self.tokenizer,
            chunk_size=self._eval_batch_size,
            rank=rank,
            world_size=world_size,
        )

    def retrieval_set(self, name: str) -> RetrievalSet:
        """One validation set as images and captions; the one that is watched is read once and kept."""
        if name == self.validation_name:
            return self._watched_set
        return self._read_set(name)

    @cached_property
    def _watched_set(self) -> RetrievalSet:
        return self._read_set(self.validation_name)

    def _read_set(self, name: str) -> RetrievalSet:
        return read_retrieval_set(self._validation[name], name=name, transform=self._eval_transform())

    def retrieval_sets(self) -> dict[str, RetrievalSet]:
        """The sets that a report shows, by name.

        Raises:
            UserError: if a file of a set is not what it was in `prepare_data`, or as `read_retrieval_set`.
        """
        self._watch.check()
        sets = {name: self.retrieval_set(name) for name in self._validation}
        self._watch.check()
        return sets

    def _eval_transform(self) -> EvalTransform:
        return EvalTransform(self._image_size, pictures=self._pictures)

    def _reader(self) -> ShardReader:
        files = {extension.lower() for column in self._columns.values() for extension in column.files}
        return ShardReader(remote=self._remote, files=sorted(files))

    def _plan(self, history: Sequence[Segment], start: int) -> PositionPlan:
        return PositionPlan(
            self.manifest, seed=self._seed, lanes=self._lanes, window=self._window, history=history, start=start
        )

    def _build_stream(self, history: Sequence[Segment], start: int) -> SampleStream:
        plan = self._plan(history, start)
        plan.check_repeats(self.max_steps * self.global_batch_size)  # known only now, after earlier segments
        return SampleStream(
            plan,
            reader=self._reader(),
            captions=self._captions,
            decode=self._decode,
            transform=self._transform,
            keep_decoded=self._keep_decoded,
            columns=self._columns,
        )

    def _build_fault_log(self, folder: Path | None) -> FaultLog:
        path = None if folder is None else folder / BAD_SAMPLES_FILE
        return FaultLog(path, max_share=self._max_bad_share, max_samples=self._max_bad_samples)

    def _report_faults(self, plan: PositionPlan, *, is_first: bool) -> None:
        """Count the faults in the shards' headers; too many end the run at its start, on all ranks."""
        try:
            faults = list(list_index_faults(plan, self._reader()))
        except OSError as error:
            raise UserError(f"data.sources: a shard cannot be read any more: {error}") from error
        if not faults:
            return
        counts = Counter(fault.reason for fault in faults)
        samples = sum(source.samples for source in self.manifest.sources)
        if is_first:
            logger.warning(
                "%d samples or shards cannot be used, %d samples can: %s",
                len(faults),
                samples,
                ", ".join(f"{reason} {count}" for reason, count in counts.most_common()),
            )
        self.fault_log.start(faults, usable=samples, is_counted=is_first)

    def _check_cache(self, plan: PositionPlan) -> None:
        if self._remote is None:
            return
        rank, world_size = self._place()
        trainer = self.trainer
        first, count = (rank, 1) if trainer is None else (rank - trainer.local_rank, trainer.num_devices)
        check_cache(plan, max_bytes=self._remote.max_bytes, ranks=range(first, first + count), world_size=world_size)

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
        if trainer.max_steps > self.max_steps:
            raise UserError(
                f"trainer.max_steps={trainer.max_steps} exceeds the {self.max_steps} steps of the data module; "
                "give both the same number"
            )
