"""Adaptations, such as LoRA or a locked tower: they change a model before training, and merge the change afterwards.

To add one, subclass `Adaptation` in any module that Python can import, and name the class in a YAML file in
`conf/adaptation/` (or in a folder given with `--config-dir`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from m2_encoder.errors import UserError, under

if TYPE_CHECKING:  # checking a configuration loads no model
    from m2_encoder.models.config import M2EncoderConfig
    from m2_encoder.models.m2_encoder import M2Encoder
    from m2_encoder.models.two_towers import Encoder
    from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

Model = TypeVar("Model", bound="Encoder")


class Adaptation(ABC):
    """Changes a model before training, and merges the change for evaluation and export.

    `apply` and `merge` also run on a model on `meta`, whose tensors have no values: to check them before a start, and
    to find the names and shapes of a checkpoint's parameters.

    Attributes:
        fixed: arguments that a run may not change when it goes on, though its checkpoint would fit.
    """

    fixed: ClassVar[tuple[str, ...]] = ()

    def prepare(self, tokenizer: SentencePieceTokenizer) -> None:  # noqa: B027 (most need nothing)
        """Take what depends on the tokenizer, and read files; called once, before `apply`.

        Raises:
            UserError: with the argument as its key, for a file that cannot be used.
        """

    def begin(self, weights: Mapping[str, Tensor] | None) -> None:  # noqa: B027 (most need nothing)
        """Read what training starts from beside the weights; called once, before `apply`, by what trains alone.

        Args:
            weights: parameters of the plain model by name; None for random ones.

        Raises:
            UserError: with the argument as its key, for what does not belong to these weights.
        """

    @abstractmethod
    def apply(self, model: M2Encoder) -> None:
        """Freeze, replace or add parameters, in place.

        Called once per process, on the initial weights, before they are sharded or replicated and before the optimizer
        is made. Parameters without `requires_grad` are neither trained nor decayed; every other one must get a gradient
        in every step. New parameters must be equal on all ranks; torch's seeded generator makes them so.
        """

    def after_step(self, model: M2Encoder, optimizer: Optimizer) -> None:  # noqa: B027 (most need nothing)
        """Change the model further, after each step of the optimizer, whose groups still have that step's rates.

        Parameters may be shards (`DTensor`). Those without a gradient were skipped by the optimizer.
        """

    @abstractmethod
    def merge(self, model: M2Encoder) -> M2Encoder:
        """Return a plain model with the same outputs; may be the same object, changed in place.

        Plain is what `M2Encoder(model.config)` builds. Where an adaptation adds parts that the architecture knows, it
        says so in `model.config`, which may differ from that of the run. Called without gradients, on a whole (not
        sharded) model, before the final evaluation and the export.
        """


class Full(Adaptation):
    """Changes nothing: every parameter that an objective reaches is trained."""

    def apply(self, model: M2Encoder) -> None:
        """Do nothing."""

    def merge(self, model: M2Encoder) -> M2Encoder:
        """Return the model itself."""
        return model


@torch.no_grad()
def merge_adaptation(adaptation: Adaptation, model: Model) -> Model:
    """`Adaptation.merge`, checked.

    Raises:
        UserError: if the merged model has other parameters than a plain one.
    """
    from m2_encoder.models.m2_encoder import M2Encoder
    from m2_encoder.models.two_towers import TwoTowers

    merged: Any = adaptation.merge(model)  # type: ignore[arg-type]  # which says itself what it fits
    plain: torch.nn.Module
    if isinstance(model, TwoTowers):
        plain = model.build_again()
    else:
        with torch.device("meta"):
            plain = M2Encoder(merged.config)
    wanted, found = ({name: p.shape for name, p in each.state_dict().items()} for each in (plain, merged))
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        rule = f"`merge` must give back a plain model; it differs in {wrong[0]}{more}"
        raise UserError(rule, key="adaptation", value=type(adaptation).__name__)
    return cast("Model", merged)


def check_adaptation(adaptation: Adaptation, config: M2EncoderConfig) -> None:
    """Run both methods on a model on `meta`, to find their errors before a start.

    Raises:
        UserError: if the adaptation does not fit the model, or `merge` returns no plain model.
    """
    from m2_encoder.models.m2_encoder import M2Encoder

    with torch.device("meta"):
        model = M2Encoder(config)
        with under("adaptation"):
            adaptation.apply(model)
        merge_adaptation(adaptation, model)
