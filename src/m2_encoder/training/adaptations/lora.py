"""Low-rank updates of frozen matrices inside the layers.

Letters: D_in, D_out width of input and output of a matrix · r rank.

Reference: LoRA (arXiv:2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.bounds import FAR, Index, Text, check_bounds
from m2_encoder.checkpoints.peft_files import LoraAdapter, check_base, digest_base, read_adapter
from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.multiway import MultiwayLayer
from m2_encoder.training.adaptation import Adaptation

SCALES: Final = ("logit_scale", "logit_vl_scale")


class LoraLinear(nn.Linear):
    """W x + b + scale * B A x, of which A and B are trained; W and b keep their names.

    Args:
        base: of W, (D_out, D_in), and b.
        rank: r; A, (r, D_in), is random, B, (D_out, r), zero.
        scale: alpha / r.
        dropout: probability to drop a number of A's input, in training.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty((rank, base.in_features)))
        self.lora_B = nn.Parameter(base.weight.new_zeros((base.out_features, rank)))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """(…, D_in) to (…, D_out)."""
        low = functional.linear(functional.dropout(x, self.dropout, self.training), self.lora_A)
        return functional.linear(x, self.weight, self.bias) + functional.linear(low * self.scale, self.lora_B)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain layer with W + scale * B A; the matrix is changed in place."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features)
        plain.weight, plain.bias = self.weight, self.bias
        plain.weight += self.scale * (self.lora_B @ self.lora_A)
        return plain.train(self.training)


