"""One call of the loss in a group: precisions, anomalies, compilation, and mistakes that one line must explain."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2_encoder.errors import UserError
from m2_encoder.objectives import image_text_contrastive
from m2_encoder.objectives.contrastive import contrastive_losses
from tests.support.plain_contrastive import rank_losses
from tests.support.rank_pool import RankPool, Seat

ROWS = (3, 1, 4, 2)
WIDTH = 8


class Call(NamedTuple):
    """How the loss is called on every rank."""

    dtype: torch.dtype = torch.float64
    scale: float = 20.0
    opposed: bool = False
    world: bool = False
    compiled: bool = False
    autocast: bool = False
    one_sided: bool = False
    poison: float | None = None


def rank_inputs(rank: int, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features and the scale of a rank; `opposed`: every logit is near its least, so that exponentials vanish."""
    generator = torch.Generator().manual_seed(500 + rank)
    rows = 3 if call.one_sided else ROWS[rank]
    images, texts = torch.randn(2, rows, WIDTH, dtype=torch.float64, generator=generator)
    if call.opposed:
        images, texts = 1 + 0.05 * images, -1 + 0.05 * texts
    unit = (nn.functional.normalize(side, dim=1).to(call.dtype) for side in (images, texts))
    return *unit, torch.tensor(math.log(call.scale), dtype=torch.promote_types(call.dtype, torch.float32))


def call_rank(seat: Seat, call: Call) -> dict[str, Any]:
    """Loss, per-row losses and gradients of a rank; the poison is one row of rank 2."""
    leaves = [leaf.requires_grad_() for leaf in rank_inputs(seat.rank, call)]
    group = dist.group.WORLD if call.world else seat.group(4)
    if seat.rank == 2 and call.poison is not None:
        with torch.no_grad():
            leaves[0][0] = call.poison
    options = {"group": group, "label_smoothing": 0.1, "equal_rows": call.one_sided, "one_sided": call.one_sided}
    function = image_text_contrastive
    if call.compiled:
        function = torch.compile(image_text_contrastive, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=call.autocast):
        loss = function(*leaves, **options)
    loss.backward()
    with torch.no_grad():
        rows = contrastive_losses(*leaves, **options).per_sample
    return {
        "loss": loss.item(),
        "dtype": str(loss.dtype),
        "rows": rows.double().numpy(),
        "grads": [leaf.grad.double().numpy() for leaf in leaves if leaf.grad is not None],
    }


def expected_ranks(call: Call) -> tuple[list[float], list[list[Any]], float]:
    """Loss and gradients of features, of the *sum* over the group, by rank; and the scale's, of the mean."""
    inputs = [rank_inputs(rank, call) for rank in range(4)]
    images, texts = ([given[side].double().requires_grad_() for given in inputs] for side in (0, 1))
    log_scale = inputs[0][2].double().requires_grad_()
    losses = rank_losses(images, texts, log_scale, smoothing=0.1)
    torch.stack(losses).sum().backward()
    grads = [[side.grad.numpy() for side in pair if side.grad is not None] for pair in zip(images, texts, strict=True)]
    assert log_scale.grad is not None
    return [loss.item() for loss in losses], grads, log_scale.grad.item() / 4


@pytest.mark.parametrize("one_sided", [False, True], ids=["local-form", "one-sided"])
@pytest.mark.parametrize(
    "call",
    [
        Call(),
        Call(world=True),
        Call(compiled=True),
        Call(scale=200.0),
        Call(scale=100.0, opposed=True),
        Call(dtype=torch.float32, scale=100.0, opposed=True),
        Call(dtype=torch.float32),
        Call(dtype=torch.bfloat16),
        Call(dtype=torch.float16),
        Call(dtype=torch.float32, autocast=True),
    ],
    ids=str,
)
def test_ranks_get_the_gradient_of_all_losses(pool: RankPool, call: Call, one_sided: bool) -> None:
    """Ranks of the local form hold different numbers of rows."""
    call = call._replace(one_sided=one_sided)
    results = pool.call(call_rank, call)
    losses, grads, scale_grad = expected_ranks(call)
    loss_rtol = 1e-12 if call.dtype == torch.float64 else 1e-6
    # Gradients of half precision are rounded once, to the dtype of their features.
    half = call.dtype in (torch.bfloat16, torch.float16)
    grad_rtol = torch.finfo(call.dtype).eps if half else max(10, call.scale) * loss_rtol
    for rank, result in enumerate(results):
        assert result["dtype"] == ("torch.float64" if call.dtype == torch.float64 else "torch.float32")
        assert result["loss"] == pytest.approx(losses[rank], rel=max(1, call.scale / 20) * loss_rtol)
        assert result["rows"].mean() == pytest.approx(result["loss"], rel=loss_rtol)
        for ours, theirs in zip(result["grads"], grads[rank], strict=False):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=grad_rtol * np.abs(theirs).max())
    # The terms of the scale's gradient cancel; each is as exact as a logit.
    grad_tol = max(20, call.scale) * loss_rtol
    size = np.abs(np.concatenate([grad.ravel() for pair in grads for grad in pair])).max()
    assert np.mean([result["grads"][2] for result in results]) == pytest.approx(scale_grad, abs=grad_tol * size)


