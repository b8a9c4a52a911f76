"""One pass over the distractors: how many beat each threshold of each probe, and which are the best five.

Every number of Challenge 1 that involves distractors is one of three: `C(a, s)`, how many distractors score above s
against probe a; the five best of a probe; and, for the ROC, how many scores of the first hundred probes exceed each
genuine score. `tally` answers all three for any number of thresholds without a full score matrix: blocks of
distractors times chunks of probes go through a matrix product, and only scores so close to a threshold that rounding
could decide are computed again in the devkit's own order (`scores` proves how close that is).

This module plans the pass and adds up its answers; `tally_cpu` and `tally_gpu` do the work per score.

Two kinds of input would defeat the bound, so they are handled apart: identical distractors (they tie with everything
that their twins tie with) are scored once and counted as often as they occur, and distractors of very different norms
go into classes of comparable norm, lest one outlier widen every window.

The price: two passes over the distractors (the first for norms, finiteness and twins), and up to 130 MB of tables.
Features that make most scores nearly equal without being identical or exact (sign codes divided by a root, say) are
recomputed for the most part and take some ten times as long.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from megaface import scores
from megaface.scores import Bounds, GalleryClass, Survey
from megaface.segments import BEST, Segment, exceeding
from megaface.tally_cpu import CpuWork
from megaface.tally_gpu import GpuWork
from megaface.windows import ImpostorWindows, Windows
from utils import InputError

CPU_BLOCK = 1024, 1024  # probes x distractors of one product: square, so that BLAS packs little; 4 MB of scores
GPU_BLOCK = 4096, 1 << 16
NARROW_BLOCK = 256  # distractors: fewer are not worth a worker


@dataclass(frozen=True)
class Questions:
    """What is asked about the distractors. All thresholds are devkit scores, float32."""

    thresholds: np.ndarray  # float32 [n, K]: per probe, strictly ascending, padded with +inf
    impostor_rows: np.ndarray  # int64 [r]: the probes whose scores are the ROC's impostors, ascending
    genuine: np.ndarray  # float32 [U]: strictly ascending genuine scores


@dataclass(frozen=True)
class Tally:
    """The answers for the first m distractors."""

    above: np.ndarray  # int64 [n, K]: C(a, thresholds[a, k])
    best_index: np.ndarray  # int64 [n, 5]: score descending, equal scores larger index first; -1 where there are fewer
    best_score: np.ndarray  # float32 [n, 5]
    accepted: np.ndarray  # int64 [U]: impostor scores above genuine[k]
    recomputed: int  # scores that were computed again in the devkit's order


@dataclass(frozen=True)
class Block:
    """Distractors of one segment and one class of norms that are scored together."""

    segment: int
    kind: int  # class of norms
    columns: np.ndarray  # int64, ascending
    weights: np.ndarray | None  # int64: how often each occurs; None: once


class Kind:
    """A class of norms: its bounds, and the windows around all thresholds, which it makes when a block needs them."""

    def __init__(self, scan: "Scan", gallery: GalleryClass) -> None:
        self.scan, self.gallery = scan, gallery
        self.lock = threading.Lock()
        self.windows: Windows | None = None
        self.impostors: ImpostorWindows | None = None

    def open(self) -> tuple[Windows, ImpostorWindows | None]:
        """The windows, made at the first call."""
        scan = self.scan
        with self.lock:
            if self.windows is not None:
                return self.windows, self.impostors
            asked, device = scan.questions, scan.device
            self.any_width = scan.bounds.half_width(self.gallery)  # float64 [n]: of the window of any decision
            if len(asked.genuine):
                self.impostors = ImpostorWindows(scan.bounds, self.gallery, asked.impostor_rows, asked.genuine, device)
            count = len(scan.distractors)
            self.windows = Windows(scan.bounds, self.gallery, asked.thresholds, scan.absent, count, device)
            return self.windows, self.impostors

    def close(self) -> None:
        """Let go of the windows; blocks that are under way keep theirs."""
        with self.lock:
            self.windows = self.impostors = None

    def least(self, rows: slice, fifth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For probes `rows` with these fifth best scores: the least half score of a candidate for the five best, and
        by how much a candidate can be below the fifth best half score of its own block. float64 [r] both."""
        # A candidate's exact score may be W above its half score's, and the fifth best W below.
        width = self.any_width[rows]
        least = (fifth + self.scan.bounds.squares[rows] - width) / 2
        return np.where(self.scan.absent[rows], np.inf, least), width


