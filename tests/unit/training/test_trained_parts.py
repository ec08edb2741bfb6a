"""What trains: every parameter that wants a gradient gets one, in whatever company, or DDP would wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS, PARTS
from m2_encoder.objectives.base import Objective
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.matching import Matching
from tests.support.models import small_config
from tests.support.objectives import Bench, build_bench, make_batch

BUILD: dict[str, Callable[[bool], Objective]] = {
    "itc": lambda text_expert: ImageTextContrastive(),
    "cmlm": lambda text_expert: MaskedLanguage(text_expert=text_expert),
    "cmim": lambda text_expert: MaskedImage(text_expert=text_expert),
    "attentive": lambda text_expert: MaskedImage(masking="attentive", mask_ratio=0.5, text_expert=text_expert),
    "captioning": lambda text_expert: Captioning(text_expert=text_expert),
    "itm": lambda text_expert: Matching(text_expert=text_expert),
}
MIXTURES = ("itc", "cmlm", "cmim", "attentive", "captioning", "itm", "itc cmlm", "itc cmim", "cmlm cmim", "cmim itm")


def build(mixture: str, *, text_expert: bool, layers: int) -> Bench:
    return build_bench(
        {name: BUILD[name](text_expert) for name in mixture.split()},
        config=small_config(num_layers=1, num_vl_layers=layers),
    )


def backward(module: Bench, names: Sequence[str]) -> None:
    """As a step in which all other objectives pause."""
    batch, objectives = make_batch(4, 2), module.trained_objectives()
    outputs = module._evaluate(batch, {name: objectives[name] for name in names})
    (torch.stack([output.loss for output in outputs.values()]).sum() + module._zero_of_paused(names)).backward()


def without_gradient(module: Bench) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("text_expert", [False, True])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_whatever_wants_a_gradient_gets_one(mixture: str, text_expert: bool, layers: int) -> None:
    module = build(mixture, text_expert=text_expert, layers=layers)
    backward(module, mixture.split())
    assert without_gradient(module) == []
    # And nothing is frozen for nothing: with everything trainable, the same parameters get a gradient.
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad(set_to_none=True)
    module.requires_grad_(True)
    backward(module, mixture.split())
    assert {name for name, p in module.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("text_expert", [False, True])
@pytest.mark.parametrize("pausing", ["itc", "cmlm", "cmim", "itm"])
def test_a_pause_leaves_no_parameter_without_a_gradient(pausing: str, text_expert: bool) -> None:
    module = build("itc cmlm cmim itm", text_expert=text_expert, layers=1)
    names = list(module.trained_objectives())
    for counting in ([name for name in names if name != pausing], [pausing]):
        module.zero_grad(set_to_none=True)
        backward(module, counting)
        assert without_gradient(module) == [], counting


class Operations(TorchDispatchMode):
    """Counts those of matrix products, recomputed ones included."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def count_operations(objectives: dict[str, Objective], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Of a first step, forward and backward; and what it logs."""
    module, logged = build_bench(objectives), list[str]()
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "log_dict", logged.extend)
    with Operations() as counted:
        module.training_step(make_batch(4, 2), 0).backward()
    return counted.total, logged


def test_what_does_not_count_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    later = {0: 0.0, 1: 0.0, 2: 1.0}
    alone, names = count_operations({"itc": ImageTextContrastive()}, monkeypatch)
    beside: dict[str, Objective] = {
        "cmlm": MaskedLanguage(weight=0),
        "cmim": MaskedImage(schedule=later),
        "attentive": MaskedImage(masking="attentive", mask_ratio=0.5, schedule=later),
        "captioning": Captioning(decoder="own", schedule=later),
        "itm": Matching(schedule=later),
    }
    assert count_operations({"itc": ImageTextContrastive(), **beside}, monkeypatch) == (alone, names)
    for name, objective in beside.items():
        objective.weight, objective.schedule = 1.0, None
        with_it, _ = count_operations({"itc": ImageTextContrastive(), name: objective}, monkeypatch)
        assert with_it > 1.1 * alone, name


def test_the_features_depend_on_no_optional_part() -> None:
    model = M2Encoder(small_config())
    batch = make_batch(2, 1)
    features = torch.cat([model.encode_image(batch.images.float()), model.encode_text(batch.text)])
    (features.sum() * model.logit_scale).backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    optional = {id(p) for p in model.part_parameters(OPTIONAL_PARTS)}
    assert unused == {name for name, p in model.named_parameters() if id(p) in optional}
    assert all(model.part_parameters([part]) for part in PARTS), "a pattern that matches nothing"
