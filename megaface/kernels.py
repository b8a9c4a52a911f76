"""What a CPU does with every single score: compiled loops, for which neither NumPy nor torch has an operation.

After the matrix product each score has to be compared with some fifty thresholds and with the five best so far. As
whole-array operations that is a dozen passes over the block and thousands of short calls; as a loop it is one pass over
a row that lies in the first-level cache, at one to three nanoseconds a score, and no thread waits for the interpreter.
Numba compiles these functions at first use and keeps the result next to this file (or in the user's cache folder).

None of them may be compiled with `fastmath`: the order of the additions is the point, and a fused multiply-add would
round once where the devkit rounds twice.

Conventions: features are C-contiguous float32; D is a half score (`scores`, equation 1); a window (`windows`) is the
pair (low, high) of float32 around a threshold, `low` and `high` ascending and ended by an infinity.
"""

from collections.abc import Callable
from typing import TypeVar

import numba
import numpy as np

STEP = 64  # scores that are looked at together: all below every bound, and none of them is looked at alone
LANES = 8  # sequential sums under way at once: an addition takes four cycles, and two can start in each
DENSE_SHARE = 4  # from every fourth pair of a row on, scoring all of them is cheaper than picking

Function = TypeVar("Function", bound=Callable)


def compiled(function: Function) -> Function:
    """Compile with Numba: without the interpreter's lock, as NumPy divides, kept for the next process."""
    return numba.njit(nogil=True, error_model="numpy", cache=True)(function)


# ---------------------------------------------------------------------------------------------- exact scores


@compiled
def row_dots(left: np.ndarray, right: np.ndarray, columns: np.ndarray, dots: np.ndarray) -> None:
    """Sequential dot products of `left` [d] with right[columns], into `dots` float32 [len(columns)]."""
    last = len(columns) - 1
    for start in range(0, last + 1, LANES):
        # Written out, because an array of sums would live in memory.
        c0, c1 = columns[start], columns[min(start + 1, last)]
        c2, c3 = columns[min(start + 2, last)], columns[min(start + 3, last)]
        c4, c5 = columns[min(start + 4, last)], columns[min(start + 5, last)]
        c6, c7 = columns[min(start + 6, last)], columns[min(start + 7, last)]
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
        for k in range(len(left)):
            value = left[k]
            s0 += value * right[c0, k]
            s1 += value * right[c1, k]
            s2 += value * right[c2, k]
            s3 += value * right[c3, k]
            s4 += value * right[c4, k]
            s5 += value * right[c5, k]
            s6 += value * right[c6, k]
            s7 += value * right[c7, k]
        sums = (s0, s1, s2, s3, s4, s5, s6, s7)
        for lane in range(min(LANES, last + 1 - start)):
            dots[start + lane] = sums[lane]


