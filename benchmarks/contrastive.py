"""The contrastive loss, forward and backward, against open_clip's ClipLoss and a plain pair of cross entropies.

One interleaved run: 8,192 and 32,768 rows of 768 on one rank, and the shape of one rank of 32 (1,024 rows against
32,768, where gathering is played by a copy; ours in local form and one-sided), in fp32: time, and peak memory above
what was there before. Then four gloo processes with 512 rows each, in groups of 4, 2 and 1, and the bytes they send,
counted by a wrapper around torch's collectives and held against the formula. On a GPU also bf16, against open_clip and
against the time that the matrix products alone would take. Peers come from the `benchmark` extra; 32,768 rows of
open_clip need 17 GB of free memory.
"""

from __future__ import annotations

import importlib.util
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from _common import PeakMemory, Report, Timing, parse_arguments, speedup
from _contrastive_ranks import load_clip_loss, measure_ranks
from torch import Tensor
from torch.nn import functional

from m2_encoder.objectives import contrastive_one_sided, contrastive_op, image_text_contrastive

WIDTH = 768
LOG_SCALE = 2.6593  # log(1 / 0.07), CLIP's start
LOG_SCALE_EXP = math.exp(LOG_SCALE)
RANKS = 32
# Both sides compute the same numbers; what differs is the order of fp32 sums.
AGREEMENT = 1e-4
NEEDED_GB = {8192: 1.5, 32768: 17.5}

Step = Callable[[], list[Tensor]]


def unit_rows(number: int, seed: int, *, like: Tensor | None = None) -> Tensor:
    """Random unit rows; pulled towards `like`, so that pairs match and the loss is not that of noise."""
    rows = torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(rows if like is None else rows + 0.3 * WIDTH**0.5 * like, dim=1)


def one_rank_steps(rows: int) -> dict[str, Step]:
    """Forward and backward of all rows on one rank: ours, open_clip's, plain cross entropy."""
    images = unit_rows(rows, 1)
    texts = unit_rows(rows, 2, like=images)
    clip_loss = load_clip_loss()()

    def plain(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
        logits = log_scale.exp() * x @ y.t()
        targets = torch.arange(rows)
        return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.t(), targets)) / 2

    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": image_text_contrastive,
        "open_clip": lambda x, y, log_scale: clip_loss(x, y, log_scale.exp()),
        "cross entropy": plain,
    }

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [images.detach().requires_grad_(), texts.detach().requires_grad_()]
        log_scale = torch.tensor(LOG_SCALE, requires_grad=True)
        loss(*leaves, log_scale).backward()
        return [leaf.grad for leaf in (*leaves, log_scale) if leaf.grad is not None]

    return {name: lambda loss=loss: step(loss) for name, loss in losses.items()}  # type: ignore[misc]


def rank_shape_steps(rows: int) -> dict[str, Step]:
    """One rank's arithmetic in a world of 32: own rows against those of all, gathering played by a copy.

    open_clip computes the gradients of all gathered rows, which its backward would then reduce-scatter.
    """
    images = unit_rows(RANKS * rows, 3)
    texts = unit_rows(RANKS * rows, 4, like=images)
    # Other ranks' logsumexps may be any of that size: what is computed with them is held against the plain formula.
    own = [
        (LOG_SCALE_EXP * queries[:rows] @ keys.t()).logsumexp(dim=1)
        for queries, keys in ((images, texts), (texts, images))
    ]
    lse = [side.repeat(RANKS) for side in own]
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    clip_loss = load_clip_loss()(local_loss=True, gather_with_grad=True, rank=0, world_size=RANKS)
    own_rows = slice(0, rows)

    gathered = play_gather([images, texts], lse, rows)

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        own = [images[own_rows].detach().requires_grad_(), texts[own_rows].detach().requires_grad_()]
        loss(*own, torch.tensor(LOG_SCALE, requires_grad=True)).backward()
        return [leaf.grad for leaf in own if leaf.grad is not None]

    def ours(x: Tensor, y: Tensor, log_scale: Tensor, *, one_sided: bool) -> Tensor:
        return image_text_contrastive(x, y, log_scale, group=dist.group.WORLD, equal_rows=True, one_sided=one_sided)

    def two_sided() -> list[Tensor]:
        with mock.patch.object(contrastive_op, "gather_rows_without_grad", gathered):
            return step(partial(ours, one_sided=False))

    def one_sided() -> list[Tensor]:
        with mock.patch.multiple(
            contrastive_one_sided,
            gather_rows_without_grad=gathered,
            sum_over_group=lambda sums, _: sums.copy_(lse[1].exp().unsqueeze(1)),
            scatter_sums=lambda sums, _: sums[own_rows].clone(),
        ):
            return step(partial(ours, one_sided=True))

    def peer() -> list[Tensor]:
        sides = iter([side[rows:].detach().requires_grad_() for side in (images, texts)])

        def all_gather(own: Tensor) -> list[Tensor]:
            return [own, *(block.clone() for block in next(sides).split(rows))]

        with mock.patch("torch.distributed.nn.all_gather", all_gather):
            return step(lambda x, y, log_scale: clip_loss(x, y, log_scale.exp()))

    expected = plain_rank_gradients(images, texts, lse, rows)
    check_agreement(two_sided(), expected)
    check_agreement(one_sided()[:1], expected[:1])  # the texts' gradients are the sum of what all ranks would send
    return {"ours": two_sided, "ours, one-sided": one_sided, "open_clip": peer}


