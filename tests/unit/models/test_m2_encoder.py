"""What users of the model may rely on: shapes, invariances, threads, and clear errors for wrong input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from m2_encoder import M2Encoder, UserError
from m2_encoder.types import TextTokens
from tests.support.closeness import assert_close_in_ulps
from tests.support.models import random_images, random_model, random_text, small_config

CONFIG = small_config()


@pytest.fixture
def model() -> M2Encoder:
    return random_model(CONFIG).requires_grad_(False)


# ------------------------------------------------------------------------------------------------ invariances


def test_features_are_unit_vectors(model: M2Encoder) -> None:
    for features in (
        model.encode_image(random_images(CONFIG, 3)),
        model.encode_text(random_text(CONFIG, [4, 1, 9])),
    ):
        assert features.shape == (3, CONFIG.feature_dim)
        assert_close_in_ulps(features.norm(dim=-1), torch.ones(3))


def test_padding_does_not_change_features(model: M2Encoder) -> None:
    ids, mask = random_text(CONFIG, [4, 1, 9])
    padded = TextTokens(
        torch.cat([ids, torch.full((3, 5), 7)], dim=1), torch.cat([mask, torch.zeros(3, 5).bool()], dim=1)
    )
    assert torch.equal(model.encode_text(padded), model.encode_text(TextTokens(ids, mask)))


def test_text_is_independent_of_its_batch(model: M2Encoder) -> None:
    text = random_text(CONFIG, [4, 1, 9, 6])
    together = model.encode_text(text)
    for i, length in enumerate([4, 1, 9, 6]):
        alone = model.encode_text(text.ids[i : i + 1, :length])
        assert_close_in_ulps(alone[0], together[i])


def test_image_is_independent_of_its_batch(model: M2Encoder) -> None:
    images = random_images(CONFIG, 4)
    together = model.encode_image(images)
    for i in range(4):
        assert_close_in_ulps(model.encode_image(images[i : i + 1])[0], together[i])


def test_permuted_batch_gives_permuted_features(model: M2Encoder) -> None:
    order = torch.tensor([2, 0, 3, 1])
    images, text = random_images(CONFIG, 4), random_text(CONFIG, [4, 1, 9, 6])
    assert_close_in_ulps(model.encode_image(images[order]), model.encode_image(images)[order])
    permuted = TextTokens(text.ids[order], text.mask[order])
    assert_close_in_ulps(model.encode_text(permuted), model.encode_text(text)[order])


def test_order_of_tokens_and_patches_matters(model: M2Encoder) -> None:
    text = random_text(CONFIG, [9])
    swapped = TextTokens(text.ids.flip(1), text.mask)
    assert (model.encode_text(text) - model.encode_text(swapped)).abs().max() > 1e-3
    images = random_images(CONFIG, 1)
    assert (model.encode_image(images) - model.encode_image(images.flip(-1))).abs().max() > 1e-3


@torch.no_grad()
def test_first_token_only_equals_the_whole_pass(model: M2Encoder) -> None:
    x, mask = torch.randn(3, 11, 16), torch.arange(11) < torch.tensor([[11], [4], [1]])
    blocked = torch.ones(11, 11).tril().bool()
    for num_image_tokens in (0, 5, 11):
        for attention_mask in (None, blocked):
            full, first = (
                model.backbone(
                    x,
                    num_image_tokens=num_image_tokens,
                    token_mask=mask,
                    attention_mask=attention_mask,
                    first_token_only=first_token_only,
                )
                for first_token_only in (False, True)
            )
            assert first.shape == (3, 1, 16)
            assert_close_in_ulps(first, full[:, :1])


def test_bytes_and_fractions_are_the_same_image(model: M2Encoder) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert_close_in_ulps(model.encode_image(images), model.encode_image(images / 255))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool])
def test_any_kind_of_mask(model: M2Encoder, dtype: torch.dtype) -> None:
    ids, mask = random_text(CONFIG, [4, 9])
    assert torch.equal(model.encode_text(ids, mask.to(dtype)), model.encode_text(TextTokens(ids, mask)))


def test_ids_without_a_mask_are_all_tokens(model: M2Encoder) -> None:
    ids, mask = random_text(CONFIG, [5, 5])
    assert torch.equal(model.encode_text(ids.int()), model.encode_text(ids, mask))


def test_empty_batches(model: M2Encoder) -> None:
    assert model.encode_image(random_images(CONFIG, 0)).shape == (0, CONFIG.feature_dim)
    nothing = TextTokens(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool))
    assert model.encode_text(nothing).shape == (0, CONFIG.feature_dim)


def test_threads_share_a_model(model: M2Encoder) -> None:
    """Routing is an argument: passes of both modalities at the same time do not disturb each other."""
    images, text = random_images(CONFIG, 2), random_text(CONFIG, [4, 9])
    jobs = [
        lambda: model.encode_image(images),
        lambda: model.encode_text(text),
        lambda: model.forward_fusion(images, text).hidden,
        lambda: model.forward_fusion(images, text, vl_text_expert=True).hidden,
    ]
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: jobs[i % 4](), range(200)))
    for i, result in enumerate(results):
        assert_close_in_ulps(result, expected[i % 4])


def test_image_and_text_use_their_own_experts(model: M2Encoder) -> None:
    """A gradient reaches exactly the parameters that a pass is documented to need."""
    model.requires_grad_(True)
    model.encode_text(random_text(CONFIG, [4, 9])).sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith(("image_", "vl_image", "backbone.layers.0.vision")) for name in touched)
    assert not any(".text_expert." in name and name.startswith("vl_encoder") for name in touched)
    assert {"text_embed.tokens.weight", "vl_text_proj.weight"} <= touched
    assert "backbone.layers.0.text_expert.fc1.weight" in touched
    assert "vl_encoder.layers.0.vision_expert.fc1.weight" in touched


def test_builds_on_meta_and_initialises_later() -> None:
    with torch.device("meta"):
        model = M2Encoder(CONFIG)
    assert all(parameter.is_meta for parameter in model.parameters())
    text = model.encode_text(torch.zeros(2, 5, dtype=torch.int64, device="meta"))
    assert text.shape == (2, CONFIG.feature_dim)
    model = model.to_empty(device="cpu")
    model.init_weights()
    assert model.eval().encode_image(random_images(CONFIG, 2)).isfinite().all()


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 8, 8), r"\(2, 3, 8, 8\), expected \(B, 3, 16, 16\)"),
        (torch.rand(2, 3, 20, 20), r"\(2, 3, 20, 20\), expected \(B, 3, 16, 16\)"),
        (torch.rand(2, 1, 16, 16), r"expected \(B, 3, 16, 16\)"),
        (torch.rand(2, 16, 16, 3), r"expected \(B, 3, 16, 16\)"),
        (torch.rand(3, 16, 16), r"expected \(B, 3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "torch.int64, expected uint8"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.bool), "torch.bool, expected uint8"),
        (torch.rand(2, 16, 16, 3), r"the channels last; .*permute\(0, 3, 1, 2\)"),
        (torch.rand(2, 3, 16, 16) * 255, "expected floating point in 0..1: images / 255, or"),
        (torch.rand(2, 3, 16, 16).half() * 255, "expected floating point in 0..1: images / 255, or"),
        (torch.rand(2, 3, 16, 16) * 2 - 1, "expected floating point in 0..1: give them before any normalisation"),
        (torch.full((2, 3, 16, 16), float("nan")), "NaN or infinite"),
        (torch.full((2, 3, 16, 16), float("inf")), "NaN or infinite"),
    ],
)
def test_wrong_images(model: M2Encoder, images: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.encode_image(images)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(2, 5), None, r"torch.float32 of shape \(2, 5\), expected whole numbers"),
        (torch.zeros(2, 5, dtype=torch.bool), None, "expected whole numbers"),
        (torch.zeros(5, dtype=torch.int64), None, r"shape \(5,\), expected whole numbers \(B, T\)"),
        (torch.tensor([[1, 40]]), None, r"token id 40 is outside 0..39"),
        (torch.tensor([[1, -3]]), None, r"token id -3 is outside 0..39"),
        (torch.zeros(1, 19, dtype=torch.int64), None, "has 19 tokens, the position table holds 18"),
        (torch.zeros(2, 0, dtype=torch.int64), None, "no tokens at all"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [0, 0, 0]]), "is all padding"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4), r"mask has shape \(2, 4\), the ids have"),
    ],
)
def test_wrong_texts(model: M2Encoder, ids: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.encode_text(ids, mask)


def test_longest_text_that_fits(model: M2Encoder) -> None:
    assert model.encode_text(torch.zeros(1, 18, dtype=torch.int64)).isfinite().all()
    padded = torch.zeros(1, 30, dtype=torch.int64), torch.arange(30)[None] < 18
    assert model.encode_text(*padded).isfinite().all(), "padding beyond the table costs nothing"


def test_two_masks_are_a_mistake(model: M2Encoder) -> None:
    text = random_text(CONFIG, [3])
    with pytest.raises(UserError, match="not both"):
        model.encode_text(text, text.mask)


def test_fusion_needs_matching_numbers(model: M2Encoder) -> None:
    with pytest.raises(UserError, match="3 images cannot be divided among 2 texts"):
        model.forward_fusion(random_images(CONFIG, 3), random_text(CONFIG, [3, 4]))


def test_patch_mask_must_cover_the_grid(model: M2Encoder) -> None:
    with pytest.raises(UserError, match=r"patch_mask has shape \(2, 15\), expected \(2, 16\)"):
        model.forward_image(random_images(CONFIG, 2), patch_mask=torch.zeros(2, 15).bool())


@pytest.mark.parametrize("texts", ["a cat", ["a cat"], None])
def test_raw_texts_are_sent_to_the_tokenizer(model: M2Encoder, texts: object) -> None:
    with pytest.raises(UserError, match=r"encode_text\(tokenizer\(texts\)\)"):
        model.encode_text(texts)  # type: ignore[arg-type]


@pytest.mark.parametrize("images", ["a.png", ["a.png"], None])
def test_raw_images_are_sent_to_preprocess(model: M2Encoder, images: object) -> None:
    with pytest.raises(UserError, match="preprocess"):
        model.encode_image(images)  # type: ignore[arg-type]


def test_similarity_stays_in_fp32_under_mixed_precision(model: M2Encoder) -> None:
    images, text = model.encode_image(random_images(CONFIG, 3)), model.encode_text(random_text(CONFIG, [4, 9]))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.similarity(images, text)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, model.similarity(images, text))
