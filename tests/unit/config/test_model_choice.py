"""Which model, files and device a command names."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.config.model_choice import model_problems, output_problems
from m2_encoder.config.problems import format_problem


def config(**changes: object) -> dict[str, object]:
    return {"model": "tiny", "weights": None, "tokenizer": None, "device": "cpu", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "model=tiny: a named model needs its checkpoint; add weights=FILE"),
        ({"model": "m2_encoder_0_4b"}, "m2_encoder_0.4B.ckpt is not on this machine"),
        ({"model": "nowhere/export"}, "model=nowhere/export: no such folder"),
        ({"model": 3}, "model=3: no such folder"),
        ({"weights": "nothing.ckpt"}, "weights=nothing.ckpt: no such file"),
        ({"weights": "https://host/x", "tokenizer": "sp.model"}, "tokenizer=sp.model: no such file"),
        ({"weights": "https://host/x", "device": "gpu"}, "device=gpu: no such kind"),
        ({"weights": "https://host/x", "device": "meta"}, "device=meta: this machine has none"),
    ],
)
def test_model_problems(changes: dict[str, object], message: str) -> None:
    problems = model_problems(config(**changes))
    assert len(problems) == 1
    assert message in format_problem(problems[0])


def test_a_url_is_not_looked_for() -> None:
    assert model_problems(config(weights="https://host/x.ckpt", device="auto")) == []


def test_output_problems(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.touch()
    assert output_problems({"output": None, "overwrite": False}) == []
    assert output_problems({"output": str(tmp_path / "new" / "b.json"), "overwrite": False}) == []
    assert "overwrite=true" in output_problems({"output": str(file), "overwrite": False})[0].fix
    assert output_problems({"output": str(file), "overwrite": True}) == []
    assert "is a folder" in output_problems({"output": str(tmp_path), "overwrite": True})[0].rule
    assert (
        "no folder that you may write to"
        in output_problems({"output": str(file / "b.json"), "overwrite": False})[0].rule
    )


def test_a_folder_that_takes_no_file_is_found_by_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To root, every folder seems to be writable."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    (problem,) = output_problems({"output": str(tmp_path / "b.json"), "overwrite": False})
    assert format_problem(problem) == (
        f"output={tmp_path}/b.json: cannot be written, because {tmp_path} is no folder that you may write to"
    )
    assert not list(tmp_path.iterdir())