def play_gather(features: list[Tensor], lse: list[Tensor], rows: int) -> Callable[..., tuple[Tensor, ...]]:
    """A gather that needs no other ranks: it copies what they would send, in the layout of this rank's message."""

    def gathered(message: Tensor, group: Any, *, counts: list[int]) -> tuple[Tensor, ...]:
        del group
        buffer = message.new_empty((len(counts) * counts[0], *message.shape[1:]))
        sides = lse if message.dim() == 1 else [side.unsqueeze(1) for side in features]
        sides = sides[-message.shape[0] // rows :]  # both, or the texts alone
        for rank, block in enumerate(buffer.split(counts[0])):
            for target, side in zip(block.split(rows), sides, strict=True):
                target.copy_(side[rank * rows : (rank + 1) * rows])
        return buffer.split(counts[0])

    return gathered


def plain_rank_gradients(images: Tensor, texts: Tensor, lse: list[Tensor], rows: int) -> list[Tensor]:
    """Gradients of all ranks' losses with respect to the first rank's rows, by the formula and with whole matrices."""
    gradients = []
    for queries, keys, own, others in ((images, texts, lse[0], lse[1]), (texts, images, lse[1], lse[0])):
        logits = LOG_SCALE_EXP * queries[:rows] @ keys.t()
        weights = (logits - own[:rows, None]).exp() + (logits - others[None]).exp()
        weights.diagonal().sub_(2)
        gradients.append(LOG_SCALE_EXP / (2 * rows) * weights @ keys)
    return gradients


class Ratios(NamedTuple):
    """open_clip's time and peak memory over a candidate's."""

    time: float
    memory: float


def measure(report: Report, what: str, steps: dict[str, Step], *, rounds: int) -> dict[str, Ratios]:
    """Time and peak memory of candidates that take turns, and open_clip's over each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[int]] = {name: [] for name in steps}
    memory = PeakMemory()
    for i in range(rounds):
        for name in list(steps) if i % 2 == 0 else reversed(list(steps)):
            with memory.measure():
                start = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - start)
            peaks[name].append(memory.bytes)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    for name, timing in timings.items():
        peak = statistics.median(peaks[name])
        report.add(
            what,
            candidate=name,
            **timing.row(),
            time_over_open_clip=round(1 / speedup(timings["open_clip"], timing), 3),
            peak_mb=round(peak / 1e6, 1),
        )
    return {
        name: Ratios(
            speedup(timings["open_clip"], timing),
            statistics.median(peaks["open_clip"]) / statistics.median(peaks[name]),
        )
        for name, timing in timings.items()
    }


def check_agreement(ours: list[Tensor], peer: list[Tensor]) -> None:
    """Refuse to report if the two sides disagree."""
    for mine, theirs in zip(ours, peer, strict=False):
        difference = ((mine - theirs).norm() / theirs.norm()).item()
        if not difference < AGREEMENT:
            raise SystemExit(f"gradients differ by {difference:.1e} of their norm: the comparison means nothing")


def free_gb() -> float:
    """Memory that can be used without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) / 1e6 if found else 0.0


