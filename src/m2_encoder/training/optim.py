"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import torch
from annotated_types import Ge, Gt, Le, Len, Lt
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from m2_encoder.bounds import Count, Example, Fraction, Index, NotNegative, check_bounds
from m2_encoder.errors import UserError
from m2_encoder.training.layer_rates import rate_ratios
from m2_encoder.training.muon import MuonWithAdamW

OptimizerFactory = Callable[[nn.Module], Optimizer]
SchedulerFactory = Callable[[Optimizer], LambdaLR]

_SCALES = ("logit_scale", "logit_vl_scale", "logit_bias")
_NO_DECAY_SUFFIXES = ("bias", "positions.weight", "cls_token", "mask_token", *_SCALES)


LearningRate: TypeAlias = Annotated[float, Gt(0), Le(10), Example("1e-3")]
Betas: TypeAlias = Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)]
Epsilon: TypeAlias = Annotated[float, Ge(1e-16), Le(1)]
Ratio: TypeAlias = Annotated[float, Gt(0), Le(1000)]
LayerDecay: TypeAlias = Annotated[float, Gt(0), Le(1)]


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and convolutions, not to norms, biases, positions, cls or scales."""
    return parameter.ndim >= 2 and not name.endswith(_NO_DECAY_SUFFIXES)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix inside a transformer layer: not an embedding, a head or a convolution."""
    return parameter.ndim == 2 and ".layers." in name


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    logit_scale_lr_ratio: float = 1.0,
    ratio: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters: with decay, without, and the scales and bias of logits.

    A group has `params`, `lr`, `weight_decay`, the parameters' `names` (for `key_by_name`) and its own `name`; and
    `lr_ratio` where that is not 1, as `ratio` says of a parameter's name. Those of one name go from the highest down.
    """
    kinds = {"decayed": (lr, weight_decay), "plain": (lr, 0.0), "scales": (lr * logit_scale_lr_ratio, 0.0)}
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            kind = "scales" if name.endswith(_SCALES) else "decayed" if is_decayed(name, parameter) else "plain"
            group = groups.setdefault((kind, ratio(name)), {"params": [], "names": []})
            group["params"].append(parameter)
            group["names"].append(name)
    made = []
    for (kind, own), group in sorted(groups.items(), key=lambda item: ([*kinds].index(item[0][0]), -item[0][1])):
        rate, decay = kinds[kind]
        scaled = {} if own == 1 else {"lr_ratio": own}
        made.append({**group, "lr": rate * own, "weight_decay": decay, "name": kind, **scaled})
    return made


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Learning rates of the next step, by the names of the groups; `group_0` and so on where they have none.

    Of groups with one name, as `layer_decay` makes them, it is the highest; the lowest is `<name>_lowest`.
    """
    found: dict[str, list[float]] = {}
    for index, group in enumerate(optimizer.param_groups):
        found.setdefault(str(group.get("name") or f"group_{index}"), []).append(float(group["lr"]))
    rates = {name: max(each) for name, each in found.items()}
    return rates | {f"{name}_lowest": min(each) for name, each in found.items() if len(each) > 1}


def main_learning_rate(optimizer: Optimizer) -> float:
    """That of `optimizer.lr` times the schedule; of an optimizer without our groups, that of its first one."""
    groups = optimizer.param_groups
    own = sorted((each for each in groups if each.get("name") in ("decayed", "plain")), key=lambda each: each["name"])
    whole = next((each for each in own if "lr_ratio" not in each), (own or groups)[0])
    return float(whole["lr"]) / float(whole.get("lr_ratio", 1.0))


