"""What several tests of whole commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from m2_encoder.config.compose import Composer, open_composer


@pytest.fixture
def composer(repo_root: Path) -> Iterator[Composer]:
    """Composes configurations of m2-train."""
    with open_composer(repo_root / "conf", "train") as opened:
        yield opened
