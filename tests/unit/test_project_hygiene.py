"""Limits that keep the project readable; each failure names the file and the line."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
CODE_FOLDERS = ("src", "tests", "scripts", "benchmarks")
TEXT_SUFFIXES = {".cff", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}
# An absolute path into somebody's machine; the same words inside a URL or a relative path are fine.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|Users|root|work|tmp)/\w+")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _code_files(repo_root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (repo_root / folder).rglob("*.py"))


def _functions(repo_root: Path) -> Iterator[tuple[str, Function]]:
    for path in _code_files(repo_root, *CODE_FOLDERS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(repo_root)}:{node.lineno}: {node.name}", node


def test_files_are_short(repo_root: Path) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _code_files(repo_root, *CODE_FOLDERS)}
    too_long = [f"{path.relative_to(repo_root)}: {n}" for path, n in lines.items() if n > MAX_FILE_LINES]
    assert lines
    assert not too_long, f"more than {MAX_FILE_LINES} lines: {too_long}"


def test_functions_are_short(repo_root: Path) -> None:
    lengths = {where: (node.end_lineno or node.lineno) - node.lineno + 1 for where, node in _functions(repo_root)}
    too_long = [f"{where}, {n} lines" for where, n in lengths.items() if n > MAX_FUNCTION_LINES]
    assert lengths
    assert not too_long, f"more than {MAX_FUNCTION_LINES} lines: {too_long}"


def test_public_names_have_docstrings(repo_root: Path) -> None:
    bare = []
    for path in _code_files(repo_root, "src"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(repo_root)}:{node.lineno}: {node.name}")
    assert not bare, f"no docstring: {bare}"


def test_only_the_top_init_has_content(repo_root: Path) -> None:
    package = repo_root / "src" / "m2_encoder"
    filled = [path for path in package.rglob("__init__.py") if path.stat().st_size]
    # The others: users call `m2_encoder.analysis.read_runs` and `m2_encoder.objectives.image_text_contrastive`.
    public = [package / name / "__init__.py" for name in ("", "analysis", "objectives")]
    assert sorted(filled) == sorted(public)


def test_every_package_folder_has_an_init(repo_root: Path) -> None:
    # Hydra's plugins of all packages share a folder, which none of them may own.
    folders = {path.parent for path in _code_files(repo_root, "src")} - {repo_root / "src" / "hydra_plugins"}
    missing = [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()]
    assert not missing, f"no __init__.py in {missing}"


def test_no_committed_file_names_a_machine_path(repo_root: Path) -> None:
    if not (repo_root / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repo_root, capture_output=True, text=True, check=True)
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = repo_root / name
        if path.suffix in TEXT_SUFFIXES and path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                if match := MACHINE_PATH.search(line):
                    found.append(f"{name}:{number}: {match[0]}")
    assert not found, f"paths of one machine: {found}"


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("root = '/{}/someone/data'", True),
        ("cd /{}/project", True),
        ("https://example.org/{}/page", False),
        ("shared/{}/file", False),
    ],
)
def test_machine_path_pattern(line: str, is_found: bool) -> None:
    assert bool(MACHINE_PATH.search(line.format("home"))) == is_found
