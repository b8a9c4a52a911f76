"""One pass over the distractors: how many beat each threshold of each probe, and which are the best five.

Every number of Challenge 1 that involves distractors is one of three: `C(a, s)`, how many distractors score above s
against probe a; the five best of a probe; and, for the ROC, how many scores of the first hundred probes exceed each
genuine score. `tally` answers all three for any number of thresholds without a full score matrix: blocks of
distractors times chunks of probes go through a matrix product, and only scores so close to a threshold that rounding
could decide are computed again in the devkit's own order (`scores` proves how close that is).

Per score the work after the product is a maximum per row. A row whose maximum is below all its thresholds is done:
with a good model that is nearly every row. Otherwise the row goes through a table (`windows`): some five passes over
the chunk in place of a search per score.

Two kinds of input would defeat the bound, so they are handled apart: identical distractors (they tie with everything
that their twins tie with) are scored once and counted as often as they occur, and distractors of very different norms
go into classes of comparable norm, lest one outlier widen every window.

The price: two passes over the distractors (the first for norms, finiteness and twins), and up to 130 MB of tables.
Features that make most scores nearly equal without being identical or exact (sign codes divided by a root, say) are
recomputed for the most part and take some ten times as long.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megaface import scores
from megaface.scores import Bounds, GalleryClass, Survey
from megaface.windows import TABLE_ROWS, ImpostorWindows, Windows
from utils import InputError

BEST = 5  # the devkit lists five distractors a probe
DENSE_SHARE = 0.2  # from this share of uncertain scores on, scoring whole rows is cheaper than gathering pairs
CPU_BLOCK = 1024, 1024  # probes x distractors of one product: square, so that BLAS packs little; 4 MB of scores
GPU_BLOCK = 4096, 1 << 16


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
class _Block:
    """Distractors of one segment and one class of norms that are scored together."""

    segment: int
    kind: int  # class of norms
    columns: np.ndarray  # int64, ascending
    weights: np.ndarray | None  # int64: how often each occurs; None: once


class _Segment:
    """The answers for the distractors between two sizes."""

    def __init__(self, questions: Questions) -> None:
        n, k = questions.thresholds.shape
        self.histogram = np.zeros((n, k + 1), np.int64)  # scores above exactly k thresholds (column 0 is not kept)
        self.best_index = np.full((n, BEST), -1, np.int64)
        self.best_score = np.full((n, BEST), -np.inf, np.float32)
        self.accepted = np.zeros(len(questions.genuine), np.int64)
        self.recomputed = 0
        self.lock = threading.Lock()


@dataclass
class _Kind:
    """A class of norms: its bounds, and its windows once a block needs them."""

    gallery: GalleryClass
    lock: threading.Lock = field(default_factory=threading.Lock)
    windows: Windows | None = None
    impostors: ImpostorWindows | None = None
    any_width: np.ndarray | None = None  # float64 [n]: half width of the score for any decision


@contextmanager
def strict_products(workers: int) -> Iterator[None]:
    """Matrix products in true float32 (no TF32, no bfloat16), and one torch thread in each of several workers."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    if workers > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def worker_count(device: torch.device) -> int:
    """Threads that share the work: a GPU is fed by one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


class FeatureError(InputError):
    """A feature that cannot be scored: number `row` of the `side` ("probe" or "distractor")."""

    def __init__(self, side: str, row: int, reason: str) -> None:
        super().__init__(f"{side} {row}: {reason}")
        self.side, self.row, self.reason = side, row, reason


def survey(values: np.ndarray, name: str, workers: int = 1, usable: np.ndarray | None = None) -> Survey:
    """Survey all features [n, d] in parallel; `FeatureError` for a usable one that is not finite."""
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda rows: scores.survey_rows(values[rows]), scores.survey_ranges(len(values))))
    whole = scores.join_surveys(parts)
    finite = np.isfinite(whole.squares)
    bad = np.flatnonzero(~finite if usable is None else ~finite & usable)
    if len(bad):
        reason = "is too large for float32" if np.isfinite(values[bad[0]]).all() else "has a value that is not finite"
        raise FeatureError(name, int(bad[0]), f"the feature {reason} ({len(bad)} such of {len(values)} {name}s)")
    return whole


def tally(
    probes: np.ndarray,
    distractors: np.ndarray,
    questions: Questions,
    sizes: Sequence[int],
    *,
    ignored: np.ndarray | None = None,
    absent: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda columns: None,
) -> list[Tally]:
    """Answer `questions` for the first m distractors, for every m of `sizes` (ascending, the last at most M).

    `probes` [n, d] and `distractors` [M, d] are float32 or float64 arrays (memory-mapped ones are read in blocks).
    `ignored` bool [M] marks distractors that can match nothing, whatever is in their rows, `absent` bool [n] probes
    without a feature: their rows, zeros, count nothing and have no best distractors. `advance` is called with the
    number of distractors that each finished block covered. Raises `InputError` for features that are not finite or
    too large.
    """
    usable = np.ones(sizes[-1], bool) if ignored is None else ~np.asarray(ignored[: sizes[-1]], bool)
    scan = _Scan(probes, distractors[: sizes[-1]], questions, sizes, usable, absent, torch.device(device))
    scan.plan(usable)
    advance(int((~usable).sum()))
    pool = ThreadPoolExecutor(scan.workers)
    try:
        with strict_products(scan.workers):
            for covered in pool.map(scan.score, scan.blocks):
                advance(covered)
    finally:
        pool.shutdown(cancel_futures=True)
    return scan.collect()


class _Scan:
    """The state of one pass."""

    def __init__(
        self,
        probes: np.ndarray,
        distractors: np.ndarray,
        questions: Questions,
        sizes: Sequence[int],
        usable: np.ndarray,
        absent: np.ndarray | None,
        device: torch.device,
    ) -> None:
        self.device, self.distractors, self.questions, self.sizes = device, distractors, questions, list(sizes)
        self.workers = worker_count(device)
        self.rows, self.columns = CPU_BLOCK if device.type == "cpu" else GPU_BLOCK
        self.absent = np.zeros(len(probes), bool) if absent is None else absent
        values = np.ascontiguousarray(probes, np.float32)
        of_probes = survey(values, "probe", self.workers)
        self.survey = survey(distractors, "distractor", self.workers, usable)
        tops = float(of_probes.squares.max()), float(self.survey.squares[usable].max(initial=0))
        check_range(*tops)
        self.bounds = Bounds(of_probes, rounds_nowhere(values, distractors, usable, tops))
        self.probes = torch.from_numpy(values).to(device)
        self.squares = torch.from_numpy(of_probes.squares).to(device)
        self.genuine = torch.from_numpy(questions.genuine).to(device)
        self.segments = [_Segment(questions) for _ in sizes]
        self.blocks: list[_Block] = []
        self.kinds: list[_Kind] = []
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
            self.kinds.append(_Kind(scores.gallery_class(self.survey, members[groups == kind])))
            for number in range(len(self.sizes)):
                for repeated in (False, True):
                    inside = np.flatnonzero((groups == kind) & (segment == number) & ((times > 1) == repeated))
                    for first in range(0, len(inside), self.columns):
                        part = inside[first : first + self.columns]
                        self.blocks.append(_Block(number, kind, members[part], times[part] if repeated else None))

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

    def kind(self, number: int) -> _Kind:
        """A class of norms with its windows, made at first use; those of earlier classes are dropped."""
        kind = self.kinds[number]
        with kind.lock:
            if kind.windows is None:
                for earlier in self.kinds[: max(0, number - 1)]:
                    earlier.windows = None
                thresholds, device = self.questions.thresholds, self.device
                kind.any_width = self.bounds.half_width(kind.gallery)
                if len(self.genuine):
                    kind.impostors = ImpostorWindows(
                        self.bounds, kind.gallery, self.questions.impostor_rows, self.questions.genuine, device
                    )
                count = len(self.distractors)
                kind.windows = Windows(self.bounds, kind.gallery, thresholds, self.absent, count, device)
        return kind

    # ------------------------------------------------------------------------------------------ the work

    def score(self, block: _Block) -> int:
        """Score one block against all probes; returns how many distractors it stands for."""
        work = _Work(self, block)
        for start in range(0, len(self.probes), self.rows):
            work.chunk(slice(start, min(start + self.rows, len(self.probes))))
        return int(len(block.columns) if block.weights is None else block.weights.sum())

    def collect(self) -> list[Tally]:
        """Add the segments up to each size."""
        answers: list[Tally] = []
        total = _Segment(self.questions)
        everyone = np.repeat(np.arange(len(self.probes)), BEST)
        for segment in self.segments:
            total.histogram += segment.histogram
            total.accepted += segment.accepted
            total.recomputed += segment.recomputed
            keep_best(
                total.best_index, total.best_score, everyone, segment.best_index.ravel(), segment.best_score.ravel()
            )
            above = total.histogram[:, :0:-1].cumsum(axis=1)[:, ::-1]
            answers.append(
                Tally(above, total.best_index.copy(), total.best_score.copy(), total.accepted.copy(), total.recomputed)
            )
        return answers


class _Work:
    """One block of distractors on its way past all probes. Each worker thread has its own."""

    def __init__(self, scan: _Scan, block: _Block) -> None:
        self.scan, self.block = scan, block
        self.segment = scan.segments[block.segment]
        self.kind = scan.kind(block.kind)
        self.windows = self.kind.windows
        columns = block.columns
        contiguous = columns[-1] - columns[0] == len(columns) - 1
        values = scan.distractors[columns[0] : columns[-1] + 1] if contiguous else scan.distractors[columns]
        self.gallery = torch.from_numpy(np.array(values, np.float32)).to(scan.device)
        self.squares = torch.from_numpy(scan.survey.squares[columns]).to(scan.device)
        self.weights = None if block.weights is None else torch.from_numpy(block.weights).to(scan.device)
        self.out = torch.empty(min(scan.rows, len(scan.probes)), len(columns), device=scan.device)
        self.scratch = torch.empty_like(self.out)

    def chunk(self, rows: slice) -> None:
        """Score probes `rows` against the block and add what that tells to the segment."""
        scan, size = self.scan, rows.stop - rows.start
        half = scores.half_scores(scan.probes[rows], self.gallery, self.squares, self.out[:size], self.scratch[:size])
        top = half.amax(dim=1)
        self.count(rows, half, flat_nonzero(top >= self.windows.lowest[rows]))
        self.find_best(rows, half, top)
        first, last = np.searchsorted(scan.questions.impostor_rows, [rows.start, rows.stop])
        if last > first and len(scan.genuine):
            some = torch.from_numpy(scan.questions.impostor_rows[first:last]).to(scan.device)
            self.count_impostors(some, half[some - rows.start])

    def count(self, rows: slice, half: Tensor, active: Tensor) -> None:
        """Sort the half scores of the `active` among probes `rows` into the gaps between their thresholds."""
        if not len(active):
            return
        windows, codes = self.windows, self.windows.count + 1
        with self.kind.lock:
            table = windows.table(rows)
        histogram = torch.zeros(len(half), codes, dtype=torch.int64, device=half.device)
        marked = []
        for part in active.split(TABLE_ROWS):
            everyone = int(part[-1] - part[0]) == len(part) - 1  # the usual case: no copies
            span = slice(int(part[0]), int(part[-1]) + 1)
            values = half[span] if everyone else half.index_select(0, part)
            bins = windows.to_bins(values, part + rows.start)
            codes_of_bins = (table[span] if everyone else table.index_select(0, part)).view(-1)
            code = codes_of_bins.index_select(0, bins.view(-1))
            unsure = flat_nonzero(code >= codes)
            row, column = split_flat(unsure, values.shape[1])
            value = values.reshape(-1).index_select(0, unsure)
            marked.append((part.index_select(0, row), column, value, code.index_select(0, unsure).long() - codes))
            histogram[part] = self.bincount(code, 2 * codes, len(part))[:, :codes]
        row, column, value, above = (torch.cat(some) for some in zip(*marked, strict=True))
        if len(row):
            above = self.resolve(row + rows.start, column, value, above, len(active))
            weights = None if self.weights is None else self.weights[column].double()
            counts = torch.bincount(row * codes + above, weights, minlength=histogram.numel())
            histogram += counts.long().view(histogram.shape)
        with self.segment.lock:
            self.segment.histogram[rows] += histogram.cpu().numpy()

    def bincount(self, code: Tensor, codes: int, rows: int) -> Tensor:
        """Histogram int64 [rows, codes] of each row of codes, with the distractors' multiplicities."""
        code = code.to(torch.int32).view(rows, -1)
        code += codes * torch.arange(rows, dtype=torch.int32, device=code.device)[:, None]
        weights = None if self.weights is None else self.weights.double().expand(rows, -1).reshape(-1)
        return torch.bincount(code.view(-1), weights, minlength=rows * codes).long().view(rows, codes)

    def resolve(self, probe: Tensor, column: Tensor, value: Tensor, above: Tensor, height: int) -> Tensor:
        """How many thresholds each marked half score exceeds, int64, starting from `above` that it surely does.

        The table's bins are wider than the windows: many marked scores are outside of the window itself.
        """
        windows = self.windows
        place = probe * (windows.count + 1) + above
        unsure = climb(place, value, windows.high.view(-1), windows.low.view(-1))
        if len(unsure):
            exact = self.exact(probe[unsure], column[unsure], height)
            exact_place = place[unsure]
            climb(exact_place, exact, windows.thresholds.view(-1), None)
            place[unsure] = exact_place
        return place - probe * (windows.count + 1)

    def exact(self, probe: Tensor, column: Tensor, height: int) -> Tensor:
        """Devkit scores float32 [N] of pairs that lie in `height` rows; whole rows at once when most are wanted."""
        scan = self.scan
        with self.segment.lock:
            self.segment.recomputed += len(probe)
        if len(probe) < DENSE_SHARE * height * len(self.gallery):
            return scores.pair_scores(scan.probes, self.gallery, probe, column, scan.squares, self.squares)
        rows, local = probe.unique(return_inverse=True)
        block = scores.block_scores(scan.probes[rows], self.gallery, scan.squares[rows], self.squares)
        return block[local, column]

    def find_best(self, rows: slice, half: Tensor, top: Tensor) -> None:
        """Update the five best of probes `rows`."""
        scan, segment = self.scan, self.segment
        width = torch.from_numpy(self.kind.any_width[rows]).to(scan.device)
        with segment.lock:
            fifth = torch.from_numpy(segment.best_score[rows, -1].copy()).to(scan.device)
        # A candidate's exact score may be W above its half score's, and the fifth best W below.
        least = (fifth.double() + scan.squares[rows] - width) / 2
        present = torch.from_numpy(~scan.absent[rows]).to(scan.device)
        local = flat_nonzero((top >= least) & present)
        if not len(local):
            return
        values = half[local]
        here = values.topk(min(BEST, values.shape[1]), dim=1).values[:, -1]
        least = torch.maximum(least[local], here.double() - width[local]) if values.shape[1] >= BEST else least[local]
        marked = flat_nonzero(values >= least[:, None])
        row, column = marked // values.shape[1], marked % values.shape[1]
        which = local + rows.start
        if scan.bounds.exact:
            score = 2 * values[row, column] - scan.squares[which[row]]
        else:
            score = self.exact(which[row], column, len(values))
        self.add_best(which[row].cpu().numpy(), self.block.columns[column.cpu().numpy()], score.cpu().numpy())

    def add_best(self, probe: np.ndarray, index: np.ndarray, score: np.ndarray) -> None:
        if self.block.weights is not None:  # a repeated distractor stands for its last few occurrences
            twins = [self.scan.twins[int(leader)] for leader in index]
            times = [len(some) for some in twins]
            probe, score, index = np.repeat(probe, times), np.repeat(score, times), np.concatenate(twins)
        with self.segment.lock:
            keep_best(self.segment.best_index, self.segment.best_score, probe, index, score)

    def count_impostors(self, which: Tensor, half: Tensor) -> None:
        """Add the scores of the ROC's probes `which` to the impostors above each genuine score."""
        scan, windows = self.scan, self.kind.impostors
        score = 2 * half - scan.squares[which][:, None]
        kept = flat_nonzero(score > windows.lowest)
        if not len(kept):
            return
        value = score.view(-1)[kept]
        near = flat_nonzero(windows.near.index_select(0, windows.to_bins(value)))
        if len(near):
            row, column = kept[near] // half.shape[1], kept[near] % half.shape[1]
            value[near] = self.exact(which[row], column, len(half))
        accepted = self.exceeding(value, None if self.weights is None else self.weights[kept % half.shape[1]])
        with self.segment.lock:
            self.segment.accepted += accepted.cpu().numpy()

    def exceeding(self, value: Tensor, weights: Tensor | None) -> Tensor:
        """How many of `value` (with multiplicity) are above each genuine score, int64 [U]."""
        if weights is None:
            return len(value) - torch.searchsorted(ascending(value), self.scan.genuine, right=True)
        order = value.argsort()
        below = torch.nn.functional.pad(weights[order].cumsum(0), (1, 0))
        return below[-1] - below[torch.searchsorted(value[order], self.scan.genuine, right=True)]


