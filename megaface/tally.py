"""One pass over the distractors: how many beat each threshold of each probe, and which are the best five.

Every number of Challenge 1 that involves distractors is one of three: `C(a, s)`, how many distractors score above s
against probe a; the five best of a probe; and, for the ROC, how many scores of the first hundred probes exceed each
genuine score. `tally` answers all three for any number of thresholds without a full score matrix: blocks of
distractors times chunks of probes go through a matrix product, and only scores so close to a threshold that rounding
could decide are computed again in the devkit's own order (`scores` proves how close that is).

`scan` plans the pass, `tally_cpu` and `tally_gpu` do the work per score, and this module runs them and adds up.

Two kinds of input would defeat the bound, so they are handled apart: identical distractors (they tie with everything
that their twins tie with) are scored once and counted as often as they occur, and distractors of very different norms
go into classes of comparable norm, lest one outlier widen every window.

The price: two passes over the distractors (the first for norms, finiteness and twins), and up to 130 MB of tables.
Features that make most scores nearly equal without being identical or exact (sign codes divided by a root, say) are
recomputed for the most part and take some ten times as long.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

import utils
from megaface import scores
from megaface.scan import Block, Questions, Scan, worker_count
from megaface.scores import Survey
from megaface.segments import exceeding
from megaface.tally_cpu import CpuWork
from megaface.tally_gpu import GpuWork
from utils import InputError


@dataclass(frozen=True)
class Tally:
    """The answers for the first m distractors."""

    above: np.ndarray  # int64 [n, K]: C(a, thresholds[a, k])
    best_index: np.ndarray  # int64 [n, 5]: score descending, equal scores larger index first; -1 where there are fewer
    best_score: np.ndarray  # float32 [n, 5]
    accepted: np.ndarray  # int64 [U]: impostor scores above genuine[k]
    recomputed: int  # scores that were computed again in the devkit's order


@contextmanager
def worker_threads(device: torch.device) -> Iterator[Executor]:
    """Threads that share the work, with matrix products in true float32 (no TF32, no bfloat16)."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with utils.computing_threads(worker_count(device)) as pool:
            yield pool
    finally:
        torch.set_float32_matmul_precision(precision)


class FeatureError(InputError):
    """A feature that cannot be scored: number `row` of the `side` ("probe" or "distractor")."""

    def __init__(self, side: str, row: int, reason: str) -> None:
        super().__init__(f"{side} {row}: {reason}")
        self.side, self.row, self.reason = side, row, reason


def start_survey(values: np.ndarray, pool: Executor) -> Iterator[Survey]:
    """Let the pool survey features [n, d] piece by piece; returns at once."""
    return pool.map(lambda rows: scores.survey_rows(values[rows]), scores.survey_ranges(len(values)))


def finish_survey(values: np.ndarray, name: str, parts: Iterable[Survey], usable: np.ndarray | None = None) -> Survey:
    """The survey of all features; `FeatureError` for a usable one whose scores could be not finite."""
    whole = scores.join_surveys(list(parts))
    fits = whole.squares <= scores.LARGEST_SQUARE  # false for NaN
    bad = np.flatnonzero(~fits if usable is None else ~fits & usable)
    if len(bad):
        reason = "is too large for float32" if np.isfinite(values[bad[0]]).all() else "has a value that is not finite"
        raise FeatureError(name, int(bad[0]), f"the feature {reason} ({len(bad)} such of {len(values)} {name}s)")
    return whole


def tally(
    probes: np.ndarray,
    of_probes: Survey,
    distractors: np.ndarray,
    survey: Iterable[Survey],
    questions: Questions,
    sizes: Sequence[int],
    pool: Executor,
    *,
    ignored: np.ndarray | None = None,
    absent: np.ndarray,
    device: torch.device,
    advance: Callable[[int], object] = lambda columns: None,
) -> list[Tally]:
    """Answer `questions` for the first m distractors, for every m of `sizes`, which ascend up to M.

    `probes` float32 [n, d] and their survey; `distractors` [M, d] float32 or float64 (a memory-mapped array is read in
    blocks) and their survey that was started; `pool` as from `worker_threads` for this device.
    `ignored` bool [M] marks distractors that can match nothing, whatever is in their rows, `absent` bool [n] probes
    without a feature: their rows, zeros, count nothing and have no best distractors. `advance` is called with the
    number of distractors that each finished block covered. Raises `InputError` for features that are not finite or
    too large.
    """
    usable = np.ones(sizes[-1], bool) if ignored is None else ~np.asarray(ignored[: sizes[-1]], bool)
    of_distractors = finish_survey(distractors, "distractor", survey, usable)
    scan = Scan(probes, of_probes, distractors, of_distractors, questions, sizes, usable, absent, device)
    scan.plan(usable)
    advance(int((~usable).sum()))
    workers = Workers(scan)
    for covered in pool.map(workers.score, scan.blocks):
        advance(covered)
    return workers.collect()


class Workers:
    """What takes blocks past all probes: one `CpuWork` or `GpuWork` for each thread of the pool."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.local = threading.local()  # each thread's `work`
        self.works: list[CpuWork | GpuWork] = []

    def score(self, block: Block) -> int:
        """Score one block against all probes; returns how many distractors it stands for."""
        if not hasattr(self.local, "work"):
            self.local.work = CpuWork(self.scan) if self.scan.device.type == "cpu" else GpuWork(self.scan)
            self.works.append(self.local.work)
        self.local.work.take(block)
        return int(len(block.columns) if block.weights is None else block.weights.sum())

    def collect(self) -> list[Tally]:
        """Add the segments up to each size."""
        for work in self.works:
            work.add_to_segment()
        answers: list[Tally] = []
        total = self.scan.new_segment()
        for segment in self.scan.segments:
            total.add(segment)
            answers.append(
                Tally(
                    exceeding(total.histogram),
                    total.best_index.copy(),
                    total.best_score.copy(),
                    total.accepted.copy(),
                    total.recomputed,
                )
            )
        return answers
