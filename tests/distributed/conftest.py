"""Four ranks that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.rank_pool import RankPool


@pytest.fixture(scope="package")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four gloo ranks, started once."""
    ranks = RankPool(4, tmp_path_factory.mktemp("pool"))
    yield ranks
    ranks.close()
