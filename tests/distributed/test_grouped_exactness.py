"""Grouped ranks with micro-batches train exactly as one process that holds all rows: real gloo ranks under DDP.

The reference is the formula in plain torch (`tests.support.plain_contrastive`); dropout and stochastic depth are on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2_encoder.objectives import image_text_contrastive
from tests.support.grouped_cases import Case, GroupedStep, deviation, rank_rows, step_alone, train_step
from tests.support.plain_contrastive import world_loss
from tests.support.rank_pool import RankPool, Seat

FP64, FP32 = 1e-12, 1e-6
SHAPES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
"""All (W, g) of 1, 2 and 4 ranks."""
UNEVEN = (3, 1, 4, 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"equal_rows": True},
    "uneven": {"rows": UNEVEN},
    "two-heads": {"heads": 2, "recompute": False},
    "multi-positive": {"identities": 3, "rows": UNEVEN},
    "captions": {"captions": 2, "heads": 2, "identities": 8, "rows": UNEVEN, "recompute": False},
    "smoothed": {"smoothing": 0.2, "captions": 2, "identities": 4, "rows": UNEVEN},
    "one-sided": {"one_sided": True, "equal_rows": True, "heads": 2},
    "one-sided-all": {
        "one_sided": True,
        "equal_rows": True,
        "smoothing": 0.2,
        "captions": 2,
        "identities": 4,
        "recompute": False,
    },
}


def make_case(world_size: int, group_size: int, micro_batches: int, **options: Any) -> Case:
    rows = tuple(options.pop("rows", (3,) * 4)[:world_size])
    return Case(rows=rows, group_size=group_size, micro_batches=micro_batches, **options)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize(("world_size", "group_size"), SHAPES, ids=str)
def test_ranks_and_micro_batches_equal_one_process(
    pool: RankPool, world_size: int, group_size: int, micro_batches: int
) -> None:
    for name, options in VARIANTS.items():
        for dtype, tolerance in (("float64", FP64), ("float32", FP32)):
            case = make_case(world_size, group_size, micro_batches, dtype=dtype, **options)
            worst = deviation(case, pool.call(train_step, case), step_alone(case))
            assert worst <= tolerance, f"{name}, {dtype}: {worst}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any step of fp64, with scales up to 100."""
    world_size = draw(st.sampled_from([1, 2, 4]))
    group_size = draw(st.sampled_from([size for size in (1, 2, 4) if size <= world_size]))
    rows = draw(st.lists(st.integers(1, 5), min_size=world_size, max_size=world_size))
    equal = draw(st.booleans())
    promised = equal and draw(st.booleans())
    return Case(
        rows=(rows[0],) * world_size if equal else tuple(rows),
        group_size=group_size,
        micro_batches=draw(st.integers(1, 4)),
        width=draw(st.integers(2, 9)),
        captions=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 2)),
        identities=draw(st.none() | st.integers(1, 8)),
        smoothing=draw(st.sampled_from([0.0, 0.3])),
        log_scales=(draw(st.floats(-1, 4.6)), draw(st.floats(-1, 4.6))),
        recompute=draw(st.booleans()),
        equal_rows=promised,
        one_sided=promised and draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


def check_any(pool: RankPool, case: Case) -> None:
    worst = deviation(case, pool.call(train_step, case), step_alone(case))
    assert worst <= FP64, worst


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_step_equals_one_process(pool: RankPool, case: Case) -> None:
    check_any(pool, case)


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_very_many_steps_equal_one_process(pool: RankPool, case: Case) -> None:
    check_any(pool, case)


def test_the_reference_tells_groups_micro_batches_and_scales_apart() -> None:
    """The comparisons above could not pass with another grouping, mean or set of targets."""
    case = make_case(4, 4, 2, rows=UNEVEN, identities=3, heads=2)
    losses = [
        float(step_alone(changed)["loss"])
        for changed in (
            case,
            case._replace(group_size=2),
            case._replace(group_size=1),
            case._replace(identities=None),
            case._replace(heads=1),
            case._replace(log_scales=(2.6, 1.9)),
        )
    ]
    gaps = np.abs(np.subtract.outer(losses, losses))[~np.eye(len(losses), dtype=bool)]
    assert gaps.min() > 1e-3


def count_hooks(seat: Seat, case: Case) -> dict[str, int]:
    """How often each parameter receives a gradient in one backward."""
    step = nn.parallel.DistributedDataParallel(
        GroupedStep(case, seat.group(case.group_size)), process_group=seat.group(case.world_size)
    )
    fired: dict[str, int] = {}
    for name, parameter in step.module.named_parameters():
        fired[name] = 0

        def count(_: Tensor, name: str = name) -> None:
            fired[name] += 1

        parameter.register_post_accumulate_grad_hook(count)
    step(*rank_rows(case, seat.rank)).backward()
    return fired


