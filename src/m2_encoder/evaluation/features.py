"""Features of an evaluation set by any model: read, decoded, encoded, stored, and shared among ranks.

With several ranks, rank r encodes pictures r::W and batches of texts r::W, and every rank ends with the features of
all, in the order of the set. A picture that cannot be read or decoded is left out on all of them.

The last bits of a feature depend on the shape of the batch that it was computed in. So all batches of pictures have one
shape, the last one is filled up, and texts share batches as if there were one rank: features are the same to the bit on
any number of ranks, and after an interruption.

Letters: n pictures · m texts · B batch · E feature dim · W ranks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.distributed.collectives import gather_rows_without_grad
from m2_encoder.errors import UserError, abridge, name_some
from m2_encoder.evaluation.embedding import Skipped, map_ahead
from m2_encoder.evaluation.encode import DEFAULT_BATCH_SIZE, FeatureModel, encode_rows, evaluation_mode, split_by_length
from m2_encoder.evaluation.feature_store import FeatureStore, picture_key, text_key
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.sets.base import EvaluationSet, Picture
from m2_encoder.evaluation.sets.reducing import keep_pictures


class PictureFeatures(NamedTuple):
    """Features of pictures."""

    features: Tensor  # L2-normalised fp32, (n', E)
    kept: Tensor  # which of the pictures have one, ascending, (n',) int64
    left_out: tuple[Skipped, ...]  # the others, and why


class EncodedSet(NamedTuple):
    """Features of a set."""

    dataset: EvaluationSet  # without the pictures that were left out, and what belonged to them alone
    images: Tensor  # of its pictures, L2-normalised fp32, (n', E)
    kept: Tensor  # which pictures of the whole set these are, (n',) int64
    texts: dict[str, Tensor]  # of its texts by language, L2-normalised fp32, (m, E)
    left_out: tuple[Skipped, ...]  # pictures without a feature, and why


class _Prepared(NamedTuple):
    row: int
    key: bytes = b""
    problem: str = ""  # why it is left out
    pixels: Tensor | None = None  # to be encoded
    feature: Tensor | None = None  # stored before


_Share: TypeAlias = tuple[dict[int, Tensor], list[tuple[int, Skipped]]]
"""One rank's: features by row, and rows without one."""

_Own = TypeVar("_Own")
_Told = TypeVar("_Told")


