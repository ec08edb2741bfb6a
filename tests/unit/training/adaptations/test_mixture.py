"""Mixtures begin as the base, train what they say, and fit what they are given to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m2_encoder.errors import UserError
from m2_encoder.models import mixture
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.multiway import TransformerExpert
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.routing import BalancedRouting
from m2_encoder.training.adaptation import check_adaptation, merge_adaptation
from m2_encoder.training.adaptations.mixture import Upcycling
from m2_encoder.training.optim import build_optimizer
from tests.support.added_parts import MIXTURE_FIELDS, adapted_config
from tests.support.models import random_images, random_model, random_text, small_config
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


@torch.no_grad()
def test_training_begins_as_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit where all copies see all tokens; a product with fewer rows may round its sums otherwise."""
    model = random_model(tiny_config())
    images, text = random_images(model.config, 37), random_text(model.config, [9, 3, 1, 6, 12])
    before = torch.cat([model.encode_image(images), model.encode_text(text)])
    Upcycling(copies=4, top_k=3).apply(model)
    after = torch.cat([model.encode_image(images), model.encode_text(text)])
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    monkeypatch.setattr(mixture, "_run_chosen", mixture._run_all)
    assert torch.cat([model.encode_image(images), model.encode_text(text)]).equal(before)


def test_only_copies_routers_and_temperature_move(emoji_folder: Path, tmp_path: Path) -> None:
    adaptation = Upcycling(copies=3, vision_layers=0, text_layers=1)
    module = make_module(
        adaptation=adaptation,
        objectives={"itc": ImageTextContrastive(), "routing": BalancedRouting()},
        optimizer=lambda each: build_optimizer(each, lr=1e-2, weight_decay=0.5),
        max_steps=3,
    )
    module.configure_model()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(module, make_datamodule(emoji_folder, max_steps=3))
    moved = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    last = f"backbone.layers.{len(module.model.backbone.layers) - 1}.text_expert"
    networks = [last, *(f"{last}.mixture.copies.{number}" for number in range(2))]
    parts = [f"{part}.{kind}" for part in ("fc1", "ffn_inner_norm", "fc2") for kind in ("weight", "bias")]
    assert moved == {
        *(f"{network}.{part}" for network in networks for part in parts),
        *(f"{last}.mixture.router.weight", "logit_scale"),
    }
    logged = trainer.logged_metrics
    assert logged["train/balance/routing"] >= 0.9
    shares = [float(logged[f"train/text_share_{number}/routing"]) for number in range(3)]
    assert sum(shares) == pytest.approx(1)
    assert "train/image_share_0/routing" not in logged

    model = module.model
    assert isinstance(model, M2Encoder)
    merged = merge_adaptation(adaptation, model.eval())
    plain = M2Encoder(merged.config).eval()
    plain.load_state_dict(merged.state_dict())
    text = random_text(merged.config, [7, 3])
    assert plain.encode_text(text).equal(merged.encode_text(text))


def test_what_is_trained_is_counted_before_a_start() -> None:
    with torch.device("meta"):
        model = M2Encoder(small_config())
        Upcycling(copies=5, vision_layers=1).apply(model)
    network = 16 * 64 + 64 + 64 * 2 + 64 * 16 + 16
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 + 3 * (5 * network + 5 * 16)
    assert [[e.mixture is not None for e in _experts(layer)] for layer in model.backbone.layers] == [
        [False, True],
        [True, True],
    ]
    with torch.device("meta"):
        whole = M2Encoder(small_config())
        Upcycling(whole=True).apply(whole)
    assert all(p.requires_grad for p in whole.parameters())


def _experts(layer: torch.nn.Module) -> list[TransformerExpert]:
    return [layer.get_submodule(name) for name in ("vision_expert", "text_expert")]  # type: ignore[misc]


def test_what_does_not_fit_is_refused_before_a_start() -> None:
    with pytest.raises(UserError, match=r"adaptation\.vision_layers=3: must not exceed 2, the layers of the backbone"):
        check_adaptation(Upcycling(vision_layers=3), small_config())
    with pytest.raises(UserError, match=r"adaptation\.copies=4: would replace the mixtures"):
        check_adaptation(Upcycling(), adapted_config())
    with pytest.raises(UserError, match=r"top_k=5: must be at most copies=4"):
        Upcycling(top_k=5)
    with pytest.raises(UserError, match=r"top_k=1: must be"):
        Upcycling(top_k=1)
    with pytest.raises(UserError, match=r"vision_layers=0: must be above 0, or text_layers"):
        Upcycling(vision_layers=0, text_layers=0)
    check_adaptation(Upcycling(), adapted_config(**dict.fromkeys(MIXTURE_FIELDS, 0)))  # beside prompts and adapters