@pytest.mark.parametrize("recompute", [True, False])
def test_every_gradient_arrives_once_so_that_ddp_reduces_it_once(pool: RankPool, recompute: bool) -> None:
    case = make_case(4, 2, 4, heads=2, recompute=recompute)
    for fired in pool.call(count_hooks, case):
        assert len(fired) == 8
        assert set(fired.values()) == {1}, fired


def unit_rows(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + rank)
    images, texts = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    return nn.functional.normalize(images, dim=1), nn.functional.normalize(texts, dim=1)


def with_open_clip(seat: Seat, dtype: str) -> dict[str, Any]:
    """Loss and gradients of ours and of open_clip's, over the whole world."""
    from open_clip.loss import ClipLoss

    theirs = ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=seat.rank, world_size=dist.get_world_size()
    )
    results: dict[str, Any] = {}
    for name in ("ours", "theirs"):
        images, texts = (rows.to(getattr(torch, dtype)).requires_grad_() for rows in unit_rows(seat.rank, 40))
        log_scale = torch.tensor(2.5, dtype=images.dtype, requires_grad=True)
        if name == "ours":
            loss = image_text_contrastive(images, texts, log_scale, group=dist.group.WORLD)
        else:
            loss = theirs(images, texts, log_scale.exp())
        loss.backward()
        gradients = [tensor.grad for tensor in (images, texts, log_scale)]
        results[name] = [loss.item(), *(gradient.numpy() for gradient in gradients if gradient is not None)]
    return results


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", FP64), ("float32", FP32)])
def test_one_group_equals_open_clips_local_loss(pool: RankPool, dtype: str, tolerance: float) -> None:
    pytest.importorskip("open_clip")
    results = pool.call(with_open_clip, dtype)
    ours, theirs = ([result[name] for result in results] for name in ("ours", "theirs"))
    np.testing.assert_allclose([r[0] for r in ours], [r[0] for r in theirs], rtol=tolerance, err_msg="losses by rank")
    for rank in range(4):
        for side in (1, 2):
            size = np.abs(theirs[rank][side]).max()
            np.testing.assert_allclose(ours[rank][side], theirs[rank][side], rtol=0, atol=tolerance * size)
    # A rank's gradient of the scale is its share here, its own loss's there: what DDP makes of them is the same.
    assert np.mean([r[3] for r in ours]) == pytest.approx(np.mean([r[3] for r in theirs]), rel=tolerance)


def with_plain_gather(seat: Seat) -> list[Any]:
    """Ours over the world, gradients as a rank gets them."""
    images, texts = (rows.requires_grad_() for rows in unit_rows(seat.rank, 60))
    log_scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    loss = image_text_contrastive(images, texts, log_scale, group=dist.group.WORLD)
    loss.backward()
    return [loss.item(), *(t.grad.numpy() for t in (images, texts, log_scale) if t.grad is not None)]


def test_one_group_equals_the_usual_formula_rank_by_rank(pool: RankPool) -> None:
    """Local loss with a gather that is differentiated as a sum over the ranks: what `ClipLoss` computes, without it."""
    sides = list(zip(*(unit_rows(rank, 60) for rank in range(4)), strict=True))
    images, texts = ([rows.requires_grad_() for rows in side] for side in sides)
    log_scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    all_images, all_texts = torch.cat(images), torch.cat(texts)
    losses = []
    for rank in range(4):
        labels = torch.arange(5) + 5 * rank
        of_images = nn.functional.cross_entropy(log_scale.exp() * images[rank] @ all_texts.t(), labels)
        of_texts = nn.functional.cross_entropy(log_scale.exp() * texts[rank] @ all_images.t(), labels)
        losses.append((of_images + of_texts) / 2)
    torch.stack(losses).sum().backward()
    by_formula = world_loss(images, texts, log_scale, group_size=4)
    torch.testing.assert_close(torch.stack(losses).mean(), by_formula, rtol=1e-12, atol=0)
    results = pool.call(with_plain_gather)
    for rank, (loss, image_grad, text_grad, _) in enumerate(results):
        assert loss == pytest.approx(losses[rank].item(), rel=FP64)
        for ours, expected in ((image_grad, images[rank].grad), (text_grad, texts[rank].grad)):
            assert expected is not None
            np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=FP64)
    assert log_scale.grad is not None
    assert sum(result[3] for result in results) == pytest.approx(log_scale.grad.item(), rel=FP64)
