"""Small parts that adaptations add to the layers of a trained backbone; a plain model has none.

Letters: P prompts · W width of an adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.mixture import Mixture
from m2_encoder.models.multiway import MultiwayEncoder, TransformerExpert

PROMPT_STD = 0.02
"""Of prompts at the start; keys and values are made of their norm, so it decides only how far a step turns them."""


class Prompts(nn.Module):
    """Learned inputs of a layer's attention, for each modality: keys and values of every token, but no tokens.

    The expert of their modality projects them as it projects tokens. An attention whose sequence holds both modalities
    sees the prompts of both. As deep prompts whose own output each layer drops, they leave lengths, positions and masks
    of a sequence as they are.

    Reference: deep prompts are those of VPT (arXiv:2203.12119), in both towers those of MaPLe (arXiv:2210.03117).
    """

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.vision = nn.Parameter(torch.empty(config.num_prompts, config.embed_dim))
        self.text = nn.Parameter(torch.empty(config.num_prompts, config.embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all prompts anew."""
        nn.init.normal_(self.vision, std=PROMPT_STD)
        nn.init.normal_(self.text, std=PROMPT_STD)

    def forward(self, *, of_text: bool) -> Tensor:
        """Prompts of one modality, (P, D)."""
        return self.text if of_text else self.vision


class Adapter(nn.Module):
    """D to W, GELU, W to D, beside the states themselves; at the start it changes nothing.

    Reference: arXiv:1902.00751.
    """

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.embed_dim, config.adapter_width)
        self.up = nn.Linear(config.adapter_width, config.embed_dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def reset_parameters(self) -> None:
        """As at the start."""
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to (B, T, D)."""
        return self.up(functional.gelu(self.down(x)))


class LanguageAdapters(nn.Module):
    """An adapter per language behind a layer, for the text tokens.

    Both see every text, and one of them counts: so shapes do not depend on the languages of a batch, and every
    parameter has a gradient in every step.

    Reference: language adapters of MAD-X (arXiv:2005.00052).
    """

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.en, self.zh = Adapter(config), Adapter(config)  # as `types.LANGUAGES` names them

    def forward(self, x: Tensor, is_chinese: Tensor) -> Tensor:
        """(B, T, D) after the adapter of each text's language; `is_chinese` is broadcastable to (B, T, 1), bool."""
        return x + torch.where(is_chinese, self.zh(x), self.en(x))


def add_prompts(backbone: MultiwayEncoder, config: M2EncoderConfig) -> None:
    """Give the first `prompt_layers` layers of a backbone their prompts."""
    for layer in backbone.layers[: config.prompt_layers]:
        layer.prompts = Prompts(config)


def add_adapters(backbone: MultiwayEncoder, config: M2EncoderConfig) -> None:
    """Give every layer of a backbone its adapters, if the configuration has any."""
    for layer in backbone.layers if config.adapter_width else ():
        layer.adapters = LanguageAdapters(config)


def add_mixtures(backbone: MultiwayEncoder, config: M2EncoderConfig) -> list[TransformerExpert]:
    """Make mixtures of the feed-forward networks of the last layers of a backbone; the experts that have them now."""
    counts = {"vision_expert": config.mixture_vision_layers, "text_expert": config.mixture_text_layers}
    layers = backbone.layers
    experts = [getattr(layer, name) for name, count in counts.items() for layer in layers[len(layers) - count :]]
    for expert in experts:
        expert.mixture = Mixture(expert, config)
    return experts


def reset_added_parts(model: nn.Module) -> None:
    """Initialise all of them anew, after everything else; no piece is Chinese then."""
    for module in model.modules():
        if isinstance(module, Prompts | Adapter):
            module.reset_parameters()
        if isinstance(module, TransformerExpert) and module.mixture is not None:
            module.mixture.reset(module)
    for table in model.buffers():
        table.zero_()
