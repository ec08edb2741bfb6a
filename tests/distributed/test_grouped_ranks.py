"""Real gloo ranks: groups hold the right ranks, and split weights get the gradients of one process that is whole."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from m2_encoder.distributed.gradients import average_over_ranks, clip_gradients, whole_tensor
from m2_encoder.distributed.topology import GroupTopology
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import checkpoint_layers, gather_model, shard_model
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS
from m2_encoder.objectives.contrastive import image_text_contrastive
from m2_encoder.strategies.groups import ContrastiveGroups
from m2_encoder.training.non_finite import NonFiniteGuard
from m2_encoder.types import TextTokens
from tests.support.ranks import run_ranks
from tests.support.training import tiny_config

ROWS = 4  # per rank
TOKENS = 9
TOLERANCE = 1e-12  # fp64, relative to the largest gradient
MAX_NORM = 0.05


def groups_of(rank: int) -> dict[str, Any]:
    """What four ranks on two nodes see for every way of naming groups."""
    seen: dict[str, Any] = {}
    for name, wanted in {
        "world": {"group_size": None, "group_nodes": None},
        "4": {"group_size": 4, "group_nodes": None},
        "2": {"group_size": 2, "group_nodes": None},
        "1": {"group_size": 1, "group_nodes": None},
        "one node": {"group_size": None, "group_nodes": 1},
    }.items():
        groups = ContrastiveGroups(**wanted)
        with pytest.raises(RuntimeError, match="only after the strategy has set up"):
            _ = groups.group
        groups.create(ranks_per_node=2, timeout=timedelta(seconds=60))
        total = torch.tensor(10**rank)
        if groups.group is None:
            seen[name] = [rank]
        else:
            dist.all_reduce(total, group=groups.group)  # of the members alone
            seen[name] = dist.get_process_group_ranks(groups.group)
        assert int(total) == sum(10**member for member in seen[name])
        assert list(groups.topology.members(groups.topology.group_index(rank))) == seen[name]
        groups.destroy()
        with pytest.raises(RuntimeError, match="only after"):
            _ = groups.topology
    return seen


def test_every_rank_is_in_the_right_group(tmp_path: Path) -> None:
    for rank, seen in enumerate(run_ranks(groups_of, 4, folder=tmp_path)):
        pair = [0, 1] if rank < 2 else [2, 3]
        assert seen == {"world": [0, 1, 2, 3], "4": [0, 1, 2, 3], "2": pair, "1": [rank], "one node": pair}


def make_model(*, seed: int, drop_path_rate: float = 0.0) -> M2Encoder:
    torch.manual_seed(seed)
    model = M2Encoder(tiny_config(num_layers=2, drop_path_rate=drop_path_rate)).double().train()
    model.freeze_parts(OPTIONAL_PARTS)
    return model


def make_rows(ranks: int) -> tuple[Tensor, TextTokens]:
    """Rows of all ranks; texts of several lengths, so that they are packed."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(ranks * ROWS, 3, 16, 16, generator=generator, dtype=torch.float64)
    ids = torch.randint(5, 100, (ranks * ROWS, TOKENS), generator=generator)
    lengths = torch.randint(3, TOKENS + 1, (ranks * ROWS, 1), generator=generator)
    return images, TextTokens(ids, torch.arange(TOKENS) < lengths)


def backward(
    model: M2Encoder,
    images: Tensor,
    text: TextTokens,
    *,
    group: dist.ProcessGroup | None,
    pieces: int = 1,
    recompute: bool = False,
) -> None:
    """One loss over pieces that are encoded one after the other, as training does it."""
    encode_image, encode_text = model.encode_image, model.encode_text
    if recompute:
        encode_image = partial(checkpoint, model.encode_image, use_reentrant=False)
        encode_text = partial(checkpoint, model.encode_text, use_reentrant=False)
    image_features = torch.cat([encode_image(piece) for piece in images.chunk(pieces)])
    texts = zip(text.ids.chunk(pieces), text.mask.chunk(pieces), strict=True)
    text_features = torch.cat([encode_text(TextTokens(*piece)) for piece in texts])
    image_text_contrastive(image_features, text_features, model.logit_scale, group=group).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def reference(world_size: int, group_size: int) -> dict[str, Tensor]:
    """Gradients of one process: the mean over groups of the loss of all rows of a group."""
    model = make_model(seed=0)
    images, text = make_rows(world_size)
    for members in GroupTopology(world_size, group_size).groups():
        rows = slice(members.start * ROWS, members.stop * ROWS)
        backward(model, images[rows], TextTokens(text.ids[rows], text.mask[rows]), group=None)
    return {name: gradient * group_size / world_size for name, gradient in gradients(model).items()}


def split(model: M2Encoder, world_size: int, *, reshard: bool = True) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("data_parallel",))
    shard_model(model, mesh=mesh, reshard_after_forward=reshard)
    average_over_ranks([p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)], None)


