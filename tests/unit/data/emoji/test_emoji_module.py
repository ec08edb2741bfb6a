"""What batches hold, who is identical to whom, how validation is divided, what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from m2_encoder.data.emoji.dataset import load_emoji_concepts, write_emoji_shards
from m2_encoder.data.emoji.emoji_module import REPORTED_SPLITS, EmojiDataModule
from m2_encoder.data.images.transforms import EvalTransform, TrainTransform
from m2_encoder.data.loading.stream import content_identity
from m2_encoder.data.retrieval_set import read_retrieval_set
from m2_encoder.data.shards.reader import SampleBytes, ShardReader
from m2_encoder.errors import UserError
from m2_encoder.types import LANGUAGES, ImageTextBatch
from tests.support.training import IMAGE_SIZE, make_captions, make_datamodule, make_tokenizer


def as_rank(datamodule: EmojiDataModule, rank: int, world_size: int, **settings: Any) -> EmojiDataModule:
    """The datamodule as one of several ranks sees it."""
    values = {"global_rank": rank, "world_size": world_size, "accumulate_grad_batches": 1, "max_steps": 12}
    values["default_root_dir"] = str(datamodule.folder)
    datamodule.trainer = SimpleNamespace(**{**values, **settings})  # type: ignore[assignment]
    return datamodule


@pytest.fixture(scope="module")
def batches(emoji_folder: Path) -> list[ImageTextBatch]:
    return list(make_datamodule(emoji_folder, max_steps=8, global_batch_size=128).train_dataloader())


@pytest.fixture(scope="module")
def samples(emoji_folder: Path) -> dict[str, SampleBytes]:
    reader, found = ShardReader(), []
    for shard in map(str, (emoji_folder / "train").glob("*.tar")):
        size = reader.measure(shard)
        found += [reader.read(shard, number, size=size.size) for number in range(size.samples)]
    return {sample.key: sample for sample in found}


@pytest.fixture(scope="module")
def metadata(samples: dict[str, SampleBytes]) -> dict[str, dict[str, Any]]:
    return {key: json.loads(sample.json or b"") for key, sample in samples.items()}


def test_shapes_and_dtypes(batches: list[ImageTextBatch]) -> None:
    for batch in batches:
        assert batch.images.shape == (128, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert batch.images.dtype == torch.uint8
        assert batch.text.ids.dtype == torch.int64
        assert batch.text.mask.dtype == torch.bool
        assert batch.text.mask.any(dim=0).all(), "texts are padded to the longest of the batch, no further"
        assert batch.language.dtype == batch.identity.dtype == torch.int64
        assert len(batch.keys) == len(batch.sources) == len(batch.language) == len(batch.identity) == 128
        assert set(batch.sources) == {"emoji"}


def test_captions_belong_to_their_samples(batches: list[ImageTextBatch], metadata: dict[str, dict[str, Any]]) -> None:
    tokenizer = make_tokenizer()
    checked = Counter[str]()
    for batch in batches:
        for key, language, ids, mask in zip(batch.keys, batch.language, *batch.text, strict=True):
            code = LANGUAGES[language]
            captions = metadata[key]["captions"][code]
            known = {tuple(t.ids[0].tolist()) for t in (tokenizer([c]) for c in captions)}
            if tuple(ids[mask].tolist()) in known:
                checked[code] += 1
    # The others are lists of keywords, a fifth of the draws.
    assert checked["en"] + checked["zh"] > 0.75 * 8 * 128
    assert min(checked.values()) > 0.3 * 8 * 128


def test_pictures_belong_to_their_keys(emoji_folder: Path, samples: dict[str, SampleBytes]) -> None:
    # With an augmentation that does nothing, the pixels of a batch are those of the sample with its key.
    plain = make_datamodule(
        emoji_folder, transform=lambda size: TrainTransform(size, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, num_ops=0)
    )
    batch = next(iter(plain.train_dataloader()))
    transform = EvalTransform(IMAGE_SIZE)
    for key, image in zip(batch.keys, batch.images, strict=True):
        assert torch.equal(image, transform.to_uint8(samples[key].image))


def test_identity_is_the_concept_in_every_style(
    batches: list[ImageTextBatch], metadata: dict[str, dict[str, Any]]
) -> None:
    rows = [
        (metadata[k]["key"], metadata[k]["style"], int(i))
        for b in batches
        for k, i in zip(b.keys, b.identity, strict=True)
    ]
    pairs = list(combinations(rows, 2))
    assert all((a[0] == b[0]) == (a[2] == b[2]) for a, b in pairs)
    assert any(a[0] == b[0] and a[1] != b[1] for a, b in pairs), "no concept in two styles: nothing was tested"


def test_no_two_concepts_share_an_identity() -> None:
    keys = [concept.key for concept in load_emoji_concepts()]
    identities = {content_identity(key) for key in keys}
    assert len(keys) == 1914
    assert len(identities) == len(keys)
    assert all(0 <= identity < 2**63 for identity in identities)
    # Beyond 32 bits, where tens of thousands of rows per batch would collide.
    assert max(identities) > 2**60


def test_an_epoch_holds_every_sample_once(emoji_folder: Path, metadata: dict[str, dict[str, Any]]) -> None:
    size = len(metadata) // 2  # two steps to an epoch
    epoch = [
        key
        for b in make_datamodule(emoji_folder, max_steps=2, global_batch_size=size).train_dataloader()
        for key in b.keys
    ]
    assert len(metadata) - len(epoch) in (0, 1)
    assert len(set(epoch)) == len(epoch)
    styles = {metadata[key]["style"] for key in epoch}
    assert styles == {sample["style"] for sample in metadata.values()}
    assert len(styles) == 3


def test_the_same_sample_differs_from_epoch_to_epoch(emoji_folder: Path, metadata: dict[str, dict[str, Any]]) -> None:
    loader = make_datamodule(emoji_folder, max_steps=2, global_batch_size=len(metadata)).train_dataloader()
    epochs = [
        {key: (image, int(language)) for key, image, language in zip(b.keys, b.images, b.language, strict=True)}
        for b in loader
    ]
    same = [torch.equal(epochs[0][key][0], epochs[1][key][0]) for key in epochs[0]]
    assert np.mean(same) < 0.2
    languages = [epochs[0][key][1] == epochs[1][key][1] for key in epochs[0]]
    assert 0.4 < np.mean(languages) < 0.6


def test_a_caption_in_every_language_follows_its_image(emoji_folder: Path, metadata: dict[str, dict[str, Any]]) -> None:
    datamodule = make_datamodule(emoji_folder, max_steps=2, captions=make_captions(every_language=True))
    tokenizer = make_tokenizer()
    for batch in datamodule.train_dataloader():
        assert len(batch.images) == len(batch.identity) == len(batch.keys) == 32
        assert batch.language.tolist() == [0, 1] * 32
        assert len(batch.text.ids) == 64
        found = 0
        for row, (ids, mask) in enumerate(zip(*batch.text, strict=True)):
            captions = metadata[batch.keys[row // 2]]["captions"][LANGUAGES[row % 2]]
            found += any(tokenizer([caption]).ids[0].tolist() == ids[mask].tolist() for caption in captions)
        assert found > 40


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_divide_the_same_global_batches(emoji_folder: Path, world_size: int) -> None:
    alone = list(make_datamodule(emoji_folder, max_steps=2).train_dataloader())
    ranks = [
        list(as_rank(make_datamodule(emoji_folder, max_steps=2), rank, world_size, max_steps=2).train_dataloader())
        for rank in range(world_size)
    ]
    for step, whole in enumerate(alone):
        for rank, parts in enumerate(ranks):
            assert parts[step].keys == whole.keys[rank::world_size]
            assert torch.equal(parts[step].images, whole.images[rank::world_size])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_validation_is_divided_among_ranks_without_loss_or_repetition(emoji_folder: Path, world_size: int) -> None:
    transform = EvalTransform(IMAGE_SIZE)
    expected = read_retrieval_set(emoji_folder / "val", name="val", transform=transform, split="val")
    texts: dict[str, dict[int, tuple[int, list[int]]]] = {language: {} for language in LANGUAGES}
    tokenizer = make_tokenizer()
    seen: dict[int, torch.Tensor] = {}
    for rank in range(world_size):
        loader = as_rank(make_datamodule(emoji_folder, eval_batch_size=100), rank, world_size).val_dataloader()
        chunks = list(loader)
        assert len(loader) == len(chunks)
        rows = list(range(rank, len(expected.keys), world_size))
        images = torch.cat([chunk.images for chunk in chunks])
        assert torch.equal(images, expected.images[rows])
        identity = torch.cat([chunk.identity for chunk in chunks])
        seen |= dict(zip(rows, identity, strict=True))
        for language in LANGUAGES:
            parts = [(chunk.texts[language], chunk.text_identity[language]) for chunk in chunks]
            found = [
                (int(number), ids[mask].tolist())
                for text, numbers in parts
                for number, ids, mask in zip(numbers, *text, strict=True)
            ]
            texts[language] |= dict(zip(range(rank, len(expected.queries(language)), world_size), found, strict=True))
    assert sorted(seen) == list(range(len(expected.keys)))
    assert [int(seen[row]) for row in sorted(seen)] == expected.numbers()
    for language in LANGUAGES:
        queries = expected.queries(language)
        wanted = [(number, tokenizer([text]).ids[0].tolist()) for number, text in queries]
        assert [texts[language][row] for row in range(len(queries))] == wanted, "every caption once"
    # Equal keys, equal identities, on whatever rank.
    assert len({int(i) for i in seen.values()}) == len(set(expected.keys)) < len(expected.keys)
    for row, key in enumerate(expected.keys):
        assert seen[row] == seen[expected.keys.index(key)]


@pytest.mark.parametrize(("world_size", "chunk_size"), [(2, 360), (3, 120), (4, 180), (7, 103), (2, 2)])
def test_all_ranks_validate_in_the_same_number_of_chunks(emoji_folder: Path, world_size: int, chunk_size: int) -> None:
    """Ranks that share split weights encode together; one that has no chunk left would let the others wait for ever."""
    loaders = [
        as_rank(make_datamodule(emoji_folder, eval_batch_size=chunk_size), rank, world_size).val_dataloader()
        for rank in range(world_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    last = [list(loader)[-1] if chunk_size > 2 else None for loader in loaders]
    assert all(chunk is None or len(chunk.images) for chunk in last)


def test_neither_loader_touches_the_random_state_of_training(emoji_folder: Path) -> None:
    datamodule = make_datamodule(emoji_folder, max_steps=1)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    list(datamodule.train_dataloader())
    list(datamodule.val_dataloader())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_reported_splits(emoji_folder: Path) -> None:
    sets = make_datamodule(emoji_folder).retrieval_sets()
    assert list(sets) == ["val", *REPORTED_SPLITS]
    assert {name: s.name for name, s in sets.items()} == {name: f"emoji_{name}" for name in sets}
    assert {name: s.split for name, s in sets.items()} == {name: name for name in sets}


def test_the_watched_set_is_read_once(emoji_folder: Path) -> None:
    datamodule = as_rank(make_datamodule(emoji_folder), 0, 1)
    watched = datamodule.retrieval_set(datamodule.validation_name)
    assert datamodule.retrieval_sets()["val"] is watched
    assert datamodule.retrieval_set(datamodule.validation_name) is watched


def test_preparation_unpacks_once(tmp_path: Path) -> None:
    datamodule = make_datamodule(tmp_path / "emoji")
    datamodule.prepare_data()
    written = (tmp_path / "emoji" / "emoji.json").stat().st_mtime_ns
    datamodule.prepare_data()
    assert (tmp_path / "emoji" / "emoji.json").stat().st_mtime_ns == written


def test_a_set_that_changed_under_the_run_is_not_reported(emoji_folder: Path, tmp_path: Path) -> None:
    datamodule = make_datamodule(Path(shutil.copytree(emoji_folder, tmp_path / "emoji")))
    datamodule.prepare_data()
    assert len(datamodule.retrieval_sets()) == 3
    for name in ("train/000000.tar", "heldout_style/000000.tar", "val/index.json"):
        whole = (emoji_folder / name).read_bytes()
        (tmp_path / "emoji" / name).write_bytes((emoji_folder / "val_style" / "000000.tar").read_bytes())
        with pytest.raises(UserError, match=rf"its {name} has changed: nothing is reported, and the checkpoints stay;"):
            datamodule.retrieval_sets()
        (tmp_path / "emoji" / name).write_bytes(whole)
    shutil.rmtree(tmp_path / "emoji")
    write_emoji_shards(tmp_path / "emoji", heldout_style="openmoji")
    with pytest.raises(UserError, match=r"data\.folder=.*emoji: while the run went on, its .* has changed"):
        datamodule.retrieval_sets()


def test_data_of_another_setting_is_refused(emoji_folder: Path) -> None:
    datamodule = make_datamodule(emoji_folder, heldout_style="noto")
    with pytest.raises(UserError, match=r"data\.folder=.*heldout_style=twemoji, and heldout_style=noto is asked for"):
        datamodule.prepare_data()


def test_without_a_folder_it_is_that_of_the_setting() -> None:
    folders = [str(make_datamodule(None, heldout_style=style).folder) for style in ("noto", "twemoji")]
    assert [folder.rpartition("-")[0] for folder in folders] == [
        "outputs/data/emoji-noto",
        "outputs/data/emoji-twemoji",
    ]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 6}, "seed: 5 then, 6 now"),
        ({"global_batch_size": 16}, "global_batch_size: 32 then, 16 now"),
    ],
)
def test_a_changed_order_is_refused(emoji_folder: Path, change: dict[str, Any], difference: str) -> None:
    state = make_datamodule(emoji_folder).train_dataloader().state_dict()
    with pytest.raises(UserError, match=difference):
        make_datamodule(emoji_folder, **change).train_dataloader().load_state_dict(state)


def test_changed_data_are_refused(emoji_folder: Path, tmp_path: Path) -> None:
    state = make_datamodule(emoji_folder).train_dataloader().state_dict()
    other = make_datamodule(tmp_path / "emoji", heldout_style="noto")
    other.prepare_data()
    with pytest.raises(UserError, match=r"another mixture .*source emoji: weight \d+ then, \d+ now"):
        other.train_dataloader().load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size=0: must be a whole number, 2 or more"),
        ({"num_workers": -1}, "num_workers=-1: must be a whole number, 0 or more"),
        ({"eval_batch_size": 0}, "eval_batch_size=0: must be a whole number, 1 or more"),
        ({"seed": -1}, "seed=-1"),
        ({"global_batch_size": 5000}, "global_batch_size=5000 exceeds the 4034 training samples"),
        ({"global_batch_size": 33}, "global_batch_size=33 must be a multiple of the 2 ranks"),
    ],
)
def test_impossible_numbers_are_named(emoji_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_rank(make_datamodule(emoji_folder, **arguments), 0, 2).train_dataloader()


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 must be 1"),
        ({"max_steps": 13}, "trainer.max_steps=13 exceeds the 12 steps"),
    ],
)
def test_a_trainer_that_would_want_more_batches_is_named(
    emoji_folder: Path, trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        as_rank(make_datamodule(emoji_folder), 0, 1, **trainer).train_dataloader()
