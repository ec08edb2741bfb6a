"""The balance of routers and the size of their logits, against plain loops over samples and tokens."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from m2_encoder.models.mixture import RouterOutput
from m2_encoder.models.parallelize import checkpoint_layers
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.routing import BalancedRouting, _measure
from m2_encoder.training.adaptations.mixture import Upcycling
from tests.support.objectives import build_bench, make_batch, take_numbers

close = torch.testing.assert_close


def plain(logits: Tensor, lengths: list[int], top_k: int) -> tuple[list[Tensor], list[Tensor]]:
    """Balance and z of each sample of one layer; logits (b, N, C)."""
    copies, balances, sizes = logits.shape[-1], [], []
    for rows, length in zip(logits, lengths, strict=True):
        passed, chances, z = [0] * copies, [torch.zeros((), dtype=logits.dtype)] * copies, 0.0
        for row in rows[:length]:
            powers = [each.exp() for each in row]
            for copy in row.topk(top_k).indices.tolist():
                passed[copy] += 1
            chances = [chance + power / sum(powers) for chance, power in zip(chances, powers, strict=True)]
            z = z + torch.log(torch.stack(powers).sum()) ** 2 / length
        shares = [copies * count / (top_k * length) for count in passed]
        balances.append(sum((f * p / length for f, p in zip(shares, chances, strict=True)), torch.zeros(())))
        sizes.append(torch.as_tensor(z))
    return balances, sizes


def test_values_and_gradients_of_every_layer() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = [
        torch.randn(3, 6, 4, generator=generator, dtype=torch.float64).requires_grad_(),
        torch.randn(3, 6, 4, generator=generator, dtype=torch.float64).requires_grad_(),
    ]
    lengths = [6, 1, 4]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    found = _measure([RouterOutput(each, each.topk(2).indices) for each in logits], mask)
    assert found is not None
    expected = [plain(each, lengths, 2) for each in logits]
    close(found.balance, torch.stack([a + b for a, b in zip(expected[0][0], expected[1][0], strict=True)]))
    close(found.z, torch.stack([a + b for a, b in zip(expected[0][1], expected[1][1], strict=True)]))
    close(found.shares.sum(dim=1), torch.full((3,), 2.0, dtype=torch.float64))
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    own = torch.autograd.grad(((found.balance + 0.1 * found.z) * weights).sum(), logits)
    total = sum(w * (b + 0.1 * z) for each in expected for w, b, z in zip(weights, *each, strict=True))
    assert isinstance(total, Tensor)
    close(own, torch.autograd.grad(total, logits))


def test_an_even_router_has_balance_one() -> None:
    chosen = torch.tensor([[0, 1], [2, 3]])[None]
    found = _measure([RouterOutput(torch.zeros(1, 2, 4), chosen)], torch.ones(1, 2, dtype=torch.bool))
    assert found is not None
    assert float(found.balance) == 1
    assert math.isclose(float(found.z), math.log(4) ** 2, rel_tol=1e-6)
    assert found.shares.tolist() == [[0.25] * 4]


def test_layers_and_pieces_that_run_again_have_the_same_gradients() -> None:
    batch, found = make_batch(4, 2), []
    for pieces, again in ((1, False), (1, True), (2, True)):
        objectives = {"itc": ImageTextContrastive(), "routing": BalancedRouting()}
        module = build_bench(objectives, adaptation=Upcycling(copies=3), micro_batches=pieces)
        if again:
            checkpoint_layers(module.model.train())
        found.append(take_numbers(module, batch))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            np.testing.assert_allclose(other[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_loss_is_the_mean_over_captions_and_layers_and_padding_is_no_token() -> None:
    module = build_bench(
        {"itc": ImageTextContrastive(), "routing": BalancedRouting()}, adaptation=Upcycling(copies=3), micro_batches=2
    )
    batch = make_batch(4, 2)
    said: dict[str, list[Tensor]] = {"image": [], "text": []}
    (layer,) = module.model.backbone.layers
    for kind, expert in (("image", layer.vision_expert), ("text", layer.text_expert)):
        expert.mixture.register_forward_pre_hook(lambda own, inputs, kind=kind: said[kind].append((own, inputs[0])))
    with torch.no_grad():
        for row in range(4):
            module.model.encode_image_backbone(batch.images[row : row + 1])
        for row, (ids, mask) in enumerate(zip(*batch.text, strict=True)):
            module.model.encode_text_backbone(type(batch.text)(ids[None, mask], mask[None, mask]))
            assert row < 8
    terms = {
        kind: [
            sum((value[0] + 0.1 * size[0]) for value, size in [plain(x @ own.router.weight.t(), [x.shape[1]], 2)])
            for own, x in each
        ]
        for kind, each in said.items()
    }
    expected = [(terms["image"][number // 2] + terms["text"][number]) / 2 for number in range(8)]
    output = module.evaluate(batch)["routing"]
    close(output.per_sample, torch.stack(expected).detach())
    close(output.loss, torch.stack(expected).mean())
