"""What a CPU does with every single score: compiled loops, for which neither NumPy nor torch has an operation.

After the matrix product each score has to be compared with some fifty thresholds and with the five best so far. As
whole-array operations that is a dozen passes over the block and thousands of short calls; as a loop it is one pass over
a row that lies in the first-level cache, at one to three nanoseconds a score, and no thread waits for the interpreter.
Numba compiles these functions at first use and keeps the result next to this file (or in the user's cache folder).

None of them but `range_squares` may be compiled with `fastmath`: the order of the additions is the point, and a fused
multiply-add would round once where the devkit rounds twice.

Conventions: features are C-contiguous float32; D is a half score (`scores`, equation 1); a window (`windows`) is the
pair (low, high) of float32 around a threshold, `low` and `high` ascending and ended by an infinity.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numba
import numpy as np

STEP = 64  # scores that are looked at together: all below every bound, and none of them is looked at alone
LANES = 8  # sequential sums under way at once: an addition takes four cycles, and two can start in each
GROUP = 32  # rows whose scores are computed together when many of them are wanted
DENSE_SHARE = 6  # from every sixth pair of a group on, scoring all of them is cheaper than picking

Function = TypeVar("Function", bound=Callable)


class Features(NamedTuple):
    """One side of a comparison: features float32 [n, d] and their squared norms float32 [n] as the devkit has them."""

    values: np.ndarray
    squares: np.ndarray


class Products(NamedTuple):
    """A matrix product of r probes with N distractors, and what belongs to its columns."""

    pieces: np.ndarray  # float32 [P, r, N]: over pieces of the dimensions (`scores`)
    shift: np.ndarray  # float32 [N]: what is added to their sum
    weights: np.ndarray  # int64 [N]: how often each distractor occurs


class RowWindows(NamedTuple):
    """Windows around K thresholds of each of r probes, ended by infinities, and the tables that find them."""

    low: np.ndarray  # float32 [r, K + 1]
    high: np.ndarray
    thresholds: np.ndarray
    tables: np.ndarray  # [r, bins], as `fill_table` says
    scale: np.ndarray  # float32 [r]
    offset: np.ndarray


class GenuineWindows(NamedTuple):
    """Windows around U genuine scores that are the same for all probes."""

    lowest: float  # the least score that can be above a genuine one
    genuine: np.ndarray  # float32 [U + 1], ended by infinity
    table: np.ndarray  # int32 [bins], as `fill_table` says
    places: np.ndarray  # int32 [bins]: about how many genuine scores are below
    scale: float
    offset: float


class Contest(NamedTuple):
    """What can be among the best `count` of each of r probes, as `candidates` says."""

    least: np.ndarray  # float64 [r]
    width: np.ndarray  # float64 [r]
    count: int  # type: ignore[assignment]  # a tuple's method of that name is not used


class Pairs(NamedTuple):
    """Room for pairs of a probe and a distractor with their exact score and how many thresholds that surely exceeds."""

    rows: np.ndarray  # int64
    columns: np.ndarray  # int64
    scores: np.ndarray  # float32
    slots: np.ndarray  # int64; of no meaning where no thresholds are asked for


def compiled(function: Function) -> Function:
    """Compile with Numba: without the interpreter's lock, as NumPy divides, kept for the next process."""
    return numba.njit(nogil=True, error_model="numpy", cache=True)(function)  # type: ignore[return-value]


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def range_squares(values: np.ndarray, edges: np.ndarray, squares: np.ndarray) -> None:
    """|x|^2 of float32 [n, d], per range of dimensions between `edges` [C + 1], into `squares` float64 [n, C].

    The one sum here that may be added in any order; in the same one for equal features.
    """
    for i in range(len(values)):
        for c in range(squares.shape[1]):
            total = 0.0
            for k in range(edges[c], edges[c + 1]):
                total += np.float64(values[i, k]) * np.float64(values[i, k])
            squares[i, c] = total


@compiled
def devkit_squares(values: np.ndarray, rows: np.ndarray, squares: np.ndarray) -> None:
    """|x|^2 of the features `rows` of float32 [n, d], into `squares` float64 [n], in the order in which the devkit's
    matrix library adds: four squares together, and what is left over one by one."""
    whole = values.shape[1] // 4 * 4
    for i in rows:
        x = values[i]
        total = 0.0
        for k in range(0, whole, 4):
            a, b, c, d = np.float64(x[k]), np.float64(x[k + 1]), np.float64(x[k + 2]), np.float64(x[k + 3])
            total += ((a * a + b * b) + c * c) + d * d
        for k in range(whole, values.shape[1]):
            total += np.float64(x[k]) * np.float64(x[k])
        squares[i] = total