# ---------------------------------------------------------------------------------------------- helpers


def flat_nonzero(mask: Tensor) -> Tensor:
    """Flat indices int64 of true entries; NumPy is several times faster than torch at it on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)


def split_flat(index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of flat indices into a matrix; division is slow, and most blocks are a power of two wide."""
    if width & (width - 1):
        row = index // width
        return row, index - row * width
    return index >> (width.bit_length() - 1), index & (width - 1)


def climb(place: Tensor, value: Tensor, high: Tensor, low: Tensor | None) -> Tensor:
    """Move each place [N] up, in place, as long as its value exceeds `high` there; `high` rises up to an infinity.

    Returns the indices of the values that ended between `low` and `high`, where nothing is decided.
    """
    pending = torch.arange(len(place), device=place.device)
    between = []
    while len(pending):
        here, some = place.index_select(0, pending), value.index_select(0, pending)
        over = some > high.index_select(0, here)
        if low is not None:
            between.append(pending[~over & (some >= low.index_select(0, here))])
        pending = pending[over]
        place.index_add_(0, pending, torch.ones_like(pending))
    return torch.cat(between) if between else pending


def ascending(values: Tensor) -> Tensor:
    """Sorted copy; NumPy has vector code for it on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values


def check_range(left_square: float, right_square: float) -> None:
    """`InputError` when a score of features with these largest |x|^2 could overflow float32."""
    if left_square + right_square > scores.LARGEST:
        raise InputError(f"squared norms of {left_square:.3g} and {right_square:.3g} make scores overflow float32")


def rounds_nowhere(
    probes: np.ndarray, distractors: np.ndarray, usable: np.ndarray, largest_squares: tuple[float, float]
) -> bool:
    """Whether all features are multiples of one power of two, coarse enough for every score to be exact."""
    step = float("inf")
    for values, wanted in ((probes, np.ones(len(probes), bool)), (distractors, usable)):
        for rows in scores.survey_ranges(len(values)):
            step = min(step, scores.quantum(values[rows][wanted[rows]]))
            if not scores.is_exact(step, *largest_squares):
                return False
    return True


def keep_best(index: np.ndarray, score: np.ndarray, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
    """Merge candidates (row, column, score) into lists [n, 5] in place: score descending, larger index first."""
    touched = np.unique(rows)
    all_rows = np.concatenate([np.repeat(touched, BEST), rows])
    all_columns = np.concatenate([index[touched].ravel(), columns])
    all_scores = np.concatenate([score[touched].ravel(), values])
    order = np.lexsort((-all_columns, -all_scores, all_rows))
    starts = np.searchsorted(all_rows[order], touched)
    picked = order[starts[:, None] + np.arange(BEST)]
    index[touched], score[touched] = all_columns[picked], all_scores[picked]
