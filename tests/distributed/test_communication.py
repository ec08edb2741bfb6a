"""What the contrastive loss sends, counted in real gloo ranks: exactly the formula, and nothing in backward."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2_encoder.objectives import image_text_contrastive
from m2_encoder.planning.communication import CommunicationCost, contrastive_bytes
from tests.support.rank_pool import RankPool, Seat
from tests.support.traffic import Traffic, measure

SHAPES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
"""All (W, g) of 1, 2 and 4 ranks."""
ROWS = 3  # of a rank in one micro-batch
ITEM_SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


class Setting(NamedTuple):
    world_size: int
    group_size: int
    micro_batches: int = 1
    dtype: str = "float32"
    width: int = 6
    heads: int = 1
    captions: int = 1
    identity: bool = False
    equal_rows: bool = True


def make_inputs(setting: Setting, rank: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None]:
    dtype, rows = getattr(torch, setting.dtype), setting.micro_batches * ROWS
    generator = torch.Generator().manual_seed(rank)

    def draw(count: int) -> list[Tensor]:
        heads = torch.randn(setting.heads, count, setting.width, generator=generator)
        return [nn.functional.normalize(head, dim=1).to(dtype).requires_grad_() for head in heads]

    scales = [torch.tensor(2.0).to(dtype).requires_grad_() for _ in range(setting.heads)]
    identity = torch.arange(rows) % 2 if setting.identity else None
    return draw(rows), draw(rows * setting.captions), scales, identity


def count_step(seat: Seat, setting: Setting) -> tuple[Traffic, Traffic] | None:
    """Traffic of a rank's forward and of its backward."""
    if seat.rank >= setting.world_size:
        return None
    images, texts, scales, identity = make_inputs(setting, seat.rank)
    group = seat.group(setting.group_size) if setting.group_size > 1 else None

    def forward() -> Tensor:
        return image_text_contrastive(
            images,
            texts,
            scales,
            group=group,
            identity=identity,
            captions_per_image=setting.captions,
            equal_rows=setting.equal_rows,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a name that torch gave up would warn on every rank of every run
        loss, sent = measure(forward, ranks=setting.group_size)
        _, sent_backward = measure(loss.backward, ranks=setting.group_size)
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in (*images, *texts, *scales))
    return sent, sent_backward


def count(pool: RankPool, setting: Setting) -> Traffic:
    """Traffic of forward, the same on every rank; backward has none."""
    counts = [result for result in pool.call(count_step, setting) if result is not None]
    assert len(counts) == setting.world_size
    forward = counts[0][0]
    for sent, sent_backward in counts:
        assert sent_backward == Traffic([], []), "backward must send nothing"
        assert sent == forward
    # What the profiler saw below Python is what was called, and nothing else.
    assert [size for _, size in forward.seen] == [size for _, size in forward.called]
    assert {name for name, _ in forward.seen} <= {"_allgather_base_"}, forward.seen
    return forward


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize(("world_size", "group_size"), SHAPES)
def test_two_collectives_with_the_bytes_of_the_formula(
    pool: RankPool, world_size: int, group_size: int, micro_batches: int
) -> None:
    for dtype, heads in (("float32", 1), ("float32", 2), ("bfloat16", 1), ("float16", 2)):
        setting = Setting(world_size, group_size, micro_batches, dtype=dtype, heads=heads)
        sent = count(pool, setting)
        k, g, b, e, item = micro_batches, group_size, ROWS, setting.width, ITEM_SIZES[dtype]
        formula = heads * (2 * k * (g - 1) * b * e * item + 8 * k * (g - 1) * b)
        assert (sent.bytes_sent, len(sent.called)) == (formula, 2 if g > 1 else 0)
        planned = contrastive_bytes(
            "local_form",
            world_size=world_size,
            group_size=g,
            rows=b,
            micro_batches=k,
            feature_dim=e,
            bytes_per_element=item,
            heads=heads,
        )
        assert planned == CommunicationCost(sent.bytes_sent, len(sent.called))


@pytest.mark.parametrize("equal_rows", [True, False])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("captions", [1, 3])
def test_what_options_add(pool: RankPool, equal_rows: bool, identity: bool, captions: int) -> None:
    """Row numbers travel through the store; identities cost 8 bytes per image, in the second message."""
    for dtype, statistic in (("float32", 4), ("float64", 8)):
        setting = Setting(4, 4, 2, dtype, captions=captions, identity=identity, equal_rows=equal_rows)
        sent = count(pool, setting)
        rows = 3 * 2 * ROWS  # of the three other ranks
        features = rows * (1 + captions) * setting.width * ITEM_SIZES[dtype]
        statistics = rows * (1 + captions) * statistic + rows * 8 * identity
        assert [size for _, size in sent.called] == [features, statistics]


def count_one_sided(seat: Seat, setting: Setting) -> tuple[Traffic, Traffic]:
    images, texts, scales, _ = make_inputs(setting, seat.rank)
    group = seat.group(setting.group_size)

    def forward() -> Tensor:
        return image_text_contrastive(images, texts, scales, group=group, equal_rows=True, one_sided=True)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, sent = measure(forward, ranks=setting.group_size)
        return sent, measure(loss.backward, ranks=setting.group_size)[1]


@pytest.mark.parametrize("group_size", [2, 4])
@pytest.mark.parametrize("heads", [1, 2])
def test_one_side_sends_the_same_bytes_but_some_of_them_in_backward(
    pool: RankPool, group_size: int, heads: int
) -> None:
    setting = Setting(4, group_size, 2, heads=heads)
    others = (group_size - 1) * 2 * ROWS * heads
    for sent, sent_backward in pool.call(count_one_sided, setting):
        features, statistics = others * setting.width * 4, others * 4
        assert [size for _, size in sent.called] == [features, statistics]
        assert [size for _, size in sent_backward.called] == [features]
        assert [name for name, _ in sent.seen] == ["_allgather_base_", "allreduce_"]
        assert [name for name, _ in sent_backward.seen] == ["_reduce_scatter_base_"]
        planned = contrastive_bytes(
            "local_form",
            world_size=4,
            group_size=group_size,
            rows=ROWS,
            micro_batches=2,
            feature_dim=setting.width,
            bytes_per_element=4,
            heads=heads,
        )
        # A ring's all-reduce is a reduce-scatter and a gather: twice what either sends.
        assert sent.bytes_sent + statistics + sent_backward.bytes_sent == planned.bytes_sent


def count_usual(seat: Seat) -> tuple[Traffic, Traffic]:
    """The usual gather with gradient, forward and backward: the counters can see traffic where there is some."""
    rows = torch.randn(ROWS, 4, requires_grad=True)

    def gather() -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(4)]
        dist.all_gather(gathered, rows.detach())
        gathered[seat.rank] = rows
        return torch.cat(gathered)

    class SumGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            total = grads[0].contiguous()
            dist.all_reduce(total)
            return total

    values, sent = measure(lambda: SumGradient.apply(gather()), ranks=4)
    _, sent_backward = measure(values.square().sum().backward, ranks=4)
    return sent, sent_backward


def test_the_counters_see_a_gather_and_a_backward_that_sends(pool: RankPool) -> None:
    for sent, sent_backward in pool.call(count_usual):
        assert [name for name, _ in sent.called] == ["all_gather"]
        assert [name for name, _ in sent.seen] == ["allgather_"]
        assert sent_backward.called == [("all_reduce", 3 * ROWS * 4 * 4)]
        assert [name for name, _ in sent_backward.seen] == ["allreduce_"]
