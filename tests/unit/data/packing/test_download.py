from __future__ import annotations

from collections.abc import Iterator

import pytest

from m2_encoder.data.packing.download import DownloadOptions, fetch
from m2_encoder.data.samples.parse import SampleProblem
from tests.support.image_server import ImageServer, serve_images
from tests.support.shards import make_image

OPTIONS = DownloadOptions(timeout_s=0.4, retries=1, wait_s=0.01, max_bytes=100_000)
IMAGE = make_image(5)


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    files = {"a.png": IMAGE, "%E7%8C%AB%20b.png": IMAGE, "large.png": bytes(200_000)}
    with serve_images(files) as running:
        yield running


@pytest.mark.parametrize("path", ["a.png", "猫 b.png", "once/503/a.png", "once/429/a.png"])
def test_files_arrive(server: ImageServer, path: str) -> None:
    assert fetch(server.url(path), OPTIONS) == IMAGE


@pytest.mark.parametrize(
    ("path", "reason", "detail", "tries"),
    [
        ("status/404", "missing_image", "HTTP 404", 1),
        ("status/403", "missing_image", "HTTP 403", 1),
        ("status/500", "remote_incomplete", "HTTP 500", 2),
        ("half/a.png", "remote_incomplete", "", 2),
        ("slow/a.png", "remote_timeout", "after 0.4 s", 2),
        ("silent", "remote_timeout", "after 0.4 s", 2),
        ("large.png", "wrong_type", "more than 100,000 bytes", 1),
    ],
)
def test_faults(server: ImageServer, path: str, reason: str, detail: str, tries: int) -> None:
    with pytest.raises(SampleProblem) as caught:
        fetch(server.url(path), OPTIONS)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
    assert server.requests[path] == tries


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:1/a.png", "remote_timeout"),
        ("http://127.0.0.1:nine/a.png", "wrong_type"),
        ("http://[broken/a.png", "wrong_type"),
        ("http://", "remote_timeout"),
    ],
)
def test_addresses_that_lead_nowhere(url: str, reason: str) -> None:
    with pytest.raises(SampleProblem) as caught:
        fetch(url, OPTIONS)
    assert caught.value.reason == reason
