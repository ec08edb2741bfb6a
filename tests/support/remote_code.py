"""Code of models that transformers opens, in a folder of the tests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def code_apart(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Copies of models' code go to `folder`; Python would look for it among that of other tests, and forgets both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        _forget_code()
        yield patch
    _forget_code()


def _forget_code() -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    sys.path[:] = [place for place in sys.path if not (Path(place) / "transformers_modules").is_dir()]
