"""Scripts of the pages in node, without a page."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest


def run_scripts(names: list[str], expression: str, values: Any, folder: Path) -> Any:
    """The value of an expression after scripts of `assets/web`; `values` is what it works on, as JSON.

    Skips the test where node is not installed.
    """
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    assets = files("m2_encoder") / "assets" / "web"
    sources = [(assets / name).read_text(encoding="utf-8") for name in names]
    (folder / "values.json").write_text(json.dumps(values), encoding="utf-8")
    script = folder / "script.js"
    before = "const values = JSON.parse(require('fs').readFileSync(process.argv[2], 'utf8'));"
    refused = "class Refused extends Error { constructor(code, detail) { super(detail); this.code = code; } }"
    after = f"process.stdout.write(JSON.stringify({expression}));"
    script.write_text("\n".join([*sources, before, refused, after]), encoding="utf-8")
    command = [node, str(script), str(folder / "values.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
