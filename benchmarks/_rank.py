"""One rank of `grouped_training.py`, run inside its network namespace. It obeys lines of JSON, one answer each.

    python _rank.py RANK WORLD_SIZE ROWS THREADS ADDRESS_OF_RANK_0

``{"do": "train", "candidate": LABEL, "at": T}``   one optimizer step, started when the clock shows T
``{"do": "loss", "candidate": LABEL, "shape": [rows, width], "at": T}``   forward and backward of the loss on features
``{"do": "gradient", "candidate": LABEL}``   loss and gradient norm of a step at the first weights; no update
``{"do": "probe", "peer": RANK, "bytes": N}``   round trip and throughput over a plain TCP connection; peer: "serve"
``{"do": "all_reduce", "numbers": N, "at": T}``   one all-reduce of N numbers; null: as many as the model has gradients
``{"do": "copy", "at": T}``, ``{"do": "matmul", "at": T}``   fixed work, see `COPY_BYTES` and `MATMUL_SIDES`
``{"do": "nothing"}``

The clock is the machine's monotonic one, which all namespaces share: no message over the shaped network is needed to
start ranks together. Ends of input end the process, whatever it is doing.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _candidates import PairEncoder, build_loss, list_candidates, new_groups
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from m2_encoder.data.emoji.dataset import load_emoji_concepts, load_emoji_tokenizer_model
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.training.optim import build_optimizer
from m2_encoder.types import TextTokens

PING_ROUNDS = 15
COPY_BYTES = 1 << 25
MATMUL_SIDES = (1024, 768, 1024)
_PROBE_PORT = 7001
_RENDEZVOUS_PORT = 7000


class Rank:
    """Model, optimizer, inputs and groups of one rank.

    Args:
        rows: per rank and optimizer step.
    """

    def __init__(self, *, rows: int) -> None:
        self.rank, world_size = dist.get_rank(), dist.get_world_size()
        groups = new_groups(world_size)
        self.candidates = {candidate.label: candidate for candidate in list_candidates(world_size)}
        self.losses = {label: build_loss(candidate, groups) for label, candidate in self.candidates.items()}
        torch.manual_seed(0)
        self.encoder = PairEncoder()
        self.parallel = DistributedDataParallel(self.encoder)
        self.optimizer = build_optimizer(self.encoder, lr=1e-4)
        size = self.encoder.model.config.image_size
        self.images = torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(self.rank))
        self.text = _captions(self.rank * rows, rows, self.encoder.model.config.context_length)
        trained = [p for p in self.encoder.parameters() if p.requires_grad]
        self.gradient = torch.zeros(sum(p.numel() for p in trained))
        self.buffers = torch.zeros(COPY_BYTES // 4), torch.ones(COPY_BYTES // 4)
        height, inner, width = MATMUL_SIDES
        self.factors = torch.rand(height, inner), torch.rand(inner, width)
        self.features: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def train(self, label: str) -> float:
        """One optimizer step; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(label)
        self.optimizer.step()
        return loss

    def gradient_of(self, label: str) -> dict[str, Any]:
        """Loss on this rank, and the averaged gradient of all parameters as random sums, for comparison."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(label)
        gradient = torch.cat([p.grad.flatten().double() for p in self.encoder.parameters() if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        signs = torch.randint(0, 2, (8, len(gradient)), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
        return {"loss": loss, "norm": gradient.norm().item(), "sums": (signs @ gradient).tolist()}

    def loss_alone(self, label: str, shape: tuple[int, int]) -> float:
        """Forward and backward of the loss on given features; the loss."""
        if shape not in self.features:
            generator = torch.Generator().manual_seed(self.rank)
            pair = [torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=1) for _ in range(2)]
            self.features[shape] = (pair[0], pair[1])
        images, texts = (features.detach().requires_grad_() for features in self.features[shape])
        loss = self.losses[label](images, texts, torch.tensor(2.0, requires_grad=True))
        loss.backward()
        return loss.item()

    def all_reduce(self, numbers: int | None) -> float:
        """The traffic of the gradients alone, or of a part of them."""
        dist.all_reduce(self.gradient[:numbers])
        return 0.0

    def copy(self) -> float:
        """Read and write `COPY_BYTES` each."""
        self.buffers[0].copy_(self.buffers[1])
        return 0.0

    def matmul(self) -> float:
        """One product of `MATMUL_SIDES`."""
        torch.matmul(*self.factors)
        return 0.0

    def _backward(self, label: str) -> float:
        loss = self.losses[label](*self.parallel(self.images, self.text, self.candidates[label].micro_batches))
        loss.backward()
        return loss.item()


def _captions(first: int, rows: int, context_length: int) -> TextTokens:
    """Names of emoji, Chinese and English in turns."""
    concepts = load_emoji_concepts()
    chosen = [concepts[i % len(concepts)] for i in range(first, first + rows)]
    names = [concept.captions[("en", "zh")[i % 2]].name for i, concept in enumerate(chosen)]
    tokens: TextTokens = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=context_length)(names)
    return tokens


# ------------------------------------------------------------------------------------------------------------- probe


def probe(peer: str, num_bytes: int) -> dict[str, float]:
    """Median round trip of one byte, and the throughput of one connection, from this rank to another."""
    with _connect(peer) as connection:
        times = []
        for _ in range(PING_ROUNDS):
            start = time.perf_counter()
            connection.send(b"x")
            connection.recv(1)
            times.append(time.perf_counter() - start)
        connection.sendall(num_bytes.to_bytes(8, "big"))
        payload = bytes(num_bytes)
        start = time.perf_counter()
        connection.sendall(payload)
        connection.recv(1)
        # The first byte and the answer were under way for one round trip: that is latency, not bandwidth.
        seconds = time.perf_counter() - start - statistics.median(times)
    return {"round_trip_ms": 1e3 * statistics.median(times), "mbit_per_s": num_bytes * 8 / seconds / 1e6}


def serve_probe() -> dict[str, float]:
    """The other end of `probe`."""
    with socket.create_server(("0.0.0.0", _PROBE_PORT)) as server:
        connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PING_ROUNDS):
            connection.send(connection.recv(1))
        missing, buffer = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big"), bytearray(1 << 20)
        while missing > 0:
            missing -= connection.recv_into(buffer)
        connection.send(b"x")
    return {}


def _connect(address: str) -> socket.socket:
    connection = socket.socket()
    deadline = time.monotonic() + 10
    while refused := connection.connect_ex((address, _PROBE_PORT)):
        if time.monotonic() > deadline:
            raise OSError(refused, f"nobody serves the probe at {address}")
        connection.close()
        time.sleep(0.01)  # the peer has not opened its port yet
        connection = socket.socket()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def sent_bytes() -> int:
    """What has left eth0 of this namespace, frames with their headers."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        if line.strip().startswith("eth0:"):
            return int(line.split(":")[1].split()[8])
    raise RuntimeError("no eth0 here: a rank runs in a namespace that _network.py made")


