"""Preparation of a model for training on one or many devices: activation checkpointing, then sharding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.multiway import MultiwayEncoder, MultiwayLayer
from m2_encoder.models.two_towers import Encoder, TwoTowers

_ENTRY_POINTS: Final = (
    "encode_image",
    "encode_text",
    "encode_image_heads",
    "encode_text_heads",
    "forward_image",
    "forward_text",
    "forward_fusion",
    "encode_image_backbone",
    "encode_text_backbone",
    "finish_image",
    "finish_text",
    "finish_patches",
    "fuse",
    "token_losses",
)
"""Methods called from outside; FSDP2 gathers weights for `forward` only, unless others are registered."""


def checkpoint_layers(model: Encoder) -> None:
    """Keep only the input of every layer, and run the layer again in backward, its random numbers replayed."""
    for module in model.modules():
        if isinstance(module, MultiwayEncoder):
            module.recompute_layers = True


def compile_layers(model: M2Encoder) -> None:
    """Compile every layer, before it is sharded; names of parameters stay, and what is read from outside a layer does.

    Layers draw the random numbers of stochastic depth as eager ones do, so that a layer or piece that is run again in
    backward drops the same (inductor's own numbers differ from graph to graph).
    """
    for module in model.modules():
        if isinstance(module, MultiwayLayer):
            module.compile(options={"fallback_random": True})


def shard_model(
    model: Encoder,
    *,
    mesh: DeviceMesh,
    reshard_after_forward: bool = True,
    layer_dtype: torch.dtype | None = None,
) -> None:
    """Split the weights over the ranks of a mesh with FSDP2: every layer alone, the rest with the model itself.

    Somebody else's model has no layers that are known: all of its weights are gathered at a time. All ranks start from
    the weights of the first. Parameters of one number (logit scales) cannot be split:
    they stay whole, and the strategy averages their gradients (`distributed.gradients.average_over_ranks`).

    Args:
        model: whole, on any device; its parts move to the mesh's. Frozen parameters must be frozen already.
        mesh: one axis, all ranks that share the weights.
        reshard_after_forward: free a layer's gathered weights between forward and backward; False keeps them, which
            saves a gather per layer.
        layer_dtype: dtype in which layers are gathered and multiplied, with gradients still summed in fp32; None for
            that of the parameters. Embeddings and heads, a few per cent of a large model, keep theirs.
    """
    policy = MixedPrecisionPolicy()
    if layer_dtype is not None:
        # The residual stream keeps its precision, as under autocast on one device.
        policy = MixedPrecisionPolicy(param_dtype=layer_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, MultiwayLayer):
            _equalize(module, mesh)
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
            register_fsdp_forward_method(module, "read")
    _equalize(model, mesh)
    scalars = {parameter for parameter in model.parameters() if parameter.numel() == 1}
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=scalars)
    for name in (name for name in _ENTRY_POINTS if hasattr(model, name)):
        register_fsdp_forward_method(model, name)


def gather_model(model: Encoder, build: Callable[[], Encoder] | None = None) -> Encoder | None:
    """The whole model on the first rank; collective over the ranks that share the weights.

    Args:
        model: sharded or not.
        build: makes a model with the parameters of this one, whose values do not count; None for a plain one.

    Returns:
        The model itself if it is whole. Otherwise a whole copy on the CPU on the first rank, None on the others.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    whole = _build_again(model) if build is None else build()
    whole.load_state_dict(state, assign=True)
    return whole


def _build_again(model: Encoder) -> Encoder:
    if isinstance(model, TwoTowers):
        return model.build_again()
    with torch.device("meta"):
        return M2Encoder(model.config)


@torch.no_grad()
def _equalize(module: nn.Module, mesh: DeviceMesh) -> None:
    """Move the parameters of a module that are not sharded yet to the mesh's device, and broadcast the first rank's."""
    device = torch.device(mesh.device_type)
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
            dist.broadcast(parameter.data, group_src=0, group=mesh.get_group())
