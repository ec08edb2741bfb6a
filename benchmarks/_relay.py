"""A delay line for Ethernet frames, for kernels without `netem`: run inside a network namespace.

    python _relay.py v0 v1 v2 v3

The interfaces are the ports of a switch. A frame that arrives at one port leaves through the port of its destination
`latency` later. It is a delay and no throttle: any number of frames are under way at once, and they keep their
order. Addresses are the ones that `_network.py` gives out: the last byte of a MAC is the number of the port.

Frames come with the kernel's offload header (`PACKET_VNET_HDR`): what TCP hands down in one piece of up to 64 KB is
received and sent in one piece, checksums left to be filled in, so that the relay needs two system calls for 64 KB
and little of a processor that four ranks share. It runs at real-time priority: otherwise they would delay it.

Lines on standard input: a latency in seconds, e.g. `0.005`; `0` closes the ports (the kernel's bridge takes over).
Every line is answered with two numbers of the time since the last one: frames refused by a full queue, and by how many
seconds the latest frame left too late. End of input ends the relay.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import gc
import os
import select
import socket
import sys
import time

# Numbers of linux/if_packet.h, which `socket` does not name.
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_ETH_P_ALL = 0x0003

_VNET_HEADER_BYTES = 10
_LARGEST_FRAME = 1 << 17
# A port is read this often before frames that are due leave: a busy sender must not hold up the others.
_READS_PER_TURN = 16
# Deep enough that nothing is ever dropped: a dropped segment costs TCP 200 ms, and no cluster is built that way.
_BUFFER_BYTES = 1 << 28


class DelayLine:
    """Frames under way, each for the same time.

    Args:
        latency_s: from arrival to departure, seconds.

    Attributes:
        latest_s: by how much the latest frame left too late, seconds.
    """

    def __init__(self, latency_s: float) -> None:
        self.latency_s = latency_s
        self.latest_s = 0.0
        # One latency for all: who came first leaves first, and a queue is enough.
        self._under_way: collections.deque[tuple[float, int, bytes]] = collections.deque()

    def push(self, now: float, port: int, frame: bytes) -> None:
        """A frame for a port has arrived; `now` never decreases."""
        self._under_way.append((now + self.latency_s, port, frame))

    def pop_due(self, now: float) -> list[tuple[int, bytes]]:
        """Frames whose time has come, in the order of their arrival: port and frame."""
        if self._under_way:
            self.latest_s = max(self.latest_s, now - self._under_way[0][0])
        due = []
        while self._under_way and self._under_way[0][0] <= now:
            _, port, frame = self._under_way.popleft()
            due.append((port, frame))
        return due

    def wait_s(self, now: float) -> float | None:
        """Seconds until the next frame is due, at least 0; None with nothing under way."""
        return max(0.0, self._under_way[0][0] - now) if self._under_way else None


def destination_port(frame: bytes) -> int | None:
    """Port of a frame with its offload header, or None if it is for nobody here (multicast, foreign addresses)."""
    address = frame[_VNET_HEADER_BYTES : _VNET_HEADER_BYTES + 6]
    return address[5] if address[:5] == b"\x02\0\0\0\0" else None


class Relay:
    """The ports, and the frames between them.

    Args:
        interfaces: name of each port, in the order of their numbers.
    """

    def __init__(self, interfaces: list[str]) -> None:
        self._interfaces = interfaces
        self._ports: list[socket.socket] = []
        self._line = DelayLine(0.0)
        self._buffer = memoryview(bytearray(_LARGEST_FRAME))  # one for all: new memory for each frame costs page faults
        self.refused = 0

    def configure(self, latency_s: float) -> str:
        """Start with an empty line of another latency; 0 closes the ports. What has gone wrong since the last time."""
        report = f"{self.refused} {self._line.latest_s}"
        self.refused = 0
        for port in self._ports:
            port.close()
        self._line = DelayLine(latency_s)
        self._ports = [_open_port(name) for name in self._interfaces] if latency_s > 0 else []
        return report

    def run(self) -> None:
        """Relay, and obey standard input, until it ends."""
        control = sys.stdin.fileno()
        while True:
            readable, _, _ = select.select([control, *self._ports], [], [], self._line.wait_s(time.monotonic()))
            for port in readable:
                if port == control:
                    if not (text := os.read(control, 64).decode().strip()):
                        return
                    print(self.configure(float(text)), flush=True)
                    break  # the other readable ports are closed by now
                self._receive(port)
            self._send_due()

    def _receive(self, port: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_READS_PER_TURN):
                length = port.recv_into(self._buffer)
                frame = bytes(self._buffer[:length])
                destination = destination_port(frame)
                if destination is not None and destination < len(self._ports):
                    self._line.push(time.monotonic(), destination, frame)

    def _send_due(self) -> None:
        for port, frame in self._line.pop_due(time.monotonic()):
            self.refused += not _send(self._ports[port], frame)


def _send(port: socket.socket, frame: bytes) -> bool:
    """Whether the queue had room."""
    try:
        port.send(frame)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
            raise
        return False
    return True


def _open_port(interface: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # protocol 0: nothing arrives before it is set up
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    port.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER_BYTES)
    port.setblocking(False)
    port.bind((interface, _ETH_P_ALL))
    return port


def main() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.disable()  # frames form no cycles, and a collection would delay them
    Relay(sys.argv[1:]).run()


if __name__ == "__main__":
    main()
