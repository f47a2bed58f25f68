"""Training batches: uint8 images, changed at random from a seeded stream.

torchvision's v2 classes draw one set of parameters a batch and from torch's global generator; here every image has its own draw and a
repeated run repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from deployopt.data import ImageSet
from deployopt.nn import distributed
from deployopt.nn.schedule import Augment

Images = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, height, width


def batches(image_set: ImageSet, batch_size: int, augment: Augment, image_size: int, random: np.random.Generator) -> Iterator[tuple[Images, NDArray[np.int64]]]:
    """One epoch in shuffled order: (images uint8 [n, H, W, C], their indices [n]). A smaller last batch is left out unless it is the only one.

    Of processes that train together each gets its share of the same batches, changed by the same draws. The next batch is made in a thread while
    this one is trained on.
    """
    order = random.permutation(len(image_set))
    steps = max(1, len(order) // batch_size)
    chunks = [order[i * batch_size : (i + 1) * batch_size] for i in range(steps)]

    own = distributed.share(len(chunks[0]))

    def make(indices: NDArray[np.int64]) -> tuple[Images, NDArray[np.int64]]:
        return _batch(image_set, indices, own, augment, image_size, random), indices[own]

    with ThreadPoolExecutor(1) as ahead:  # one thread: draws happen in batch order
        upcoming: Future[tuple[Images, NDArray[np.int64]]] = ahead.submit(make, chunks[0])
        for following in chunks[1:]:
            current, upcoming = upcoming, ahead.submit(make, following)
            yield current.result()
        yield upcoming.result()


def _batch(image_set: ImageSet, batch: NDArray[np.int64], own: slice, augment: Augment, image_size: int, random: np.random.Generator) -> Images:
    """The images batch[own]. Draws are made for the whole batch, so that they do not depend on who makes which part."""
    indices = batch[own]
    if augment.resized_crop is None:
        images = image_set.images(indices)
    else:
        streams = random.spawn(len(batch))[own]  # one an image: how much a crop draws depends on the image's size
        images = np.stack([resized_crop(image_set.raw(int(i)), image_size, augment.resized_crop, stream) for i, stream in zip(indices, streams, strict=True)])
    if augment.crop_padding:
        images = shift(images, augment.crop_padding, random.integers(0, 2 * augment.crop_padding + 1, (2, len(batch)))[:, own])
    if augment.horizontal_flip:
        mirrored = random.random(len(batch))[own] < 0.5
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return images


def shift(images: Images, most: int, corners: NDArray[np.int64]) -> Images:
    """Each image of [n, H, W, C] moved by up to `most` pixels either way, black where nothing was.

    Args:
        corners: of the part to keep, in the image with `most` black pixels around it: int64 [2, n], top and left, 0 to 2 · most.
    """
    n, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    top, left = corners
    rows, columns = top[:, None] + np.arange(height), left[:, None] + np.arange(width)  # [n, H], [n, W]
    moved: Images = padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved


def resized_crop(image: Images, size: int, smallest: float, random: np.random.Generator) -> Images:
    """A random part of [h, w, C], resized to [size, size, C]."""
    from torchvision.transforms.v2 import functional

    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # [C, h, w]
    resized = functional.resized_crop(planes, *_crop_box(image.shape[0], image.shape[1], smallest, random), size=[size, size], antialias=True)
    result: Images = resized.numpy().transpose(1, 2, 0)
    return result


def _crop_box(height: int, width: int, smallest: float, random: np.random.Generator) -> Box:
    """As torchvision's RandomResizedCrop: area uniform in [smallest, 1], aspect log-uniform in [3/4, 4/3], ten tries, then the whole image."""
    for _ in range(10):
        area = height * width * random.uniform(smallest, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1)), h, w
    return 0, 0, height, width