class FeatureEncoder:
    """One model's features of pictures and texts; a context manager.

    Args:
        model: on any device.
        store: folder that keeps features of all models; None keeps them nowhere.
        batch_size: pictures or texts per forward pass, B; of fewer pictures than that, their number.
        num_workers: threads that read and decode ahead; 0 does it in the calling thread.
        group: ranks that share the work, and call the same methods in the same order; None for this process alone.

    Raises:
        UserError: if the store cannot be written.
    """

    def __init__(
        self,
        model: EvaluatedModel,
        *,
        store: str | os.PathLike[str] | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        num_workers: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model, self.batch_size, self.num_workers = model, batch_size, num_workers
        self._root, self._group = store, group
        self._stores: dict[str, FeatureStore] = {}
        self._open = ExitStack()

    def __enter__(self) -> FeatureEncoder:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files of the store."""
        self._stores = {}
        self._open.close()

    def encode_set(self, dataset: EvaluationSet, *, languages: Sequence[str] | None = None) -> EncodedSet:
        """Features of a set; its texts are those of some languages, by default of all.

        Raises:
            UserError: for a set of which no picture can be used, features that are not finite, texts for a model
                without a text tower, a full disk, and pictures or texts that a file of features lacks.
        """
        if languages is None or languages:
            self._require_texts(dataset)
        pictures = self.encode_pictures(dataset.pictures)
        if not len(pictures.kept):
            said = name_some([f"{name} ({reason})" for name, reason in pictures.left_out], 3) or "it has none"
            raise UserError(f"{dataset.name}: no picture could be used: {said}")
        if pictures.left_out:
            total = len(dataset.pictures)
            dataset = keep_pictures(dataset, pictures.kept)
            number = len(pictures.left_out)
            said = f"{number:,} of {total:,} pictures could not be used"
            dataset = dataclasses.replace(
                dataset,
                counts={**dataset.counts, "not_decoded": number},
                comparable="; ".join(filter(None, (dataset.comparable, said))),
            )
        wanted = [*dataset.texts] if languages is None else [name for name in languages if name in dataset.texts]
        texts = {language: self.encode_texts(dataset.texts[language].rows) for language in wanted}
        return EncodedSet(dataset, pictures.features, pictures.kept, texts, pictures.left_out)

    def encode_pictures(self, pictures: Sequence[Picture]) -> PictureFeatures:
        """Features of pictures, in their order; equal files are encoded once.

        Raises:
            UserError: as `encode_set`.
        """
        total = len(pictures)
        if self.model.table is not None:
            features = self.model.table.pictures.look_up([picture.name for picture in pictures], "pictures")
            return PictureFeatures(features, torch.arange(total), ())
        features, left_out = self._share(total, partial(self._encode_own_pictures, pictures))
        kept = torch.ones(total, dtype=torch.bool)
        kept[list(left_out)] = False
        return PictureFeatures(
            features[kept], kept.nonzero().flatten(), tuple(left_out[row] for row in sorted(left_out))
        )

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, (m, E), in their order; equal texts are encoded once.

        Raises:
            UserError: as `encode_set`.
        """
        self.model.require_texts()
        if self.model.table is not None and self.model.table.texts is not None:
            return self.model.table.texts.look_up(texts, "texts")
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        keys = [text_key(text) for text in distinct]
        found, complete = self._together(lambda: _and_whether_all(self._stored("texts", keys), keys))
        if all(complete):
            features = torch.stack([found[key] for key in keys]) if keys else torch.empty(0, self._width)
        else:
            features, _ = self._share(len(keys), partial(self._encode_own_texts, [*distinct], keys, found))
        return features[[distinct[text] for text in texts]]

    def cached_vectors(self, keys: Sequence[bytes], compute: Callable[[], Tensor]) -> Tensor:
        """Vectors, (len(keys), E), that are stored under digests of what makes them, such as those of classes.

        Args:
            keys: of `KEY_BYTES` each.
            compute: gives all of them; called on all ranks, if one is missing.

        Raises:
            UserError: as `encode_set`.
        """
        found, complete = self._together(lambda: _and_whether_all(self._stored("classes", keys), keys))
        if all(complete):
            return torch.stack([found[key] for key in keys]) if keys else torch.empty(0, self._width)
        vectors = compute()
        self._together(partial(self._add_classes, keys, vectors))
        return vectors

    @property
    def _width(self) -> int:
        return self.model.facts.embed_dim

    def _require_texts(self, dataset: EvaluationSet) -> None:
        if dataset.texts:
            self.model.require_texts()

    def _store(self, kind: Literal["pictures", "texts", "classes"]) -> FeatureStore | None:
        if self._root is None:
            return None
        if kind not in self._stores:
            store = FeatureStore(self._root, self.model.fingerprint, kind, width=self._width)
            self._stores[kind] = self._open.enter_context(store)
        return self._stores[kind]

    def _stored(self, kind: Literal["texts", "classes"], keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        store = self._store(kind)
        found = {} if store is None else {key: store.get(key) for key in keys}
        return {key: feature for key, feature in found.items() if feature is not None}

    def _add_classes(self, keys: Sequence[bytes], vectors: Tensor) -> tuple[None, None]:
        store = self._store("classes")
        if store is not None and self._rank() == 0:
            store.add(keys, vectors)
        return None, None

    def _encode_own_pictures(self, pictures: Sequence[Picture]) -> _Share:
        store, batch_size = self._store("pictures"), min(self.batch_size, len(pictures))
        rows = range(self._rank(), len(pictures), self._ranks())
        prepare = partial(_prepare, pictures, self.model, store)
        keys: dict[int, bytes] = {}
        done: dict[bytes, Tensor] = {}
        waiting: dict[bytes, tuple[str, Tensor]] = {}
        left_out = []

        def flush() -> None:
            if waiting:
                names, pixels = zip(*waiting.values(), strict=True)
                filled = torch.stack([*pixels, *[pixels[-1]] * (batch_size - len(pixels))])
                features = model.encode_image(filled.to(device))[: len(pixels)]
                self._finish([*waiting], names, features, store, done)
                waiting.clear()

        model = _encoder(self.model.model)
        with evaluation_mode(model) as device:
            for found in map_ahead(prepare, rows, num_workers=self.num_workers, ahead=batch_size):
                name = pictures[found.row].name
                if found.problem:
                    left_out.append((found.row, Skipped(name, found.problem)))
                    continue
                keys[found.row] = found.key
                if found.feature is not None:
                    done[found.key] = found.feature
                elif found.pixels is not None and found.key not in done:
                    waiting.setdefault(found.key, (name, found.pixels))
                if len(waiting) == batch_size:
                    flush()
            flush()
        return {row: done[key] for row, key in keys.items()}, left_out

    def _encode_own_texts(self, texts: Sequence[str], keys: Sequence[bytes], stored: dict[bytes, Tensor]) -> _Share:
        tokens = self.model.tokenizer(texts)
        store, model = self._store("texts"), _encoder(self.model.model)
        own: dict[int, Tensor] = {}
        with evaluation_mode(model) as device:
            for batch in split_by_length(tokens, self.batch_size)[self._rank() :: self._ranks()]:
                rows = batch.tolist()
                done = {keys[row]: stored[keys[row]] for row in rows if keys[row] in stored}
                if len(done) < len(rows):  # then all of it, or the others would share another batch
                    features = encode_rows(model, tokens, batch, device)
                    made: dict[bytes, Tensor] = {}
                    self._finish([keys[row] for row in rows], [texts[row] for row in rows], features, store, made)
                    done = made | done
                own |= {row: done[keys[row]] for row in rows}
        return own, []

    def _finish(
        self,
        keys: list[bytes],
        names: Sequence[str],
        features: Tensor,
        store: FeatureStore | None,
        done: dict[bytes, Tensor],
    ) -> None:
        """Checks and stores a batch."""
        features = features.float().cpu()
        finite = features.isfinite().all(dim=1).tolist()
        if broken := [abridge(name, 120) for name, good in zip(names, finite, strict=True) if not good]:
            what = f"{len(broken):,} of {len(names):,} features are not finite, such as that of {broken[0]!r}"
            raise UserError(f"{self.model.name}: {what}: the model is broken")
        if store is not None:
            store.add(keys, features)
        done |= dict(zip(keys, features, strict=True))

    def _share(self, total: int, encode: Callable[[], _Share]) -> tuple[Tensor, dict[int, Skipped]]:
        """Features of all, (total, E), zeros where there is none, and who has none; `encode` does this rank's share."""

        def call() -> tuple[Tensor, tuple[list[int], list[tuple[int, Skipped]]]]:
            own, left_out = encode()
            values = torch.stack([*own.values()]) if own else torch.empty(0, self._width)
            return values, ([*own], left_out)

        values, shares = self._together(call)
        blocks: Sequence[Tensor] = [values]
        counts = [len(rows) for rows, _ in shares]
        if self._group is not None and any(counts):
            device = torch.device("cuda") if dist.get_backend(self._group) == "nccl" else torch.device("cpu")
            blocks = gather_rows_without_grad(values.to(device), self._group, counts=counts)
        features = torch.zeros(total, self._width)
        for (rows, _), block in zip(shares, blocks, strict=False):
            features[rows] = block.cpu()
        return features, dict(pair for _, left_out in shares for pair in left_out)

    def _together(self, call: Callable[[], tuple[_Own, _Told]]) -> tuple[_Own, list[_Told]]:
        """What `call` gives this rank, and what it tells the others, by rank; where it fails on one, all fail."""
        if self._group is None:
            own, told = call()
            return own, [told]
        result: tuple[_Own, _Told] | None = None
        failure: Exception | None = None
        try:
            result = call()
        except Exception as error:  # the other ranks wait for this one, whatever happened
            failure = error
        problem = "" if failure is None else str(failure) or type(failure).__name__
        said: list[Any] = [None] * self._ranks()
        dist.all_gather_object(said, (None if result is None else result[1], problem), group=self._group)
        if failure is not None:
            raise failure
        if broken := [f"rank {rank}: {each}" for rank, (_, each) in enumerate(said) if each]:
            raise UserError("; ".join(broken))
        assert result is not None
        return result[0], [each for each, _ in said]

    def _rank(self) -> int:
        return 0 if self._group is None else dist.get_rank(self._group)

    def _ranks(self) -> int:
        return 1 if self._group is None else dist.get_world_size(self._group)


def _and_whether_all(found: dict[bytes, Tensor], keys: Sequence[bytes]) -> tuple[dict[bytes, Tensor], bool]:
    return found, all(key in found for key in keys)


def _encoder(model: FeatureModel | None) -> FeatureModel:
    assert model is not None, "files of features are looked up"
    return model


def _prepare(pictures: Sequence[Picture], model: EvaluatedModel, store: FeatureStore | None, row: int) -> _Prepared:
    """Reads a picture and decodes it, unless its feature is stored."""
    picture = pictures[row]
    try:
        content = picture.read()
        key = picture_key(content)
        if store is not None and (feature := store.get(key)) is not None:
            return _Prepared(row, key, feature=feature)
        return _Prepared(row, key, pixels=model.preprocess(content))
    except (UserError, OSError) as error:
        said = " ".join(str(getattr(error, "strerror", None) or error).split())
        return _Prepared(row, problem=said.removeprefix("image bytes: ").removeprefix(f"{picture.name}: "))