def retransmitted_segments() -> int:
    """TCP segments that this namespace has sent again."""
    names, values = (
        line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    return int(values[names.index("RetransSegs")])


# ----------------------------------------------------------------------------------------------------------- control


def timed(work: Callable[[], float], at: float) -> dict[str, float]:
    """Do something at a time; how long it took from then on, what it returned and what was sent."""
    sent = sent_bytes()
    time.sleep(max(0.0, at - time.monotonic()))
    value = work()
    return {"seconds": time.monotonic() - at, "value": value, "sent": sent_bytes() - sent}


def obey(rank: Rank, order: dict[str, Any]) -> dict[str, Any]:
    """Carry one order out."""
    if order["do"] == "train":
        return timed(lambda: rank.train(order["candidate"]), order["at"])
    if order["do"] == "loss":
        return timed(lambda: rank.loss_alone(order["candidate"], tuple(order["shape"])), order["at"])
    if order["do"] == "all_reduce":
        return timed(lambda: rank.all_reduce(order["numbers"]), order["at"])
    if order["do"] in ("copy", "matmul"):
        return timed(rank.copy if order["do"] == "copy" else rank.matmul, order["at"])
    if order["do"] == "gradient":
        return rank.gradient_of(order["candidate"])
    if order["do"] == "probe":
        measured = serve_probe() if order["peer"] == "serve" else probe(order["peer"], order["bytes"])
        return {**measured, "retransmitted": retransmitted_segments()}
    if order["do"] == "nothing":
        return {"retransmitted": retransmitted_segments()}
    raise ValueError(f"unknown order {order}")


def _read_orders(orders: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(1)  # whoever gave orders is gone; a collective may be waiting for ever


def main() -> None:
    number, world_size, rows, threads = map(int, sys.argv[1:5])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    # open_clip and the collectives that every supported torch has: newer names exist, older ones still work.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated")
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_orders, args=(orders,), daemon=True).start()
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{sys.argv[5]}:{_RENDEZVOUS_PORT}", rank=number, world_size=world_size
    )
    rank = Rank(rows=rows)
    text_tokens = rank.text.mask.sum(dim=1).double().mean().item()
    print(json.dumps({"text_tokens": text_tokens}), file=answers, flush=True)
    while True:
        print(json.dumps(obey(rank, json.loads(orders.get()))), file=answers, flush=True)


if __name__ == "__main__":
    main()
