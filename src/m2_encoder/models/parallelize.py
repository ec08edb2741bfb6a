"""How a model is prepared for training on one or many devices, in one place: checkpointing, then sharding.

The order matters: what a layer does in backward (run again) is decided before its weights are taken apart.
"""

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
"""Methods that outsiders call; FSDP2 watches `forward` alone unless it is told of them."""


def checkpoint_layers(model: M2Encoder) -> None:
    """Keep only the input of every layer, and run the layer again in backward, its random numbers replayed."""
    for module in model.modules():
        if isinstance(module, MultiwayEncoder):
            module.recompute_layers = True


def shard_model(
    model: M2Encoder,
    *,
    mesh: DeviceMesh,
    reshard_after_forward: bool = True,
    layer_dtype: torch.dtype | None = None,
) -> None:
    """Split the weights over the ranks of a mesh with FSDP2: every layer alone, the rest with the model itself.

    All ranks start from the weights of the first. Parameters without dimensions (the two logit scales) cannot be
    split: they stay whole, and whoever trains averages their gradient (`distributed.gradients.average_over_ranks`).

    Args:
        model: whole, on any device; its parts move to the mesh's. Frozen parameters must be frozen already.
        mesh: one axis, all ranks that share the weights.
        reshard_after_forward: free a layer's gathered weights between forward and backward; False keeps them, which
            saves a gather per layer.
        layer_dtype: layers are gathered and multiplied in it, gradients are still summed in fp32; None keeps the
            parameters' own. Embeddings and heads, a few per cent of a large model, are gathered as they are.
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
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward, ignored_params=scalars)
    for name in _ENTRY_POINTS:
        register_fsdp_forward_method(model, name)


def gather_model(model: M2Encoder, prepare: Callable[[M2Encoder], None] | None = None) -> M2Encoder | None:
    """The whole model on the first rank; a collective, so all ranks that share the weights must call it.

    Args:
        model: sharded or not.
        prepare: gives a plain model the parameters of this one, where it has others.

    Returns:
        The model itself if it is whole. Else, on the first rank a whole copy on the CPU, on the others None.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    with torch.device("meta"):
        whole = M2Encoder(model.config)
        if prepare is not None:
            prepare(whole)
    whole.load_state_dict(state, assign=True)
    return whole


@torch.no_grad()
def _equalize(module: nn.Module, mesh: DeviceMesh) -> None:
    """Give all ranks the first one's weights of a module, as far as they are not split yet, on the mesh's device."""
    device = torch.device(mesh.device_type)
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
            dist.broadcast(parameter.data, group_src=0, group=mesh.get_group())
