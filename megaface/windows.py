"""Where rounding could decide: windows around thresholds, and tables that find the scores inside them quickly.

The matrix product yields half scores D, with `2 D - |p|^2` within W of the devkit's score (`scores`, equation 3).
Around every threshold s of probe a lies a window in units of D: above `high` a score surely exceeds s, below `low` it
surely does not, and between the two it has to be computed again in the devkit's order.

To sort millions of scores into the gaps between some fifty thresholds a row, the range of the thresholds is cut into
bins, and a table says for each bin how many thresholds lie below it, or that a window touches it. The map from values
to bins is monotone, and values and window edges go through the same operations, so a bin can never contradict a
comparison: at worst a bin is marked that need not have been. Where none is marked, the table is the whole answer.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megaface import kernels
from megaface.scores import UNIT, Bounds, GalleryClass

TABLE_ENTRIES = 1 << 25  # of the tables of all probes together: 32 MB for up to 127 thresholds a probe
# Bins a probe: a table fits into a core's first-level cache beside a row of scores; a GPU has none to fill.
LARGEST_TABLE, LARGEST_TABLE_GPU = 2048, 8192
SCORES_PER_BIN = 8  # of a probe: fewer would not repay the making of a table
IMPOSTOR_BINS = 1 << 16
STEEPEST = 1e30  # bins per unit: keeps the map of values to bins finite


def outward(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 window edges as float32, the lower rounded down and the upper up."""
    down, up = low.astype(np.float32), high.astype(np.float32)
    down = np.where(down > low, np.nextafter(down, np.float32(-np.inf)), down)
    up = np.where(up < high, np.nextafter(up, np.float32(np.inf)), up)
    return down, up


