"""The devkit's score, exact to the bit, and rigorous bounds for everything that stands in for it.

The devkit scores a probe p against a gallery feature g as `S = (dot + dot) + (-|p|^2 + -|g|^2)` in float32, where `dot`
adds the products in the order of the dimensions, each product and each sum rounded (no fused multiply-add), and
`|x|^2` is a float64 sum, four squares at a time, rounded to float32. `pair_scores` and `block_scores` do exactly that:
the order inside a pair is kept, so the result is the devkit's to the last bit. At 512 dimensions that costs a core 0.02
(all pairs of a block) to 0.2 microseconds a pair, three to thirty times a matrix product, which is why the bulk of the
comparisons goes through `torch.mm` instead, and why this module proves how far the two can be apart.

**The bound.** Let u = 2^-24, eta = 2^-126 (what one operation can lose to underflow, flushed or not),
gamma_k = k u / (1 - k u), N = |p| |g| >= sum |p_k g_k|, d the exact dot product, h = -|g|^2 / 2. A matrix product is
split along the dimensions into pieces of about 256, each computed by BLAS in an order that nobody knows (any order,
with or without FMA, obeys gamma_256), and the pieces and h are added:

    |D - (d + h)|  <=  gamma_(piece + pieces + 1) N + gamma_(pieces + 1) |h| + 2 n eta                             (1)

The devkit's sum is sequential, so its error is at most u times the sum of the magnitudes of its partial sums s_k,
plus u N for the products. The usual bound takes |s_k| <= N and gives n u N. A partial sum is small at both ends,
though: |s_k| <= |p[:k]| |g[:k]| and |s_k| <= |d| + |p[k:]| |g[k:]| (Cauchy-Schwarz), so with R = sum_k of the smaller

    |dot - d|  <=  u (N + R + n gamma_n N) + 2 n eta                                                               (2)

For random unit vectors R is n/4 instead of n. Adding |p|^2 and |g|^2 rounds twice more: 3 u (|p|^2 + |g|^2). Hence
S > s is certain when 2 D - |p|^2 > s + W and impossible when it is < s - W, with

    W  =  2 * (1) + 2 * (2) + 4 u (|p|^2 + |g|^2)                                                                  (3)

R depends on |d|, and so on the pair. `Bounds.half_width` takes |d| as large as it can be for a pair next to one of
the thresholds, plus a slack X that exceeds the whole right side of (3) at its crudest (R = n N). A pair with larger
|d| is further from its threshold by what |d| exceeds that, and the bound grows only by n u < 1 times as much, so the
decision stands. The bound is proportional to the features' scale (down to eta), whatever it is.

When all features are multiples of one power of two, few enough of them to fit in 24 bits (quantised features, the
usual source of exact ties), every operation above is exact in every order and W = 0: see `is_exact`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megaface import kernels

UNIT = 2.0**-24  # float32: largest relative error of one rounding
UNDERFLOW = 2.0**-126  # float32: largest absolute error of one operation that underflows, even when flushed to zero
# |S| <= (|p| + |g|)^2 stays finite in float32, and so does all that is computed on the way, up to this |x|^2.
LARGEST_SQUARE = 0.99 * float(np.finfo(np.float32).max) / 4

CHUNKS = 16  # pieces in which the norms of prefixes and tails are known, for (2)
PIECE = 256  # dimensions per matrix product, for (1): shorter is more exact and slower
# Scores that are added up together. A GPU is bound by the calls, two per dimension, so it gets as many as a small one
# has memory for (1.6 GB of products); on a CPU two buffers shall stay in a core's second-level cache.
PAIR_BATCH_GPU = 1 << 18
BLOCK_SCORES, BLOCK_SCORES_GPU = 1 << 17, 1 << 24
SURVEY_ROWS = 1024


def gamma(k: float) -> float:
    """k u / (1 - k u), the standard bound on k successive relative roundings (Higham 2002, section 3.1)."""
    return k * UNIT / (1 - k * UNIT)


def dimension_chunks(dimensions: int) -> list[tuple[int, int]]:
    """At most `CHUNKS` consecutive ranges that cover the dimensions."""
    edges = np.unique(np.linspace(0, dimensions, min(CHUNKS, dimensions) + 1).astype(int))
    return list(itertools.pairwise(edges.tolist()))


# ---------------------------------------------------------------------------------------------- exact scores


def pair_scores(
    left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, left_squares: Tensor, right_squares: Tensor
) -> Tensor:
    """Devkit scores float32 [N] of the pairs (left[rows[k]], right[columns[k]]).

    `left` [n, d] and `right` [m, d] are float32; `*_squares` [n], [m] are their `Survey.squares`.
    """
    if left.device.type == "cpu":
        dots = torch.empty(len(rows))
        kernels.pair_dots(left.numpy(), right.numpy(), rows.numpy(), columns.numpy(), dots.numpy())
    else:
        dots = _pair_dots_gpu(left, right, rows, columns)
    return _finish(dots, left_squares[rows], right_squares[columns])


def _pair_dots_gpu(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sequential dot products with torch alone, which promises no order for a sum: the loop is written out."""
    dots = torch.zeros(len(rows), device=left.device)
    for start in range(0, len(rows), PAIR_BATCH_GPU):
        part = slice(start, start + PAIR_BATCH_GPU)
        products = left.index_select(0, rows[part])
        products *= right.index_select(0, columns[part])
        total = dots[part]
        for product in products.t().contiguous():
            total += product
    return dots


