"""CLIP_benchmark's web datasets, against webdataset itself."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.base import EvaluationSet
from m2_encoder.evaluation.sets.clip_benchmark import read_clip_benchmark
from m2_encoder.evaluation.sets.reading import read_set
from tests.support.shards import make_image, write_tar

NAMES = ["a cat", "a dog", "a fox"]


def write_set(root: Path, kind: str, labels: list[bytes], *, per_shard: int = 3) -> Path:
    """A set as the exporter lays it out; with neither names nor type where the kind has none."""
    extension = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}[kind]
    members = [
        [(f"s{number:07d}.webp", make_image(number, kind="WEBP")), (f"s{number:07d}.{extension}", label)]
        for number, label in enumerate(labels)
    ]
    shards = [members[start : start + per_shard] for start in range(0, len(members), per_shard)]
    for number, shard in enumerate(shards):
        write_tar(root / "test" / f"{number}.tar", [member for sample in shard for member in sample])
    (root / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    if kind != "classification":
        (root / "dataset_type.txt").write_text(kind + "\n")
    if kind != "retrieval":
        (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
        (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n{c}.\n")
    return root


def vector(*values: int) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(values))
    return stream.getvalue()


def read_with_webdataset(root: Path, label: str, shards: int) -> list[tuple[bytes, bytes]]:
    found = []
    for number in range(shards):
        with (root / "test" / f"{number}.tar").open("rb") as stream:
            files = tar_file_expander([{"url": f"{number}.tar", "stream": stream}])
            found += [(sample["webp"], sample[label]) for sample in group_by_keys(files)]
    return found


def pairs(found: EvaluationSet, language: str) -> list[tuple[str, str]]:
    texts = found.texts[language]
    return [(texts.rows[text], found.pictures[picture].name) for text, picture in texts.pairs.tolist()]


def test_classes_in_the_order_of_webdataset(tmp_path: Path) -> None:
    labels = [b"2", b"0", b"1\n", b"0", b"2", b"2", b"1"]
    root = write_set(tmp_path / "wds_pets", "classification", labels)
    found = read_clip_benchmark(root)
    theirs = read_with_webdataset(root, "cls", 3)
    assert [picture.read() for picture in found.pictures] == [image for image, _ in theirs]
    assert found.classes is not None
    assert found.classes.targets.tolist() == [int(label) for _, label in theirs]
    assert found.classes.names == {"en": tuple(NAMES)}
    assert found.classes.templates == {"en": ("a photo of {}", "{}.")}
    assert (found.name, found.classes.label_set) == ("pets", "pets/classnames.txt")
    assert found.pictures[3].name == "1.tar:s0000003.webp"
    assert not list(root.rglob("*.index")), "a set is read where it lies, and nothing is written there"


def test_captions_are_lines_and_equal_ones_stay_apart(tmp_path: Path) -> None:
    root = write_set(tmp_path / "flickr30k_cn", "retrieval", ["一只猫\n猫咪".encode(), "一只猫\r\n".encode()])
    found = read_clip_benchmark(root)
    assert pairs(found, "zh") == [
        ("一只猫", "0.tar:s0000000.webp"),
        ("猫咪", "0.tar:s0000000.webp"),
        ("一只猫", "0.tar:s0000001.webp"),
    ]
    assert found.counts["equal_texts"] == {"zh": 2}
    assert found.comparable == "2 pictures, 1,000 published; 3 zh texts, 5,000 published"


def test_several_classes_of_a_picture(tmp_path: Path) -> None:
    found = read_clip_benchmark(write_set(tmp_path, "multilabel", [vector(0, 1, 1), vector(1, 0, 0)]), name="voc")
    assert found.classes is not None
    assert found.classes.targets.dtype == torch.bool
    assert found.classes.targets.tolist() == [[False, True, True], [True, False, False]]
    with pytest.raises(UserError, match="names in en"):
        read_clip_benchmark(write_set(tmp_path / "b", "multilabel", [vector(0, 1)]))


def empty(root: Path) -> None:
    for tar in (root / "test").glob("*.tar"):
        write_tar(tar, [])


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes() if (root / name).exists() else b""))


FAULTS: dict[str, Callable[[Path], object]] = {
    "cut": rewrite("test/1.tar", lambda content: content[:700]),
    "pointer": rewrite("test/1.tar", lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "missing": lambda root: (root / "test" / "1.tar").unlink(),
    "more": rewrite("test/2.tar", lambda _: b""),
    "short": rewrite("classnames.txt", lambda _: b"a cat\na dog\n"),
    "template": rewrite("zeroshot_classification_templates.txt", lambda _: b"a photo of {c}\na photo of it\n"),
    "kind": rewrite("dataset_type.txt", lambda _: b"retrieval"),
    "split": lambda root: (root / "test").rename(root / "validation"),
    "encoding": rewrite("classnames.txt", lambda _: "一只猫\n一只狗\n狐狸".encode("gb18030")),
    "empty": empty,
    "names": lambda root: (root / "classnames.txt").unlink(),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut", r"1\.tar: is no whole tar: cut at byte 700; download it again"),
        ("pointer", r"1\.tar: is a pointer of Git LFS, .* git lfs pull"),
        ("missing", r"1 of 2 tars are missing: 1\.tar; complete the download"),
        ("more", r"holds 2\.tar, but nshards\.txt says 2"),
        ("short", r"classnames\.txt: 2 names in en, but the pictures' classes go from 0 to 2"),
        ("template", r"templates\.txt, line 2: 'a photo of it' has 0 places for a name"),
        ("kind", r"sample s0000000 has webp, cls, wanted txt; dataset_type\.txt says"),
        ("split", r"has no split test with nshards\.txt; choose split=validation"),
        ("encoding", r"classnames\.txt: the file is not UTF-8 at byte"),
        ("empty", "no sample in its 2 tars"),
        ("names", r"classnames\.txt is not there"),
    ],
)
def test_faults_have_one_line_each(tmp_path: Path, name: str, message: str) -> None:
    root = write_set(tmp_path, "classification", [b"0", b"1", b"2", b"0"])
    FAULTS[name](root)
    with pytest.raises(UserError, match=message) as caught:
        read_clip_benchmark(root)
    assert "\n" not in str(caught.value)


def test_a_script_of_several_languages_needs_one(tmp_path: Path) -> None:
    root = write_set(tmp_path / "MSCOCO-Captions", "retrieval", ["кошка".encode()])
    with pytest.raises(UserError, match="by script, 1 caption in cyrillic; say which it is, such as language=zh"):
        read_clip_benchmark(root)
    found = read_clip_benchmark(root, language="ru")
    assert list(found.texts) == ["ru"]
    assert found.comparable.startswith("1 pictures, 5,000 published")


def test_names_with_a_byte_order_mark(tmp_path: Path) -> None:
    root = write_set(tmp_path, "classification", [b"0"])
    (root / "classnames.txt").write_bytes("\ufeff猫\r\n狗\r\n".encode())
    found = read_clip_benchmark(root)
    assert found.classes is not None
    assert found.classes.names == {"zh": ("猫", "狗")}
    assert found.counts["classes_without_pictures"] == 1


def test_setting_of_another_layout_is_refused_unless_it_is_none(tmp_path: Path) -> None:
    root = write_set(tmp_path / "own", "classification", [b"0", b"1", b"2"])
    assert len(read_set(root, layout="clip_benchmark", labels=None).pictures) == 3
    with pytest.raises(UserError, match="no setting of layout clip_benchmark"):
        read_set(root, layout="clip_benchmark", labels="names.txt")