# ---------------------------------------------------------------------------------------------- exact scores


@compiled
def pair_dots(left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray, dots: np.ndarray) -> None:
    """Sequential dot products of pairs (left[rows[k]], right[columns[k]]), into `dots` float32 [len(rows)]."""
    last = len(rows) - 1
    for start in range(0, last + 1, LANES):
        # Written out, because an array of sums would live in memory.
        p1, p2, p3 = min(start + 1, last), min(start + 2, last), min(start + 3, last)
        p4, p5, p6, p7 = min(start + 4, last), min(start + 5, last), min(start + 6, last), min(start + 7, last)
        a0, a1, a2, a3 = left[rows[start]], left[rows[p1]], left[rows[p2]], left[rows[p3]]
        a4, a5, a6, a7 = left[rows[p4]], left[rows[p5]], left[rows[p6]], left[rows[p7]]
        b0, b1, b2, b3 = right[columns[start]], right[columns[p1]], right[columns[p2]], right[columns[p3]]
        b4, b5, b6, b7 = right[columns[p4]], right[columns[p5]], right[columns[p6]], right[columns[p7]]
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
        for k in range(left.shape[1]):
            s0 += a0[k] * b0[k]
            s1 += a1[k] * b1[k]
            s2 += a2[k] * b2[k]
            s3 += a3[k] * b3[k]
            s4 += a4[k] * b4[k]
            s5 += a5[k] * b5[k]
            s6 += a6[k] * b6[k]
            s7 += a7[k] * b7[k]
        sums = (s0, s1, s2, s3, s4, s5, s6, s7)
        for lane in range(min(LANES, last + 1 - start)):
            dots[start + lane] = sums[lane]


@compiled
def group_dots(left: np.ndarray, turned: np.ndarray, dots: np.ndarray) -> None:
    """Sequential dot products of `left` [g, d] with all columns of `turned` [d, N], into `dots` float32 [GROUP, N].

    What is in the rows of `dots` beyond g means nothing.
    """
    width = 256  # of a panel of `turned` that stays in the second-level cache while all rows pass
    last, whole = len(left) - 1, left.shape[1] // 4 * 4
    dots[:] = 0
    for start in range(0, turned.shape[1], width):
        end = min(start + width, turned.shape[1])
        for i in range(0, len(left), 4):
            a, b, c, d = left[i], left[min(i + 1, last)], left[min(i + 2, last)], left[min(i + 3, last)]
            # Written out, because the compiler makes vectors of rows that it knows to be contiguous.
            e, f, g, h = dots[i, start:end], dots[i + 1, start:end], dots[i + 2, start:end], dots[i + 3, start:end]
            for k in range(0, whole, 4):  # four rows and four dimensions: what is read once is used four times
                t, u = turned[k, start:end], turned[k + 1, start:end]
                v, w = turned[k + 2, start:end], turned[k + 3, start:end]
                for j in range(end - start):
                    e[j] = (((e[j] + a[k] * t[j]) + a[k + 1] * u[j]) + a[k + 2] * v[j]) + a[k + 3] * w[j]
                    f[j] = (((f[j] + b[k] * t[j]) + b[k + 1] * u[j]) + b[k + 2] * v[j]) + b[k + 3] * w[j]
                    g[j] = (((g[j] + c[k] * t[j]) + c[k + 1] * u[j]) + c[k + 2] * v[j]) + c[k + 3] * w[j]
                    h[j] = (((h[j] + d[k] * t[j]) + d[k + 1] * u[j]) + d[k + 2] * v[j]) + d[k + 3] * w[j]
            for k in range(whole, left.shape[1]):
                t = turned[k, start:end]
                for j in range(end - start):
                    e[j] += a[k] * t[j]
                    f[j] += b[k] * t[j]
                    g[j] += c[k] * t[j]
                    h[j] += d[k] * t[j]


@compiled
def turn(gallery: np.ndarray) -> np.ndarray:
    """Transposed copy [d, N] of `gallery` [N, d], in squares that the cache holds."""
    turned = np.empty(gallery.shape[::-1], np.float32)
    side = 32
    for row in range(0, gallery.shape[0], side):
        for column in range(0, gallery.shape[1], side):
            for k in range(column, min(column + side, gallery.shape[1])):
                for i in range(row, min(row + side, gallery.shape[0])):
                    turned[k, i] = gallery[i, k]
    return turned


