"""Pictures and their classes for image classifiers: the mapper, and the augmentations of timm and
torchvision as Detectron2's steps.

A record has ``file_name`` and ``label``, a class number. The result holds ``image`` (C, S, S) uint8
and ``label``; all pictures have one size S, so that a batch is one tensor. Values are not
normalised: that is the model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from d2dense.errors import UserError, nearest

from .mappers import known_format, to_tensor
from .reading import SampleError, read_image

__all__ = [
    "CentralSquare",
    "ClassificationMapper",
    "RandomErasing",
    "RandomSquare",
    "from_cfg",
    "imagenet",
]

_INTERPOLATIONS = ("bilinear", "bicubic")


class _PictureStep(T.Augmentation):
    """A step that changes a picture (H, W, C) uint8 and nothing else."""

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        aug_input.image = self.apply(aug_input.image)
        return T.NoOpTransform()

    def apply(self, image: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def __repr__(self) -> str:
        """Detectron2's leaves out arguments by whether they *are* the defaults."""
        names = inspect.signature(type(self)).parameters
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"

    __str__ = __repr__


class RandomSquare(_PictureStep):
    """timm's training transform: a random part of the picture as a square, flipped, in other
    colours.

    Args:
        size: side of the square in pixels.
        scale: range of the part's share of the picture's area.
        flip: probability of a horizontal flip.
        auto_augment: timm's name of a policy such as ``rand-m9-mstd0.5-inc1``; empty: none.
        color_jitter: strength in brightness, contrast and saturation; as in timm, only where there
            is no policy.
        interpolation: ``bilinear`` or ``bicubic``.

    Raises:
        UserError: a policy that timm does not know.
    """

    def __init__(
        self,
        *,
        size: int = 224,
        scale: Sequence[float] = (0.08, 1.0),
        flip: float = 0.5,
        auto_augment: str = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.4,
        interpolation: str = "bicubic",
    ):
        super().__init__()
        self.size = size
        self.scale = tuple(scale)
        self.flip = flip
        self.auto_augment = auto_augment
        self.color_jitter = color_jitter
        self.interpolation = _known_interpolation(interpolation)
        self._transform = self._timm_transform()

    def _timm_transform(self) -> Callable[[Image.Image], Any]:
        from timm.data import create_transform

        try:
            return create_transform(
                self.size,
                is_training=True,
                scale=self.scale,
                hflip=self.flip,
                auto_augment=self.auto_augment or None,
                color_jitter=self.color_jitter,
                interpolation=self.interpolation,
                use_prefetcher=True,  # (C, H, W) uint8, without normalisation
            )
        except (AssertionError, ValueError, IndexError, KeyError) as error:
            raise UserError(
                f"timm has no augmentation policy {self.auto_augment!r} ({error}); change "
                "INPUT.CLASSIFICATION.AUTO_AUGMENT / auto_augment of RandomSquare"
            ) from error

    def apply(self, image: np.ndarray) -> np.ndarray:
        # versions of timm differ in the kind of array
        return np.asarray(self._transform(Image.fromarray(image))).transpose(1, 2, 0)


class RandomErasing(_PictureStep):
    """timm's random erasing: a rectangle becomes normally distributed noise.

    timm erases in normalised pictures; here the noise is given the data's mean and deviation, and
    is rounded and cut to 8 bits.

    Args:
        probability: of erasing anything.
        pixel_mean, pixel_std: of the data, per channel.
    """

    def __init__(
        self,
        *,
        probability: float = 0.25,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
    ):
        from timm.data.random_erasing import RandomErasing as Erasing

        super().__init__()
        self.probability = probability
        self.pixel_mean = tuple(pixel_mean)
        self.pixel_std = tuple(pixel_std)
        self._erase = Erasing(probability, mode="pixel", device="cpu")

    def apply(self, image: np.ndarray) -> np.ndarray:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.pixel_mean, self.pixel_std))
        normalised = self._erase((torch.from_numpy(image.transpose(2, 0, 1).copy()) - mean) / std)
        values = (normalised * std + mean).round_().clamp_(0, 255)
        return values.to(torch.uint8).permute(1, 2, 0).numpy()


class CentralSquare(_PictureStep):
    """The square in the middle, after resizing the shorter edge.

    Args:
        size: side of the square in pixels; what a smaller picture lacks is black.
        resize: the shorter edge before.
        interpolation: ``bilinear`` or ``bicubic``.
    """

    def __init__(self, *, size: int = 224, resize: int = 256, interpolation: str = "bicubic"):
        super().__init__()
        self.size = size
        self.resize = resize
        self.interpolation = _known_interpolation(interpolation)
        mode = InterpolationMode(interpolation)
        self._transform = Compose([Resize(resize, interpolation=mode), CenterCrop(size)])

    def apply(self, image: np.ndarray) -> np.ndarray:
        return np.asarray(self._transform(Image.fromarray(image)))


def _known_interpolation(name: str) -> str:
    if name not in _INTERPOLATIONS:
        raise UserError(
            f"INPUT.CLASSIFICATION.INTERPOLATION / interpolation = {name!r}, expected one of "
            f"{', '.join(_INTERPOLATIONS)}{nearest(name, _INTERPOLATIONS)}"
        )
    return name


def imagenet(
    *,
    is_train: bool,
    size: int = 224,
    test_resize: int = 256,
    scale: Sequence[float] = (0.08, 1.0),
    flip: float = 0.5,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.4,
    random_erasing: float = 0.25,
    interpolation: str = "bicubic",
) -> list[T.Augmentation]:
    """Return the steps of training from scratch on ImageNet (or, without ``is_train``, of testing)
    that DeiT, Swin and ConvNeXt share; arguments as of the steps.
    """
    if not is_train:
        return [CentralSquare(size=size, resize=test_resize, interpolation=interpolation)]
    square = RandomSquare(
        size=size,
        scale=scale,
        flip=flip,
        auto_augment=auto_augment,
        color_jitter=color_jitter,
        interpolation=interpolation,
    )
    return [square, RandomErasing(probability=random_erasing)] if random_erasing else [square]


class ClassificationMapper:
    """Feeds classifiers.

    Args:
        is_train: whether ``augmentations`` are those of training; nothing else depends on it.
        augmentations: steps that end in pictures of one size, usually from :func:`imagenet`.
        image_format: channel order.
    """

    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str = "RGB",
    ):
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = known_format(image_format)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the mapped copy of ``record``.

        Raises:
            SampleError: naming the file.
        """
        record = dict(record)
        if "label" not in record:
            raise SampleError(
                f"image {record['file_name']} has no class of its own; a classifier needs a "
                "dataset of the kind image_folder",
                record["file_name"],
            )
        inputs = T.AugInput(read_image(record, self.image_format))
        self.augmentations(inputs)
        record["image"] = to_tensor(inputs.image)
        return record


def from_cfg(cfg: CfgNode, is_train: bool) -> ClassificationMapper:
    """Build the mapper from ``INPUT.CLASSIFICATION``."""
    node = cfg.INPUT.CLASSIFICATION
    steps = imagenet(
        is_train=is_train,
        size=node.SIZE,
        test_resize=node.TEST_RESIZE,
        scale=node.SCALE,
        flip=node.FLIP,
        auto_augment=node.AUTO_AUGMENT,
        color_jitter=node.COLOR_JITTER,
        random_erasing=node.RANDOM_ERASING,
        interpolation=node.INTERPOLATION,
    )
    return ClassificationMapper(
        is_train=is_train, augmentations=steps, image_format=cfg.INPUT.FORMAT
    )