def largest_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 1e-3, "gradients near 0 would prove nothing"
    return max(float((ours[name] - expected[name]).abs().max()) for name in expected) / scale


# Ranks, ranks per group, pieces, whether pieces and layers are encoded again, whether gathered weights are kept.
SPLIT = [
    (2, 1, 1, False, False, False),
    (2, 2, 2, True, False, False),
    (2, 2, 2, True, True, True),
    (2, 1, 4, False, True, False),
    (4, 2, 2, True, False, False),
    (4, 4, 1, False, True, True),
]


def compare_split(rank: int, world_size: int) -> list[float]:
    """Differences to one process, two steps of each case: the second could differ."""
    images, text = make_rows(world_size)
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    own = images[rows], TextTokens(text.ids[rows], text.mask[rows])
    differences = []
    for ranks, group_size, pieces, recompute, layers, keep in SPLIT:
        if ranks != world_size:
            continue
        groups = ContrastiveGroups(group_size=group_size, group_nodes=None)
        groups.create(ranks_per_node=world_size, timeout=None)
        model = make_model(seed=rank)  # the first rank's weights count
        if layers:
            checkpoint_layers(model)
        split(model, world_size, reshard=not keep)
        expected = reference(world_size, group_size)
        for _ in range(2):
            model.zero_grad()
            backward(model, *own, group=groups.group, pieces=pieces, recompute=recompute)
            differences.append(largest_difference(gradients(model), expected))
        groups.destroy()
    return differences


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_of_split_weights_equal_one_process(world_size: int, tmp_path: Path) -> None:
    cases = [case for case in SPLIT if case[0] == world_size]
    for differences in run_ranks(compare_split, world_size, world_size, folder=tmp_path):
        assert len(differences) == 2 * len(cases)
        for case, step in zip(cases, zip(differences[::2], differences[1::2], strict=True), strict=True):
            assert max(step) < TOLERANCE, (case, step)


def repeat_with_noise(rank: int) -> None:
    """Stochastic depth: a piece that is encoded again must drop what it dropped."""
    images, text = make_rows(2)
    found = []
    for recompute, layers in product((False, True), repeat=2):
        model = make_model(seed=0, drop_path_rate=0.5)
        if layers:
            checkpoint_layers(model)
        split(model, 2)
        torch.manual_seed(100 + rank)
        backward(model, images, text, group=None, pieces=2, recompute=recompute)
        found.append(gradients(model))
    for other in found[1:]:
        assert largest_difference(other, found[0]) < TOLERANCE
    assert largest_difference(reference(2, 2), found[0]) > 1e-3, "nothing was dropped"


def test_what_is_encoded_again_drops_the_same_branches(tmp_path: Path) -> None:
    run_ranks(repeat_with_noise, 2, folder=tmp_path)


def clip_and_gather(rank: int) -> dict[str, Any]:
    """Clipping, the diagnosis of a bad gradient, and the whole model from split weights."""
    images, text = make_rows(2)
    model = make_model(seed=rank)
    split(model, 2)
    backward(model, images, text, group=None)
    assert isinstance(model.text_proj.weight, DTensor)
    norm = clip_gradients(model.parameters(), MAX_NORM)
    again = clip_gradients(model.parameters())
    clipped = {name: gradient.clone().numpy() for name, gradient in gradients(model).items()}

    if rank == 1:
        bias = model.vl_encoder.norm.vision_expert.bias.grad
        assert isinstance(bias, DTensor)
        bias.to_local().fill_(torch.nan)  # the first rank's part stays finite
    guard = NonFiniteGuard(max_in_a_row=2)
    skipped = guard.observe(clip_gradients(model.parameters()), step=1, losses={}, parameters=model.named_parameters())

    whole = gather_model(model)
    weights = None if whole is None else {name: value.numpy() for name, value in whole.state_dict().items()}
    return {"norm": float(norm), "again": float(again), "clipped": clipped, "skipped": skipped, "weights": weights}


def test_clipping_diagnosis_and_gathering(tmp_path: Path) -> None:
    results = run_ranks(clip_and_gather, 2, folder=tmp_path)
    model = make_model(seed=0)
    images, text = make_rows(2)
    backward(model, images, text, group=None)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = float(nn.utils.clip_grad_norm_(parameters, MAX_NORM))
    assert norm > 2 * MAX_NORM, "nothing would be clipped"
    for result in results:
        assert result["norm"] == pytest.approx(norm, rel=1e-12)
        assert result["again"] == pytest.approx(MAX_NORM, rel=1e-4)
        clipped = {name: torch.from_numpy(gradient) for name, gradient in result["clipped"].items()}
        assert largest_difference(clipped, gradients(model)) < 1e-9
        assert result["skipped"]
    assert results[1]["weights"] is None
    for name, value in model.state_dict().items():
        assert torch.equal(torch.from_numpy(results[0]["weights"][name]), value), name


def test_a_whole_model_is_its_own_gathering() -> None:
    model = make_model(seed=0)
    assert gather_model(model) is model
