from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m2_encoder.cli import commands
from m2_encoder.config import paths
from m2_encoder.errors import UserError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The least that counts as a checkout."""
    root = tmp_path / "checkout"
    (root / "src" / "m2_encoder").mkdir(parents=True)
    (root / "conf").mkdir()
    (root / "conf" / "train.yaml").touch()
    (root / "notebooks" / "deep").mkdir(parents=True)
    return root


def test_checkout_is_found_from_below(checkout: Path) -> None:
    assert paths.find_checkout(checkout / "notebooks" / "deep") == checkout
    assert paths.find_conf(checkout / "notebooks") == checkout / "conf"


def test_other_code_does_not_read_the_configurations_of_a_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout / "notebooks")
    assert commands.PLAN() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"in the checkout {checkout}: its conf/ would be read by other code, that of {paths.PACKAGE_FOLDER}" in said
    assert f"PYTHONPATH={checkout / 'src'}" in said


def test_a_copy_of_the_same_code_may(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = checkout / "src" / "m2_encoder"
    (own / "a.py").write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(paths, "PACKAGE_FOLDER", own.resolve())
    paths.check_checkout(checkout)
    monkeypatch.setattr(paths, "PACKAGE_FOLDER", shutil.copytree(own, tmp_path / "installed"))
    paths.check_checkout(checkout)
    (own / "a.py").write_text("x = 2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"such as a\.py"):
        paths.check_checkout(checkout)
    paths.check_checkout(tmp_path)  # outside of any checkout


def test_no_checkout_outside(tmp_path: Path) -> None:
    assert paths.find_checkout(tmp_path) is None


def test_outside_the_installed_configurations_serve(tmp_path: Path) -> None:
    assert (paths.find_conf(tmp_path) / "train.yaml").is_file()


def test_packaged_configurations_beat_a_source_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "lib" / "m2_encoder"
    (package / "conf").mkdir(parents=True)
    (package / "conf" / "train.yaml").touch()
    monkeypatch.setattr(paths, "PACKAGE_FOLDER", package)
    assert paths.find_conf(tmp_path) == package / "conf"


def test_damaged_installation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "PACKAGE_FOLDER", tmp_path / "a" / "b" / "m2_encoder")
    with pytest.raises(FileNotFoundError, match="install m2-encoder again"):
        paths.find_conf(tmp_path)


def test_relative_paths_count_from_the_checkout_or_the_working_directory(checkout: Path, tmp_path: Path) -> None:
    assert paths.anchor("outputs", checkout / "notebooks") == checkout / "outputs"
    assert paths.anchor("outputs", tmp_path) == tmp_path / "outputs"
    assert paths.anchor("/elsewhere/outputs", checkout) == Path("/elsewhere/outputs")
    assert paths.anchor("~/outputs", checkout) == Path.home() / "outputs"


def test_what_is_read_counts_from_the_working_directory_first(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = checkout / "notebooks"
    for folder in (checkout / "sides", checkout / "tars", inside / "tars"):
        folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(inside)
    assert paths.find_path("tars").samefile(inside / "tars")
    assert paths.find_path("sides") == checkout / "sides"
    assert paths.find_path("nowhere") == checkout / "nowhere"
    assert paths.find_patterns(["tars/{000..009}.tar", "sides/*.tar"]) == [
        "tars/{000..009}.tar", str(checkout / "sides" / "*.tar")
    ]  # fmt: skip
    assert paths.find_patterns("sides") == str(checkout / "sides")
    as_they_are = ["nowhere/*.tar", "https://host/{000..009}.tar", str(checkout / "sides"), "[a-z].tar"]
    assert paths.find_patterns(as_they_are) == as_they_are
