"""What a run changes about the model before it trains it, and how a plain model comes out again.

To add one, such as LoRA or a locked tower: write a subclass of `Adaptation`, in any module that Python can import, and
a YAML file in `conf/adaptation/` (or a folder given with `--config-dir`) that names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from m2_encoder.errors import UserError

if TYPE_CHECKING:  # checking a configuration loads no model
    from m2_encoder.models.config import M2EncoderConfig
    from m2_encoder.models.m2_encoder import M2Encoder


class Adaptation(ABC):
    """Changes a model before its training, and takes the change back for evaluation and export.

    Both methods also run on a model on `meta`, whose tensors have no values: before a start, to see that they fit, and
    to find the names and shapes of a checkpoint's parameters.
    """

    @abstractmethod
    def apply(self, model: M2Encoder) -> None:
        """Freeze, replace or add parameters, in place.

        Called once per process, with the initial weights, before weights are split or replicated and before the
        optimizer is made. Parameters without `requires_grad` are neither trained nor decayed. Each trainable one needs
        a gradient in every step; new ones have to be equal on all ranks, as the seed makes them.
        """

    @abstractmethod
    def merge(self, model: M2Encoder) -> M2Encoder:
        """A plain model that computes what this one computes; may be the same object, changed in place.

        Called without gradients, on a whole model, before the final evaluation and the export.
        """


class Full(Adaptation):
    """Trains every parameter that an objective reaches, and changes nothing."""

    def apply(self, model: M2Encoder) -> None:
        """Nothing."""

    def merge(self, model: M2Encoder) -> M2Encoder:
        """The model itself."""
        return model


@torch.no_grad()
def merge_adaptation(adaptation: Adaptation, model: M2Encoder) -> M2Encoder:
    """The plain model behind an adapted one.

    Raises:
        UserError: if `merge` gives a model with other parameters than a plain one has.
    """
    from m2_encoder.models.m2_encoder import M2Encoder

    merged = adaptation.merge(model)
    with torch.device("meta"):
        plain = M2Encoder(model.config)
    wanted, found = ({name: p.shape for name, p in each.state_dict().items()} for each in (plain, merged))
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        rule = f"`merge` must give back a plain model; it differs in {wrong[0]}{more}"
        raise UserError(rule, key="adaptation", value=type(adaptation).__name__)
    return merged


def check_adaptation(adaptation: Adaptation, config: M2EncoderConfig) -> None:
    """Try both methods on `meta`, before anything is trained.

    Raises:
        UserError: if it does not fit the model, or `merge` gives no plain model.
    """
    from m2_encoder.models.m2_encoder import M2Encoder

    with torch.device("meta"):
        model = M2Encoder(config)
        adaptation.apply(model)
        merge_adaptation(adaptation, model)
