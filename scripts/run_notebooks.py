"""Execute notebooks/*.py and write them with their pictures to outputs/notebooks/*.ipynb.

    python scripts/run_notebooks.py                                    # all, on what they name themselves
    python scripts/run_notebooks.py run run_folder=outputs/tuned       # one, on another run
    python scripts/run_notebooks.py --small                            # all, on small runs that are trained first

NAME=VALUE takes the place of a parameter: a name that the first code cell of a notebook assigns. Needs the extra
`notebooks`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
NOTEBOOKS: Final = REPO_ROOT / "notebooks"
OUTPUT: Final = REPO_ROOT / "outputs" / "notebooks"

_BRIEF: Final = (
    "+experiment=smoke", "trainer.max_steps=6", "scheduler.warmup_steps=1", "trainer.val_check_interval=3",
    "run.checkpoint_every=3", "objective=[itc,cmlm,cmim]", "evaluation=[retrieval]",
    "+callbacks.throughput.window_steps=2",
)  # fmt: skip
SMALL: Final = {"run_folder": "run", "runs_pattern": "sweep-*"}
"""Where in the folder of small runs lies what a parameter names."""

SMALL_VALUES: Final = {"shown_set": "heldout_families", "words": ["猫", "cat"], "texts": ["猫", "a cat"]}
"""Other parameters with small runs: the smallest set of pictures, and few queries."""

_SWEPT: Final = tuple((lr, k, seed) for lr in (1e-3, 1e-2) for k in (1, 2) for seed in (0, 1))


_CLIENT: Final[dict[str, Any]] = {"timeout": 1800, "startup_timeout": 300, "extra_arguments": ["--log-level=ERROR"]}


def list_notebooks() -> list[Path]:
    """All of them, by name."""
    return sorted(NOTEBOOKS.glob("*.py"))


def parameters_of(notebook: Any) -> list[str]:
    """The names that the first code cell of a notebook assigns."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assigned = (node.targets for node in ast.parse(first.source).body if isinstance(node, ast.Assign))
    return [target.id for targets in assigned for target in targets if isinstance(target, ast.Name)]


def execute(path: Path, values: Mapping[str, Any], output: Path) -> Path:
    """Runs a notebook from the folder that it lies in, as Jupyter does.

    Args:
        path: of the text.
        values: by parameter; those that the notebook does not have are passed over.
        output: a folder.

    Returns:
        The path of the executed notebook, which is written after a failure, too.

    Raises:
        CellExecutionError: for a cell that fails.
    """
    notebook = jupytext.read(path)
    given = {name: values[name] for name in parameters_of(notebook) if name in values}
    if given:
        place = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code") + 1
        lines = "\n".join(f"{name} = {value!r}" for name, value in given.items())
        notebook.cells.insert(place, nbformat.v4.new_code_cell(lines, metadata={"tags": ["injected-parameters"]}))
    written = output / f"{path.stem}.ipynb"
    output.mkdir(parents=True, exist_ok=True)
    try:
        NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, **_CLIENT).execute()
    finally:
        nbformat.write(notebook, written)
    return written


def prepare_small(folder: Path, *, sweep: bool = True) -> dict[str, Any]:
    """Trains small runs for all notebooks, where they are not there yet; half a minute of one core.

    They have learned nothing: they show that everything works. Without `sweep` it is a single run, for notebooks that
    read one. Returns the values of parameters, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        _train_run(folder)
        for lr, k, seed in _SWEPT if sweep else ():
            _train_variant(folder, f"sweep-lr={lr}-micro_batches={k}-seed={seed}", lr, k, seed)
    return {**{name: str(folder / place) for name, place in SMALL.items()}, **SMALL_VALUES}


def _train_run(folder: Path) -> None:
    # Imported here, because notebooks on runs that are there need none of it.
    from m2_encoder.cli.commands import TRAIN
    from m2_encoder.config.command import run_command

    if (folder / "run" / "summary.json").is_file():
        return
    places = (f"run.folder={folder}", "run.name=run", f"data.folder={folder / 'data'}")
    if code := run_command(TRAIN, [*_BRIEF, *places, "run.resume=auto"]):
        raise SystemExit(code)


def _train_variant(folder: Path, name: str, lr: float, micro_batches: int, seed: int) -> None:
    """The same run with other settings, without evaluation; composing each anew would take longer than training it."""
    from m2_encoder.runs.folder import read_config
    from m2_encoder.runs.run import train

    if (folder / name / "summary.json").is_file():
        return
    cfg = read_config(folder / "run" / "config.yaml")
    cfg["run"] |= {"name": name, "export": False}
    cfg |= {"seed": seed, "evaluation": {}, "objective": {"itc": cfg["objective"]["itc"]}}
    cfg["optimizer"]["lr"] = lr
    cfg["strategy"]["micro_batches"] = micro_batches
    cfg["trainer"]["val_check_interval"] = cfg["trainer"]["max_steps"]
    train(cfg)


def main(argv: Sequence[str] | None = None) -> int:
    """Executes what the command line names; 1 if a notebook fails, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="NOTEBOOK | NAME=VALUE")
    parser.add_argument("--small", action="store_true", help="on small runs, in outputs/notebooks/small")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    known = {path.stem: path for path in list_notebooks()}
    names = [word for word in arguments.words if "=" not in word] or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no notebook {unknown[0]!r}; there are {', '.join(known)}")
    pairs = (word.split("=", 1) for word in arguments.words if "=" in word)
    values = {name: _read_value(text) for name, text in pairs}
    parameters = {name for stem in names for name in parameters_of(jupytext.read(known[stem]))}
    if wrong := sorted(values.keys() - parameters):
        parser.error(f"no parameter {wrong[0]!r}; there are {', '.join(sorted(parameters))}")
    if arguments.small:
        small = arguments.output.resolve() / "small"
        print(f"training small runs in {small}")
        values = prepare_small(small) | values
    done = [_report(known[name], values, arguments.output) for name in names]
    return int(not all(done))


def _read_value(text: str) -> Any:
    """A number, a list and the like as Python writes them; anything else is a text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _report(path: Path, values: Mapping[str, Any], output: Path) -> bool:
    """Executes one notebook and says what became of it; whether it ran to its end."""
    try:
        print(f"{path.stem:<12} {execute(path, values, output)}", flush=True)
    except CellExecutionError as error:
        print(f"{path.stem:<12} failed: {error.ename}: {error.evalue}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
