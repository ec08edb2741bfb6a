"""Notices gradients that DistributedDataParallel (DDP) does not average over ranks, which it does not say itself.

DDP averages the gradients of a backward pass if its own forward has announced that pass. Where features come from the
module inside it, from a forward in `no_sync()`, or from pieces that are recomputed on their own, every rank would step
by its own gradient, which is 100 % off and more.

Which DDP holds a parameter is known to the DDP alone, so that all of them are looked for, once for each parameter that
is met at the end of a graph. What a reducer did shows in the times at which it saw gradients.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Final, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from m2_encoder.errors import UserError

_Wrappers: TypeAlias = tuple["weakref.ref[DistributedDataParallel]", ...]

_OF_PARAMETER: Final = WeakIdKeyDictionary()
_WRAPPERS: Final = weakref.WeakSet[DistributedDataParallel]()
"""Wrappers of the parameters that were met, and all that were seen: what looking for them again would find."""

_ADVICE: Final = (
    "call the DistributedDataParallel module itself; for micro-batches "
    "use DistributedDataParallel(m2_encoder.objectives.in_pieces(model, k))"
)


def expect_averages(loss: Tensor, inputs: Sequence[Tensor]) -> None:
    """Let the backward pass of a loss end with an error if a DDP leaves gradients behind it as they are.

    Nothing happens without a DDP around the parameters (FSDP2, or averages by other means), in `no_sync()` that lasts
    until the end of backward, and in `torch.autograd.grad`. Sends nothing and waits for nothing.

    Args:
        loss: of features of this rank, before `backward`.
        inputs: what it was computed from: features and scale.

    Raises:
        UserError: from `loss.backward()`, which has then gone through.
    """
    if not loss.requires_grad or not _has_ranks():
        return
    for leaf in _find_parameters(inputs):
        if wrappers := _find_wrappers(leaf):
            loss.register_hook(partial(_watch, leaf, wrappers))


def refuse_outside_wrapper(tensors: Sequence[Tensor]) -> None:
    """Refuse pieces that were computed outside of the forward of the DDP around their parameters.

    Raises:
        UserError: if they were.
    """
    if not _has_ranks():
        return
    for leaf in _find_parameters(tensors):
        if _is_outside(_find_wrappers(leaf)) and _is_outside(_find_again(leaf)):
            raise UserError(
                "pieces are encoded and recomputed outside of the forward of DistributedDataParallel, which would not "
                f"average their gradients over ranks: {_ADVICE}"
            )


def _is_outside(wrappers: _Wrappers) -> bool:
    """Whether there are wrappers, but the forward of none of them is what runs now."""
    active = DistributedDataParallel._get_active_ddp_module()
    return bool(wrappers) and not any(wrapper is active for ref in wrappers if (wrapper := ref()) is not None)


def _has_ranks() -> bool:
    if torch.compiler.is_compiling():
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _find_parameters(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A parameter behind each tensor, once."""
    return list({id(leaf): leaf for leaf in map(_find_parameter, tensors) if leaf is not None}.values())


def _find_parameter(tensor: Tensor) -> Tensor | None:
    """A parameter from which a tensor was computed."""
    if tensor.grad_fn is None:
        return tensor if tensor.requires_grad and isinstance(tensor, nn.Parameter) else None
    nodes, seen = [tensor.grad_fn], {tensor.grad_fn}
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None) if type(node).__name__ == "AccumulateGrad" else None
        if isinstance(leaf, nn.Parameter):
            return leaf
        found = [follower for follower, _ in node.next_functions if follower is not None and follower not in seen]
        seen.update(found)
        nodes += found
    return None


def _find_wrappers(parameter: Tensor) -> _Wrappers:
    """The DDPs that average the gradient of a parameter."""
    if parameter not in _OF_PARAMETER:
        active = DistributedDataParallel._get_active_ddp_module()
        near = [*_WRAPPERS, *([] if active is None else [active])]
        found = {wrapper for wrapper in near if _holds(wrapper, parameter)}
        _OF_PARAMETER[parameter] = tuple(map(weakref.ref, found)) if found else _look_for(parameter)
        _WRAPPERS.update(found)
    wrappers: _Wrappers = _OF_PARAMETER[parameter]
    return wrappers


def _find_again(parameter: Tensor) -> _Wrappers:
    """The same without those that are garbage, and with any that have come since."""
    gc.collect()
    return _look_for(parameter)


def _look_for(parameter: Tensor) -> _Wrappers:
    """The same among all objects of the process, in about 0.1 s."""
    kinds = _subclasses(DistributedDataParallel)  # and type(), because isinstance() may run code of stand-ins
    found = [each for each in gc.get_objects() if type(each) in kinds]
    _WRAPPERS.update(found)
    wrappers: _Wrappers = tuple(weakref.ref(wrapper) for wrapper in found if _holds(wrapper, parameter))
    _OF_PARAMETER[parameter] = wrappers
    return wrappers


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_subclasses, kind.__subclasses__()))


def _holds(wrapper: DistributedDataParallel, parameter: Tensor) -> bool:
    # What torch.compile makes of the reducer does not show in its times.
    if not hasattr(wrapper, "reducer") or getattr(wrapper, "_use_python_reducer", False):
        return False
    names = wrapper.module.named_parameters()
    return any(each is parameter and name not in wrapper.parameters_to_ignore for name, each in names)


def _watch(leaf: Tensor, wrappers: _Wrappers, grad: Tensor) -> None:
    """At the start of backward: look again at its end."""
    before = leaf.grad, None if leaf.grad is None else leaf.grad._version
    times = {ref: wrapper.reducer.get_backward_stats() for ref in wrappers if (wrapper := ref()) is not None}
    torch.autograd.Variable._execution_engine.queue_callback(partial(_check, leaf, before, times))


def _check(
    leaf: Tensor,
    before: tuple[Tensor | None, int | None],
    times: dict[weakref.ref[DistributedDataParallel], list[int]],
) -> None:
    grad, version = before
    if leaf.grad is None or (leaf.grad is grad and leaf.grad._version == version):
        return  # nothing was accumulated: torch.autograd.grad
    if any(_averages(wrapper, past) for ref, past in times.items() if (wrapper := ref()) is not None):
        return
    left = _find_again(leaf)
    if left and times.keys() >= set(left):
        raise UserError(
            "gradients were not averaged over ranks: features or scale come from the module inside "
            f"DistributedDataParallel, or from its forward in no_sync() that ended before backward; {_ADVICE}"
        )


def _averages(wrapper: DistributedDataParallel, past: list[int]) -> bool:
    """Whether it has seen gradients since, as the times of its reducer tell, or is not meant to."""
    is_first = wrapper.static_graph and wrapper._static_graph_delay_allreduce_enqueued and not any(past)
    return is_first or not wrapper.require_backward_grad_sync or wrapper.reducer.get_backward_stats() != past
