"""The notebooks: what they may hold, and that each runs to its end on small runs of the real commands."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import matplotlib as mpl
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from scripts.run_notebooks import SMALL, SMALL_VALUES, execute, list_notebooks, main, parameters_of

from m2_encoder.errors import UserError
from tests.support.once import build_once
from tests.support.slow_parts import choose_parts

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = list_notebooks()
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
FEW = ("run",)
"""It reads one run, not a sweep. The others are slow."""
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# ipykernel's own use of Python; nothing that a notebook can mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Values of all parameters: small runs, trained once for all tests."""
    sweep = len(choose_parts(request, {path.stem: path for path in NOTEBOOKS}, FEW)) > len(FEW)

    def train(folder: Path) -> None:
        program = "from pathlib import Path; from scripts.run_notebooks import prepare_small; "
        program += f"prepare_small(Path({str(folder)!r}), sweep={sweep})"
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr

    folder = build_once(tmp_path_factory, "notebooks", train)
    return {**{name: str(folder / place) for name, place in SMALL.items()}, **SMALL_VALUES}


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@EVERY
def test_a_notebook_is_short_and_defines_nothing(path: Path) -> None:
    notebook = jupytext.read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].source.startswith("# ")
    assert 8 <= len(notebook.cells) <= 24
    for cell in _code(notebook):
        found = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, DEFINITIONS)]
        assert not found, f"{path.name}:{found[0].name}: belongs into m2_encoder.analysis"


@EVERY
def test_parameters_stand_alone_in_the_first_code_cell(path: Path) -> None:
    notebook = jupytext.read(path)
    first = _code(notebook)[0]
    assert first.metadata.get("tags") == ["parameters"]
    for node in ast.parse(first.source).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)  # a value that a user can replace by another one
    assert parameters_of(notebook)
    assert set(parameters_of(notebook)) & set(SMALL), "without a small run it would read the user's own"


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in FEW else pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_to_its_end(path: Path, small: dict[str, Any], tmp_path: Path) -> None:
    notebook = nbformat.read(execute(path, small, tmp_path), as_version=4)
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    said = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not said, "warnings, such as of a character without a glyph"
    assert any("image/png" in output.get("data", {}) for output in outputs), "a picture is inside"


@EVERY
def test_a_notebook_without_its_runs_says_what_makes_them(path: Path, tmp_path: Path) -> None:
    """In this process: the cells up to the one that reads."""
    nothing = "\n".join(f"{name} = {str(tmp_path / 'nothing')!r}" for name in SMALL)
    parameters, *cells = (cell.source for cell in _code(jupytext.read(path)))
    program = "\n".join([parameters, nothing, *cells])
    with mpl.rc_context(), pytest.raises(UserError, match="m2-train"):
        exec(program, {})


@pytest.mark.slow
def test_a_user_error_is_one_line_in_a_notebook(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError) as failed:
        execute(NOTEBOOKS[0], dict.fromkeys(SMALL, str(tmp_path / "nothing")), tmp_path)
    notebook = nbformat.read(tmp_path / f"{NOTEBOOKS[0].stem}.ipynb", as_version=4)
    (output,) = [output for cell in _code(notebook) for output in cell.outputs if output.output_type == "error"]
    assert failed.value.ename == "UserError"
    assert output.traceback == [f"UserError: {output.evalue}"]


@pytest.mark.parametrize(
    ("words", "said"), [(["nope"], "no notebook 'nope'; there are"), (["run", "x=1"], "no parameter 'x'; there are")]
)
def test_the_script_names_what_it_does_not_know(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
