"""Features of sets: what is encoded, what is left out, what is stored, and by how many ranks."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.errors import UserError
from m2_encoder.evaluation.cost import measure_cost
from m2_encoder.evaluation.feature_store import text_key
from m2_encoder.evaluation.features import EncodedSet, FeatureEncoder
from m2_encoder.evaluation.models.opening import open_model
from m2_encoder.evaluation.sets.base import Picture
from tests.support.evaluation_sets import WIDTH, counting_model, letters_of, small_set
from tests.support.ranks import fork_context, run_ranks


def expected_images(folder: Path, model: Any, rows: list[int]) -> Tensor:
    transform = EvalTransform(16)
    with torch.no_grad():
        return torch.cat([model.model.encode_image(transform.to_uint8(folder / f"{row}.png")[None]) for row in rows])


def expected_texts(model: Any, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.model.encode_text(letters_of([text])) for text in texts])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_is_encoded_without_what_does_not_decode(tmp_path: Path, num_workers: int) -> None:
    dataset, model = small_set(tmp_path, 9, broken=(2, 5)), counting_model()
    with FeatureEncoder(model, batch_size=3, num_workers=num_workers) as encoder:
        found = encoder.encode_set(dataset)
    kept = [0, 1, 3, 4, 6, 7, 8]
    assert found.kept.tolist() == kept
    assert found.left_out == (
        ("2.png", "not an image that is read here, but something unknown, 10 bytes"),
        ("5.png", "No such file or directory"),
    )
    torch.testing.assert_close(found.images, expected_images(tmp_path, model, kept))
    assert [picture.name for picture in found.dataset.pictures] == [f"{row}.png" for row in kept]
    english = found.dataset.texts["en"]
    assert english.rows == tuple(f"text {row} of 9" for row in range(18) if row // 2 in kept)
    assert [(english.rows[text], kept[picture]) for text, picture in english.pairs.tolist()] == [
        (f"text {row} of 9", row // 2) for row in range(18) if row // 2 in kept
    ]
    torch.testing.assert_close(found.texts["en"], expected_texts(model, list(english.rows)))
    chinese, parallel = found.dataset.texts["zh"], found.dataset.parallel["zh", "en"]
    pairs = [(chinese.rows[a], english.rows[b]) for a, b in parallel.tolist()]
    assert pairs == [(f"图 {row}", f"text {2 * row} of 9") for row in kept]
    assert found.dataset.classes is not None
    assert found.dataset.classes.targets.tolist() == [row % 2 for row in kept]
    assert [kept[row] for row in found.dataset.subsets["even"].tolist()] == [0, 4, 6, 8]
    assert found.dataset.counts["not_decoded"] == 2
    assert found.dataset.comparable == "2 of 9 pictures could not be used"
    assert (dataset.comparable, len(dataset.pictures)) == ("", 9)


def test_languages_are_chosen_and_equal_inputs_encoded_once(tmp_path: Path) -> None:
    dataset, model = small_set(tmp_path, 4), counting_model()
    twice = dataclasses.replace(dataset, pictures=[*dataset.pictures, *dataset.pictures])
    with FeatureEncoder(model, batch_size=3) as encoder:
        found = encoder.encode_set(twice, languages=["zh"])
        assert torch.equal(found.images[:4], found.images[4:])
        assert torch.equal(encoder.encode_texts(["a", "b", "a"])[0], encoder.encode_texts(["a"])[0])
        assert [*found.texts] == ["zh"]
        assert [*encoder.encode_set(twice, languages=()).texts] == []
    assert model.model.texts_seen == 4 + 2 + 1
    without = dataclasses.replace(model, no_texts="it has no text tower")
    with FeatureEncoder(without) as encoder:
        assert len(encoder.encode_set(dataset, languages=()).images) == 4
        with pytest.raises(UserError, match=r"^counting: it has no text tower; choose tasks that need pictures alone"):
            encoder.encode_set(dataset)


def test_what_is_stored_is_not_encoded_again(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    dataset, model = small_set(tmp_path / "set", 7, broken=(3,)), counting_model()
    results = []
    for _ in range(2):
        with FeatureEncoder(model, store=tmp_path / "store", batch_size=2, num_workers=1) as encoder:
            results.append(encoder.encode_set(dataset))
            again = encoder.encode_set(dataset, languages=["zh"])
            assert torch.equal(again.texts["zh"], results[0].texts["zh"])
    assert (model.model.images_seen, model.model.texts_seen) == (6, 18)
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].texts["en"], results[1].texts["en"])
    assert results[0].left_out == results[1].left_out
    renamed = dataclasses.replace(dataset, pictures=[p._replace(name=f"x{p.name}") for p in dataset.pictures[:2]])
    with FeatureEncoder(model, store=tmp_path / "store") as encoder:  # another set with the same pictures
        assert torch.equal(encoder.encode_pictures(renamed.pictures).features, results[0].images[:2])
    assert model.model.images_seen == 6
    other = counting_model(seed=1)
    with FeatureEncoder(other, store=tmp_path / "store") as encoder:
        assert not torch.allclose(encoder.encode_set(dataset).images, results[0].images)


def test_vectors_of_classes_are_stored_by_what_made_them(tmp_path: Path) -> None:
    asked = []

    def vectors_of(encoder: FeatureEncoder, number: int) -> Tensor:
        def compute() -> Tensor:
            asked.append(number)
            return torch.arange(number)[:, None].repeat(1, WIDTH).float()

        return encoder.cached_vectors([text_key(f"class {row} of {number}") for row in range(number)], compute)

    for number, expected in ((3, [3]), (3, [3]), (4, [3, 4])):
        with FeatureEncoder(counting_model(), store=tmp_path) as encoder:
            assert vectors_of(encoder, number)[:, 0].tolist() == [*range(number)]
        assert asked == expected
    with FeatureEncoder(counting_model()) as encoder:
        vectors_of(encoder, 4)
    assert asked == [3, 4, 4]


def test_features_that_are_not_finite_and_sets_without_pictures_are_refused(tmp_path: Path) -> None:
    dataset, model = small_set(tmp_path, 4), counting_model()
    with torch.no_grad():
        model.model.image.weight[0, 0] = torch.nan
    said = r"^counting: 4 of 4 features are not finite, such as that of '0.png': the model is broken"
    for _ in range(2):  # nothing of it was stored
        with FeatureEncoder(model, store=tmp_path / "store") as encoder, pytest.raises(UserError, match=said):
            encoder.encode_set(dataset)
    (tmp_path / "none").mkdir()
    broken = small_set(tmp_path / "none", 2, broken=(0, 1))
    with FeatureEncoder(counting_model()) as encoder:
        with pytest.raises(UserError, match=r"^small: no picture could be used: 0.png \(not an image"):
            encoder.encode_set(broken)
        with pytest.raises(UserError, match=r"^small: no picture could be used: it has none"):
            encoder.encode_set(dataclasses.replace(broken, pictures=[]))


def test_files_of_features_take_the_place_of_a_model(tmp_path: Path) -> None:
    dataset = small_set(tmp_path, 3, broken=(1,))  # nobody reads it
    texts = [text for own in dataset.texts.values() for text in own.rows]
    images, rows = torch.randn(3, 4), torch.randn(len(texts), 4)
    np.savez(tmp_path / "p.npz", features=images.numpy(), names=np.array([p.name for p in dataset.pictures]))
    np.savez(tmp_path / "t.npz", features=rows.numpy(), names=np.array(texts))
    with FeatureEncoder(open_model(f"features:{tmp_path}/p.npz,{tmp_path}/t.npz")) as encoder:
        found = encoder.encode_set(dataset)
        torch.testing.assert_close(found.images, torch.nn.functional.normalize(images, dim=-1))
        torch.testing.assert_close(found.texts["zh"], torch.nn.functional.normalize(rows[6:], dim=-1))
        with pytest.raises(UserError, match=r"t.npz lacks 1 of 1 texts: an unknown one"):
            encoder.encode_texts(["an unknown one"])


def encode_shared(rank: int, folder: str, store: str | None, ranks: int) -> dict[str, Any]:
    (own := Path(folder) / str(rank)).mkdir()
    dataset, model = small_set(own, 11, broken=(4, 7)), counting_model()
    with FeatureEncoder(model, store=store, batch_size=2, group=dist.group.WORLD) as encoder:
        found = encoder.encode_set(dataset)
        vectors = encoder.cached_vectors([text_key("a"), text_key("b")], lambda: encoder.encode_texts(["a", "b"]))
        few = encoder.encode_texts(["one"])  # fewer than ranks
        seen = model.model.images_seen
        error = ""
        if rank == ranks - 1:
            model.model.image.weight.data.fill_(torch.nan)
        try:
            fresh = [Picture(f"new {row}", _NewPicture(row)) for row in range(4)]
            encoder.encode_pictures(fresh)
        except UserError as problem:
            error = str(problem)
    (own / "file").touch()
    unusable = str(own / "file") if rank == ranks - 1 else None
    with FeatureEncoder(model, store=unusable, group=dist.group.WORLD) as encoder:
        with pytest.raises(UserError, match="Not a directory"):  # on all ranks, and none waits for another
            encoder.encode_texts(["x"])
        with pytest.raises(UserError, match="Not a directory"):
            encoder.cached_vectors([text_key("c")], lambda: encoder.encode_texts(["c"]))
    return {
        **_plain(found),
        "vectors": vectors.numpy(),
        "few": few.numpy(),
        "error": error,
        "seen": seen,
    }


class _NewPicture:
    def __init__(self, row: int) -> None:
        self.row = row

    def __call__(self) -> bytes:
        from tests.support.peer_models import png

        return png(100 + self.row)


def _plain(found: EncodedSet) -> dict[str, Any]:
    return {
        "images": found.images.numpy(),
        "kept": found.kept.tolist(),
        "names": [picture.name for picture in found.dataset.pictures],
        "left_out": [tuple(each) for each in found.left_out],
        **{language: features.numpy() for language, features in found.texts.items()},
    }


def test_ranks_share_the_work_and_give_the_same_features(tmp_path: Path) -> None:
    results = {}
    for ranks in (1, 2, 3):
        for name in ("set", "world"):
            (tmp_path / f"{name}{ranks}").mkdir()
        args = str(tmp_path / f"set{ranks}"), str(tmp_path / "store") if ranks == 2 else None, ranks
        results[ranks] = run_ranks(encode_shared, ranks, *args, folder=tmp_path / f"world{ranks}")
    (whole,) = results[1]
    assert whole["kept"] == [0, 1, 2, 3, 5, 6, 8, 9, 10]
    for ranks, shares in results.items():
        assert sum(share["seen"] for share in shares) == 9  # nothing twice
        for rank, share in enumerate(shares):
            assert {key: share[key] for key in ("kept", "names", "left_out")} == {
                key: whole[key] for key in ("kept", "names", "left_out")
            }
            for key in ("images", "en", "zh", "vectors", "few"):
                assert np.array_equal(share[key], whole[key]), (ranks, rank, key)
            said = "features are not finite" in share["error"]
            assert said, share["error"]
            assert share["error"].startswith(f"rank {ranks - 1}: " if rank < ranks - 1 else "counting: ")


def encode_slowly(folder: Path, store: Path, seen: Any) -> None:
    dataset, model = small_set(folder, 60), counting_model()
    encode = model.model.encode_image

    def counted(images: Tensor) -> Tensor:
        made = encode(images)
        seen.value += len(images)
        if seen.value >= 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    model.model.encode_image = counted
    with FeatureEncoder(model, store=store, batch_size=2) as encoder:
        encoder.encode_set(dataset)


def test_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    context = fork_context()
    seen = context.Value("l", 0, lock=False)
    process = context.Process(target=encode_slowly, args=(tmp_path / "set", tmp_path / "store", seen))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    dataset, model = small_set(tmp_path / "set", 60), counting_model()
    with FeatureEncoder(model, store=tmp_path / "store", batch_size=2) as encoder:
        found = encoder.encode_set(dataset)
    assert model.model.images_seen == 60 - 18  # the batch in which it was killed is encoded again
    with FeatureEncoder(model, batch_size=2) as encoder:
        whole = encoder.encode_set(dataset)
    assert torch.equal(found.images, whole.images)
    assert torch.equal(found.texts["en"], whole.texts["en"])
    torch.testing.assert_close(found.images, expected_images(tmp_path / "set", model, [*range(60)]))


def test_cost_is_plain_numbers_of_batches_that_were_counted(tmp_path: Path) -> None:
    dataset, model = small_set(tmp_path, 3), counting_model()
    found = measure_cost(model, [p.read() for p in dataset.pictures], ["a", "bc"], batch_size=8, repeats=3)
    names = {"preprocess_ms", "image_ms@1", "image_ms@8", "text_ms@1", "text_ms@8", "peak_memory_mb"}
    assert set(found) == names
    assert all(type(value) is float and value > 0 for value in found.values())
    assert model.model.images_seen == (2 + 3) * (1 + 3)
    alone = measure_cost(dataclasses.replace(model, no_texts="none"), [dataset.pictures[0].read()], [], batch_size=1)
    assert set(alone) == {"preprocess_ms", "image_ms@1", "peak_memory_mb"}
    with pytest.raises(UserError, match="give at least one of each"):
        measure_cost(model, [], ["a"])
