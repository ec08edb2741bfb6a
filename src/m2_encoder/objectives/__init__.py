"""Losses for image-text encoders. The functions work without Lightning, on the features of any torch module."""

from __future__ import annotations

from m2_encoder.objectives.contrastive import image_text_contrastive

__all__ = ["image_text_contrastive"]
