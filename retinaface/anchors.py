"""The anchors: where in an image each of the network's answers is about.

They are kept in pixels, not relative to the image as in the reference, which spares two roundings and makes them a
matter of the grid alone. The cache is bounded by the number of sizes and by `tiles.MAX_PIXELS`: 130 MB at the very
worst, 0.5 MB for LFW.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from retinaface.network import ANCHOR_SIZES, STRIDES


@functools.lru_cache(maxsize=32)
def anchors(height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Centres [A, 2] (x, y) and sides [A] of an image's anchors in pixels, read-only.

    The order is the reference's (`PriorBox`): strides 8, 16, 32, cells row by row, in each cell the smaller anchor
    first. Cells at the right and lower border may reach beyond the image, as there: each stride has ceil(side / stride)
    cells, and centres lie at (cell + 0.5) * stride.
    """
    levels = [
        _level(-(-height // stride), -(-width // stride), stride, sizes)
        for stride, sizes in zip(STRIDES, ANCHOR_SIZES, strict=True)
    ]
    centres, sides = (np.concatenate(parts) for parts in zip(*levels, strict=True))
    centres.flags.writeable = sides.flags.writeable = False
    return centres, sides


def _level(
    rows: int, columns: int, stride: int, sizes: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    centres = np.empty((rows, columns, len(sizes), 2), dtype=np.float32)
    centres[..., 0] = (np.arange(columns, dtype=np.float32)[:, None] + 0.5) * stride
    centres[..., 1] = (np.arange(rows, dtype=np.float32)[:, None, None] + 0.5) * stride
    return centres.reshape(-1, 2), np.tile(np.array(sizes, np.float32), rows * columns)
