"""The pass over one block of distractors on a CPU: a matrix product, then compiled loops over its rows (`kernels`)."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from megaface import kernels, scores
from megaface.segments import BEST, exceeding

if TYPE_CHECKING:
    from megaface.tally import Block, Scan


class CpuWork:
    """One block of distractors on its way past all probes. Each worker thread has its own."""

    def __init__(self, scan: "Scan", block: "Block") -> None:
        self.scan, self.block = scan, block
        self.segment, self.kind = scan.segments[block.segment], scan.kind(block.kind)
        self.windows, self.impostors = self.kind.open()
        self.gallery = scan.read(block)
        self.squares = scan.survey.squares[block.columns]
        self.weights = np.ones(len(block.columns), np.int64) if block.weights is None else block.weights
        shape = min(scan.rows, len(scan.probes)), len(block.columns)
        self.out, self.scratch = torch.empty(shape), torch.empty(shape)
        # Candidates for the best: room for every score, of which the system gives only what is touched.
        self.found = np.empty(self.out.numel(), np.int64), np.empty(self.out.numel(), np.int64)
        self.found_scores = np.empty(self.out.numel(), np.float32)

    def chunk(self, rows: slice) -> None:
        """Score probes `rows` against the block and add what that tells to the segment."""
        scan, size = self.scan, rows.stop - rows.start
        gallery, squares = torch.from_numpy(self.gallery), torch.from_numpy(self.squares)
        half = scores.half_scores(scan.probes[rows], gallery, squares, self.out[:size], self.scratch[:size]).numpy()
        self.count(rows, half)
        self.find_best(rows, half)
        which = scan.impostors_in(rows)
        if len(which):
            self.count_impostors(which, half[which - rows.start])

    def count(self, rows: slice, half: np.ndarray) -> None:
        """Sort the half scores of probes `rows` into the gaps between their thresholds."""
        histogram = np.zeros_like(self.segment.histogram[rows])
        with self.kind.lock:
            windows = self.windows.for_kernel(rows)
        recomputed = kernels.count_rows(half, *self.sides(rows), self.weights, windows, histogram)
        with self.segment.lock:
            self.segment.histogram[rows] += histogram
            self.segment.recomputed += recomputed

    def find_best(self, rows: slice, half: np.ndarray) -> None:
        """Offer what can be among the five best of probes `rows`."""
        least, width = self.kind.least(rows, self.segment.fifth(rows))
        rounds = not self.scan.bounds.exact
        count = kernels.best_rows(half, *self.sides(rows), least, width, rounds, BEST, *self.found, self.found_scores)
        if not count:
            return
        probe, column = (some[:count] for some in self.found)
        twins = None if self.block.weights is None else self.scan.twins
        self.segment.add_best(rows.start + probe, self.block.columns[column], self.found_scores[:count], twins)
        if rounds:
            with self.segment.lock:
                self.segment.recomputed += count

    def count_impostors(self, which: np.ndarray, half: np.ndarray) -> None:
        """Add the scores of the ROC's probes `which` to the impostors above each genuine score."""
        value = 2 * half - self.scan.survey_of_probes.squares[which][:, None]
        histogram = np.zeros((1, len(self.segment.accepted) + 1), np.int64)
        with self.kind.lock:
            windows = self.impostors.for_kernel()
        recomputed = kernels.count_rows(value, *self.sides(which), self.weights, windows, histogram)
        with self.segment.lock:
            self.segment.accepted += exceeding(histogram)[0]
            self.segment.recomputed += recomputed

    def sides(self, rows: slice | np.ndarray) -> tuple[np.ndarray, ...]:
        """Features and squared norms of probes and of the block."""
        scan = self.scan
        return scan.values[rows], scan.survey_of_probes.squares[rows], self.gallery, self.squares