def measure_gpu(report: Report, *, quick: bool) -> None:
    """bf16 on the GPU: open_clip where it fits, and the floor of the four matrix products."""
    clip_loss = load_clip_loss()()
    for rows in (8192, 16384) if quick else (8192, 32768, 65536, 131072):
        images = unit_rows(rows, 1).cuda().bfloat16()
        texts = unit_rows(rows, 2).cuda().bfloat16()

        def ours(x: Tensor = images, y: Tensor = texts) -> None:
            leaves = [x.detach().requires_grad_(), y.detach().requires_grad_()]
            image_text_contrastive(*leaves, torch.tensor(LOG_SCALE, device="cuda", requires_grad=True)).backward()

        def peer(x: Tensor = images, y: Tensor = texts) -> None:
            leaves = [x.detach().requires_grad_(), y.detach().requires_grad_()]
            clip_loss(*leaves, torch.tensor(LOG_SCALE_EXP, device="cuda", requires_grad=True)).backward()

        def floor(x: Tensor = images, y: Tensor = texts) -> None:
            """The products that any form without stored logits needs: twice S, P @ Y and P.T @ X."""
            for rows_ in x.split(8192):
                for columns in y.split(8192):
                    tile = rows_ @ columns.t()
                    torch.mm(rows_, columns.t(), out=tile)
                    _ = tile @ columns
                    _ = tile.t() @ rows_

        candidates = {"ours": ours, "products alone": floor}
        if 24 * rows * rows < torch.cuda.mem_get_info()[0]:
            candidates["open_clip"] = peer
        timings = time_on_gpu(candidates, rounds=3 if quick else 10)
        for name, (timing, peak) in timings.items():
            report.add(
                f"GPU bf16, {rows:,} rows",
                candidate=name,
                **timing.row(),
                over_floor=round(timing.median / timings["products alone"][0].median, 3),
                peak_mb=round(peak / 1e6, 1),
            )


def time_on_gpu(candidates: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, tuple[Timing, int]]:
    """Interleaved times with synchronisation, and peaks of allocated memory, bytes."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    peaks = dict.fromkeys(candidates, 0)
    for i in range(-1, rounds):
        for name, call in candidates.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - before)
    return {name: (Timing(tuple(values)), peaks[name]) for name, values in seconds.items()}


def main() -> int:
    """Run everything that this machine can; exit code 2 without the peer."""
    arguments = parse_arguments(__doc__)
    quick = arguments.quick
    if importlib.util.find_spec("open_clip") is None:
        print("contrastive.py: open_clip is missing; pip install '.[benchmark]', or make benchmark", file=sys.stderr)
        return 2
    report = Report("Contrastive loss, forward + backward", distributions=("open_clip_torch",))
    small = one_rank_steps(1024)
    for peer in ("open_clip", "cross entropy"):
        check_agreement(small["ours"](), small[peer]())
    for rows, rounds in ((8192, 2 if quick else 9), (32768, 1 if quick else 3)):
        if free_gb() < NEEDED_GB[rows]:
            report.add(f"{rows:,} rows", skipped=f"needs {NEEDED_GB[rows]} GB of free memory, {free_gb():.1f} are")
            continue
        steps = one_rank_steps(rows)
        if quick:
            del steps["cross entropy"]
        ratios = measure(report, f"{rows:,} rows", steps, rounds=rounds)["ours"]
        report.figures |= {f"time_ratio_{rows}": ratios.time, f"memory_ratio_{rows}": ratios.memory}
    shaped = measure(report, "one rank of 32", rank_shape_steps(1024), rounds=2 if quick else 9)
    for name, suffix in (("ours, one-sided", ""), ("ours", "_two_sided")):
        report.figures[f"time_ratio_rank_shape{suffix}"] = shaped[name].time
        report.figures[f"memory_ratio_rank_shape{suffix}"] = shaped[name].memory
    measure_ranks(report, quick=quick)
    if torch.cuda.is_available():
        measure_gpu(report, quick=quick)
    report.finish(json_path=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
