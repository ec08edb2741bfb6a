"""A model in pieces is the same model, with one gradient for all of its rows."""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from m2_encoder.distributed.groups import make_group
from m2_encoder.errors import UserError
from m2_encoder.objectives import image_text_contrastive, in_pieces


class Output(NamedTuple):
    features: dict[str, Tensor]
    scale: Tensor
    name: str


class Model(nn.Module):
    """Takes and gives what models take and give: keywords, numbers, nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.drop = nn.Dropout(0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.double()
        self.sizes: list[int] = []

    def forward(self, images: Tensor, *, texts: Tensor, factor: float = 1.0) -> Output:
        self.sizes.append(len(images))
        image, text = (nn.functional.normalize(self.drop(self.layer(factor * side))) for side in (images, texts))
        return Output({"image": image, "text": text}, self.logit_scale * 1, "towers")


def _rows(count: int = 8, captions: int = 1) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(n, 6, dtype=torch.float64) for n in (count, captions * count))  # type: ignore[return-value]


def _gradients(model: Model, images: Tensor, texts: Tensor, captions: int = 1) -> dict[str, Any]:
    torch.manual_seed(1)
    output = model(images, texts=texts, factor=2.0)
    loss = image_text_contrastive(
        output.features["image"], output.features["text"], output.scale, captions_per_image=captions
    )
    loss.backward()
    return {"drawn": torch.rand(()), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("captions", [1, 2])
def test_gradients_are_those_of_all_rows_at_once(captions: int) -> None:
    model = Model()
    model.drop.p = 0.0
    rows = _rows(captions=captions)
    expected = _gradients(copy.deepcopy(model), *rows, captions)
    found = _gradients(in_pieces(model, 4), *rows, captions)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)
    assert model.sizes == [2] * 8  # each piece twice


def test_random_numbers_are_those_of_pieces_that_are_kept() -> None:
    rows, model = _rows(), Model()
    expected = _gradients(in_pieces(copy.deepcopy(model), 4, recompute=False), *rows)
    found = _gradients(in_pieces(model, 4), *rows)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)


def test_all_else_stays_as_it_is() -> None:
    model = Model()
    before = inspect.signature(model.forward)
    names = list(model.state_dict())
    assert in_pieces(model, 4) is model
    assert inspect.signature(model.forward) == before
    assert list(model.state_dict()) == names
    output = model(_rows()[0], texts=_rows()[1])
    assert (output.name, tuple(output.scale.shape), output.features["image"].shape) == ("towers", (), (8, 5))
    model.sizes.clear()
    with torch.no_grad():
        model(_rows(3)[0], texts=_rows(3)[1])
    assert model.sizes == [3]
    other = copy.deepcopy(model)
    other(_rows()[0], texts=_rows()[1])
    assert (other.sizes, model.sizes) == ([3, 2, 2, 2, 2], [3])


def test_another_call_sets_another_number() -> None:
    model = in_pieces(in_pieces(Model(), 4), 2)
    model(_rows()[0], texts=_rows()[1])
    assert model.sizes == [4, 4]
    in_pieces(model, 1)(_rows()[0], texts=_rows()[1])
    assert model.sizes == [4, 4, 8]


@pytest.mark.parametrize("rows", [(6, 8), (8, 6), (0, 0), (2, 2)])
def test_rows_that_cannot_be_cut_are_refused(rows: tuple[int, int]) -> None:
    images, texts = (torch.ones(count, 6, dtype=torch.float64) for count in rows)
    with pytest.raises(UserError, match=rf"cannot cut tensors of {rows[0]}, {rows[1]} rows into 4 equal pieces"):
        in_pieces(Model(), 4)(images, texts=texts)
    with pytest.raises(UserError, match="cannot cut no tensor with rows"):
        in_pieces(Model(), 4)("a", texts="b")


@pytest.mark.parametrize("number", [0, -1, 2.0, True, None, "4"])
def test_no_number_of_pieces(number: Any) -> None:
    with pytest.raises(UserError, match=r"^micro_batches=.*: must be a whole number, 1 or more"):
        in_pieces(Model(), number)


def test_groups_without_processes() -> None:
    assert make_group(1) is None
    with pytest.raises(UserError, match=r"^group_size=2: must divide the 1 rank.*call torch.distributed.init_process"):
        make_group(2)