def block_scores(left: Tensor, right: Tensor, left_squares: Tensor, right_squares: Tensor) -> Tensor:
    """Devkit scores float32 [n, m] of all pairs; dearer than a matrix product, cheaper per pair than `pair_scores`."""
    dots = torch.empty(len(left), len(right), device=left.device)
    together = BLOCK_SCORES if left.device.type == "cpu" else BLOCK_SCORES_GPU
    width = max(1, together // max(1, len(left)))
    for start in range(0, len(right), width):
        columns = right[start : start + width].t().contiguous()
        total = torch.zeros(len(left), columns.shape[1], device=left.device)
        product = torch.empty_like(total)
        for k in range(left.shape[1]):
            # Two calls on purpose: addcmul may fuse them and round once.
            torch.mul(left[:, k, None], columns[k], out=product)
            total += product
        dots[:, start : start + width] = total
    return _finish(dots, left_squares[:, None], right_squares[None])


def _finish(dots: Tensor, left_squares: Tensor, right_squares: Tensor) -> Tensor:
    return (dots + dots) + (-left_squares + -right_squares)


# ---------------------------------------------------------------------------------------------- survey of features


@dataclass(frozen=True)
class Survey:
    """What one pass over a set of features [n, d] tells: all that bounds and duplicates need."""

    squares: np.ndarray  # float32 [n]: |x|^2 as the devkit has it; NaN or inf where a feature is not finite
    chunk_squares: np.ndarray  # float32 [n, C]: the same per range of dimensions, to a relative 1e-6
    keys: np.ndarray  # uint64 [n]: equal for equal features, almost never for others
    widths: np.ndarray  # float64 [C]: how many dimensions each range has

    @property
    def dimensions(self) -> int:
        return int(self.widths.sum())


def survey_rows(values: np.ndarray) -> Survey:
    """`Survey` of a few features [n, d], float32 or float64 (rounded to float32 first, as everywhere here)."""
    chunks = dimension_chunks(values.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(values, np.float32)
        parts = np.empty((len(values), len(chunks)))
        kernels.range_squares(values, np.array([a for a, _ in chunks] + [values.shape[1]]), parts)
        total = parts.sum(axis=1)
        # Another order than the devkit's can round to another float32 only next to the midpoint of two.
        margin = total * (values.shape[1] * 2.0**-52)
        unsure = np.flatnonzero((total - margin).astype(np.float32) != (total + margin).astype(np.float32))
        kernels.devkit_squares(values, unsure, total)
        squares = total.astype(np.float32)
        # Any fixed odd multipliers do; these are the splitmix64 increment and its multiples.
        multipliers = (np.arange(1, len(chunks) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
        keys = (parts.view(np.uint64) * multipliers).sum(axis=1, dtype=np.uint64)
        return Survey(squares, parts.astype(np.float32), keys, np.array([b - a for a, b in chunks], float))


def join_surveys(parts: list[Survey]) -> Survey:
    """One survey of consecutive parts."""
    return Survey(
        np.concatenate([part.squares for part in parts]),
        np.concatenate([part.chunk_squares for part in parts]),
        np.concatenate([part.keys for part in parts]),
        parts[0].widths,
    )


def survey_ranges(count: int) -> Iterator[slice]:
    """The pieces in which a large array is surveyed."""
    for start in range(0, count, SURVEY_ROWS):
        yield slice(start, min(start + SURVEY_ROWS, count))


def quantum(values: np.ndarray) -> float:
    """The largest power of two of which all float32 `values` are multiples; infinity when all are zero."""
    values = np.asarray(values, np.float32)
    mantissa, exponent = np.frexp(values[values != 0])
    if not len(mantissa):
        return float("inf")
    whole = np.abs(mantissa.astype(np.float64) * 2.0**24).astype(np.int64)
    lowest = (whole & -whole).astype(np.float64)
    return float(np.ldexp(lowest, exponent - 24).min())


def is_exact(step: float, left_square: float, right_square: float) -> bool:
    """Whether no operation on features with this quantum and these largest |x|^2 can round, in any order.

    Every product, partial sum, square and score is a multiple of step^2 / 2 and below 2 (|p|^2 + |g|^2); it is
    exact in float32 when that needs at most 24 bits and no product underflows.
    """
    if step == float("inf"):
        return True
    grain = step * step / 2
    return grain > UNDERFLOW and 2 * (left_square + right_square) <= grain * 2**24


# ---------------------------------------------------------------------------------------------- bounds


@dataclass(frozen=True)
class GalleryClass:
    """Upper bounds that hold for every gallery feature of one class of comparable norms."""

    largest_square: float
    smallest_square: float
    prefix: np.ndarray  # float64 [C]: largest norm of the dimensions up to the end of range c
    tail: np.ndarray  # float64 [C]: largest norm of the dimensions from the start of range c


def _prefix_and_tail(chunk_squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper bounds [n, C] of the squared norms of the dimensions up to the end, and from the start, of each range."""
    squares = chunk_squares.astype(np.float64) * (1 + 1e-5) + 2 * UNDERFLOW * UNDERFLOW
    return squares.cumsum(axis=1), squares[:, ::-1].cumsum(axis=1)[:, ::-1]


def gallery_class(survey: Survey, members: np.ndarray) -> GalleryClass:
    """Bounds over `members` (indices) of a surveyed gallery."""
    prefix = np.zeros(len(survey.widths))
    tail = np.zeros(len(survey.widths))
    for part in np.array_split(members, max(1, len(members) // 65536)):
        some_prefix, some_tail = _prefix_and_tail(survey.chunk_squares[part])
        prefix, tail = np.maximum(prefix, some_prefix.max(axis=0)), np.maximum(tail, some_tail.max(axis=0))
    squares = survey.squares[members]
    return GalleryClass(float(squares.max()), float(squares.min()), np.sqrt(prefix), np.sqrt(tail))


def split_by_norm(squares: np.ndarray) -> np.ndarray:
    """Class numbers [n] such that norms inside a class differ by at most a factor of 2; class 0 is the largest.

    One outlier would otherwise widen the window of everything that is compared beside it. Greedy from the largest
    norm down, so normalised features are one class. Below 2^-30 of the largest norm the rest is one class.
    """
    classes = np.zeros(len(squares), np.int64)
    remaining = np.arange(len(squares))
    number = 0
    largest = float(squares.max(initial=0.0))
    while len(remaining):
        top = float(squares[remaining].max())
        inside = squares[remaining] >= top / 4
        if top <= largest * 2.0**-60:
            inside[:] = True
        classes[remaining[inside]] = number
        remaining = remaining[~inside]
        number += 1
    return classes


class Bounds:
    """Half widths W of (3), per probe, against a class of gallery features."""

    def __init__(self, survey: Survey, exact: bool) -> None:
        self.squares = survey.squares.astype(np.float64)
        self.prefix, self.tail = (np.sqrt(squares) for squares in _prefix_and_tail(survey.chunk_squares))
        self.widths = survey.widths
        self.exact = exact

    def half_width(self, gallery: GalleryClass, thresholds: np.ndarray | None = None) -> np.ndarray:
        """W float64 [n] that holds for every decision `S > s` against one of `thresholds` [n, K], ascending up to infs.

        Without thresholds W holds for any decision.
        """
        if self.exact:
            return np.zeros(len(self.squares))
        dimensions = float(self.widths.sum())
        pieces = len(product_pieces(int(dimensions))) + 1
        longest = max(b - a for a, b in product_pieces(int(dimensions)))
        norm = self.prefix[:, -1] * gallery.prefix[-1]
        underflow = 2 * dimensions * UNDERFLOW
        product = gamma(longest + pieces) * norm + gamma(pieces) * gallery.largest_square / 2 + underflow
        ends = self.squares + gallery.largest_square
        far = norm  # |d| cannot exceed this
        if thresholds is not None and thresholds.size:
            slack = 2 * (product + gamma(2 * dimensions) * norm + underflow) + 4 * UNIT * ends
            far = np.minimum(norm, self._largest_dot(gallery, thresholds) + slack)
        partial = (np.minimum(self.prefix * gallery.prefix, far[:, None] + self.tail * gallery.tail)) @ self.widths
        devkit = UNIT * (norm + partial + dimensions * gamma(dimensions) * norm) + underflow
        return 1.001 * (2 * (product + devkit) + 4 * UNIT * ends + 8 * UNDERFLOW)

    def _largest_dot(self, gallery: GalleryClass, thresholds: np.ndarray) -> np.ndarray:
        """The largest |dot| [n] at which a score can equal a threshold: 2 dot = s + |p|^2 + |g|^2."""
        count = np.isfinite(thresholds).sum(axis=1)
        low = thresholds[:, 0].astype(np.float64)
        high = np.take_along_axis(thresholds, np.maximum(count - 1, 0)[:, None], 1)[:, 0].astype(np.float64)
        smallest = np.abs(low + self.squares + gallery.smallest_square)
        largest = np.abs(high + self.squares + gallery.largest_square)
        return np.where(count > 0, np.maximum(smallest, largest) / 2, 0.0)


# ---------------------------------------------------------------------------------------------- matrix product


def product_pieces(dimensions: int) -> list[tuple[int, int]]:
    """The ranges of dimensions that go through one matrix product each."""
    count = -(-dimensions // PIECE)
    edges = np.linspace(0, dimensions, count + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))


def half_scores(left: Tensor, right: Tensor, right_squares: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """D = left @ right.T - |right|^2 / 2, float32 [n, m], within (1) of the exact value; 2 D - |p|^2 is the score.

    `out` and `scratch` are [n, m] buffers; the result is `out`.
    """
    (first, *others) = product_pieces(left.shape[1])
    torch.mm(left[:, first[0] : first[1]], right[:, first[0] : first[1]].t(), out=out)
    for start, end in others:
        torch.mm(left[:, start:end], right[:, start:end].t(), out=scratch)
        out += scratch
    out += right_squares * -0.5
    return out
