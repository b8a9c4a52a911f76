"""The state of one pass over the distractors: what is asked, how the work is cut, and what the workers share.

`tally` runs the pass; `tally_cpu` and `tally_gpu` take the blocks that are planned here past all probes.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaface import scores
from megaface.scores import Bounds, GalleryClass, Survey
from megaface.segments import BEST, Segment
from megaface.windows import ImpostorWindows, Windows

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


def worker_count(device: torch.device) -> int:
    """Threads that share the work: a GPU is fed by one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


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
        probes, thresholds = self.questions.thresholds.shape
        return Segment(probes, thresholds, len(self.questions.genuine))

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
