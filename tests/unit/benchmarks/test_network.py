"""The shaped network, with real namespaces where the machine allows them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import _network
from benchmarks._network import Link, Network, NetworkError, bucket

NAMESPACES = Path("/run/netns")

_SERVER = """
import socket
with socket.create_server(("0.0.0.0", 7009)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(5):
    connection.send(connection.recv(1))
for _ in range(3):
    missing = 500_000
    while missing:
        missing -= len(connection.recv(min(65536, missing)))
    connection.send(b"x")
"""

_CLIENT = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7009))
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
trips = []
for _ in range(5):
    start = time.perf_counter()
    connection.send(b"x")
    connection.recv(1)
    trips.append(time.perf_counter() - start)
transfers = []
for _ in range(3):
    start = time.perf_counter()
    connection.sendall(bytes(500_000))
    connection.recv(1)
    transfers.append(time.perf_counter() - start)
print(min(trips), min(transfers))
"""


@pytest.fixture
def _namespaces() -> None:
    try:
        _network.check_machine()
    except NetworkError as error:
        pytest.skip(str(error))
    name = f"{_network.PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", name], check=True)


def _measure(network: Network) -> tuple[float, float]:
    """Shortest round trip, and the fewest seconds that 500 kB took, from rank 0 to rank 1."""
    server = [*network.command(1), sys.executable, "-c", _SERVER]
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        client = [*network.command(0), sys.executable, "-c", _CLIENT, network.address(1)]
        done = subprocess.run(client, capture_output=True, text=True, check=True, timeout=20)
    trip, seconds = map(float, done.stdout.split())
    return trip, seconds


@pytest.mark.usefixtures("_namespaces")
def test_links_have_the_latency_and_bandwidth_they_were_given() -> None:
    # Lower bounds are what shaping promises; upper ones leave room for a machine that is busy with other things.
    with Network(2) as network:
        network.shape(Link(0.0, None))
        trip, seconds = _measure(network)
        assert trip < 5e-3
        assert seconds < 0.03
        network.shape(Link(10.0, None))
        trip, seconds = _measure(network)
        assert 20e-3 <= trip < 60e-3
        assert 20e-3 <= seconds < 0.1  # a delay and no throttle: one round trip, whatever the size
        network.shape(Link(0.0, 50.0))
        trip, seconds = _measure(network)
        assert trip < 15e-3
        assert 0.95 * 500_000 * 8 / 50e6 <= seconds < 0.2
        network.shape(Link(10.0, 50.0))
        trip, seconds = _measure(network)
        assert trip >= 20e-3
        assert 20e-3 + 0.95 * 500_000 * 8 / 50e6 <= seconds < 0.3
        refused, late_s = network.relay_errors()
        assert refused == 0
        assert 0 < late_s < 0.05
        names = set(NAMESPACES.glob(f"{_network.PREFIX}-{os.getpid()}-*"))
        assert len(names) == 3
    assert not names & set(NAMESPACES.iterdir())


@pytest.mark.usefixtures("_namespaces")
def test_what_a_killed_process_left_is_removed_at_the_next_start(repo_root: Path) -> None:
    code = "import os, signal; from benchmarks._network import Network; Network(1).__enter__(); os.kill(os.getpid(), 9)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=repo_root) as process:
        process.wait()
    left = list(NAMESPACES.glob(f"{_network.PREFIX}-{process.pid}-*"))
    assert len(left) == 2
    _network.remove_stale()
    assert not any(path.exists() for path in left)


@pytest.mark.usefixtures("_namespaces")
def test_sigterm_removes_the_network(repo_root: Path) -> None:
    code = (
        "import time\nfrom benchmarks._network import Network\n"
        "with Network(1):\n    print('up', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=repo_root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        start = time.monotonic()
        process.terminate()
        assert process.wait() == 128 + 15
    assert time.monotonic() - start < 30
    assert not list(NAMESPACES.glob(f"{_network.PREFIX}-{process.pid}-*"))


def test_without_root_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkError, match="need root"):
        Network(2).__enter__()


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "tc" else f"/bin/{tool}")
    with pytest.raises(NetworkError, match="program tc is missing"):
        Network(2).__enter__()


@pytest.mark.parametrize(
    ("mbit", "piece"),
    [(10.0, 9000), (100.0, 9000), (500.0, 16875), (1000.0, 32768), (100_000.0, 32768)],
)
def test_the_bucket_holds_one_piece_and_little_more(mbit: float, piece: int) -> None:
    found = bucket(mbit)
    assert found.rate_bit == mbit * 1e6
    assert found.piece_bytes == piece
    assert piece * 1.2 < found.burst_bytes < piece * 1.3


def test_labels_name_both_numbers() -> None:
    assert Link(0.0, None).label == "0 ms, unlimited"
    assert Link(0.5, 100.0).label == "0.5 ms, 100 Mbit/s"