@compiled
def exact_scores(
    probes: Features, gallery: Features, turned: np.ndarray, rows: np.ndarray, columns: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """The devkit's scores of pairs (probes[rows[k]], gallery[columns[k]]), into `scores` float32 [len(rows)]; rows
    ascend.

    `turned` is empty until a call needs all of the gallery [N, d] transposed; pass on what is returned.
    """
    left, right = probes.values, gallery.values
    dots = np.empty((0, 0), np.float32)
    waiting = start = 0  # pairs from `waiting` to `start` are scored one by one
    while start < len(rows):
        first = rows[start] // GROUP * GROUP
        end = start + 1
        while end < len(rows) and rows[end] < first + GROUP:
            end += 1
        if (end - start) * DENSE_SHARE >= min(GROUP, len(left) - first) * len(right):
            if not dots.size:
                dots = np.empty((GROUP, len(right)), np.float32)
            if not turned.size:
                turned = turn(right)
            group_dots(left[first : first + GROUP], turned, dots)
            for i in range(start, end):
                scores[i] = dots[rows[i] - first, columns[i]]
            pair_dots(left, right, rows[waiting:start], columns[waiting:start], scores[waiting:start])
            waiting = end
        start = end
    pair_dots(left, right, rows[waiting:], columns[waiting:], scores[waiting:])
    for i in range(len(rows)):
        scores[i] = (scores[i] + scores[i]) + (-probes.squares[rows[i]] + -gallery.squares[columns[i]])
    return turned


# ---------------------------------------------------------------------------------------------- thresholds


@compiled
def to_bin(value: float, scale: float, offset: float, bins: int) -> int:
    """The bin of a value: monotone."""
    return np.int32(min(max(value * scale + offset, np.float32(0)), np.float32(bins - 1)))  # type: ignore[return-value, arg-type]


@compiled
def fill_windows(
    thresholds: np.ndarray,
    asked: np.ndarray,
    squares: np.ndarray,
    width: np.ndarray,
    exact: bool,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """The windows of the first `asked` [n] of each probe's thresholds [n, K + 1], into low and high [n, K + 1].

    squares and width float64 [n] as in `scores`. Edges are rounded outward. When scores are `exact`, none is near a
    threshold, and one on it is not above it: low follows high.
    """
    for i in range(len(thresholds)):
        for k in range(asked[i]):
            middle = thresholds[i, k] + squares[i]
            down, up = (middle - width[i]) / 2, (middle + width[i]) / 2
            low[i, k], high[i, k] = down, up
            if high[i, k] < up:
                high[i, k] = np.nextafter(high[i, k], np.float32(np.inf))
            if exact:
                low[i, k] = np.nextafter(high[i, k], np.float32(np.inf))
            elif low[i, k] > down:
                low[i, k] = np.nextafter(low[i, k], np.float32(-np.inf))


@compiled
def fill_table(low: np.ndarray, high: np.ndarray, scale: float, offset: float, table: np.ndarray) -> None:
    """What each bin tells of the thresholds: how many are surely below, plus K + 1 where a window of others touches it.

    low and high [K + 1]; `table` holds integers up to 2 K + 1.
    """
    k = done = 0
    while high[k] < np.inf:
        edges = to_bin(low[k], scale, offset, len(table)), to_bin(high[k], scale, offset, len(table))
        first, end = max(min(edges), done), max(max(edges) + 1, done)
        table[done:first] = k
        table[first:end] = k + len(high)
        done = end
        k += 1
    table[done:] = k


@compiled
def fill_tables(low: np.ndarray, high: np.ndarray, scale: np.ndarray, offset: np.ndarray, tables: np.ndarray) -> None:
    """`fill_table` for low and high [r, K + 1], scale and offset [r], tables [r, bins]."""
    for i in range(len(high)):
        fill_table(low[i], high[i], scale[i], offset[i], tables[i])


@compiled
def sort_in(
    values: np.ndarray,
    lowest: float,
    table: np.ndarray,
    scale: float,
    offset: float,
    weights: np.ndarray,
    histogram: np.ndarray,
    columns: np.ndarray,
) -> int:
    """Sort values [N] into the gaps between K thresholds as far as `table` tells.

    Adds the weight of each value that surely exceeds exactly k thresholds to histogram[k] (k = 0 is not kept right).
    The columns of the others, ascending, go into `columns` [N] (and their weights into the second half of histogram
    int64 [2 K + 2], which means nothing). Returns how many those are.
    """
    count, sure, bins = 0, len(histogram) // 2, len(table)
    some = False
    for j in range(len(values)):
        some |= values[j] >= lowest
    if not some:
        return 0
    places = np.empty(len(values), np.uint32)  # unsigned: an index that may be negative is looked at twice
    for j in range(len(values)):
        places[j] = to_bin(values[j], scale, offset, bins)
    for j in range(len(values)):  # without a branch: whether a value is near a threshold nobody can foresee
        code = np.uint32(table[places[j]])
        histogram[code] += weights[j]
        columns[count] = j
        count += code >= sure  # type: ignore[assignment]  # Numba keeps it an int
    return count


@compiled
def look_closer(
    values: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    table: np.ndarray,
    scale: float,
    offset: float,
    weights: np.ndarray,
    histogram: np.ndarray,
    columns: np.ndarray,
    slots: np.ndarray,
) -> int:
    """Sort in those of the values at `columns` [M], as `sort_in` left them, that are outside of all windows.

    The columns of the others take their place, and the thresholds that those surely exceed go into `slots`; returns how
    many they are.
    """
    kept = 0
    for i in range(len(columns)):
        column = columns[i]
        value = values[column]
        k = np.int64(table[to_bin(value, scale, offset, len(table))]) - len(high)
        k += value > high[k]  # nearly always enough, and again without a branch
        while value > high[k]:
            k += 1
        inside = value >= low[k]
        histogram[k] += 0 if inside else weights[column]
        columns[kept], slots[kept] = column, k
        kept += inside
    return kept


@compiled
def climb(score: float, thresholds: np.ndarray, slot: int) -> int:
    """How many thresholds an exact score exceeds; about `slot`."""
    for _ in range(3):  # without a branch, as in `sort_in`; then there is rarely more to do
        slot += score > thresholds[slot]
    while score > thresholds[slot]:
        slot += 1
    while slot > 0 and score <= thresholds[slot - 1]:
        slot -= 1
    return slot


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
        some = False
        for j in range(len(part)):
            some |= part[j] >= least
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
def add_up(products: Products, row: int, half: np.ndarray) -> None:
    """One row of half scores, into `half` [N]."""
    part = products.pieces[0, row]
    shift = products.shift
    for j in range(len(half)):
        half[j] = part[j] + shift[j]
    for number in range(1, len(products.pieces)):
        part = products.pieces[number, row]
        for j in range(len(half)):
            half[j] += part[j]


@compiled
def scan_rows(
    products: Products,
    probes: Features,
    gallery: Features,
    turned: np.ndarray,
    windows: RowWindows,
    histogram: np.ndarray,
    contest: Contest,
    near: Pairs,
    found: Pairs,
    rounds: bool,
) -> tuple[int, int, np.ndarray]:
    """Sort the scores of r probes against N distractors in, and find what can be among the best of each probe.

    The counts are added to `histogram` int64 [r, 2 K + 2], as `sort_in` says. `found` takes the candidates; it and
    `near`, which is scratch, have room for r N pairs. `turned` is as in `exact_scores`; `rounds`: whether scores round
    at all. Returns how many scores were computed again for a threshold, how many candidates there are, and `turned`.
    """
    weights = products.weights
    half = np.empty(products.pieces.shape[2], np.float32)
    top = np.empty(contest.count, np.float64)
    near_count = count = 0
    for i in range(products.pieces.shape[1]):
        add_up(products, i, half)
        of_row = windows.tables[i], windows.scale[i], windows.offset[i], weights, histogram[i]
        some = sort_in(half, windows.low[i, 0], *of_row, near.columns[near_count:])
        if some:
            columns = near.columns[near_count : near_count + some]
            some = look_closer(half, windows.low[i], windows.high[i], *of_row, columns, near.slots[near_count:])
            near.rows[near_count : near_count + some] = i
            near_count += some
        some = candidates(half, contest.least[i], contest.width[i], top, found.columns[count:])
        found.rows[count : count + some] = i
        for j in range(count, count + some):
            found.scores[j] = (half[found.columns[j]] + half[found.columns[j]]) - probes.squares[i]
        count += some
    turned = exact_scores(probes, gallery, turned, near.rows[:near_count], near.columns[:near_count], near.scores)
    for j in range(near_count):
        i = near.rows[j]
        histogram[i, climb(near.scores[j], windows.thresholds[i], near.slots[j])] += weights[near.columns[j]]
    if rounds:
        turned = exact_scores(probes, gallery, turned, found.rows[:count], found.columns[:count], found.scores)
    return near_count, count, turned


@compiled
def count_impostors(
    products: Products,
    which: np.ndarray,
    probes: Features,
    gallery: Features,
    turned: np.ndarray,
    windows: GenuineWindows,
    histogram: np.ndarray,
    near: Pairs,
    rounds: bool,
) -> tuple[int, np.ndarray]:
    """Sort the scores of rows `which` int64 [r] of a block into the gaps between all genuine scores.

    `probes` are those of `which`; the counts are added to `histogram` int64 [2 U + 2]; the rest as in `scan_rows`.
    Returns how many scores were computed again, and `turned`.
    """
    weights, scale, offset = products.weights, windows.scale, windows.offset
    value = np.empty(products.pieces.shape[2], np.float32)
    count = 0
    for i in range(len(which)):
        add_up(products, which[i], value)
        for j in range(len(value)):
            value[j] = (value[j] + value[j]) - probes.squares[i]
        columns = near.columns[count:]
        some = sort_in(value, windows.lowest, windows.table, scale, offset, weights, histogram, columns)
        near.rows[count : count + some] = i
        for j in range(some):
            near.scores[count + j] = value[columns[j]]
        count += some
    if rounds:
        turned = exact_scores(probes, gallery, turned, near.rows[:count], near.columns[:count], near.scores)
    for j in range(count):
        about = windows.places[to_bin(near.scores[j], scale, offset, len(windows.places))]
        histogram[climb(near.scores[j], windows.genuine, about)] += weights[near.columns[j]]
    return count, turned


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
    near, own_row = np.empty(images.shape[1], np.int64), np.empty(images.shape[1], np.int64)
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
                own_row[:count] = first + i
                pair_dots(probes, probes, own_row[:count], near[:count], exact)
                for j in range(count):
                    value = (exact[j] + exact[j]) + (-own + -squares[near[j]])
                    before += (value > score) | ((value == score) & (near[j] > mate))
            positions[i, t] = before


# ---------------------------------------------------------------------------------------------- text


@compiled
def join_integers(numbers: np.ndarray, separator: np.ndarray, text: np.ndarray, ends: np.ndarray) -> None:
    """Decimal digits of uint64 numbers [N], each followed by `separator` uint8; ends int64 [N]: where the digits end.

    `text` uint8 has room for 20 digits and a separator per number.
    """
    ten, zero = np.uint64(10), np.uint64(ord("0"))
    length = 0
    for i in range(len(numbers)):
        number, digits = numbers[i], 1
        while number >= ten:
            number //= ten
            digits += 1
        length += digits
        number = numbers[i]
        for place in range(length - 1, length - 1 - digits, -1):
            text[place] = zero + number % ten
            number //= ten
        ends[i] = length
        for character in separator:
            text[length] = character
            length += 1


@compiled
def join_scores(numbers: np.ndarray, separator: int, text: np.ndarray, odd: np.ndarray) -> int:
    """Float32 numbers [N] as `devkit_json.float_text` prints them, each followed by the byte `separator`.

    Only magnitudes from 0.01 up to 10, sixteen digits of which are a shift of a product that fits into 64 bits: of
    others nothing is written, and they are marked in `odd` bool [N]. `text` uint8 has room for 21 bytes a number;
    returns how many were written.
    """
    ten, zero, one = np.uint64(10), np.uint64(ord("0")), np.uint64(1)
    length = 0
    for i in range(len(numbers)):
        size = abs(np.float64(numbers[i]))
        odd[i] = not (0.01 <= size < 10)
        if not odd[i]:
            decimals = 15 if size >= 1 else 16 if size >= 0.1 else 17
            fraction, exponent = math.frexp(size)
            product = np.uint64(fraction * 2.0**24)  # times 2^(exponent - 24) is the number
            for _ in range(decimals):
                product *= np.uint64(5)
            shift = np.uint64(24 - exponent - decimals)
            digits = product >> shift
            rest, half = product - (digits << shift), one << (shift - one)
            if rest > half or (rest == half and digits & one):
                digits += one
            if numbers[i] < 0:
                text[length] = ord("-")
                length += 1
            length += decimals + 2  # with the digit before the point
            for place in range(length - 1, length - 1 - decimals, -1):
                text[place] = zero + digits % ten
                digits //= ten
            text[length - decimals - 1] = ord(".")
            text[length - decimals - 2] = zero + digits
            while text[length - 1] == zero and text[length - 2] == zero:
                length -= 1
        text[length] = separator
        length += 1
    return length