class Lora(Adaptation):
    """Trains low-rank updates of chosen matrices; all of the model is frozen but for what `also` names.

    At the start B is 0, so the model is the base. On export the updates are merged; `m2-export to=[peft]` keeps them
    apart.

    Args:
        rank: r; 0 adds nothing.
        alpha: updates are multiplied by alpha / r.
        dropout: of the updates' inputs, in training.
        encoders: `backbone`, `vl_encoder`.
        experts: `vision_expert`, `text_expert`. In the vision-language encoder the vision experts serve texts, too.
        modules: matrices of an expert.
        first_layer: the first layer with updates, counted from 0 through the backbone, then on through the
            vision-language encoder. Layers below it are not passed backward, which saves time and memory.
        also: what is trained as a whole: `logit_scale`, `projections` (to features), `norms` (of the encoders). The
            temperature alone by default: one number, which follows the number of negatives of the new batches and moves
            no feature, so that an adapter is complete without it.
        start: folder of an adapter to go on from, ours or peft's; it must be of the same base, rank and modules.

    Raises:
        UserError: for what does not exist; in `apply`, if the rank exceeds the width, or nothing is left to train.
    """

    fixed: ClassVar[tuple[str, ...]] = ("alpha",)

    @check_bounds
    def __init__(
        self,
        rank: Annotated[int, Ge(0), Le(2**16), FAR] = 8,
        alpha: Annotated[float, Gt(0), Le(10**6), FAR] = 16.0,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        encoders: Annotated[Sequence[Literal["backbone", "vl_encoder"]], MinLen(1)] = ("backbone", "vl_encoder"),
        experts: Annotated[Sequence[Literal["vision_expert", "text_expert"]], MinLen(1)] = (
            "vision_expert",
            "text_expert",
        ),
        modules: Annotated[Sequence[Literal["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]], MinLen(1)] = (
            *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ),
        first_layer: Index = 0,
        also: Sequence[Literal["logit_scale", "projections", "norms"]] = ("logit_scale",),
        start: Text | None = None,
    ) -> None:
        self._rank, self._alpha, self._dropout = rank, alpha, dropout
        self._encoders, self._experts, self._modules = encoders, experts, modules
        self._first_layer, self._also, self._start = first_layer, also, start
        self._begun: LoraAdapter | None = None
        if rank == 0 and not also:
            raise UserError(
                "must be above 0 where nothing else is trained; or name something in also", key="rank", value=0
            )
        if rank == 0 and start is not None:
            raise UserError("must be that of the adapter in start", key="rank", value=0)

    def begin(self, weights: Mapping[str, Tensor] | None) -> None:
        """Read the adapter of `start`."""
        if self._start is None:
            return
        if weights is None:
            rule = "belongs to trained weights, and this run starts from random ones; give model.weights"
            raise UserError(rule, key="start", value=self._start)
        try:
            self._begun = read_adapter(Path(self._start).expanduser())
            check_base(weights, self._begun)
        except UserError as error:
            raise UserError(error.text, key="start", value=self._start) from error
        found = self._begun
        if (found.rank, found.alpha) != (self._rank, self._alpha):
            rule = f"has rank {found.rank} and alpha {found.alpha:g}; use rank={found.rank} alpha={found.alpha:g}"
            raise UserError(rule, key="start", value=self._start)

    def apply(self, model: M2Encoder) -> None:
        """Freeze the model and put updates beside the chosen matrices."""
        self._check(model)
        model.requires_grad_(False)
        chosen = list(self._choose(model))
        for parent, attribute, _ in chosen if self._rank else ():
            base = getattr(parent, attribute)
            updated = LoraLinear(base, rank=self._rank, scale=self._alpha / self._rank, dropout=self._dropout)
            setattr(parent, attribute, updated.train(base.training))
        for name, parameter in model.named_parameters():
            if any(_is_part(name, word) for word in self._also):
                parameter.requires_grad_(True)
        if self._begun is not None and model.logit_scale.device.type != "meta":
            self._fill(model, self._begun)
            self._begun = None

    def merge(self, model: M2Encoder) -> M2Encoder:
        """Add the updates to their matrices."""
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLinear):
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, module.merge())
        return model

    def take_adapter(self, model: M2Encoder) -> LoraAdapter:
        """What was trained, apart from the base; of a whole, adapted model that is not merged.

        Raises:
            UserError: for rank 0, which adds nothing.
        """
        if self._rank == 0:
            raise UserError("adds nothing that could be kept apart; export the model itself", key="rank", value=0)
        updated = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
        state = model.state_dict()
        whole = [name for name in state if name not in SCALES and any(_is_part(name, word) for word in self._also)]
        apart = {f"{name}.{matrix}" for name in updated for matrix in ("lora_A", "lora_B")}
        base = {name: value for name, value in state.items() if name not in apart}
        return LoraAdapter(
            rank=self._rank,
            alpha=self._alpha,
            dropout=self._dropout,
            pairs={name: (module.lora_A.detach(), module.lora_B.detach()) for name, module in updated.items()},
            whole={name: state[name] for name in whole},
            scales={name: float(state[name]) for name in SCALES} if "logit_scale" in self._also else {},
            base=digest_base(base, without=whole),
        )

    def _check(self, model: M2Encoder) -> None:
        config = model.config
        if self._rank > config.embed_dim:
            rule = f"must be at most {config.embed_dim}, the width of the model: more adds nothing to a matrix"
            raise UserError(rule, key="rank", value=self._rank)
        if not any(True for _ in self._choose(model)):
            last = config.num_layers + config.num_vl_layers - 1
            rule = f"must be at most {last if 'vl_encoder' in self._encoders else config.num_layers - 1}"
            raise UserError(
                f"{rule}, the last layer of {self._encoders[-1]}", key="first_layer", value=self._first_layer
            )

    def _choose(self, model: M2Encoder) -> Iterator[tuple[nn.Module, str, str]]:
        """Parent, attribute and name of every chosen matrix."""
        start = 0
        for encoder in ("backbone", "vl_encoder"):
            layers = getattr(model, encoder).layers
            for number, layer in enumerate(layers):
                assert isinstance(layer, MultiwayLayer)
                if encoder in self._encoders and start + number >= self._first_layer:
                    for expert in self._experts:
                        for module in self._modules:
                            yield getattr(layer, expert), module, f"{encoder}.layers.{number}.{expert}.{module}"
            start += len(layers)

    @torch.no_grad()
    def _fill(self, model: M2Encoder, adapter: LoraAdapter) -> None:
        """Values of an adapter; its modules must be those of this run."""
        wanted = {name for _, _, name in self._choose(model)}
        if differing := sorted(wanted ^ adapter.pairs.keys()):
            where = "is only in the adapter" if differing[0] in adapter.pairs else "is not in the adapter"
            rule = f"{differing[0]} {where}; use its encoders, experts, modules and first_layer"
            raise UserError(rule, key="adaptation.start", value=self._start)
        parameters = dict(model.named_parameters())
        for name, (down, up) in adapter.pairs.items():
            parameters[f"{name}.lora_A"].copy_(down)
            parameters[f"{name}.lora_B"].copy_(up)
        for name, value in adapter.whole.items():
            parameters[name].copy_(value)
        for name, number in adapter.scales.items():
            parameters[name].fill_(number)


def _is_part(name: str, word: str) -> bool:
    """Whether a parameter belongs to what `also` calls by a word."""
    if word == "logit_scale":
        return name in SCALES
    if word == "projections":
        return name.split(".")[0] in ("image_proj", "text_proj", "vl_image_proj", "vl_text_proj")
    return name.startswith(("backbone.", "vl_encoder.")) and (name.split(".")[-2].endswith("norm") or ".norm." in name)
