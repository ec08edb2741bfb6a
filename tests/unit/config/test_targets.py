"""What is said of a `_target_` that is not found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2_encoder.config.targets import TargetError, add_to_path, find_target

FILES = {
    "parts_here/__init__.py": "",
    "parts_here/losses.py": "class HardestNegative: ...\n",
    "parts_broken.py": "import math\n\nimport no_such_library_here\n",
    "parts_unreadable.py": "def f(:\n",
    "parts_raising.py": "class A:\n    x = 1 / 0\n",
    "parts_lazy.py": "def __getattr__(n):\n    if n == 'A':\n        import no_such_one\n    raise AttributeError(n)\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder, which is not on Python's path."""
    inside = tmp_path / "mine"
    for name, text in FILES.items():
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield inside
    for name in [each for each in sys.modules if each.startswith("parts_")]:
        del sys.modules[name]


def refusal(name: str) -> str:
    with pytest.raises(TargetError) as caught:
        find_target(name)
    return str(caught.value)


def test_what_is_there_is_found(folder: Path) -> None:
    add_to_path([folder])
    assert find_target("parts_here.losses.HardestNegative").__name__ == "HardestNegative"
    assert find_target("torch.optim.AdamW").__name__ == "AdamW"
    assert find_target("m2_encoder.models.config.M2EncoderConfig.from_name")("tiny").name == "tiny"


def test_a_module_that_is_not_found_says_how_it_can_be(folder: Path) -> None:
    assert "start with PYTHONPATH=mine, or with --config-dir mine" in refusal("parts_here.losses.HardestNegative")
    said = refusal("parts_elsewhere.Loss")
    assert said.startswith("there is no module parts_elsewhere on Python's path")
    assert "PYTHONPATH=FOLDER" in said
    assert "--config-dir FOLDER with parts_elsewhere.py in it" in said
    assert "did you mean torch" in refusal("troch.optim.AdamW")


def test_near_names_are_shown(folder: Path) -> None:
    add_to_path([folder])
    assert "did you mean HardestNegative" in refusal("parts_here.losses.HardestNegativ")
    assert "did you mean losses" in refusal("parts_here.loses.HardestNegative")
    assert "did you mean AdamW" in refusal("torch.optim.AdmW")
    assert "give MODULE.NAME" in refusal("HardestNegative")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("parts_broken.Loss", "parts_broken.py, line 3: ModuleNotFoundError: No module named 'no_such_library_here'"),
        ("parts_unreadable.f", "parts_unreadable.py, line 1: SyntaxError"),
        ("parts_raising.A", "parts_raising.py, line 2: ZeroDivisionError: division by zero"),
        ("parts_lazy.A", "parts_lazy.py, line 3: ModuleNotFoundError: No module named 'no_such_one'"),
    ],
)
def test_what_fails_inside_is_shown_with_its_line(name: str, said: str, folder: Path) -> None:
    add_to_path([folder])
    assert said in refusal(name)


def test_a_folder_hides_nothing(folder: Path) -> None:
    (folder / "json.py").write_text("", encoding="utf-8")
    add_to_path([folder, folder])
    assert sys.path.count(str(folder)) == 1
    assert sys.path[-1] == str(folder)
