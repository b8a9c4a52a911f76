"""Painted squares that stand for faces, and a detector of them that is exact, instant and needs no network."""

from types import SimpleNamespace

import cv2
import numpy as np

from cropping.align import TEMPLATE

BLUE, RED = (255, 0, 0), (0, 0, 255)  # forehead and chin, BGR


def paint(width, height, faces, seed=0):
    """A dark photo BGR [height, width, 3] with square faces (x, y, side): the upper half blue, the lower half red."""
    bgr = np.random.default_rng(seed).integers(20, 90, (height, width, 3), dtype=np.uint8)
    for x, y, side in faces:
        bgr[y : y + side // 2, x : x + side] = BLUE
        bgr[y + side // 2 : y + side, x : x + side] = RED
    return bgr


def save(path, bgr):
    """Write a photo without loss, whatever its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", bgr)[1].tobytes())


class PaintedFaces:
    """Detects painted faces of at least `smallest` pixels that stand upright within 20 degrees.

    Best first: the larger, the better. Counts calls and photos.
    """

    device = "cpu"

    def __init__(self, smallest=16):
        self.smallest = smallest
        self.sizes = []

    def detect(self, images):
        self.sizes += [image.shape[:2] for image in images]
        return [self._one(image) for image in images]

    def _one(self, bgr):
        b, g, r = (bgr[:, :, channel].astype(int) for channel in range(3))
        blue, red = ((strong > 150) & (weak < 100) & (g < 100) for strong, weak in ((b, r), (r, b)))
        painted = (np.maximum(b, r) > 110) & (g < 100)  # also the purple between the halves of an enlarged face
        count, areas = cv2.connectedComponents(painted.astype(np.uint8), connectivity=8)
        found = []
        for label in range(1, count):
            parts = [np.argwhere((areas == label) & part)[:, ::-1] for part in (blue, red)]
            if min(map(len, parts)) < 0.4 * self.smallest**2:
                continue
            top, bottom = (part.mean(axis=0) for part in parts)
            down = bottom - top  # half a side long
            if abs(np.degrees(np.arctan2(down[0], down[1]))) > 20:
                continue
            side = 2 * np.hypot(*down)
            centre = (top + bottom) / 2
            # The template, as if the square were the crop, turned as the square is turned.
            turn = np.array([[down[1], down[0]], [-down[0], down[1]]]) / np.hypot(*down)
            landmarks = centre + (TEMPLATE - 55.5) * side / 112 @ turn.T
            box = [*(centre - side / 2), *(centre + side / 2)]
            found.append((0.9 + side / 1e5, box, landmarks))
        found.sort(key=lambda face: -face[0])
        return SimpleNamespace(
            scores=np.array([score for score, _, _ in found], np.float32),
            boxes=np.array([box for _, box, _ in found], np.float32).reshape(-1, 4),
            landmarks=np.array([landmarks for _, _, landmarks in found], np.float32).reshape(-1, 5, 2),
        )
