"""The contrastive operator as a torch citizen: registered properly, compiled, differentiated twice, misused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2_encoder.errors import UserError
from m2_encoder.objectives import image_text_contrastive
from m2_encoder.objectives.contrastive import contrastive_losses
from m2_encoder.objectives.contrastive_op import NO_GROUP, contrastive_backward, contrastive_forward
from tests.support.closeness import assert_close_in_ulps
from tests.support.plain_contrastive import rank_losses

ROWS, WIDTH = 6, 5


def unit_rows(count: int, *, seed: int = 0, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(rows, dim=1).to(dtype)


def make_inputs(
    *, rows: int = ROWS, captions: int = 1, scale: float = 10.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = (
        unit_rows(rows, seed=1, dtype=dtype),
        unit_rows(rows * captions, seed=2, dtype=dtype),
        torch.tensor(math.log(scale), dtype=torch.promote_types(dtype, torch.float32)),
    )
    return leaves[0].requires_grad_(), leaves[1].requires_grad_(), leaves[2].requires_grad_()


def reference(images: Tensor, texts: Tensor, scale: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients by the formula, in fp64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (images, texts, scale)]
    (loss,) = rank_losses([leaves[0]], [leaves[1]], leaves[2], **options)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def grads(loss: Tensor, *leaves: Tensor, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, **options))


def assert_all_close(ours: list[Tensor], expected: list[Tensor], *, rtol: float) -> None:
    """By the largest entry of each."""
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0, atol=rtol * float(theirs.abs().max()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck's own copies
class TestRegistration:
    """`opcheck`: schema, aliases, autograd registration, fake tensors with static and dynamic shapes."""

    @pytest.mark.parametrize("with_identity", [False, True])
    @pytest.mark.parametrize(("captions", "heads"), [(1, 1), (2, 2)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_forward(self, with_identity: bool, captions: int, heads: int, dtype: torch.dtype) -> None:
        args = self.arguments(with_identity=with_identity, captions=captions, heads=heads, dtype=dtype)
        results = torch.library.opcheck(contrastive_forward, args)
        assert set(results.values()) == {"SUCCESS"}, results

    @pytest.mark.parametrize("with_identity", [False, True])
    @pytest.mark.parametrize(("captions", "heads"), [(1, 1), (2, 2)])
    def test_backward(self, with_identity: bool, captions: int, heads: int) -> None:
        args = self.arguments(with_identity=with_identity, captions=captions, heads=heads, dtype=torch.float32)
        images, texts, scales, identity, *_ = (a.detach() if isinstance(a, Tensor) else a for a in args)
        _, _, *saved = contrastive_forward(images, texts, scales, identity, *args[4:])
        checked = torch.library.opcheck(
            contrastive_backward,
            (torch.ones(heads), images, texts, scales, identity, *saved, 0.1),
            test_utils=("test_schema", "test_faketensor"),
        )
        assert set(checked.values()) == {"SUCCESS"}, checked

    def arguments(self, *, with_identity: bool, captions: int, heads: int, dtype: torch.dtype) -> tuple[Any, ...]:
        images = torch.stack([unit_rows(ROWS, seed=s, dtype=dtype) for s in range(heads)], dim=1)
        texts = torch.stack([unit_rows(ROWS * captions, seed=9 + s, dtype=dtype) for s in range(heads)], dim=1)
        scales = torch.full((heads,), 2.0)
        leaves = (images.requires_grad_(), texts.requires_grad_(), scales.requires_grad_())
        return *leaves, torch.arange(ROWS) % 3 if with_identity else None, NO_GROUP, False, 0.1


class TestCompiled:
    @pytest.mark.parametrize(
        ("backend", "dynamic"),
        [("aot_eager", None), ("aot_eager", True), pytest.param("inductor", None, marks=pytest.mark.slow)],
    )
    def test_one_graph_with_the_same_loss_and_gradients(self, backend: str, dynamic: bool | None) -> None:
        @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
        def step(images: Tensor, texts: Tensor, scale: Tensor, identity: Tensor) -> Tensor:
            return 2 * image_text_contrastive(images, texts, scale - 0.1, identity=identity, label_smoothing=0.1)

        for rows in (ROWS, ROWS + 3):  # another shape compiles again, or is covered
            inputs, identity = make_inputs(rows=rows), torch.arange(rows) % 4
            loss = step(*inputs, identity)
            shifted = (*inputs[:2], inputs[2] - 0.1)
            expected, expected_grads = reference(*shifted, identity=[identity], smoothing=0.1)
            torch.testing.assert_close(loss.detach(), 2 * expected, rtol=1e-12, atol=0)
            assert_all_close(grads(loss, *inputs), [2 * grad for grad in expected_grads], rtol=1e-12)


class TestAutograd:
    def test_without_a_graph_the_loss_is_the_same(self) -> None:
        inputs = make_inputs()
        expected = image_text_contrastive(*inputs)
        with torch.no_grad():
            silent = image_text_contrastive(*inputs)
        with torch.inference_mode():
            inferred = image_text_contrastive(*inputs)
        assert expected.requires_grad
        assert not silent.requires_grad
        assert inferred.is_inference()
        assert silent.item() == inferred.item() == expected.item()

    def test_backward_again_gives_the_same_again(self) -> None:
        inputs = make_inputs()
        loss = image_text_contrastive(*inputs)
        once = grads(loss, *inputs, retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        for leaf, grad in zip(inputs, once, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, 2 * grad, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    def test_second_derivatives_are_refused(self) -> None:
        inputs = make_inputs()
        (first,) = grads(image_text_contrastive(*inputs), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="contrastive_backward"):
            first.square().sum().backward()

    @pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (0, 1)])
    def test_what_is_frozen_changes_no_other_gradient(self, frozen: tuple[int, ...]) -> None:
        """As with a locked image tower: the same gradients for what is left."""
        inputs = make_inputs()
        expected = grads(image_text_contrastive(*inputs), *inputs)
        leaves = [leaf.detach().requires_grad_(place not in frozen) for place, leaf in enumerate(inputs)]
        image_text_contrastive(*leaves).backward()
        for place, leaf in enumerate(leaves):
            if place in frozen:
                assert leaf.grad is None
            else:
                assert leaf.grad is not None
                assert_close_in_ulps(leaf.grad, expected[place])

    def test_each_head_has_its_own_gradient(self) -> None:
        """Losses of heads that are weighted apart: a weight reaches its head alone."""
        pairs = [make_inputs(), tuple(leaf.detach().flip(0).requires_grad_() for leaf in make_inputs()[:2])]
        scales = [torch.tensor(1.5, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)]
        losses = contrastive_losses([p[0] for p in pairs], [p[1] for p in pairs], scales).loss
        mixed = grads(3 * losses[0] - 5 * losses[1], pairs[0][0], pairs[1][0])
        for head, (weight, mine) in enumerate(zip((3, -5), mixed, strict=True)):
            _, theirs = reference(pairs[head][0], pairs[head][1], scales[head])
            assert_all_close([mine], [weight * theirs[0]], rtol=1e-12)

    def test_two_heads_are_the_mean_of_two_losses(self) -> None:
        one, two = make_inputs(), [leaf.detach().requires_grad_() for leaf in make_inputs()[:2]]
        other_scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        together = image_text_contrastive((one[0], two[1]), (one[1], two[0]), (one[2], other_scale))
        apart = image_text_contrastive(*one) / 2 + image_text_contrastive(two[1], two[0], other_scale) / 2
        leaves = (*one, *two, other_scale)
        assert_close_in_ulps(together, apart)
        assert_all_close(grads(together, *leaves), grads(apart, *leaves), rtol=1e-13)

    def test_inputs_are_left_alone_and_need_not_be_contiguous(self) -> None:
        images, texts, scale = make_inputs()
        before = [leaf.detach().clone() for leaf in (images, texts, scale)]
        loss = image_text_contrastive(images, texts, scale)
        expected = grads(loss, images, texts)
        for leaf, copy in zip((images, texts, scale), before, strict=True):
            assert torch.equal(leaf, copy)
        strided = [leaf.detach().t().contiguous().t().requires_grad_() for leaf in (images, texts)]
        assert not strided[0].is_contiguous()
        assert_all_close(grads(image_text_contrastive(*strided, scale), *strided), expected, rtol=1e-13)

    def test_a_scale_of_one_element_gets_a_gradient_of_its_shape(self) -> None:
        images, texts, _ = make_inputs()
        scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        (grad,) = grads(image_text_contrastive(images, texts, scale), scale)
        assert grad.shape == (1,)


class TestNumbers:
    @pytest.mark.parametrize("scale", [1.0, 69.0, 71.0, 100.0, 200.0, 1e4])
    @pytest.mark.parametrize("kind", ["random", "aligned", "opposed", "mixed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_no_scale_overflows(self, scale: float, kind: str, dtype: torch.dtype) -> None:
        """exp(89) is no fp32 number; opposed features have all logits far below the largest possible one."""
        images, texts, log_scale = make_inputs(rows=ROWS, scale=scale, dtype=dtype)
        if kind != "random":
            line = nn.functional.normalize(torch.ones(ROWS, WIDTH, dtype=dtype) + 0.01 * images.detach(), dim=1)
            sign = {"aligned": 1.0, "opposed": -1.0, "mixed": torch.tensor([1, -1, 1, 1, -1, -1]).to(dtype)[:, None]}
            images, texts = line.clone().requires_grad_(), (sign[kind] * line.flip(0)).requires_grad_()
        inputs = (images, texts, log_scale)
        loss = image_text_contrastive(*inputs)
        expected, expected_grads = reference(*inputs)
        # A logit is as exact as its products: rounding of the size s * eps is what probabilities can be trusted to.
        rtol = torch.finfo(dtype).eps * max(20.0, 4 * scale)
        torch.testing.assert_close(loss.detach().double(), expected, rtol=rtol, atol=rtol)
        for mine, theirs in zip(grads(loss, *inputs), expected_grads, strict=True):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=rtol * max(scale, float(theirs.abs().max())))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("rows", [5, 64])
    def test_half_precision_loses_nothing_beyond_its_inputs(self, dtype: torch.dtype, rows: int) -> None:
        inputs = make_inputs(rows=rows, captions=2, scale=50.0, dtype=dtype)
        loss = image_text_contrastive(*inputs, captions_per_image=2)
        expected, expected_grads = reference(*inputs)
        assert loss.dtype == torch.float32
        assert_close_in_ulps(loss, expected)
        given = grads(loss, *inputs)
        assert [grad.dtype for grad in given] == [dtype, dtype, torch.float32]
        assert_all_close(given[:2], expected_grads[:2], rtol=torch.finfo(dtype).eps)  # rounded once, at the end
        assert_all_close(given[2:], expected_grads[2:], rtol=2e-5)

    @pytest.mark.parametrize("where", ["images", "texts"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_features_that_are_not_finite_give_a_loss_that_is_not_finite(self, where: str, value: float) -> None:
        """Training counts and skips such steps; an exception on one rank would leave the others waiting."""
        images, texts, scale = (leaf.detach().clone() for leaf in make_inputs(dtype=torch.float32))
        {"images": images, "texts": texts}[where][2].fill_(value)
        leaves = [leaf.requires_grad_() for leaf in (images, texts, scale)]
        loss = image_text_contrastive(*leaves)
        assert not loss.isfinite()
        assert not all(grad.isfinite().all() for grad in grads(loss, *leaves))

    def test_rows_far_more_than_a_tile(self) -> None:
        """More rows than the sides of a tile, and no multiples of them; captions make the two sides differ."""
        inputs = make_inputs(rows=2051, captions=2, scale=30.0, dtype=torch.float32)
        identity = torch.arange(2051) % 1999
        options = {"identity": identity, "label_smoothing": 0.1, "captions_per_image": 2}
        loss = image_text_contrastive(*inputs, **options)
        expected, expected_grads = reference(*inputs, identity=[identity], smoothing=0.1)
        assert_close_in_ulps(loss, expected)
        assert_all_close(grads(loss, *inputs), expected_grads, rtol=1e-5)


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"images": [], "texts": [], "scale": []}, "0 image_features, 0 text_features and 0 logit_scale"),
            ({"scale": [torch.tensor(1.0)] * 2}, "1 image_features, 1 text_features and 2 logit_scale"),
            ({"images": [unit_rows(3), unit_rows(4)], "texts": [unit_rows(3)] * 2, "scale": [torch.tensor(1.0)] * 2},
             r"image_features of the heads are \(3, 5\) torch.float64 and \(4, 5\)"),
            ({"images": [unit_rows(3)] * 2, "texts": [unit_rows(3), unit_rows(3).float()],
              "scale": [torch.tensor(1.0)] * 2}, r"text_features of the heads .* torch.float32"),
            ({"scale": torch.ones(2)}, r"logit_scale is torch.float32 \(2,\)"),
            ({"scale": torch.tensor(3)}, "logit_scale is torch.int64"),
            ({"scale": 2.0}, "logit_scale is a float; it must be a tensor, or several in a list, one per head"),
            ({"images": unit_rows(3).numpy()}, "image_features is a ndarray; it must be a tensor"),
            ({"texts": [unit_rows(3).tolist()]}, "text_features holds a list; it must be a tensor"),
            ({"images": unit_rows(3).to(torch.float8_e4m3fn)}, "float8_e4m3fn and .* of 16 bits or more"),
            ({"images": torch.ones(3, 5, dtype=torch.int64)}, "features are torch.int64 and torch.float64"),
            ({"texts": torch.ones(3, 5, dtype=torch.bool)}, "they must be floating numbers"),
            ({"texts": unit_rows(3, width=4)}, r"\(3, 5\) and text_features \(3, 4\)"),
            ({"texts": unit_rows(3).to("meta")}, "text_features on meta; move one of them"),
            ({"captions_per_image": 0}, "k = captions_per_image = 0"),
            ({"captions_per_image": 2}, "k = captions_per_image = 2"),
            ({"identity": torch.zeros(3)}, r"identity is torch.float32 \(3,\), expected torch.int64"),
            ({"identity": torch.zeros(3, dtype=torch.int64, device="meta")}, "identity is on meta"),
            ({"label_smoothing": 1}, "label_smoothing=1 must be in"),
            ({"label_smoothing": math.nan}, "label_smoothing=nan must be in"),
            ({"group": "world"}, "group='world'"),
            ({"images": 2 * unit_rows(3), "debug": True}, "row 0 has norm 2"),
        ],
    )  # fmt: skip
    def test_messages(self, change: dict[str, Any], message: str) -> None:
        given: dict[str, Any] = {"images": unit_rows(3), "texts": unit_rows(3), "scale": torch.tensor(1.0), **change}
        with pytest.raises(UserError, match=message):
            image_text_contrastive(given.pop("images"), given.pop("texts"), given.pop("scale"), **given)

    def test_norms_are_checked_on_request_and_while_anomalies_are_hunted(self) -> None:
        images, texts, scale = (leaf.detach() for leaf in make_inputs())
        texts = texts.clone()
        texts[4] *= 1.05
        assert image_text_contrastive(images, texts, scale).isfinite()
        with pytest.raises(
            UserError, match=r"text_features must be L2-normalised, row 4 has norm 1.05; use .*normalize"
        ):
            image_text_contrastive(images, texts, scale, debug=True)
        with torch.autograd.set_detect_anomaly(True), pytest.raises(UserError, match="row 4"):
            image_text_contrastive(images, texts, scale)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_rounded_norms_pass_the_check(self, dtype: torch.dtype) -> None:
        images, texts = unit_rows(200, width=3, dtype=dtype), unit_rows(200, width=3, seed=5, dtype=dtype)
        assert image_text_contrastive(images, texts, torch.tensor(2.0), debug=True).isfinite()

    def test_a_row_of_nan_is_left_to_the_guard_of_training(self) -> None:
        images = unit_rows(4)
        images[2] = math.nan
        assert image_text_contrastive(images, unit_rows(4), torch.tensor(2.0), debug=True).isnan()