def line(least: np.ndarray, most: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 (scale, offset) of the map that takes `least` to bin 2 and `most` to bin `bins - 3`.

    Bin 0 and the last stay free of window edges: whatever is clamped into them is surely below or above everything.
    """
    # A range of a few roundings would overflow the map; a wider range is always right.
    span = np.maximum(most - least, np.maximum(np.abs(least) * 1e-5, bins / STEEPEST))
    scale = (bins - 5) / span
    return scale.astype(np.float32), (2 - least * scale).astype(np.float32)


def smallest_kind(most: int) -> type[np.integer]:
    """The smallest integers, among those that torch has, that count up to `most`."""
    return next(kind for kind in (np.uint8, np.int16, np.int32) if most <= np.iinfo(kind).max)


class Windows:
    """The windows of all probes' thresholds against one class of distractors, and their tables."""

    def __init__(
        self,
        bounds: Bounds,
        gallery: GalleryClass,
        thresholds: np.ndarray,
        absent: np.ndarray,
        distractors: int,
        device: torch.device,
    ) -> None:
        """`thresholds` float32 [n, K] ascending, padded with +inf; `absent` bool [n] probes that count nothing;
        `distractors`: about how many scores a probe will have."""
        self.device = device
        self.count = thresholds.shape[1]
        asked = np.where(absent, 0, np.isfinite(thresholds).sum(axis=1))  # how many thresholds each probe has
        # One more column of infinities ends every row.
        shape = len(thresholds), self.count + 1
        low, high = np.full(shape, np.inf, np.float32), np.full(shape, np.inf, np.float32)
        ended = np.full(shape, np.inf, np.float32)
        ended[:, :-1] = thresholds
        width = bounds.half_width(gallery, thresholds)
        kernels.fill_windows(ended, asked, bounds.squares, width, bounds.exact, low, high)
        self.low, self.high, self.thresholds = (torch.from_numpy(edge).to(device) for edge in (low, high, ended))
        self.lowest = self.low[:, 0].clone()
        bins = min(TABLE_ENTRIES // max(1, len(low)), distractors // SCORES_PER_BIN)
        bins = int(np.clip(bins, 256, LARGEST_TABLE if device.type == "cpu" else LARGEST_TABLE_GPU))
        self.bins = 1 << (bins.bit_length() - 1)
        self.scale, self.offset = self._lines(low, high, asked)
        self._tables: dict[int, Tensor] = {}

    def _lines(self, low: np.ndarray, high: np.ndarray, asked: np.ndarray) -> tuple[Tensor, Tensor]:
        rows, last = np.arange(len(low)), np.maximum(asked - 1, 0)
        least, most = (
            np.where(asked > 0, some, without).astype(np.float64)
            for some, without in (
                (np.minimum(low[:, 0], high[:, 0]), 0),
                (np.maximum(low[rows, last], high[rows, last]), 1),
            )
        )
        scale, offset = line(least, most, self.bins)
        return torch.from_numpy(scale).to(self.device), torch.from_numpy(offset).to(self.device)

    def to_bins(self, values: Tensor, rows: Tensor) -> Tensor:
        """Bins int32 [r, N] of half scores [r, N] of probes `rows` [r]: those of the k-th row follow the others'.

        Multiplication and addition are two calls: a fused one might be used in some vector lanes and not in others. A
        row's start is added to whole numbers: added before, it would round a value up or not depending on the row.
        """
        bins = values * self.scale[rows][:, None]
        bins += self.offset[rows][:, None]
        bins = bins.clamp_(0, self.bins - 1).to(torch.int32)
        bins += torch.arange(len(rows), device=values.device, dtype=torch.int32)[:, None] * self.bins
        return bins

    def for_kernel(self, rows: slice) -> kernels.RowWindows:
        """What `kernels.scan_rows` takes, for probes `rows`. Call from one thread at a time."""
        low, high, thresholds, scale, offset = (
            some[rows].numpy() for some in (self.low, self.high, self.thresholds, self.scale, self.offset)
        )
        return kernels.RowWindows(low, high, thresholds, self.table(rows).numpy(), scale, offset)

    def table(self, rows: slice) -> Tensor:
        """uint8, int16 or int32 [r, bins] for probes `rows`, as `kernels.fill_table` says. Call from one thread at a
        time."""
        if rows.start not in self._tables:
            table = np.empty((rows.stop - rows.start, self.bins), smallest_kind(2 * self.count + 1))
            low, high, scale, offset = (
                some[rows].cpu().numpy() for some in (self.low, self.high, self.scale, self.offset)
            )
            kernels.fill_tables(low, high, scale, offset, table)
            self._tables[rows.start] = torch.from_numpy(table).to(self.device)
        return self._tables[rows.start]


class ImpostorWindows:
    """Windows of all genuine scores, in units of the score: the ROC compares every impostor with all of them."""

    def __init__(
        self, bounds: Bounds, gallery: GalleryClass, rows: np.ndarray, genuine: np.ndarray, device: torch.device
    ) -> None:
        """`rows` int64 [r] the probes whose scores are impostors, `genuine` float32 [U] ascending."""
        largest = bounds.squares[rows].max(initial=0.0) + gallery.largest_square
        width = (
            float(bounds.half_width(gallery)[rows].max(initial=0.0)) + 4 * UNIT * largest
        )  # 2 D - |p|^2 rounds again
        exact = np.array(genuine, np.float64)
        low, high = outward(exact - width, exact + width)
        if bounds.exact:  # nothing rounds, so a score on a genuine one is not above it
            high, low = genuine, np.nextafter(genuine, np.float32(np.inf))
        self.device, self.exact = device, bounds.exact
        self.low, self.high, self.genuine = (np.append(some, np.float32(np.inf)) for some in (low, high, genuine))
        self.lowest = float(min(low[0], high[0]))
        scale, offset = line(np.minimum(low, high)[:1].astype(float), high[-1:].astype(float), IMPOSTOR_BINS)
        self.scale, self.offset = scale[0], offset[0]

    def for_kernel(self) -> kernels.GenuineWindows:
        """What `kernels.count_impostors` takes. Call from one thread at a time."""
        return kernels.GenuineWindows(self.lowest, self.genuine, self.table, self._places, self.scale, self.offset)

    @cached_property
    def table(self) -> np.ndarray:
        """int32 [bins], as `kernels.fill_table` says."""
        table = np.empty(IMPOSTOR_BINS, np.int32)
        kernels.fill_table(self.low, self.high, self.scale, self.offset, table)
        return table

    @cached_property
    def _places(self) -> np.ndarray:
        """About how many genuine scores are below a score in each bin, int32 [bins]."""
        places = np.empty(IMPOSTOR_BINS, np.int32)
        kernels.fill_table(self.genuine, self.genuine, self.scale, self.offset, places)
        return places % len(self.genuine)

    @cached_property
    def near(self) -> Tensor:
        """Whether a bin touches a window, bool [bins]; no window is any where nothing rounds."""
        return torch.from_numpy((self.table >= len(self.genuine)) & (not self.exact)).to(self.device)

    def to_bins(self, values: Tensor) -> Tensor:
        """Bins int32 of scores; monotone."""
        bins = values * float(self.scale)
        bins += float(self.offset)
        bins.clamp_(0, IMPOSTOR_BINS - 1)
        return bins.to(torch.int32)
