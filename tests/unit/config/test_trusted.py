"""What a configuration from a stranger's folder may name: nothing of it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.cli.commands import EXPORT, TRAIN
from m2_encoder.config import trusted
from m2_encoder.config.compose import open_composer
from m2_encoder.errors import UserError
from m2_encoder.runs.folder import read_config, write_config

Run = Callable[..., str]
LINES = ("logger=csv", "data.folder=data")


@pytest.fixture(scope="module")
def plain(repo_root: Path) -> dict[str, object]:
    """A resolved configuration, as a run saves it."""
    folder = repo_root / "conf"
    with open_composer(folder, "train") as composer:
        return composer.compose(["+experiment=smoke", *LINES]).cfg


@pytest.fixture
def saved(plain: dict[str, object], tmp_path: Path) -> Path:
    path = tmp_path / "stranger" / "config.yaml"
    write_config(path, plain)
    return path


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a mark when it is imported."""
    (tmp_path / "stranger").mkdir(exist_ok=True)
    mark = tmp_path / "mark"
    text = f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef run(**_): Path({str(mark)!r}).touch()\n"
    (tmp_path / "stranger" / "trap_of_stranger.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "stranger"))
    monkeypatch.delitem(sys.modules, "trap_of_stranger", raising=False)
    return mark


@pytest.fixture
def train(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`m2-train` by a folder's configuration, which is refused, or would start; what it says."""
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr("m2_encoder.cli.train.run_train", lambda _: print("started"))

    def run(*arguments: str) -> str:
        lines = ["--config-path", str(tmp_path / "stranger"), "--config-name", "config", f"run.folder={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["m2-train", *lines, *arguments])
        capsys.readouterr()
        code = TRAIN()
        out, err = capsys.readouterr()
        assert code == (0 if "started" in out else 2), err
        assert "Traceback" not in err
        return "started" if code == 0 else err

    return run


def test_a_saved_configuration_is_repeated(saved: Path, train: Run) -> None:
    assert train() == "started"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("own: {_target_: trap_of_stranger.run}", "objective.own._target_"),
        ("own: {_target_: m2_encoder.files.shutil.rmtree, path: x}", "objective.own._target_"),
        ("own: {_target_: m2_encoder.files.write_text, path: x, content: y}", "objective.own._target_"),
        ("own: [{deep: {_target_: trap_of_stranger.run, _partial_: true}}]", "objective.own[0].deep._target_"),
        ("own: {_target_: '${seed}'}", None),
    ],
)
def test_a_foreign_target_is_refused_before_it_is_imported(
    saved: Path, train: Run, trap: Path, line: str, key: str | None
) -> None:
    text = saved.read_text()
    saved.write_text(text.replace("objective:\n", f"objective:\n  {line}\n", 1))
    said = train()
    assert not trap.exists()
    if key is not None:
        assert f"{key}=" in said
        assert "is named by a saved configuration, which could run any code by it" in said
        assert "--config-dir FOLDER" in said


def test_the_command_line_and_a_folder_of_configurations_are_the_users_word(
    saved: Path, train: Run, trap: Path, tmp_path: Path
) -> None:
    text = saved.read_text().replace("objective:\n", "objective:\n  own: {_target_: trap_of_stranger.run}\n", 1)
    saved.write_text(text)
    (tmp_path / "my" / "objective").mkdir(parents=True)
    (tmp_path / "my" / "objective" / "own.yaml").write_text("own:\n  _target_: trap_of_stranger.run\n")
    for arguments in (("objective.own._target_=trap_of_stranger.run",), ("--config-dir", str(tmp_path / "my"))):
        said = train(*arguments)
        assert "saved configuration" not in said
        assert trap.exists(), "it is imported now"
        trap.unlink()
        sys.modules.pop("trap_of_stranger")


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {own: {_target_: trap_of_stranger.run}}}",
        "hydra: {job_logging: {handlers: {own: {(): trap_of_stranger.run}}}}",
        "hydra: {searchpath: [file:///tmp]}",
        "defaults: [{override hydra/launcher: own}]",
        "own: ${oc.env:HOME}",
        "own: [{deep: 'x ${oc.decode:${run.name}}'}]",
        "# @package hydra",
    ],
)
def test_more_than_values_is_refused(saved: Path, train: Run, trap: Path, text: str) -> None:
    saved.write_text(f"{text}\n{saved.read_text()}")
    said = train()
    assert str(saved) in said
    assert "if you trust it, name its folder as --config-dir, too" in said
    assert not trap.exists()
    with pytest.raises(UserError, match="a saved configuration"):
        read_config(saved)


@pytest.mark.parametrize(
    "text",
    [
        "own: !!python/object/apply:pathlib.PosixPath [a]\nhydra: {callbacks: {own: {_target_: trap_of_stranger.run}}}",
        "own: 2020-99-99\nhydra: {callbacks: {own: {_target_: trap_of_stranger.run}}}",
        "own: !!int x",
        "own: &own [*own]",
        f"own: {'[' * 3000}{']' * 3000}",
        "own: \xff",
    ],
)
def test_what_cannot_be_looked_through_is_refused(saved: Path, train: Run, trap: Path, text: str) -> None:
    """OmegaConf reads some of these."""
    saved.write_bytes(f"{text}\n{saved.read_text()}".encode("latin-1"))
    said = train()
    assert str(saved) in said
    assert "is not valid YAML" in said or "is nested too deeply" in said
    assert not trap.exists()
    with pytest.raises(UserError, match=r"is not valid YAML|is nested too deeply"):
        read_config(saved)


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("experiment/smoke.yaml", ["+experiment=smoke"]),
        ("hydra/launcher/mine.yaml", ["hydra/launcher=mine"]),
        ("hydra/env/default.yaml", []),
    ],
)
def test_options_beside_a_saved_configuration_are_refused(
    saved: Path, train: Run, trap: Path, file: str, arguments: list[str]
) -> None:
    (saved.parent / file).parent.mkdir(parents=True)
    (saved.parent / file).write_text("# @package hydra\ncallbacks: {own: {_target_: trap_of_stranger.run}}\n")
    said = train(*arguments)
    assert f"{saved.parent / file} lies beside a saved configuration" in said
    assert f"--config-dir {saved.parent}" in said
    assert not trap.exists()


def test_export_builds_nothing_that_a_run_names(
    saved: Path, trap: Path, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = saved.read_text()
    assert "  _target_: m2_encoder.training.adaptation.Full" in text
    saved.write_text(text.replace("m2_encoder.training.adaptation.Full", "trap_of_stranger.run"))
    (saved.parent / "checkpoints").mkdir()
    (saved.parent / "checkpoints" / "own.ckpt").write_bytes(b"")
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr(
        sys, "argv", ["m2-export", f"run.folder={tmp_path}", "run.name=stranger", "checkpoint=own.ckpt"]
    )
    assert EXPORT() == 2
    err = capsys.readouterr().err
    assert err.startswith("m2-export: adaptation._target_=trap_of_stranger.run: is named by a saved configuration")
    assert not trap.exists()


def test_what_ships_is_trusted(repo_root: Path) -> None:
    found = trusted.trusted_targets()
    assert {"lightning.pytorch.Trainer", "m2_encoder.objectives.contrastive.ImageTextContrastive"} <= found
    assert all(name.startswith(("m2_encoder.", "lightning.", "optuna.", "hydra_plugins.m2_")) for name in found)
