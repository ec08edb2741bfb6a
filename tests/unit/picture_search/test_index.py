"""An index against features computed by hand, and after each thing that can happen to files, disks and processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2_encoder.errors import UserError
from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.files import hold_lock
from m2_encoder.picture_search import update as module
from m2_encoder.picture_search.index import INDEX_FILE, LOCK_FILE, PictureIndex, open_index
from m2_encoder.picture_search.model import SearchModel, open_index_model, open_search_model
from m2_encoder.picture_search.update import Changes, update_index
from tests.support.pictures import FEATURE_DIM, export_small, write_picture

Update = Callable[..., Changes]


@pytest.fixture
def update(tmp_path: Path, photos: Path, model: SearchModel) -> Update:
    def call(**given: Any) -> Changes:
        settings = {"path": tmp_path / "i", "root": photos, "model": model, "batch_size": 2, "num_workers": 0, **given}
        return update_index(**settings)

    return call


def by_hand(folder: Path, names: list[str], model: SearchModel) -> torch.Tensor:
    encoder: Any = model.encoder.model
    with torch.no_grad():
        return torch.cat([encoder.encode_image(model.encoder.preprocess(folder / name)[None]) for name in names])


def require_right(index: PictureIndex, model: SearchModel, *, atol: float = 1e-3) -> None:
    """Every picture of the folder is there, once, with its own feature."""
    files = sorted(str(path.relative_to(index.root)) for path in index.root.rglob("*.*") if path.is_file())
    assert index.names == files
    np.testing.assert_allclose(np.asarray(index.features, np.float32), by_hand(index.root, files, model), atol=atol)
    assert index.sizes.tolist() == [(index.root / name).stat().st_size for name in files]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_are_those_of_the_model(update: Update, tmp_path: Path, model: SearchModel, dtype: str) -> None:
    assert update(dtype=dtype) == Changes(new=5, changed=0, deleted=0, unchanged=0, skipped=[])
    index = open_index(tmp_path / "i")
    assert (index.features.dtype, index.features.shape) == (dtype, (5, FEATURE_DIM))
    assert isinstance(index.features, np.memmap)
    require_right(index, model, atol=1e-3 if dtype == "float16" else 2e-6)
    assert sorted(path.name for path in (tmp_path / "i").iterdir())[1:] == [INDEX_FILE]


def test_search_is_exact(update: Update, tmp_path: Path) -> None:
    update(dtype="float32")
    index = open_index(tmp_path / "i")
    queries = np.random.default_rng(0).normal(size=(3, FEATURE_DIM)).astype(np.float32)
    scores, rows = index.search(queries, 4)
    expected = queries.astype(np.float64) @ index.features.astype(np.float64).T
    order = np.argsort(-expected, axis=1)[:, :4]
    assert rows.tolist() == order.tolist()
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, 1), rtol=1e-6)
    assert index.search(queries, 100)[1].shape == (3, 5)
    with pytest.raises(ValueError, match="expected"):
        index.search(queries[:, :3], 1)


def test_only_what_differs_is_encoded_again(
    update: Update, tmp_path: Path, photos: Path, model: SearchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    update()
    encoded: list[str] = []
    encode = FeatureEncoder.encode_pictures

    def watch(self: FeatureEncoder, pictures: Any) -> Any:
        encoded.extend(picture.name for picture in pictures)
        return encode(self, pictures)

    monkeypatch.setattr(FeatureEncoder, "encode_pictures", watch)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "i").glob("features*"))
    assert update() == Changes(new=0, changed=0, deleted=0, unchanged=5, skipped=[])
    assert encoded == []
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "i").glob("features*")) == before
    write_picture(photos / "new.png", 10)
    write_picture(photos / "b.png", 11)
    (photos / "a.jpg").unlink()
    os.utime(photos / "e.png", ns=(1, 1))  # touched: its content may be another one
    assert update() == Changes(new=1, changed=2, deleted=1, unchanged=2, skipped=[])
    assert encoded == ["b.png", "e.png", "new.png"]
    require_right(open_index(tmp_path / "i"), model)


def test_bad_files_are_listed_and_tried_again(update: Update, tmp_path: Path, photos: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra heic is not installed")
    good = (photos / "e.png").read_bytes()
    (photos / "cut.png").write_bytes(good[:50])
    (photos / "empty.jpg").touch()
    (photos / "gone.png").symlink_to("nowhere")
    (photos.parent / "secret.png").write_bytes(good)
    (photos / "out.png").symlink_to("../secret.png")
    (photos / "in.png").symlink_to("e.png")
    (photos / "film.mov").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    (photos / "notes.txt").write_text("no picture by name")
    (photos / os.fsdecode(b"\xb9\xb7.png")).write_bytes(good)
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    picture.save(photos / "f.avif")
    pillow_heif.from_pillow(picture).save(photos / "g.heic")
    changes = update()
    said = {item.name: item.reason for item in changes.skipped}
    assert sorted(said) == sorted([r"\udcb9\udcb7.png", "cut.png", "empty.jpg", "film.mov", "gone.png", "out.png"])
    assert said["out.png"].startswith("is a link to a file outside of the folder")
    assert "rename it" in said[r"\udcb9\udcb7.png"]
    assert said["empty.jpg"] == "empty"
    assert said["cut.png"] == "cannot be decoded: image file is truncated"
    assert changes.new == 8
    index = open_index(tmp_path / "i")
    assert {"f.avif", "g.heic"} < set(index.names)
    assert {item.name: item.reason for item in index.skipped} == said
    (photos / "cut.png").write_bytes(good)
    assert update() == Changes(1, 0, 0, 8, [item for item in changes.skipped if item.name != "cut.png"])
    (photos / "cut.png").write_bytes(good[:50])
    assert update().deleted == 1
    assert "cut.png" not in open_index(tmp_path / "i").names


def test_a_folder_that_cannot_be_read_is_not_taken_for_deleted(
    update: Update, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if os.fspath(path).endswith("/c"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    changes = update()
    assert (changes.deleted, changes.unchanged) == (0, 5)
    assert [item.name for item in changes.skipped] == ["c"]
    monkeypatch.undo()
    assert update() == Changes(0, 0, 0, 5, [])


def test_empty_or_missing_folder_leaves_the_index(update: Update, tmp_path: Path, photos: Path) -> None:
    update()
    before = (tmp_path / "i" / INDEX_FILE).read_bytes()
    shutil.rmtree(photos)
    photos.mkdir()
    with pytest.raises(UserError, match="no picture in it"):
        update()
    (photos / "bad.png").write_text("none")
    with pytest.raises(UserError, match=r"no picture could be used: bad\.png"):
        update()
    assert (tmp_path / "i" / INDEX_FILE).read_bytes() == before


def test_moved_photos_and_foreign_folders(update: Update, tmp_path: Path, photos: Path) -> None:
    update()
    other = tmp_path / "other"
    write_picture(other / "x.png", 3)
    with pytest.raises(UserError, match=r"is the index of .*我的 照片"):
        update(root=other)
    moved = photos.rename(tmp_path / "moved")
    assert update(root=moved) == Changes(0, 0, 0, 5, [])
    assert open_index(tmp_path / "i").root == moved
    with pytest.raises(UserError, match=r"other files in it \(x\.png\)"):
        update(root=moved, path=other)
    with pytest.raises(UserError, match="is a file"):
        update(root=moved, path=other / "x.png")


def test_another_model_is_refused(
    update: Update, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, exported: Path
) -> None:
    update()
    other = export_small(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"is not the model of .*index to another output"):
        update(model=open_search_model(other))
    index = open_index(tmp_path / "i")
    assert open_index_model(index).fingerprint == index.made_by.fingerprint
    with pytest.raises(UserError, match="is not the model of"):
        open_index_model(index, model=other)
    copy = shutil.copytree(exported, tmp_path / "copy")
    assert open_index_model(index, model=copy).fingerprint == index.made_by.fingerprint
    assert update(model=open_search_model(copy)).unchanged == 5


def test_second_writer_is_refused(update: Update, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update()
    pid = os.fork()
    read, write = os.pipe()
    del read, write
    if pid == 0:
        with hold_lock(tmp_path / "i" / LOCK_FILE):
            (tmp_path / "held").touch()
            while not (tmp_path / "free").exists():
                pass
        os._exit(0)
    while not (tmp_path / "held").exists():
        pass
    try:
        with pytest.raises(UserError, match=f"another m2-search index writes it .pid {pid}"):
            update()
    finally:
        (tmp_path / "free").touch()
        os.waitpid(pid, 0)
    assert update().unchanged == 5


def test_index_inside_the_photos_does_not_index_itself(photos: Path, model: SearchModel) -> None:
    path = photos / "photos.index"
    assert update_index(path, photos, model, num_workers=0).new == 5
    assert update_index(path, photos, model, num_workers=0) == Changes(0, 0, 0, 5, [])


@pytest.mark.parametrize("moment", ["features", "index"])
def test_full_disk_leaves_the_old_index(
    update: Update, tmp_path: Path, photos: Path, model: SearchModel, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    update()
    write_picture(photos / "new.png", 10)
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name.startswith(moment):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        update()
    assert len(open_index(tmp_path / "i")) == 5
    monkeypatch.undo()
    assert update().new == 1
    require_right(open_index(tmp_path / "i"), model)
    assert len(list((tmp_path / "i").iterdir())) == 2, "nothing is left behind"


def test_damaged_indexes_are_one_line(update: Update, tmp_path: Path) -> None:
    folder = tmp_path / "i"
    with pytest.raises(UserError, match=r"no such index: .*; write it with m2-search index PHOTOS output="):
        open_index(folder)
    update()
    content = json.loads((folder / INDEX_FILE).read_text())
    features = folder / content["features"]
    whole = features.read_bytes()
    for damage, message in (
        ({"version": 9}, "of version 9"),
        ({"format": "x"}, "something else"),
        ({"names": content["names"][1:]}, "4 names"),
        ({"features": "features-none.npy"}, "features-none.npy is missing"),
        ({"model": {}}, "damaged"),
    ):
        (folder / INDEX_FILE).write_text(json.dumps({**content, **damage}))
        with pytest.raises(UserError, match=message):
            open_index(folder)
    (folder / INDEX_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"index\.json: is a file; give the folder that m2-search index wrote"):
        open_index(folder / INDEX_FILE)
    with pytest.raises(UserError, match=r"holds no index\.json.*; write an index with m2-search index"):
        open_index(tmp_path)
    features.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="damaged"):
        open_index(folder)
    (folder / INDEX_FILE).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_index(folder)


def test_graph_finds_what_comparing_all_finds(tmp_path: Path, model: SearchModel) -> None:
    pytest.importorskip("usearch", reason="the extra usearch is not installed")
    photos = tmp_path / "p"
    for number in range(120):
        write_picture(photos / f"{number:03}.png", number)
    update_index(tmp_path / "all", photos, model, num_workers=0)
    update_index(tmp_path / "graph", photos, model, num_workers=0, neighbours=True)
    plain, graph = open_index(tmp_path / "all"), open_index(tmp_path / "graph")
    assert graph.neighbours is not None
    queries = np.asarray(plain.features[::10], np.float32)
    (scores, rows), (expected_scores, expected) = graph.search(queries, 5), plain.search(queries, 5)
    assert np.mean(rows == expected) > 0.95
    np.testing.assert_allclose(scores[:, 0], expected_scores[:, 0], atol=1e-6)
    (photos / "000.png").unlink()
    update_index(tmp_path / "graph", photos, model, num_workers=0, neighbours=True)
    assert open_index(tmp_path / "graph").search(queries[1:2], 1)[1].tolist() == [[9]]
    update_index(tmp_path / "graph", photos, model, num_workers=0)
    assert open_index(tmp_path / "graph").neighbours is None
    assert module.LARGE == 200_000


def test_large_index_asks_for_its_package_before_it_encodes(
    update: Update, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 4)
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"more than 4 pictures.*install it with pip install 'm2-encoder\[usearch\]'"):
        update()
    assert not (tmp_path / "i" / "encoding").exists()
    assert update(neighbours=False).new == 5


def test_reader_keeps_the_index_that_it_opened(update: Update, tmp_path: Path, photos: Path) -> None:
    update()
    index = open_index(tmp_path / "i")
    before = np.array(index.features)
    write_picture(photos / "0.png", 10)
    update()
    assert np.array_equal(index.features, before)
    assert len(open_index(tmp_path / "i")) == 6