@pytest.mark.parametrize("one_sided", [False, True], ids=["local-form", "one-sided"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_reaches_every_rank_and_raises_nowhere(
    pool: RankPool, poison: float, one_sided: bool
) -> None:
    """All ranks skip such a step together; one that raised alone would leave the others waiting."""
    for dtype in (torch.float32, torch.float64):
        for result in pool.call(call_rank, Call(dtype, poison=poison, one_sided=one_sided)):
            assert not math.isfinite(result["loss"])
            assert not np.isfinite(result["grads"][0]).all()


def message_of(seat: Seat, mistake: str) -> str | None:
    """What a rank is told when it alone makes a mistake that is found before anything is sent."""
    images, texts, log_scale = rank_inputs(seat.rank, Call(torch.float32))
    group: Any = seat.group(2)
    if mistake == "non-member":
        # new_group gives a rank outside of the group a marker instead of a group
        group = dist.new_group([0, 1])
        if seat.rank < 2:
            return None
    elif mistake == "another-group":
        groups = [dist.new_group([0, 1], use_local_synchronization=False), dist.new_group([2, 3])]
        group = groups[1 - seat.rank // 2]
    try:
        image_text_contrastive(images, texts, log_scale, group=group)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("mistake", ["non-member", "another-group"])
def test_a_group_without_this_rank_is_refused_at_once(pool: RankPool, mistake: str) -> None:
    told = pool.call(message_of, mistake)
    concerned = told if mistake == "another-group" else told[2:]
    for message in concerned:
        assert message is not None
        assert "does not hold this rank" in message
        assert "\n" not in message


def heads_together(seat: Seat) -> tuple[list[float], list[Any], list[Any]]:
    """Two heads in one call, and one after the other."""
    images, texts, _ = rank_inputs(seat.rank, Call())
    scales = [torch.tensor(1.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)]
    identity = torch.arange(ROWS[seat.rank]) // 2
    results, losses = [], []
    for together in (True, False):
        one, two = (images.clone().requires_grad_(), texts.clone().requires_grad_())
        leaves = [scale.clone().requires_grad_() for scale in scales]
        options = {"group": seat.group(4), "identity": identity}
        if together:
            loss = image_text_contrastive([one, two], [two, one], leaves, **options)
        else:
            loss = image_text_contrastive(one, two, leaves[0], **options) / 2
            loss = loss + image_text_contrastive(two, one, leaves[1], **options) / 2
        loss.backward()
        losses.append(loss.item())
        results.append([leaf.grad.numpy() for leaf in (one, two, *leaves) if leaf.grad is not None])
    return losses, results[0], results[1]


def test_heads_that_travel_together_are_the_mean_of_heads_alone(pool: RankPool) -> None:
    for losses, together, apart in pool.call(heads_together):
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        for one, other in zip(together, apart, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def trained_text_tower(seat: Seat) -> list[Any]:
    """LiT: images without a gradient; the texts' and the scale's must not change for that."""
    results = []
    for trains in (True, False):
        images, texts, log_scale = rank_inputs(seat.rank, Call())
        images.requires_grad_(trains)
        image_text_contrastive(
            images, texts.requires_grad_(), log_scale.requires_grad_(), group=seat.group(2)
        ).backward()
        assert (images.grad is not None) == trains
        results.append([leaf.grad.numpy() for leaf in (texts, log_scale) if leaf.grad is not None])
    return results


def test_a_locked_image_tower_changes_nothing_for_the_texts(pool: RankPool) -> None:
    for free, locked in pool.call(trained_text_tower):
        for one, other in zip(free, locked, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def break_promise(seat: Seat) -> str:
    """Uneven rows that were promised to be equal, in debug."""
    leaves = rank_inputs(seat.rank, Call())
    with pytest.raises(UserError) as error:
        image_text_contrastive(*leaves, group=seat.group(4), equal_rows=True, debug=True)
    return str(error.value)


def test_a_broken_promise_of_equal_rows_is_named_on_every_rank(pool: RankPool) -> None:
    expected = f"the ranks of the group have {list(ROWS)} rows; use equal_rows=False"
    assert all(expected in message for message in pool.call(break_promise))
