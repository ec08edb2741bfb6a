"""Loops around DistributedDataParallel that would train on a rank's own gradient end in an error; right ones pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from m2_encoder.distributed.groups import make_group
from m2_encoder.errors import UserError
from m2_encoder.objectives import encode_pieces, image_text_contrastive, in_pieces
from m2_encoder.objectives.sigmoid import sigmoid_losses
from tests.support.elsewhere import Case, Towers, deviation, make_batch, make_model
from tests.support.plain_contrastive import world_loss
from tests.support.rank_pool import RankPool, Seat

RANKS, PIECES = 4, 2
CASE = Case("ddp", RANKS)
Features = tuple[Tensor, Tensor, Tensor]


class Loop:
    """A model in DDP on a rank, and its rows."""

    def __init__(self, rank: int, **options: Any) -> None:
        self.model = make_model(CASE)
        self.ddp = DistributedDataParallel(self.model, **options)
        self.rows = make_batch(CASE, rank, 0)
        self.pieces = list(zip(*(side.chunk(PIECES) for side in self.rows), strict=True))

    def backward(self, images: Tensor, texts: Tensor, scale: Tensor) -> None:
        image_text_contrastive(images, texts, scale, group=dist.group.WORLD).backward()

    def join(self, features: list[Features]) -> Features:
        images, texts, scales = zip(*features, strict=True)
        return torch.cat(images), torch.cat(texts), scales[-1]


def several_forwards(loop: Loop) -> None:
    loop.backward(*loop.join([loop.ddp(*piece) for piece in loop.pieces]))


def last_piece_announced(loop: Loop) -> None:
    with loop.ddp.no_sync():
        first = loop.ddp(*loop.pieces[0])
    loop.backward(*loop.join([first, loop.ddp(*loop.pieces[1])]))


def accumulated_then_averaged(loop: Loop) -> None:
    with loop.ddp.no_sync():
        loop.backward(*loop.ddp(*loop.rows))
    loop.model.zero_grad()
    loop.backward(*loop.ddp(*loop.rows))


def by_hand_around_ddp(loop: Loop) -> None:
    """Each piece is encoded twice; the second time through DDP, with the gradient of its features."""
    with torch.no_grad():
        images, texts, _ = loop.join([loop.ddp(*piece) for piece in loop.pieces])
    images.requires_grad_()
    texts.requires_grad_()
    scale = loop.model.logit_scale.detach().requires_grad_()
    loop.backward(images, texts, scale)
    gradients = zip(images.grad.chunk(PIECES), texts.grad.chunk(PIECES), strict=True)
    for number, (piece, (of_image, of_text)) in enumerate(zip(loop.pieces, gradients, strict=True)):
        image, text, own = loop.ddp(*piece)
        ((image * of_image).sum() + (text * of_text).sum() + own * (scale.grad if number == 0 else 0)).backward()


def gradient_alone(loop: Loop) -> None:
    """Only looks at gradients: nothing is accumulated, so nothing was to be averaged."""
    images, texts, scale = loop.model(*loop.rows)
    loss = image_text_contrastive(images, texts, scale, group=dist.group.WORLD)
    torch.autograd.grad(loss, list(loop.model.parameters()))
    loop.backward(*loop.ddp(*loop.rows))


RIGHT = [several_forwards, last_piece_announced, accumulated_then_averaged, by_hand_around_ddp, gradient_alone]


def module_inside(loop: Loop) -> None:
    loop.backward(*loop.ddp.module(*loop.rows))


def module_inside_of_one_side(loop: Loop) -> None:
    texts = loop.ddp.module(*loop.rows)[1].detach()
    loop.backward(loop.ddp.module(*loop.rows)[0], texts, torch.tensor(2.0))


def module_inside_for_sigmoid(loop: Loop) -> None:
    images, texts, scale = loop.ddp.module(*loop.rows)
    sigmoid_losses(images, texts, scale, torch.tensor(-1.0), group=dist.group.WORLD).loss.backward()


def forward_in_no_sync(loop: Loop) -> None:
    with loop.ddp.no_sync():
        features = [loop.ddp(*piece) for piece in loop.pieces]
    loop.backward(*loop.join(features))


def module_inside_checkpointed(loop: Loop) -> None:
    loop.backward(*loop.join([checkpoint(loop.model, *piece, use_reentrant=False) for piece in loop.pieces]))


def pieces_of_the_module_inside(loop: Loop) -> None:
    loop.backward(*encode_pieces(lambda piece: loop.model(*piece)[:2], loop.pieces), loop.model.logit_scale)


def pieces_through_ddp(loop: Loop) -> None:
    loop.backward(*encode_pieces(lambda piece: loop.ddp(*piece)[:2], loop.pieces), loop.model.logit_scale)


def cut_module_inside(loop: Loop) -> None:
    in_pieces(loop.model, PIECES)
    loop.backward(*loop.ddp.module(*loop.rows))


def cut_wrapper(loop: Loop) -> None:
    loop.backward(*in_pieces(loop.ddp, PIECES)(*loop.rows))


WRONG: dict[Callable[[Loop], None], str] = {
    module_inside: "gradients were not averaged over ranks",
    module_inside_of_one_side: "gradients were not averaged over ranks",
    module_inside_for_sigmoid: "gradients were not averaged over ranks",
    forward_in_no_sync: "gradients were not averaged over ranks",
    module_inside_checkpointed: "gradients were not averaged over ranks",
    pieces_of_the_module_inside: "outside of the forward of DistributedDataParallel",
    pieces_through_ddp: "outside of the forward of DistributedDataParallel",
    cut_wrapper: "takes the model inside",
    cut_module_inside: "outside of the forward of DistributedDataParallel",
}


def run(seat: Seat, loops: list[Callable[[Loop], None]], options: dict[str, Any]) -> list[Any]:
    """The gradients of each loop on a rank, or its error."""
    found: list[Any] = []
    loop = Loop(seat.rank, **options)
    for function in loops:
        loop.model.zero_grad()
        try:
            function(loop)
            found.append({name: p.grad for name, p in loop.model.named_parameters()})
        except UserError as error:
            found.append(str(error))
    return found


def step_alone() -> list[dict[str, Tensor]]:
    model = make_model(CASE)
    features = [model(*make_batch(CASE, rank, 0)) for rank in range(RANKS)]
    images, texts, _ = zip(*features, strict=True)
    world_loss(images, texts, model.logit_scale, group_size=RANKS).backward()
    return [{name: p.grad for name, p in model.named_parameters()}]


@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=str)
def test_right_loops_have_the_gradient_of_one_process(pool: RankPool, options: dict[str, Any]) -> None:
    loops = RIGHT if not options else [several_forwards]
    expected = step_alone()
    for results in pool.call(run, loops, options):
        for function, gradients in zip(loops, results, strict=True):
            assert isinstance(gradients, dict), f"{function.__name__}: {gradients}"
            assert deviation([gradients], expected) < 1e-12, function.__name__


FEW = [module_inside, forward_in_no_sync, pieces_of_the_module_inside, cut_wrapper]


@pytest.mark.parametrize("loops", [FEW, pytest.param(list(WRONG), marks=pytest.mark.slow)], ids=["few", "all"])
def test_wrong_loops_are_refused_on_every_rank(pool: RankPool, loops: list[Callable[[Loop], None]]) -> None:
    for results in pool.call(run, loops, {}):
        for function, said in zip(loops, results, strict=True):
            assert isinstance(said, str), f"{function.__name__} was not noticed"
            assert WRONG[function] in said, f"{function.__name__}: {said}"
            assert "in_pieces(" in said
            assert len(said) < 400


def average_by_hand(seat: Seat) -> dict[str, Tensor]:
    model = make_model(CASE)
    assert isinstance(model, Towers)
    images, texts, scale = model(*make_batch(CASE, seat.rank, 0))
    image_text_contrastive(images, texts, scale, group=dist.group.WORLD).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= RANKS
    return {name: p.grad for name, p in model.named_parameters()}


def test_averages_by_other_means_are_let_alone(pool: RankPool) -> None:
    for gradients in pool.call(average_by_hand):
        assert deviation([gradients], step_alone()) < 1e-12


def group_of(seat: Seat, size: Any) -> Any:
    try:
        group = make_group(size)
    except UserError as error:
        return str(error)
    if group is None:
        return None
    members = dist.get_process_group_ranks(group)
    if size < RANKS:
        dist.destroy_process_group(group)
    return members


def test_groups_are_of_neighbours(pool: RankPool) -> None:
    assert pool.call(group_of, 1) == [None] * RANKS
    assert pool.call(group_of, 2) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert pool.call(group_of, 4) == [[0, 1, 2, 3]] * RANKS
    for size in (0, 3, 8, True):
        said = f"group_size={size}: must divide the 4 rank(s); use one of 1, 2, 4"
        assert pool.call(group_of, size) == [said] * RANKS
