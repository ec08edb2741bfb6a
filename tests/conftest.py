"""Fixtures that every test may use."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from m2_encoder.data.emoji.dataset import write_emoji_shards
from tests.support.once import build_once

_CONNECTS = ("socket.connect", "socket.sendto")


def _refuse_other_machines(event: str, arguments: tuple[Any, ...]) -> None:
    """No test reaches another machine, whatever library asks: as if there were no network."""
    if event not in _CONNECTS or not isinstance(arguments[1], tuple):
        return
    try:
        is_here = ipaddress.ip_address(arguments[1][0].partition("%")[0]).is_loopback
    except ValueError:
        is_here = arguments[1][0] == "localhost"
    if not is_here:
        raise ConnectionRefusedError(f"tests run without a network; {arguments[1]} was asked for")


sys.addaudithook(_refuse_other_machines)

REPO_ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("tests", deadline=None)  # how long an example takes depends on what else the machine does
settings.load_profile("tests")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout: the folder that holds pyproject.toml."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Numbers of the official implementation: M2_PARITY_DIR, or shared/parity beside the checkout."""
    configured = os.environ.get("M2_PARITY_DIR")
    folder = Path(configured) if configured else REPO_ROOT.parent / "shared" / "parity"
    if folder.is_dir():
        return folder
    if configured:
        # Whoever names a folder wants these tests to run: a typing error must not turn into a skip.
        pytest.fail(f"M2_PARITY_DIR={configured} is not a folder")
    pytest.skip(f"no parity data: set M2_PARITY_DIR, or put it in {folder}")


@pytest.fixture(scope="session")
def emoji_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in set, unpacked once for all tests; read-only by agreement."""
    return build_once(tmp_path_factory, "emoji", write_emoji_shards)


@pytest.fixture
def hangups_heard() -> Iterator[None]:
    """SIGHUP as a process of a terminal gets it, also where the tests themselves are run by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same torch seed, whatever ran before it."""
    torch.manual_seed(20240126)


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    """No test leaves a process group behind, which would change how the next ones train."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("left a process group behind; destroy it, or do this in a process of its own")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test, nor a command it starts, uploads to the developer's W&B account."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks a hub for weights."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
