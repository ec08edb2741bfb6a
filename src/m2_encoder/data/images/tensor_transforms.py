"""The training transform on uint8 tensors: the same crops and augmentations, in a third of the time.

NumPy copies memory, not torch: torch would wake its thread pool for half a megabyte, which costs ten times the copy.

Letters: S image side in pixels · H, W height and width of a source.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from m2_encoder.data.images.augmentation import random_crop_box
from m2_encoder.data.images.decode import decode_image_uint8
from m2_encoder.data.images.transforms import ImageSource, TrainTransform, check_generator
from m2_encoder.errors import ImageError


class TensorTrainTransform(TrainTransform):
    """`TrainTransform` for decoded tensors, with the same arguments, draws and ranges.

    Its pixels are those of `TrainTransform`, but for rounding in the resize: on photographs within 2 of 255 levels,
    0.02 on average. Bytes are decoded by `decode_image_uint8`; other sources are left to `TrainTransform`.
    """

    def __call__(self, source: ImageSource | Tensor, *, rng: np.random.Generator) -> Tensor:
        """(3, S, S) uint8 of a (3, H, W) uint8 tensor or another source; of tensors and bytes with the channels last.

        Raises:
            ImageError: if the source is a tensor of another kind, or cannot be opened.
            UserError: if `rng` is no NumPy generator.
        """
        if isinstance(source, bytes):
            source = decode_image_uint8(source, max_pixels=self.max_pixels, pictures=self.pictures)
        if not isinstance(source, Tensor):
            return super().__call__(source, rng=rng)
        _check(source)
        check_generator(rng)
        height, width = source.shape[1:]
        box = random_crop_box((width, height), scale=self.scale, ratio=self.ratio, rng=rng)
        levels = crop_and_resize(source, box, self.image_size)
        if rng.random() < self.flip:
            levels = _mirror(levels)
        if not self._augments:
            return torch.from_numpy(levels).permute(2, 0, 1)
        return torch.from_numpy(np.array(self._augment(Image.fromarray(levels), rng))).permute(2, 0, 1)

    @property
    def _augments(self) -> bool:
        """Whether `_augment` does or draws anything."""
        moves = self.rotate_degrees or self.translate or self.shear or self.zoom != (1.0, 1.0)
        recolours = any(self.color_jitter) or self.grayscale or self.invert
        return bool(self.num_ops or moves or recolours)


def crop_and_resize(image: Tensor, box: tuple[int, int, int, int], image_size: int) -> npt.NDArray[np.uint8]:
    """(S, S, 3) of the part (left, top, right, bottom) of a (3, H, W) uint8 image, bicubic with antialias."""
    left, top, right, bottom = box
    part = image.numpy().transpose(1, 2, 0)[top:bottom, left:right]
    height, width = bottom - top, right - left
    if height == width == image_size:
        return part.copy()
    part = np.ascontiguousarray(part)
    # A batch of one whose strides say so: only then torch neither splits the channels nor joins them again.
    batch = torch.from_numpy(part.reshape(1, height, width, 3)).permute(0, 3, 1, 2)
    if height > image_size and 2 * width < height + image_size:
        # Here Pillow 13 resizes the height first, torch always the width; each rounds between the two.
        batch = interpolate(batch, (image_size, width), mode="bicubic", antialias=True)
    batch = interpolate(batch, (image_size, image_size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(batch.numpy()[0].transpose(1, 2, 0))


def _mirror(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Left and right exchanged, (S, S, 3); moving whole pixels is twice as fast as moving bytes."""
    pixels = levels.view("V3")
    return pixels[:, ::-1].copy().view(np.uint8).reshape(levels.shape)


def _check(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or image.is_cuda:
        raise ImageError(
            f"an image tensor must be (3, H, W) uint8 on the CPU, got {tuple(image.shape)} {image.dtype} on "
            f"{image.device}; decode_image_uint8 makes such"
        )
