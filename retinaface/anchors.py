"""Where the network's outputs sit in the image."""

import functools

import numpy as np

from retinaface.network import ANCHOR_SIZES, STRIDES


@functools.lru_cache(maxsize=32)
def anchors(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [A, 2] (x, y) and sides [A] of all anchors of an image, float32 pixels, in the reference's order."""
    centres, sides = [], []
    for stride, sizes in zip(STRIDES, ANCHOR_SIZES, strict=True):
        y, x = np.mgrid[: -(-height // stride), : -(-width // stride)].reshape(2, -1)
        cells = (np.stack([x, y], axis=1).astype(np.float32) + np.float32(0.5)) * stride
        centres.append(np.repeat(cells, len(sizes), axis=0))
        sides.append(np.tile(np.float32(sizes), len(cells)))
    return np.concatenate(centres), np.concatenate(sides)