def name_groups(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state whose groups have the names of the optimizer's; checkpoints of earlier versions do not know them."""
    groups = state.get("param_groups", [])
    named = [{"name": own["name"], **group} for own, group in zip(optimizer.param_groups, groups, strict=False)]
    return {**state, "param_groups": [*named, *groups[len(named) :]]}


@check_bounds
def build_optimizer(
    module: nn.Module,
    *,
    lr: LearningRate,
    betas: Betas = (0.9, 0.98),
    eps: Epsilon = 1e-6,
    weight_decay: NotNegative = 0.2,
    logit_scale_lr_ratio: Ratio = 1.0,
    layer_decay: LayerDecay = 1.0,
    image_lr_ratio: Ratio = 1.0,
    text_lr_ratio: Ratio = 1.0,
) -> AdamW:
    """AdamW with the groups of `parameter_groups`.

    Args:
        module: its parameters with `requires_grad` are trained.
        lr: peak learning rate; the scheduler multiplies it.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, on matrices and convolutions only (`is_decayed`).
        logit_scale_lr_ratio: learning rate of the logit scales, and of the bias of `SigmoidContrastive`, over `lr`.
            Short runs need more than 1: at usual rates a scale moves by less than 0.1 in a hundred steps.
        layer_decay: learning rate of each layer over that of the one above it, from the heads (`lr`) down to the
            embeddings; 1 for none. See `rate_ratios`.
        image_lr_ratio: learning rate of the image tower over what it would be otherwise.
        text_lr_ratio: that of the text tower.

    Reference: AdamW (arXiv:1711.05101); values of CLIP (arXiv:2103.00020), Table 19-20.
    """
    named = list(module.named_parameters())
    ratio = rate_ratios(
        (name for name, _ in named),
        layer_decay=layer_decay,
        image_lr_ratio=image_lr_ratio,
        text_lr_ratio=text_lr_ratio,
    )
    groups = parameter_groups(
        named, lr=lr, weight_decay=weight_decay, logit_scale_lr_ratio=logit_scale_lr_ratio, ratio=ratio
    )
    if not groups:
        raise UserError("no parameter wants a gradient; there is nothing to train")
    first, second = betas
    optimizer = AdamW(groups, lr=lr, betas=(first, second), eps=eps)
    optimizer.register_load_state_dict_pre_hook(name_groups)
    return optimizer


def key_by_name(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict` with parameters by name instead of by number, as FSDP saves it.

    Numbers follow the optimizer's groups, while FSDP would read them as places among the module's parameters. Any
    optimizer with the groups of `parameter_groups` loads the result. A state that is empty, by name already, or without
    names in its groups is returned as it is.
    """
    groups = state.get("param_groups", [])
    if not groups or any(group["params"] == group.get("names", group["params"]) for group in groups):
        return state
    names = {key: name for group in groups for key, name in zip(group["params"], group["names"], strict=True)}
    return {
        **state,
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [{**group, "params": list(group["names"])} for group in groups],
    }


def fill_state(state: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state by name, with an initial state for parameters that never had a gradient.

    Parameters of an objective that has paused since the start have no state, which FSDP refuses to load. The state of
    AdamW, and of torch's other optimizers but Adagrad, Rprop and ASGD, starts from zeros.

    Args:
        state: of `key_by_name`. Without any parameter's state, or not by name, it stays as it is.
        weights: the parameters by name, shaped (and sharded) as the state is.
    """
    own: dict[str, dict[str, Any]] = state.get("state", {})
    missing = [name for group in state.get("param_groups", []) for name in group["params"] if name not in own]
    if not own or not missing or not all(isinstance(name, str) for name in missing):
        return state
    example = max(own, key=lambda name: weights[name].ndim > 0)  # a scalar's moments look like a count
    filled = {
        name: {
            key: torch.zeros_like(weights[name] if value.shape == weights[example].shape else value)
            for key, value in own[example].items()
        }
        for name in missing
    }
    return {**state, "state": {**own, **filled}}


@check_bounds
def build_muon(
    module: nn.Module,
    *,
    lr: LearningRate,
    matrix_lr: LearningRate,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95,
    betas: Betas = (0.9, 0.98),
    eps: Epsilon = 1e-6,
    weight_decay: NotNegative = 0.2,
    logit_scale_lr_ratio: Ratio = 1.0,
    layer_decay: LayerDecay = 1.0,
    image_lr_ratio: Ratio = 1.0,
    text_lr_ratio: Ratio = 1.0,
) -> MuonWithAdamW:
    """Muon for the matrices inside the layers, AdamW as in `build_optimizer` for everything else.

    Args:
        module: its parameters with `requires_grad` are trained.
        lr: peak learning rate of AdamW's parameters; the scheduler multiplies it.
        matrix_lr: peak learning rate of Muon's matrices (`is_hidden_matrix`).
        momentum: Muon's.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: decoupled decay, on Muon's matrices and on AdamW's (`is_decayed`).
        logit_scale_lr_ratio: as in `build_optimizer`.
        layer_decay: as in `build_optimizer`, of `matrix_lr`, too.
        image_lr_ratio: as in `build_optimizer`, of `matrix_lr`, too.
        text_lr_ratio: as in `build_optimizer`, of `matrix_lr`, too.
    """
    ratio = rate_ratios(
        (name for name, _ in module.named_parameters()),
        layer_decay=layer_decay,
        image_lr_ratio=image_lr_ratio,
        text_lr_ratio=text_lr_ratio,
    )
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    hidden = [(name, parameter) for name, parameter in named if is_hidden_matrix(name, parameter)]
    others = [(name, parameter) for name, parameter in named if not is_hidden_matrix(name, parameter)]
    adamw = parameter_groups(
        others, lr=lr, weight_decay=weight_decay, logit_scale_lr_ratio=logit_scale_lr_ratio, ratio=ratio
    )
    if not hidden or not adamw:
        raise UserError("Muon needs trainable matrices inside layers and other parameters; use optimizer=adamw")
    first, second = betas
    matrices = parameter_groups(hidden, lr=matrix_lr, weight_decay=weight_decay, ratio=ratio)
    return MuonWithAdamW(
        muon=[{**group, "name": "matrices"} for group in matrices],
        adamw=adamw,
        betas=(first, second),
        eps=eps,
        momentum=momentum,
    )


def follow_schedule(scheduler: object) -> None:
    """Give a restored optimizer the learning rates that a schedule by steps has for the next step.

    A checkpoint holds those of the schedule that it was saved with. Without a change they are the same numbers.
    """
    if isinstance(scheduler, LambdaLR):
        rates = [
            base * factor(scheduler.last_epoch)
            for factor, base in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@check_bounds
def warmup_cosine(
    optimizer: Optimizer, *, warmup_steps: Index, max_steps: Count, min_lr_ratio: Fraction = 0.0
) -> LambdaLR:
    """Linear warm-up to the peak, then half a cosine to `min_lr_ratio` of it at `max_steps`.

    Args:
        optimizer: its learning rates are the peaks.
        warmup_steps: steps until the peak; step t (from 0) of the warm-up runs at (t + 1) / warmup_steps of it.
        max_steps: step at which the cosine ends.
        min_lr_ratio: learning rate at the end over the peak, 0..1.

    Reference: SGDR (arXiv:1608.03983), one cycle.
    """
    if warmup_steps > max_steps:
        raise UserError(f"must be in 0..max_steps={max_steps}", key="warmup_steps", value=warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


@check_bounds
def warmup_constant(optimizer: Optimizer, *, warmup_steps: Index) -> LambdaLR:
    """Linear warm-up to the peak, which then stays."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))
