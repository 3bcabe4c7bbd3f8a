"""Batches of images: augmented ones in a shuffled order to train on, plain ones to validate.

The order is the endless chain of permutations perm(seed, epoch), and an image is augmented by a
generator of (seed, epoch, index), so every step can be built on its own, by any worker.
The transforms follow torchvision's in semantics; on PIL they cost what decoding leaves over.

B rows of this rank, C channels, S image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastformer.train.data import DataError, Purpose, random_stream
from fastformer.train.data.images import (
    ImageArrays,
    ImageFiles,
    decode_rgb,
    decoding_reason,
    open_image,
    upright_size,
)

if TYPE_CHECKING:
    from PIL import Image

Batch = dict[str, Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CROP_ATTEMPTS = 10


class ImageSource(Protocol):
    """Labelled images that can be loaded by index."""

    labels: Tensor

    def load(self, indices: Sequence[int], epochs: Sequence[int] | None, seed: int) -> Tensor:
        """Return normalised float32 (B, C, H, W), augmented by (seed, epoch, index).

        `epochs` holds one epoch per index; None asks for the images as validation sees them.
        """
        ...


def array_statistics(arrays: ImageArrays) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, over all images and pixels."""
    std, mean = torch.std_mean(arrays.images.double(), dim=(0, 2, 3), correction=0)
    return tuple(mean.tolist()), tuple(std.tolist())


class ArraySource:
    """Images in memory; `shift` moves training images by up to one pixel, filled with zeros."""

    def __init__(
        self,
        arrays: ImageArrays,
        mean: Sequence[float],
        std: Sequence[float],
        shift: bool = False,
    ):
        self.images = arrays.images
        self.labels = arrays.labels
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.shift = shift

    def load(self, indices: Sequence[int], epochs: Sequence[int] | None, seed: int) -> Tensor:
        images = self.images[list(indices)]
        if self.shift and epochs is not None:
            height, width = images.shape[2:]
            padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
            for row, (index, epoch) in enumerate(zip(indices, epochs, strict=True)):
                stream = random_stream(Purpose.AUGMENTATION, seed, epoch, index)
                top, left = torch.randint(3, (2,), generator=stream).tolist()
                images[row] = padded[row, :, top : top + height, left : left + width]
        return (images - self.mean) / self.std


class PhotoSource:
    """Image files, cut to (3, S, S).

    Training: a random crop of `scale` of the area and `ratio` of width to height, resized, and
    mirrored every other time (torchvision's RandomResizedCrop and RandomHorizontalFlip).
    Validation: the shorter side resized to 256/224 of S, the centre cut out. Bilinear.
    """

    def __init__(
        self,
        files: ImageFiles,
        image_size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ):
        self.paths = files.paths
        self.labels = files.labels
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.scale = scale
        self.ratio = ratio

    def load(self, indices: Sequence[int], epochs: Sequence[int] | None, seed: int) -> Tensor:
        S = self.image_size
        pixels = np.empty((len(indices), S, S, 3), dtype=np.uint8)
        for row, index in enumerate(indices):
            path = self.paths[index]
            try:
                with open_image(path) as image:
                    if epochs is None:
                        view = central_view(image, S)
                    else:
                        stream = random_stream(Purpose.AUGMENTATION, seed, epochs[row], index)
                        view = random_view(image, S, self.scale, self.ratio, stream)
                pixels[row] = np.asarray(view)
            except Exception as error:  # as in the scan, nearly any type
                raise DataError(
                    f"images: {path} could be decoded when training started and cannot now "
                    f"({decoding_reason(error)}); restore the file, or start again without it"
                ) from error
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float()
        return images.div_(255).sub_(self.mean).div_(self.std)


def random_view(
    image: Image.Image,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    stream: torch.Generator,
) -> Image.Image:
    """Crop at random, resize to size x size, mirror every other time."""
    from PIL import Image

    width, height = upright_size(image)
    left, top, wide, high = random_crop(width, height, scale, ratio, stream)
    mirror = torch.rand(1, generator=stream).item() < 0.5
    # Decoding at a fraction of the size leaves at least twice the pixels that the crop needs.
    enough = math.ceil(2 * size * width / wide), math.ceil(2 * size * height / high)
    rgb = decode_rgb(image, enough)
    fx, fy = rgb.width / width, rgb.height / height
    box = round(left * fx), round(top * fy), round((left + wide) * fx), round((top + high) * fy)
    view = rgb.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else view


def random_crop(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    stream: torch.Generator,
) -> tuple[int, int, int, int]:
    """Draw (left, top, width, height) as torchvision's RandomResizedCrop.get_params does.

    The area is uniform in `scale`, the ratio log-uniform in `ratio`; after ten draws that do not
    fit into the image, the largest central crop within `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    draws = torch.rand(_CROP_ATTEMPTS, 4, generator=stream, dtype=torch.float64).tolist()
    for area, log_ratio, x, y in draws:
        target = width * height * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(low + log_ratio * (high - low))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


def central_view(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to 256/224 of `size`, and cut size x size out of the centre."""
    from PIL import Image

    width, height = upright_size(image)
    shorter = round(size * 256 / 224)
    if width <= height:
        wide, high = shorter, int(shorter * height / width)
    else:
        wide, high = int(shorter * width / height), shorter
    rgb = decode_rgb(image, (2 * wide, 2 * high))
    left, top = round((wide - size) / 2), round((high - size) / 2)
    # Only the pixels that are kept are computed; the filter still reads beyond the box.
    x, y = rgb.width / wide, rgb.height / high
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return rgb.resize((size, size), Image.Resampling.BILINEAR, box)


class ImageBatches(Dataset[Batch]):
    """Training batches: `[step]` is {"images": float32 (B, C, S, S), "labels": int64 (B,)}.

    Positions step * G ... step * G + G - 1 of the endless chain of epochs, G = B * world_size,
    of which rank r holds r, r + world_size, ...: every batch is whole, an epoch may end inside.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.source = source
        self.rows = batch_size * world_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._order_of: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, step: int) -> Batch:
        first = step * self.rows + self.rank
        indices, epochs = [], []
        for position in range(first, (step + 1) * self.rows, self.world_size):
            epoch, place = divmod(position, len(self.source.labels))
            indices.append(self._order(epoch)[place])
            epochs.append(epoch)
        return {
            "images": self.source.load(indices, epochs, self.seed),
            "labels": self.source.labels[indices],
        }

    def _order(self, epoch: int) -> list[int]:
        if self._order_of[0] != epoch:
            stream = random_stream(Purpose.ORDER, self.seed, epoch)
            order = torch.randperm(len(self.source.labels), generator=stream)
            self._order_of = epoch, order.tolist()
        return self._order_of[1]


class ValidationBatches(Dataset[Batch]):
    """Every image once, in order and without augmentation; the last batch may be smaller."""

    def __init__(self, source: ImageSource, batch_size: int):
        self.source = source
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.source.labels) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"images: batch {number} of {len(self)}")
        first = number * self.batch_size
        indices = range(first, min(first + self.batch_size, len(self.source.labels)))
        return {
            "images": self.source.load(indices, None, seed=0),
            "labels": self.source.labels[list(indices)],
        }