@compiled
def pair_dots(left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray, dots: np.ndarray) -> None:
    """Sequential dot products of pairs (left[rows[k]], right[columns[k]]); fastest where equal rows are adjacent."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and rows[end] == rows[start]:
            end += 1
        row_dots(left[rows[start]], right, columns[start:end], dots[start:end])
        start = end


@compiled
def all_dots(left: np.ndarray, turned: np.ndarray, dots: np.ndarray) -> None:
    """Sequential dot products of `left` [d] with all columns of `turned` [d, N], into `dots` float32 [N]."""
    width = 256  # the sums stay in the first-level cache
    whole = len(left) // 4 * 4
    for start in range(0, len(dots), width):
        some = dots[start : start + width]
        some[:] = 0
        for k in range(0, whole, 4):  # four at a time: each sum is read and written once for them
            t0, t1 = turned[k, start : start + width], turned[k + 1, start : start + width]
            t2, t3 = turned[k + 2, start : start + width], turned[k + 3, start : start + width]
            for j in range(len(some)):
                total = (some[j] + left[k] * t0[j]) + left[k + 1] * t1[j]
                some[j] = (total + left[k + 2] * t2[j]) + left[k + 3] * t3[j]
        for k in range(whole, len(left)):
            for j in range(len(some)):
                some[j] += left[k] * turned[k, start + j]


@compiled
def turn(gallery: np.ndarray) -> np.ndarray:
    """Transposed copy [d, N] of `gallery` [N, d], in squares that the cache holds."""
    turned = np.empty(gallery.shape[::-1], np.float32)
    side = 32
    for row in range(0, gallery.shape[0], side):
        for column in range(0, gallery.shape[1], side):
            for i in range(row, min(row + side, gallery.shape[0])):
                for k in range(column, min(column + side, gallery.shape[1])):
                    turned[k, i] = gallery[i, k]
    return turned


@compiled
def exact_scores(
    left: np.ndarray,
    left_square: float,
    right: np.ndarray,
    right_squares: np.ndarray,
    turned: np.ndarray,
    columns: np.ndarray,
    scores: np.ndarray,
) -> np.ndarray:
    """The devkit's scores of `left` [d] against right[columns], into scores[: len(columns)]; columns ascend.

    `scores` is float32 [N]. `turned` is empty until a call needs all of `right` [N, d] transposed; pass on what is
    returned.
    """
    if len(columns) * DENSE_SHARE < len(right):
        row_dots(left, right, columns, scores)
    else:
        if not turned.size:
            turned = turn(right)
        all_dots(left, turned, scores)
        for i in range(len(columns)):  # i <= columns[i]: nothing is overwritten before it is read
            scores[i] = scores[columns[i]]
    for i in range(len(columns)):
        scores[i] = (scores[i] + scores[i]) + (-left_square + -right_squares[columns[i]])
    return turned


# ---------------------------------------------------------------------------------------------- thresholds


@compiled
def to_bin(value: float, scale: float, offset: float, bins: int) -> int:
    """The bin of a value: monotone."""
    return np.int32(min(max(value * scale + offset, np.float32(0)), np.float32(bins - 1)))


@compiled
def fill_starts(high: np.ndarray, scale: float, offset: float, starts: np.ndarray) -> None:
    """starts[b]: how many of the ascending `high` are surely below every value of bin b."""
    k, last = 0, len(high) - 1  # the infinity at the end is below nothing
    for number in range(len(starts)):
        while k < last and to_bin(high[k], scale, offset, len(starts)) < number:
            k += 1
        starts[number] = k


@compiled
def sort_in(
    values: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    starts: np.ndarray,
    guesses: np.ndarray,
    scale: float,
    offset: float,
    weights: np.ndarray,
    histogram: np.ndarray,
    columns: np.ndarray,
    slots: np.ndarray,
) -> int:
    """Sort values [N] into the gaps between K thresholds.

    Adds the weight of each value that surely exceeds exactly k thresholds to histogram[k] (k = 0 is not kept right).
    Values inside a window are not added: their columns, ascending, and about how many thresholds they exceed, by the
    table `guesses`, go into `columns` and `slots`. Returns how many those are.
    """
    count, lowest, last = 0, low[0], len(starts)
    places = np.empty(STEP, np.uint32)
    for begin in range(0, len(values), STEP):
        part = values[begin : begin + STEP]
        some = 0
        for j in range(len(part)):
            some += part[j] >= lowest
        if not some:
            continue
        for j in range(len(part)):
            places[j] = to_bin(part[j], scale, offset, last)
        for j in range(len(part)):
            value, place = part[j], places[j]
            k = np.uint32(starts[place])  # unsigned: an index that may be negative is looked at twice
            while value > high[k]:
                k += np.uint32(1)
            if value < low[k]:
                histogram[k] += weights[begin + j]
            else:
                columns[count], slots[count] = begin + j, guesses[place]
                count += 1
    return count


@compiled
def climb(
    exact: np.ndarray,
    thresholds: np.ndarray,
    weights: np.ndarray,
    columns: np.ndarray,
    slots: np.ndarray,
    histogram: np.ndarray,
) -> None:
    """Add exact scores to the histogram. `slots`: about how many thresholds each exceeds."""
    for i in range(len(columns)):
        k = slots[i]
        while k > 0 and exact[i] <= thresholds[k - 1]:
            k -= 1
        while exact[i] > thresholds[k]:
            k += 1
        histogram[k] += weights[columns[i]]


# ---------------------------------------------------------------------------------------------- the five best


@compiled
def candidates(values: np.ndarray, least: float, width: float, top: np.ndarray, columns: np.ndarray) -> int:
    """Columns of the half scores [N] that can be among the best len(top), ascending; returns how many.

    `least`: nothing below can be; `width`: so much below the last of the row's own best can still be. `top` is scratch.
    """
    top[:] = -np.inf
    last = len(top) - 1
    count = 0
    for begin in range(0, len(values), STEP):
        part = values[begin : begin + STEP]
        some = 0
        for j in range(len(part)):
            some += part[j] >= least
        if not some:
            continue
        for j in range(len(part)):
            value = np.float64(part[j])
            if value < least:
                continue
            columns[count] = begin + j
            count += 1
            if value > top[last]:
                k = last
                while k > 0 and value > top[k - 1]:
                    top[k] = top[k - 1]
                    k -= 1
                top[k] = value
                least = max(least, top[last] - width)
    kept = 0
    for i in range(count):
        if values[columns[i]] >= least:
            columns[kept] = columns[i]
            kept += 1
    return kept


@compiled
def keep_best(index: np.ndarray, score: np.ndarray, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
    """Merge candidates (row, column, score) into lists [n, 5] in place: score descending, larger index first."""
    last = index.shape[1] - 1
    for i in range(len(rows)):
        row, column, value = rows[i], columns[i], values[i]
        k = last
        if value < score[row, k] or (value == score[row, k] and column <= index[row, k]):
            continue
        while k > 0 and (value > score[row, k - 1] or (value == score[row, k - 1] and column > index[row, k - 1])):
            index[row, k], score[row, k] = index[row, k - 1], score[row, k - 1]
            k -= 1
        index[row, k], score[row, k] = column, value


# ---------------------------------------------------------------------------------------------- whole blocks


@compiled
def count_rows(
    values: np.ndarray,
    probes: np.ndarray,
    squares: np.ndarray,
    gallery: np.ndarray,
    gallery_squares: np.ndarray,
    weights: np.ndarray,
    windows: tuple[np.ndarray, ...],
    histogram: np.ndarray,
) -> int:
    """Sort the scores of r probes against N distractors in; returns how many were computed again.

    values [r, N] are half scores or scores, as `windows` are; probes [r, d], squares [r]; gallery [N, d], its squares
    [N] and weights int64 [N]. `windows` holds low, high and thresholds [r, K + 1], starts and guesses [r, bins], scale
    and offset [r]. The answer is added to `histogram` int64 [r, K + 1], as `sort_in` says. Windows and histogram may
    have one row that stands for all.
    """
    low, high, thresholds, starts, guesses, scale, offset = windows
    columns = np.empty(values.shape[1], np.int64)
    slots = np.empty(values.shape[1], np.int64)
    exact = np.empty(values.shape[1], np.float32)
    turned = np.empty((0, 0), np.float32)
    recomputed = 0
    for i in range(len(values)):
        w = min(i, len(low) - 1)
        count = sort_in(
            values[i],
            low[w],
            high[w],
            starts[w],
            guesses[w],
            scale[w],
            offset[w],
            weights,
            histogram[w],
            columns,
            slots,
        )
        if count:
            some = columns[:count]
            turned = exact_scores(probes[i], squares[i], gallery, gallery_squares, turned, some, exact)
            climb(exact, thresholds[w], weights, some, slots, histogram[w])
            recomputed += count
    return recomputed


@compiled
def best_rows(
    half: np.ndarray,
    probes: np.ndarray,
    squares: np.ndarray,
    gallery: np.ndarray,
    gallery_squares: np.ndarray,
    least: np.ndarray,
    width: np.ndarray,
    rounds: bool,
    best: int,
    rows: np.ndarray,
    columns: np.ndarray,
    scores: np.ndarray,
) -> int:
    """Find what can be among the `best` of r probes, with exact scores; returns how many candidates there are.

    half [r, N] half scores; least and width float64 [r] as in `candidates`; `rounds`: whether scores round at all.
    Writes the candidates into rows and columns int64 and scores float32, each of room for r N.
    """
    found = np.empty(half.shape[1], np.int64)
    exact = np.empty(half.shape[1], np.float32)
    turned = np.empty((0, 0), np.float32)
    top = np.empty(best, np.float64)
    total = 0
    for i in range(len(half)):
        count = candidates(half[i], least[i], width[i], top, found)
        if rounds and count:
            turned = exact_scores(probes[i], squares[i], gallery, gallery_squares, turned, found[:count], exact)
        for j in range(count):
            rows[total], columns[total] = i, found[j]
            scores[total] = exact[j] if rounds else 2 * half[i, found[j]] - squares[i]
            total += 1
    return total


@compiled
def fill_all_starts(high: np.ndarray, scale: np.ndarray, offset: np.ndarray, starts: np.ndarray) -> None:
    """`fill_starts` for high [r, K + 1], scale and offset [r], starts [r, bins]."""
    for i in range(len(high)):
        fill_starts(high[i], scale[i], offset[i], starts[i])


# ---------------------------------------------------------------------------------------------- galleries of probes


@compiled
def gallery_positions(
    half: np.ndarray,
    first: int,
    images: np.ndarray,
    columns: np.ndarray,
    mates: np.ndarray,
    scores: np.ndarray,
    width: np.ndarray,
    positions: np.ndarray,
    probes: np.ndarray,
    squares: np.ndarray,
) -> None:
    """How many images of each gallery of probes come before the mates of probes `first`, `first` + 1, ...

    half [r, U] half scores of these r probes; images int64 [T, I] the galleries, and their columns in `half`, -1 for
    images that take no part; mates int64 [r, T], their exact scores float32 [r, T] (-inf: nothing to be done) and
    places int64 [r, T], which are written. width float64 [r] as in `scores`; probes [n, d] and squares [n] of all.
    """
    near = np.empty(images.shape[1], np.int64)
    exact = np.empty(images.shape[1], np.float32)
    for i in range(len(half)):
        own, row = squares[first + i], half[i]
        for t in range(len(images)):
            score, mate = scores[i, t], mates[i, t]
            if score == -np.inf:
                continue
            low, high = np.float64(score) + own - width[i], np.float64(score) + own + width[i]
            before = inside = 0
            for j in range(images.shape[1]):
                value = 2 * np.float64(row[columns[t, j]])
                before += (value > high) & (columns[t, j] >= 0)
                inside += (value >= low) & (value <= high) & (columns[t, j] >= 0)
            if inside > 1:  # one is the mate
                count = 0
                for j in range(images.shape[1]):
                    value = 2 * np.float64(row[columns[t, j]])
                    if value >= low and value <= high and columns[t, j] >= 0 and images[t, j] != mate:
                        near[count] = images[t, j]
                        count += 1
                row_dots(probes[first + i], probes, near[:count], exact)
                for j in range(count):
                    value = (exact[j] + exact[j]) + (-own + -squares[near[j]])
                    before += (value > score) | ((value == score) & (near[j] > mate))
            positions[i, t] = before
