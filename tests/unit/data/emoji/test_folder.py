"""Which folder the built-in set is in, and what is done about one that is damaged or holds something else."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.data.emoji import dataset as emoji
from m2_encoder.data.emoji.dataset import default_emoji_folder, emoji_settings, write_emoji_shards
from m2_encoder.errors import UserError


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_emoji_shards(tmp_path_factory.mktemp("emoji") / "shards")


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_complete_folder_is_left_alone(unpacked: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in unpacked.rglob("*")}
    assert write_emoji_shards(unpacked) == unpacked
    assert {path: path.stat().st_mtime_ns for path in unpacked.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heldout_style": "noto"}, "heldout_style=twemoji, and heldout_style=noto is asked for; give another folder"),
        ({"samples_per_shard": 100}, "samples_per_shard=500, and samples_per_shard=100 is asked for"),
        ({"styles": ("noto", "twemoji")}, r"styles=\[noto,twemoji,fluent,openmoji\], and styles=\[noto,twemoji\] is"),
    ],
)
def test_other_arguments_are_refused(unpacked: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    folder = Path(shutil.copytree(unpacked, tmp_path / "shards"))
    before = _digests(folder)
    with pytest.raises(UserError, match=rf"folder=.*shards: holds the built-in set with {message}"):
        write_emoji_shards(folder, **arguments)
    assert _digests(folder) == before


def test_the_set_of_another_version_is_refused(unpacked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(unpacked, tmp_path / "shards"))
    marker = json.loads((folder / "emoji.json").read_bytes())
    (folder / "emoji.json").write_text(json.dumps({**marker, "fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="holds the set of another version of this package; give another folder"):
        write_emoji_shards(folder)


def test_every_setting_has_a_folder_of_its_own() -> None:
    settings: list[dict[str, Any]] = [
        {}, {"heldout_style": "noto"}, {"samples_per_shard": 499}, {"styles": ("noto", "twemoji")},
    ]  # fmt: skip
    names = [str(default_emoji_folder(emoji_settings(**each))) for each in settings]
    assert len(set(names)) == len(names)
    assert re.fullmatch(r"outputs/data/emoji-twemoji-[0-9a-f]{8}", names[0])
    assert re.fullmatch(r"outputs/data/emoji-noto-[0-9a-f]{8}", names[1])


def test_the_digest_of_every_file_is_kept(unpacked: Path) -> None:
    digests = _digests(unpacked)
    assert json.loads((unpacked / "emoji.json").read_bytes())["sha256"] == {
        name: digest for name, digest in digests.items() if name != "emoji.json"
    }


def test_the_folder_of_an_earlier_version_is_compared_and_kept(unpacked: Path, tmp_path: Path) -> None:
    """Which kept no digests."""
    folder = Path(shutil.copytree(unpacked, tmp_path / "emoji"))
    marker = json.loads((folder / "emoji.json").read_bytes())
    del marker["sha256"]
    (folder / "emoji.json").write_text(json.dumps(marker))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    write_emoji_shards(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")} == before
    assert _digests(folder) == _digests(unpacked)


def _damage(folder: Path, damage: str) -> str:
    """Damages a folder; the name of the file that is no longer right."""
    name = {"index": "val/index.json", "shard": "train/000003.tar", "marker": "emoji.json"}.get(
        damage, "val/000001.tar"
    )
    if damage in ("index", "shard", "marker"):
        (folder / name).unlink()
    elif damage == "truncated":
        os.truncate(folder / name, 1000)
    else:  # a byte of a picture, at equal size and time
        status, content = (folder / name).stat(), bytearray((folder / name).read_bytes())
        content[5000] ^= 1
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    return name


@pytest.mark.parametrize("damage", ["marker", "index", "shard", "truncated", "byte"])
def test_a_damaged_folder_named_by_its_settings_is_made_anew(
    unpacked: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(unpacked, tmp_path / default_emoji_folder(emoji_settings()).name))
    name = _damage(folder, damage)
    write_emoji_shards(folder)
    assert _digests(folder) == _digests(unpacked)
    assert damage == "marker" or f"{folder}: its {name} " in caplog.text
    assert damage == "marker" or "made anew" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("damage", ["index", "shard", "truncated", "byte"])
def test_a_damaged_folder_of_the_users_is_refused(unpacked: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(unpacked, tmp_path / "shards"))
    name = _damage(folder, damage)
    before = _digests(folder)
    with pytest.raises(UserError, match=rf"folder=.*shards: its {name} .*; remove the folder"):
        write_emoji_shards(folder)
    assert _digests(folder) == before


@pytest.mark.parametrize("name", ["shards", default_emoji_folder(emoji_settings()).name])
def test_a_tar_that_does_not_belong_is_refused_and_kept(unpacked: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(unpacked, tmp_path / name))
    shutil.copy(folder / "heldout_style" / "000000.tar", folder / "train" / "mine.tar")
    with pytest.raises(UserError, match=r"train/mine\.tar was added"):
        write_emoji_shards(folder)
    assert (folder / "train" / "mine.tar").is_file()


def test_an_interrupted_unpack_leaves_nothing_half_done(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = emoji._write_tars

    def stop_at_val(target: Path, *arguments: Any) -> Any:
        if target.name == "val":
            raise KeyboardInterrupt
        return whole(target, *arguments)

    monkeypatch.setattr(emoji, "_write_tars", stop_at_val)
    with pytest.raises(KeyboardInterrupt):
        write_emoji_shards(tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    # A killed process cannot tidy up: what it left goes with the next unpack, once it is old enough.
    for name, age_s in (
        (".shards.partial-old", 7200),
        (".shards.partial-new", 0),
        (".other.partial-old", 7200),
    ):
        (tmp_path / name / "train").mkdir(parents=True)
        stamp = (tmp_path / name).stat().st_mtime - age_s
        os.utime(tmp_path / name, (stamp, stamp))
    assert _digests(write_emoji_shards(tmp_path / "shards")) == _digests(unpacked)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.partial-old",
        ".shards.partial-new",
        "shards",
    ]


def test_processes_may_unpack_the_same_folder_at_once(unpacked: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        pool.map(write_emoji_shards, [tmp_path / "shards"] * 4, chunksize=1)
    assert _digests(tmp_path / "shards") == _digests(unpacked)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_other_peoples_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        write_emoji_shards(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        write_emoji_shards(tmp_path / "thesis.txt")
    with pytest.raises(UserError, match="cannot unpack to it: "):
        write_emoji_shards(tmp_path / "thesis.txt" / "shards")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