@contextmanager
def worker_threads(device: torch.device) -> Iterator[Executor]:
    """Threads that share the work, with matrix products in true float32 (no TF32, no bfloat16).

    Each thread tells torch that it wants no others: torch asks per thread, and BLAS would start as many for each.
    """
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    pool = ThreadPoolExecutor(worker_count(device), "challenge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads that start later begin with
        torch.set_float32_matmul_precision(precision)


def worker_count(device: torch.device) -> int:
    """Threads that share the work: a GPU is fed by one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


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
    for covered in pool.map(scan.score, scan.blocks):
        advance(covered)
    return scan.collect()


class Scan:
    """The state of one pass."""

    def __init__(
        self,
        probes: np.ndarray,
        of_probes: Survey,
        distractors: np.ndarray,
        of_distractors: Survey,
        questions: Questions,
        sizes: Sequence[int],
        usable: np.ndarray,
        absent: np.ndarray,
        device: torch.device,
    ) -> None:
        self.device, self.distractors, self.questions, self.sizes = device, distractors, questions, list(sizes)
        self.workers = worker_count(device)
        self.rows, self.columns = CPU_BLOCK if device.type == "cpu" else GPU_BLOCK
        self.absent = absent
        self.values, self.survey_of_probes, self.survey = probes, of_probes, of_distractors
        tops = float(of_probes.squares.max()), float(of_distractors.squares[usable].max(initial=0))
        self.bounds = Bounds(of_probes, rounds_nowhere(probes, distractors, usable, tops))
        self.probes = torch.from_numpy(probes).to(device)
        self.squares = torch.from_numpy(of_probes.squares).to(device)
        self.genuine = torch.from_numpy(questions.genuine).to(device)
        self.segments = [self.new_segment() for _ in sizes]
        self.local = threading.local()  # each thread's `work`
        self.works: list[CpuWork | GpuWork] = []
        self.blocks: list[Block] = []
        self.kinds: list[Kind] = []
        self.twins: dict[int, np.ndarray] = {}  # first of identical distractors -> the last `BEST` of them

    # ------------------------------------------------------------------------------------------ the plan

    def plan(self, usable: np.ndarray) -> None:
        """Cut the usable distractors into blocks of one class of norms and one segment."""
        leaders, weights, segments = [], [], []
        for number, (start, end) in enumerate(zip([0, *self.sizes[:-1]], self.sizes, strict=True)):
            members, times = self.unique(start + np.flatnonzero(usable[start:end]))
            leaders.append(members)
            weights.append(times)
            segments.append(np.full(len(members), number))
        members, times, segment = np.concatenate(leaders), np.concatenate(weights), np.concatenate(segments)
        groups = scores.split_by_norm(self.survey.squares[members])
        for kind in range(groups.max(initial=-1) + 1):
            self.kinds.append(Kind(self, scores.gallery_class(self.survey, members[groups == kind])))
            for number in range(len(self.sizes)):
                for repeated in (False, True):
                    inside = np.flatnonzero((groups == kind) & (segment == number) & ((times > 1) == repeated))
                    for part in self.cut(inside):
                        self.blocks.append(Block(number, kind, members[part], times[part] if repeated else None))

    def cut(self, members: np.ndarray) -> list[np.ndarray]:
        """Parts that are at most as wide as a block; for several workers equal ones, and as many for each."""
        if not len(members):
            return []
        if self.workers == 1:
            return np.split(members, range(self.columns, len(members), self.columns))
        count = -(-len(members) // self.columns)
        even = -(-count // self.workers) * self.workers
        return np.array_split(members, max(count, min(even, len(members) // NARROW_BLOCK)))

    def unique(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One of each set of identical distractors among `members`, ascending, and how often it occurs."""
        keys = self.survey.keys[members]
        order = np.argsort(keys, kind="stable")
        new = np.ones(len(keys), bool)
        new[1:] = keys[order][1:] != keys[order][:-1]
        if new.all():
            return members, np.ones(len(members), np.int64)
        leader = np.empty_like(members)
        leader[order] = members[order[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]]
        followers = np.flatnonzero(leader != members)
        for rows in scores.survey_ranges(len(followers)):
            part = followers[rows]
            same = (self.distractors[members[part]] == self.distractors[leader[part]]).all(axis=1)
            leader[part[~same]] = members[part[~same]]
        leaders, inverse, times = np.unique(leader, return_inverse=True, return_counts=True)
        grouped, ends = members[np.argsort(inverse, kind="stable")], np.cumsum(times)
        for k in np.flatnonzero(times > 1):
            self.twins[int(leaders[k])] = grouped[ends[k] - min(BEST, times[k]) : ends[k]]
        return leaders, times

    def kind(self, number: int) -> Kind:
        """A class of norms; the windows of classes before the last are dropped."""
        for earlier in self.kinds[: max(0, number - 1)]:
            earlier.close()
        return self.kinds[number]

    def new_segment(self) -> Segment:
        """One without answers."""
        return Segment(*self.questions.thresholds.shape, len(self.questions.genuine))

    # ------------------------------------------------------------------------------------------ the work

    def read(self, block: Block) -> np.ndarray:
        """The block's features, float32 [N, d], in memory."""
        columns = block.columns
        contiguous = columns[-1] - columns[0] == len(columns) - 1
        return np.array(
            self.distractors[columns[0] : columns[-1] + 1] if contiguous else self.distractors[columns], np.float32
        )

    def impostors_in(self, rows: slice) -> np.ndarray:
        """The probes among `rows` whose scores are the ROC's impostors; none when there is nothing to compare with."""
        asked = self.questions
        first, last = np.searchsorted(asked.impostor_rows, [rows.start, rows.stop])
        return asked.impostor_rows[first : last if len(asked.genuine) else first]

    def score(self, block: Block) -> int:
        """Score one block against all probes; returns how many distractors it stands for."""
        if not hasattr(self.local, "work"):
            self.local.work = CpuWork(self) if self.device.type == "cpu" else GpuWork(self)
            self.works.append(self.local.work)
        self.local.work.take(block)
        return int(len(block.columns) if block.weights is None else block.weights.sum())

    def collect(self) -> list[Tally]:
        """Add the segments up to each size."""
        for work in self.works:
            work.add_to_segment()
        answers: list[Tally] = []
        total = self.new_segment()
        for segment in self.segments:
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


# ---------------------------------------------------------------------------------------------- what may not be


def rounds_nowhere(
    probes: np.ndarray, distractors: np.ndarray, usable: np.ndarray, largest_squares: tuple[float, float]
) -> bool:
    """Whether all features are multiples of one power of two, coarse enough for every score to be exact."""
    step = float("inf")
    for values, wanted in ((probes, np.ones(len(probes), bool)), (distractors, usable)):
        # The first row alone tells of nearly all features that they round.
        for rows in (slice(0, 1), *scores.survey_ranges(len(values))):
            step = min(step, scores.quantum(values[rows][wanted[rows]]))
            if not scores.is_exact(step, *largest_squares):
                return False
    return True
