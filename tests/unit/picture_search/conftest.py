from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.picture_search.model import SearchModel, open_search_model
from tests.support.pictures import export_small, write_picture


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="session")
def model(exported: Path) -> SearchModel:
    return open_search_model(exported)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures, two of them in sub-folders."""
    folder = tmp_path / "我的 照片"
    for seed, name in enumerate(("b.png", "a.jpg", "c/d.webp", "c/猫.png", "e.png")):
        write_picture(folder / name, seed)
    return folder
