"""Losses for image-text encoders. The functions work without Lightning, on the features of any torch module."""

from __future__ import annotations

from m2_encoder.objectives.contrastive import image_text_contrastive
from m2_encoder.objectives.pieces import encode_pieces, in_pieces

__all__ = ["encode_pieces", "image_text_contrastive", "in_pieces"]
