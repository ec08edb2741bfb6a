"""Ranks in network namespaces, joined by links whose latency and bandwidth can be changed while they run.

    rank 0: eth0 ── v0 ┐
    rank 1: eth0 ── v1 ┤ hub: the kernel's bridge, or `_relay.py` where a latency is wanted
    rank 2: eth0 ── v2 ┤
    rank 3: eth0 ── v3 ┘

Bandwidth is the kernel's token bucket (`tc … tbf`) at both ends of each pair, so that each rank has it in each
direction. Latency is the relay's, because few kernels come with `netem`. Nothing is ever dropped: queues are deeper
than what TCP may have under way, and its windows are open from the first byte, as in a fabric with flow control.

Everything lives in namespaces named `m2net-<process>-<part>`; the machine's own network is never touched. They go when
the `Network` is closed, at the exit of the process and on SIGTERM; what a killed process left goes at the next start.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

PREFIX = "m2net"
MTU = 9000
_ADDRESS = "10.77.0.{}"

_RELAY = Path(__file__).with_name("_relay.py")
_NAMESPACES = Path("/run/netns")
# What TCP hands down in one piece; a connection keeps the limit that it found, so that it is the same for all links.
_LARGEST_PIECE = 32768
# Longest piece that a bucket lets through whole, in time: the grain of the shaping. It cuts what is longer into frames.
_GRAIN_S = 0.00027
_HEADER_BYTES = 64
_QUEUE_BYTES = 1 << 26
_WINDOW_SEGMENTS = 5000
_SYSCTL = {
    "net.ipv6.conf.all.disable_ipv6": "1",
    "net.ipv6.conf.default.disable_ipv6": "1",
    "net.ipv4.tcp_congestion_control": "reno",  # without losses it never slows down, and it does not pace
    "net.ipv4.tcp_slow_start_after_idle": "0",
    "net.ipv4.tcp_early_retrans": "0",  # no probes for losses that do not happen
    "net.ipv4.tcp_wmem": "4096 4194304 67108864",
    "net.ipv4.tcp_rmem": "4096 16777216 67108864",
}


class NetworkError(RuntimeError):
    """The machine cannot build the network; the message is one line that says what is missing."""


class Link(NamedTuple):
    """What joins a rank to the others.

    Attributes:
        latency_ms: from rank to rank, one way; 0 for what the kernel itself takes.
        bandwidth_mbit: of a rank, in each direction, Mbit/s; None for no limit.
    """

    latency_ms: float
    bandwidth_mbit: float | None

    @property
    def label(self) -> str:
        """For tables and keys, such as `5 ms, 100 Mbit/s`."""
        rate = "unlimited" if self.bandwidth_mbit is None else f"{self.bandwidth_mbit:g} Mbit/s"
        return f"{self.latency_ms:g} ms, {rate}"


class Bucket(NamedTuple):
    """Arguments of the token bucket for a rate.

    Attributes:
        rate_bit: bit/s.
        piece_bytes: what passes whole; a frame at least.
        burst_bytes: size of the bucket: one piece with its headers and a quarter, which makes up for late timers; no
            more than that passes unshaped.
    """

    rate_bit: int
    piece_bytes: int
    burst_bytes: int


def bucket(bandwidth_mbit: float) -> Bucket:
    """The finest token bucket that costs little processor time: pieces of about a quarter of a millisecond."""
    rate = round(bandwidth_mbit * 1e6)
    piece = min(_LARGEST_PIECE, max(MTU, int(rate / 8 * _GRAIN_S)))
    return Bucket(rate_bit=rate, piece_bytes=piece, burst_bytes=piece + piece // 4 + _HEADER_BYTES)


class Network:
    """The namespaces, for a `with` statement.

    Args:
        num_ranks: ranks, at most 200.

    Raises:
        NetworkError: without root, `ip`, `tc` or a kernel that has namespaces, veth and tbf.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._hub = self._name("hub")
        self._relay: subprocess.Popen[str] | None = None
        self._latency_s = 0.0
        self._previous_handler: Any = None

    def __enter__(self) -> Network:
        check_machine()
        remove_stale()
        atexit.register(self.close)
        self._previous_handler = signal.signal(signal.SIGTERM, _exit_on_signal)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def command(self, rank: int) -> list[str]:
        """What to put before a command so that it runs in a rank's namespace."""
        return ["ip", "netns", "exec", self._name(rank)]

    def address(self, rank: int) -> str:
        """IPv4 address of a rank."""
        return _ADDRESS.format(rank + 1)

    def shape(self, link: Link) -> None:
        """Change every link; nothing may be under way."""
        limit = None if link.bandwidth_mbit is None else bucket(link.bandwidth_mbit)
        for namespace, device in self._ends():
            qdisc = ["tc", "-n", namespace, "qdisc"]
            # Deleted first: a replaced bucket would keep tokens and sizes of the old one.
            subprocess.run([*qdisc, "del", "dev", device, "root"], capture_output=True, check=False)
            if limit is not None:
                rate, burst = f"{limit.rate_bit}bit", f"{limit.burst_bytes}b"
                _run(
                    *qdisc,
                    "add",
                    "dev",
                    device,
                    "root",
                    "tbf",
                    "rate",
                    rate,
                    "burst",
                    burst,
                    "limit",
                    str(_QUEUE_BYTES),
                )
        self._latency_s = link.latency_ms / 1e3
        self._restart_relay()

    def relay_errors(self) -> tuple[int, float]:
        """What the relay has done wrong since the last `shape`; nothing may be under way.

        Returns:
            Frames refused, 0 unless a queue was too short, and by how many seconds the latest frame left too late.
        """
        return self._restart_relay()

    def close(self) -> None:
        """Remove everything; harmless when called again."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.communicate()
            self._relay = None
        _remove([self._name(part) for part in (*range(self._num_ranks), "hub")])
        atexit.unregister(self.close)
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def _name(self, part: int | str) -> str:
        return f"{PREFIX}-{os.getpid()}-{part}"

    def _ends(self) -> list[tuple[str, str]]:
        """Namespace and device of both ends of every link."""
        pairs = [((self._name(rank), "eth0"), (self._hub, f"v{rank}")) for rank in range(self._num_ranks)]
        return [end for pair in pairs for end in pair]

    def _build(self) -> None:
        for part in ("hub", *range(self._num_ranks)):
            _run("ip", "netns", "add", self._name(part))
            settings = [f"{key}={value}" for key, value in _SYSCTL.items()]
            _run("ip", "netns", "exec", self._name(part), "sysctl", "-qw", *settings)
            _run("ip", "-n", self._name(part), "link", "set", "lo", "up")
        _run("ip", "-n", self._hub, "link", "add", "bridge", "mtu", str(MTU), "type", "bridge", "stp_state", "0")
        _run("ip", "-n", self._hub, "link", "set", "bridge", "up")
        for rank in range(self._num_ranks):
            self._join(rank)
        arguments = ["ip", "netns", "exec", self._hub, sys.executable, str(_RELAY)]
        self._relay = subprocess.Popen(
            [*arguments, *(f"v{rank}" for rank in range(self._num_ranks))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the relay
        )  # fmt: skip
        self._bridge(True)

    def _join(self, rank: int) -> None:
        own, port = self._name(rank), f"v{rank}"
        _run(
            "ip", "link", "add", "eth0", "netns", own, "address", _mac(rank), "mtu", str(MTU), "type", "veth",
            "peer", "name", port, "netns", self._hub, "address", _mac(rank, hub=True), "mtu", str(MTU),
        )  # fmt: skip
        for namespace, device in ((own, "eth0"), (self._hub, port)):
            # The frames of a connection stay on one processor: from two of them they would arrive out of order.
            _run("ip", "-n", namespace, "link", "set", "dev", device, "gso_max_size", str(_LARGEST_PIECE))
            path = f"/sys/class/net/{device}/queues/rx-0/rps_cpus"
            _run("ip", "netns", "exec", namespace, "sh", "-c", f"echo 3 > {path}")
        _run("ip", "-n", self._hub, "link", "set", port, "up")
        _run("ip", "-n", own, "link", "set", "eth0", "up")
        _run("ip", "-n", own, "address", "add", f"{self.address(rank)}/24", "dev", "eth0")
        window = ["initcwnd", str(_WINDOW_SEGMENTS), "initrwnd", str(_WINDOW_SEGMENTS)]
        _run("ip", "-n", own, "route", "change", "10.77.0.0/24", "dev", "eth0", *window)
        # Known to each other from the start: the relay carries no broadcasts, hence no ARP.
        for other in range(self._num_ranks):
            if other != rank:
                neighbour = [self.address(other), "lladdr", _mac(other), "dev", "eth0", "nud", "permanent"]
                _run("ip", "-n", own, "neighbour", "replace", *neighbour)

    def _restart_relay(self) -> tuple[int, float]:
        latency_s = self._latency_s
        assert self._relay is not None
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        # Never both at once: every frame would arrive twice.
        if latency_s > 0:
            self._bridge(False)
        try:
            self._relay.stdin.write(f"{latency_s}\n")
            self._relay.stdin.flush()
            answer = self._relay.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise NetworkError("the relay has ended; its message is above")
        if latency_s == 0:
            self._bridge(True)
        refused, late_s = answer.split()
        return int(refused), float(late_s)

    def _bridge(self, on: bool) -> None:
        for rank in range(self._num_ranks):
            master = ["master", "bridge"] if on else ["nomaster"]
            _run("ip", "-n", self._hub, "link", "set", f"v{rank}", *master)


def check_machine() -> None:
    """Whether a network can be built here.

    Raises:
        NetworkError: naming what is missing.
    """
    if os.geteuid() != 0:
        raise NetworkError("network namespaces need root; run it as root")
    for tool in ("ip", "tc", "sysctl"):
        if shutil.which(tool) is None:
            raise NetworkError(f"the program {tool} is missing; install iproute2 and procps")


def remove_stale() -> None:
    """Remove namespaces whose process is gone."""
    if not _NAMESPACES.is_dir():
        return
    stale = []
    for path in _NAMESPACES.glob(f"{PREFIX}-*-*"):
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            stale.append(path.name)
    _remove(stale)


def _remove(names: list[str]) -> None:
    for name in names:
        if (_NAMESPACES / name).exists():
            # What still runs inside would keep the devices; it was started by the process that made the namespace.
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for process in map(int, listed.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _exit_on_signal(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)  # so that `with` statements and atexit tidy up


def _mac(rank: int, *, hub: bool = False) -> str:
    return f"02:00:00:00:{int(hub):02x}:{rank:02x}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise NetworkError(f"`{' '.join(command)}` failed: {reason[-1] if reason else done.returncode}")
