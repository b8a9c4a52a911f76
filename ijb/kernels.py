"""Compiled loops over images, pairs and sorted scores, with the roundings of NumPy and in its order.

The public programs pool with NumPy in float32 and score with `np.sum(a * b, -1)` in float64. A template or a score that
differs in its last bit can change which of two pairs is accepted first, so the loops add in the order in which NumPy
does: rows one after the other where it reduces the first axis, pairwise where it reduces the last one. None may be
compiled with `fastmath`.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable)

_LEAF, _LANES = 128, 8  # NumPy's pairwise sum adds up to so many numbers (PW_BLOCKSIZE) in so many lanes


def _compiled(function: Function) -> Function:
    return cast(Function, numba.njit(nogil=True, error_model="numpy", cache=True)(function))


@_compiled
def pool(
    plain: np.ndarray,
    mirrored: np.ndarray,
    step: int,
    norms: np.ndarray,
    weights: np.ndarray,
    rows: np.ndarray,
    media_starts: np.ndarray,
    template_starts: np.ndarray,
    first: int,
    last: int,
    templates: np.ndarray,
) -> None:
    """Templates `first` to `last` of all eight treatments, into `templates` float32 [8, T, D] (4 F + 2 N + D).

    plain, mirrored, step: as in `templates.ImageFeatures`. norms float32 [2, n]: lengths without and with the mirror
    image, 1 instead of 0. weights float32 [n]. rows int64: images by template and media; media m has
    rows[media_starts[m]:media_starts[m + 1]], template t the media from template_starts[t] on.
    """
    dimensions = plain.shape[1]
    media = np.empty((8, dimensions), np.float32)
    for t in range(first, last):
        templates[:, t] = 0
        for m in range(template_starts[t], template_starts[t + 1]):
            start, end = media_starts[m], media_starts[m + 1]
            for r in range(start, end):
                i = rows[r]
                weight = weights[i]
                own, other = plain[step * i], mirrored[step * i + step - 1]
                for f in range(2):
                    norm = norms[f, i]
                    raw, raw_weighted, unit, unit_weighted = (
                        media[4 * f],
                        media[4 * f + 1],
                        media[4 * f + 2],
                        media[4 * f + 3],
                    )
                    if r == start:
                        media[4 * f : 4 * f + 4] = 0
                    for d in range(dimensions):
                        value = own[d]
                        if f == 1:
                            value = value + other[d]
                        raw[d] += value
                        raw_weighted[d] += value * weight
                        unit[d] += value / norm
                        unit_weighted[d] += value / norm * weight
            count = np.float32(end - start)
            for k in range(8):
                for d in range(dimensions):
                    templates[k, t, d] += media[k, d] / count


def pairwise_plan(dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """How NumPy adds `dimensions` numbers: bounds of the leaves int64 [L + 1], and which leaf's sum is added to which
    int64 [L - 1, 2]."""
    bounds, merges = [0], []

    def divide(start: int, end: int) -> int:
        size = end - start
        if size <= _LEAF:
            bounds.append(end)
            return len(bounds) - 2
        half = size // 2
        half -= half % _LANES
        left, right = divide(start, start + half), divide(start + half, end)
        merges.append((left, right))
        return left

    divide(0, dimensions)
    return np.array(bounds), np.array(merges, np.int64).reshape(-1, 2)


def arrange(embeddings: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Embeddings [T, D] as `score_pairs` wants them: numbers that are added one to another lie a fixed width apart.

    Lanes of all leaves side by side, for each of 16 steps (zeros where a leaf has fewer); behind them the numbers of
    the last leaf that fill no eight lanes.
    """
    leaves, steps = len(bounds) - 1, _LEAF // _LANES
    rest = int(bounds[-1] - bounds[-2]) % _LANES
    arranged = np.zeros((len(embeddings), steps * leaves * _LANES + rest))
    lanes = arranged[:, : arranged.shape[1] - rest].reshape(len(embeddings), steps, leaves, _LANES)
    for leaf in range(leaves):
        part = embeddings[:, bounds[leaf] : bounds[leaf + 1] - (rest if leaf == leaves - 1 else 0)]
        lanes[:, : part.shape[1] // _LANES, leaf] = part.reshape(len(part), -1, _LANES)
    if rest:
        arranged[:, -rest:] = embeddings[:, -rest:]
    return arranged


@_compiled
def score_pairs(
    arranged: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    merges: np.ndarray,
    start: int,
    end: int,
    scores: np.ndarray,
) -> None:
    """scores[k] = sum(embeddings[left[k]] * embeddings[right[k]]) in float64 as NumPy adds it, k from start to end."""
    leaves = len(merges) + 1
    width = np.uint64(leaves * 8)  # unsigned: the compiler need not think of indices that count from the end
    lanes, sums = np.empty(width), np.empty(leaves)
    for k in range(start, end):
        a, b = arranged[left[k]], arranged[right[k]]
        for j in range(width):
            total = a[j] * b[j]
            for step in range(1, 16):
                i = np.uint64(step) * width + j
                total += a[i] * b[i]
            lanes[j] = total
        for leaf in range(leaves):
            j = 8 * leaf
            first = (lanes[j] + lanes[j + 1]) + (lanes[j + 2] + lanes[j + 3])
            sums[leaf] = first + ((lanes[j + 4] + lanes[j + 5]) + (lanes[j + 6] + lanes[j + 7]))
        for behind in range(16 * leaves * 8, len(a)):
            sums[leaves - 1] += a[behind] * b[behind]
        for m in range(len(merges)):
            sums[merges[m, 0]] += sums[merges[m, 1]]
        scores[k] = sums[0]


@_compiled
def block_order(left: np.ndarray, right: np.ndarray, templates: int, block: int) -> np.ndarray:
    """Pairs int64 [P] in an order in which neighbours share templates: by blocks of `right`, within one by `left`."""
    order = np.empty(len(left), np.int64)
    by_left = np.empty(len(left), np.int64)
    _counting_sort(left, np.arange(len(left)), templates, by_left)
    _counting_sort(right // block, by_left, templates // block + 1, order)
    return order


@_compiled
def _counting_sort(keys: np.ndarray, items: np.ndarray, count: int, result: np.ndarray) -> None:
    """`items` by their keys, stable."""
    places = np.zeros(count + 1, np.int64)
    for item in items:
        places[keys[item] + 1] += 1
    for key in range(count):
        places[key + 1] += places[key]
    for item in items:
        result[places[keys[item]]] = item
        places[keys[item]] += 1


@_compiled
def nearest_points(genuine: np.ndarray, impostor: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """TAR float64 [k] at the point of scikit-learn's `roc_curve` whose FAR is nearest to each target, and the area.

    genuine, impostor: all scores, descending. The points are those that `roc_curve` keeps: where the numbers of either
    kind accepted do not grow as they did at the point before. Of points equally near the last one counts.
    """
    all_false, all_true = len(impostor), len(genuine)
    nearest = np.abs(0.0 - targets)  # the point before everything: nothing is accepted
    tars = np.zeros(len(targets))
    area = 0.0
    false, true, step_false, step_true, points = 0, 0, 0, 0, 0
    while false < all_false or true < all_true:
        if true == all_true or (false < all_false and impostor[false] > genuine[true]):
            score = impostor[false]
        else:
            score = genuine[true]
        next_false, next_true = false, true
        while next_false < all_false and impostor[next_false] == score:
            next_false += 1
        while next_true < all_true and genuine[next_true] == score:
            next_true += 1
        grown_false, grown_true = next_false - false, next_true - true
        if points == 1 or (points > 1 and (grown_false != step_false or grown_true != step_true)):
            _consider(false, true, all_false, all_true, targets, nearest, tars)
        area += float(grown_false) * (true + next_true) / 2
        step_false, step_true = grown_false, grown_true
        false, true = next_false, next_true
        points += 1
    _consider(false, true, all_false, all_true, targets, nearest, tars)
    return tars, area / (float(all_false) * all_true)


@_compiled
def _consider(
    false: int,
    true: int,
    all_false: int,
    all_true: int,
    targets: np.ndarray,
    nearest: np.ndarray,
    tars: np.ndarray,
) -> None:
    far, tar = false / all_false, true / all_true
    for k in range(len(targets)):
        away = abs(far - targets[k])
        if away <= nearest[k]:
            nearest[k], tars[k] = away, tar
