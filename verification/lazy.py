"""Crops that are decoded when they are wanted, so that a set of any size takes the memory of what it is made from."""

from collections.abc import Callable
from typing import Any

import numpy as np

from config import CROP_SIZE


class LazyCrops:
    """Stands for an array of crops, uint8 RGB [n, 112, 112, 3], whose rows `read` makes; indexed as such an array is.

    One number gives a crop [112, 112, 3]; a slice, numbers or a mask give [k, 112, 112, 3]. Safe to index from several
    threads when `read` is.
    """

    def __init__(self, count: int, read: Callable[[int], np.ndarray]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of the array that this stands for."""
        return self._count, CROP_SIZE, CROP_SIZE, 3

    def __getitem__(self, index: Any) -> np.ndarray:
        positions = np.arange(self._count)[index]
        if positions.ndim == 0:
            return self._read(int(positions))
        crops = np.empty((len(positions), CROP_SIZE, CROP_SIZE, 3), np.uint8)
        for row, position in enumerate(positions.tolist()):
            crops[row] = self._read(position)
        return crops


CropArray = np.ndarray | LazyCrops
