"""The pass over blocks of distractors on a CPU: a matrix product, then compiled loops over its rows (`kernels`)."""

import math

import numpy as np
import torch

from megaface import kernels, scores
from megaface.scan import Block, Scan
from megaface.segments import BEST, exceeding

PRODUCTS = 1 << 21  # room for the products of a chunk, in all pieces of the dimensions: 8 MB


class CpuWork:
    """What one worker thread needs to take blocks of distractors past all probes: memory for products, and counts."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.pieces = scores.product_pieces(scan.values.shape[1])
        self.rows = min(scan.rows, len(scan.values), max(kernels.GROUP, PRODUCTS // (len(self.pieces) * scan.columns)))
        room = self.rows * scan.columns
        self.products = torch.empty(len(self.pieces) * room)  # by torch, which starts it where a cache line starts
        self.found, self.near = _room(room), _room(room)  # candidates, and what is next to a threshold
        self.segment = scan.segments[0]
        self._start_counts()

    def _start_counts(self) -> None:
        # Twice as wide as what counts: see `kernels.sort_in`.
        probes, codes = self.segment.histogram.shape
        self.histogram = np.zeros((probes, 2 * codes), np.int64)
        self.accepted = np.zeros((1, 2 * len(self.segment.accepted) + 2), np.int64)
        self.recomputed = 0

    def add_to_segment(self) -> None:
        """Hand the counts over to the segment that they belong to."""
        with self.segment.lock:
            self.segment.histogram += self.histogram[:, : self.segment.histogram.shape[1]]
            self.segment.accepted += exceeding(self.accepted[:, : len(self.segment.accepted) + 1])[0]
            self.segment.recomputed += self.recomputed

    def take(self, block: Block) -> None:
        """Score a block against all probes."""
        scan = self.scan
        if scan.segments[block.segment] is not self.segment:
            self.add_to_segment()
            self.segment = scan.segments[block.segment]
            self._start_counts()
        self.block, self.kind = block, scan.kind(block.kind)
        self.windows, self.impostors = self.kind.open()
        self.gallery, self.squares = scan.read(block), scan.survey.squares[block.columns]
        self.shift = self.squares * np.float32(-0.5)
        self.turned = np.empty((0, 0), np.float32)
        self.weights = np.ones(len(block.columns), np.int64) if block.weights is None else block.weights
        for start in range(0, len(scan.values), self.rows):
            self._chunk(slice(start, min(start + self.rows, len(scan.values))))

    def _chunk(self, rows: slice) -> None:
        """Score probes `rows` against the block; count, and offer the segment what can be among the five best."""
        scan = self.scan
        products = kernels.Products(self._multiply(rows), self.shift, self.weights)
        gallery = kernels.Features(self.gallery, self.squares)
        with self.kind.lock:
            windows = self.windows.for_kernel(rows)
        contest = kernels.Contest(*self.kind.least(rows, self.segment.fifth(rows)), BEST)
        rounds = not scan.bounds.exact
        recomputed, count, self.turned = kernels.scan_rows(
            products,
            self._probes(rows),
            gallery,
            self.turned,
            windows,
            self.histogram[rows],
            contest,
            self.near,
            self.found,
            rounds,
        )
        self.recomputed += recomputed + (count if rounds else 0)
        if count:
            probe, column, score, _ = (some[:count] for some in self.found)
            twins = None if self.block.weights is None else scan.twins
            self.segment.add_best(rows.start + probe, self.block.columns[column], score, twins)
        which = scan.impostors_in(rows)
        if self.impostors is not None and len(which):
            with self.kind.lock:
                genuine = self.impostors.for_kernel()
            recomputed, self.turned = kernels.count_impostors(
                products,
                which - rows.start,
                self._probes(which),
                gallery,
                self.turned,
                genuine,
                self.accepted[0],
                self.near,
                rounds,
            )
            self.recomputed += recomputed if rounds else 0

    def _multiply(self, rows: slice) -> np.ndarray:
        """The products of probes `rows` with the block, float32 [P, r, N], in P pieces of the dimensions."""
        shape = len(self.pieces), rows.stop - rows.start, len(self.gallery)
        products = self.products[: math.prod(shape)].view(shape)
        left, right = self.scan.probes[rows], torch.from_numpy(self.gallery).t()
        for (start, end), out in zip(self.pieces, products, strict=True):
            torch.mm(left[:, start:end], right[start:end], out=out)
        return products.numpy()

    def _probes(self, rows: slice | np.ndarray) -> kernels.Features:
        return kernels.Features(self.scan.values[rows], self.scan.survey_of_probes.squares[rows])


def _room(count: int) -> kernels.Pairs:
    """Room for every score, of which the system gives only what is touched."""
    return kernels.Pairs(*(np.empty(count, kind) for kind in (np.int64, np.int64, np.float32, np.int64)))
