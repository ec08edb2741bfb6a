"""Files appear whole or not at all, and whoever named one is told when it cannot be written."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import atomic_file, atomic_folder, file_sha256, write_json, write_text


def test_a_file_that_is_not_finished_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"名": 1})
    before = (tmp_path / "a.json").read_bytes()
    assert before.decode() == '{\n  "名": 1\n}\n'
    with pytest.raises(KeyError), atomic_file(tmp_path / "a.json") as temporary:
        raise KeyError(temporary.write_text("half"))
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*a\.json: full"),
        atomic_file(tmp_path / "a.json", error=CheckpointError),
    ):
        raise RuntimeError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == before
    assert file_sha256(tmp_path / "a.json") == hashlib.sha256(before).hexdigest()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0"),  # torch.save
    ],
)
def test_a_full_disk_is_said_in_words(tmp_path: Path, error: Exception) -> None:
    said = "; make room there and start again; what is finished is kept"
    with pytest.raises(UserError) as caught, atomic_file(tmp_path / "a.ckpt"):
        raise error
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'a.ckpt'}: ")
    assert str(caught.value).endswith(said)
    assert "inline_container" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        with pytest.raises(UserError, match=said), atomic_folder(tmp_path / "export"):
            raise error
        assert not list(tmp_path.iterdir())


def test_the_argument_that_names_a_file_is_told(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "folder" / "a.txt", "a", key="output")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output=.*file/a\.txt: cannot be written \(File exists\); give another"):
        write_text(tmp_path / "file" / "a.txt", "a", key="output")
    with pytest.raises(UserError, match=r"^output=.*new: cannot be written \(it is a folder"):
        write_text(tmp_path / "new", "a", key="output")
    with pytest.raises(UserError, match="does not exist; create it first"):
        write_text(tmp_path / "other" / "a.txt", "a")
