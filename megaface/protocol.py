"""MegaFace Challenge 1: ranks, CMC, ROC, the devkit's "traditional" CMC and its lists of matches.

`identification` gives what the official devkit computes, bit for bit where the devkit's answer is defined, and raises
`InputError` where the devkit crashes, hangs or writes garbage. The devkit fills two score matrices and counts in them
(14 GB and half an hour for a million distractors); here every decision that needs a distractor is collected first, as
a threshold on a probe's scores, and one pass over the distractors (`tally`) answers them all.

Terms: a genuine pair (a, b) is two probes of one identity; b is then the gallery image, and its rank `C(a, S(a, b))`
is how many distractors score above it against probe a. Ties favour the genuine pair.

Departures from the devkit, all of them where it fails: fewer than five distractors give a shorter list of the best;
with fewer than a hundred probes the ROC's impostors are the scores of all probes there are; probes without a feature
(`absent`) fail every comparison instead of reading as garbage; distractors can be taken out of the competition without
changing the counts (`ignored`). Counts are kept as integers: the devkit's float32 histogram stops at 2^24 pairs.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from megaface import kernels, scores
from megaface.scan import Questions
from megaface.scores import Survey
from megaface.segments import BEST
from megaface.tally import Tally, finish_survey, start_survey, tally, worker_threads
from utils import InputError

IMPOSTOR_PROBES = 100  # the devkit's ROC takes the impostor scores of the first 100 probes (hard-coded)
GALLERIES = 10  # of the traditional CMC
STEP = 0.01  # a curve's point is written when the value has risen by more than this
MODULUS = 2**31 - 1  # minimal standard generator (Park and Miller 1988), std::minstd_rand0
MULTIPLIER = 16807
POSITION_ROWS = 512  # probes whose gallery positions are found together,
POSITION_SCORES = 1 << 24  # and at most as many scores, 128 MB for a worker
PAIRS_TOGETHER = 8192  # genuine pairs that one worker scores at a time

__all__ = ["BEST", "Identification", "Roc", "identification", "subsample"]


@dataclass(frozen=True)
class Roc:
    """The full verification curve: a staircase, given by the points where it rises."""

    accepts: np.ndarray  # int64 [V], strictly ascending: impostors accepted
    rates: np.ndarray  # float32 [V]: share of genuine pairs accepted with at most that many impostors
    impostors: int  # how many impostor scores there are

    def rate_at(self, false_accept_rate: float) -> float:
        """Verification rate at a false accept rate, read off the full curve without interpolation."""
        allowed = int(np.floor(false_accept_rate * self.impostors * (1 + 1e-12)))
        below = int(np.searchsorted(self.accepts, allowed, side="right"))
        return float(self.rates[below - 1]) if below else 0.0

    def subsampled(self) -> tuple[np.ndarray, np.ndarray]:
        """The points that the devkit writes: false accept rates and verification rates, float32."""
        accepts, rates = self.accepts, self.rates
        if accepts[0] != 0:
            accepts, rates = np.concatenate([[0], accepts]), np.concatenate([np.zeros(1, np.float32), rates])
        if accepts[-1] != self.impostors:
            accepts, rates = np.concatenate([accepts, [self.impostors]]), np.concatenate([rates, rates[-1:]])
        kept = subsample(rates)
        return accepts[kept].astype(np.float32) / np.float32(self.impostors), rates[kept]


@dataclass(frozen=True)
class Identification:
    """The results for one number of distractors."""

    size: int  # as asked for
    distractors: int  # as used: m = min(size, number of distractors)
    ids: tuple[str, ...]  # identity of each probe
    pairs: np.ndarray  # int64 [P, 2]: all ordered genuine pairs (a, b), by b, then a
    scores: np.ndarray  # float32 [P]: S(a, b); -inf where one of them is absent
    ranks: np.ndarray  # int64 [P]: distractors of a that beat b
    cmc: np.ndarray  # float32 [m + 1]: share of pairs with rank <= r
    roc: Roc
    traditional_cmc: np.ndarray  # float32 [m + identities]
    best_index: np.ndarray  # int64 [n, 5]: each probe's best distractors, best first, -1 where there are fewer
    best_score: np.ndarray  # float32 [n, 5]
    impostor_probes: int  # how many probes' scores are the ROC's impostors
    recomputed: int  # scores that were so close to a decision that they were computed in the devkit's order

    def rate_at_rank(self, rank: int) -> float:
        """Identification rate at `rank` (1 is best): the share of pairs that fewer than `rank` distractors beat."""
        return float(self.cmc[min(rank, len(self.cmc)) - 1])


def identification(
    probes: np.ndarray,
    ids: Sequence[str],
    distractors: np.ndarray,
    sizes: Sequence[int],
    *,
    absent: np.ndarray | None = None,
    ignored: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda columns: None,
) -> list[Identification]:
    """Challenge 1 for the first `size` distractors, for each of `sizes`, in one pass over the distractors.

    `probes` [n, d] with identities `ids` [n], `distractors` [M, d]; float32, or float64 which is rounded to float32;
    any scale, nothing is normalised; memory-mapped arrays are read in blocks.
    `absent` bool [n] marks probes that have no feature (their rows are not read): every pair with one gets the last
    rank and the lowest score. `ignored` bool [M] marks distractors that can beat nothing but still count in m.
    `advance` is called with the number of distractors scored since the last call.
    Raises `InputError` for sizes below 1, no distractors, no identity with two probes, dimensions that differ, and
    features that are not finite or overflow float32.
    """
    ids = tuple(ids)
    probes = np.ascontiguousarray(probes if absent is None else _without(probes, absent), np.float32)
    absent = np.zeros(len(probes), bool) if absent is None else np.asarray(absent, bool)
    _check_shapes(probes, ids, distractors, sizes)
    used = sorted({min(size, len(distractors)) for size in sizes})
    distractors = distractors[: used[-1]]
    device = torch.device(device)
    with worker_threads(device) as pool:
        surveys = start_survey(probes, pool), start_survey(distractors, pool)
        game = _Game(probes, surveys[0], ids, absent, device, pool)
        answers = tally(
            probes,
            game.survey,
            distractors,
            surveys[1],
            game.questions,
            used,
            pool,
            ignored=ignored,
            absent=absent,
            device=device,
            advance=advance,
        )
        by_columns = dict(zip(used, answers, strict=True))
        columns = [min(size, len(distractors)) for size in sizes]
        # Before the pool ends, which drops what it has not begun: with few distractors the probes may still be sorted.
        return [game.result(size, m, by_columns[m]) for size, m in zip(sizes, columns, strict=True)]


def subsample(values: np.ndarray) -> list[int]:
    """Indices of a rising float32 curve that the devkit writes: each rise of more than 0.01, and the last point."""
    kept = []
    previous, start = np.float32(-1), 0
    while start < len(values):
        # float32 subtraction is monotone, so the first point far enough can be found by bisection.
        start = bisect_left(
            range(len(values)), True, start, key=lambda i: bool(np.float32(values[i] - previous) > STEP)
        )
        if start < len(values):
            kept.append(start)
            previous = values[start]
    if not kept or kept[-1] != len(values) - 1:
        kept.append(len(values) - 1)
    return kept


def _without(probes: np.ndarray, absent: np.ndarray) -> np.ndarray:
    return np.where(np.asarray(absent, bool)[:, None], np.float32(0), np.asarray(probes, np.float32))


def _check_shapes(probes: np.ndarray, ids: tuple[str, ...], distractors: np.ndarray, sizes: Sequence[int]) -> None:
    if probes.ndim != 2 or distractors.ndim != 2 or not probes.shape[1]:
        raise InputError(f"features must be [count, dimensions], not {probes.shape} and {distractors.shape}")
    if len(ids) != len(probes):
        raise InputError(f"{len(probes)} probes but {len(ids)} identities")
    if probes.shape[1] != distractors.shape[1]:
        raise InputError(f"probes have {probes.shape[1]} dimensions, distractors {distractors.shape[1]}")
    if not len(distractors):
        raise InputError("there are no distractors")
    if not sizes or min(sizes) < 1:
        raise InputError(f"a size must be at least 1, not {min(sizes, default=0)}")
    if len(set(ids)) == len(ids):
        raise InputError(f"no identity has two probes ({len(ids)} probes), so there is no genuine pair")


class _Game:
    """Everything that the probes alone decide: genuine pairs and scores, galleries, and what to ask of distractors."""

    def __init__(
        self,
        probes: np.ndarray,
        survey: Iterable[Survey],
        ids: tuple[str, ...],
        absent: np.ndarray,
        device: torch.device,
        pool: Executor,
    ) -> None:
        self.values, self.ids, self.absent = probes, ids, absent
        self.groups = _groups(ids)
        self.members = np.concatenate(self.groups)
        # Of each probe: the number of its identity, its place among the probes of that, and how many others those are.
        self.group, self.place, self.others = np.empty((3, len(ids)), np.int64)
        for number, members in enumerate(self.groups):
            self.group[members], self.place[members], self.others[members] = number, _count(members), len(members) - 1
        self.starts = self.others.cumsum() - self.others  # of the pairs with this probe as gallery image
        self.survey = finish_survey(probes, "probe", survey)
        self.probes = torch.from_numpy(probes).to(device)
        self.squares = torch.from_numpy(self.survey.squares).to(device)
        self.pairs, self.pair_scores = self._genuine(pool)
        self.galleries = self._trials(pool)
        self.questions = self._questions()  # while the pool places mates in their galleries

    # ------------------------------------------------------------------------------------------ genuine pairs

    def _genuine(self, pool: Executor) -> tuple[np.ndarray, np.ndarray]:
        """All ordered pairs (a, b) int64 [P, 2] by b, then a; their scores float32 [P], -inf where one is absent."""
        gallery = np.repeat(_count(self.ids), self.others)
        place = _count(gallery) - self.starts[gallery]
        place += place >= self.place[gallery]
        sizes = np.array([len(members) for members in self.groups])
        pairs = np.stack([self.members[(sizes.cumsum() - sizes)[self.group[gallery]] + place], gallery], axis=1)
        half = np.flatnonzero(pairs[:, 0] < pairs[:, 1])
        values = np.empty(len(pairs), np.float32)
        parts = np.array_split(pairs[half], -(-len(half) // PAIRS_TOGETHER))
        values[half] = np.concatenate(list(pool.map(self.score, parts)))
        values[self.pair_number(*pairs[half, ::-1].T)] = values[half]  # S(a, b) = S(b, a)
        return pairs, values

    def pair_number(self, probe: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Where the genuine pairs (probe, gallery) stand in `pairs`."""
        return self.starts[gallery] + self.place[probe] - (self.place[probe] > self.place[gallery])

    def score(self, pairs: np.ndarray) -> np.ndarray:
        """Devkit scores float32 [P] of probe pairs int64 [P, 2]; -inf where one is absent."""
        first, second = (torch.from_numpy(np.ascontiguousarray(side)).to(self.probes.device) for side in pairs.T)
        values = scores.pair_scores(self.probes, self.probes, first, second, self.squares, self.squares)
        return np.where(self.absent[pairs].any(axis=1), np.float32(-np.inf), values.cpu().numpy())

    # ------------------------------------------------------------------------------------------ traditional CMC

    def _trials(self, pool: Executor) -> list["_Trial"]:
        """The galleries of the traditional CMC: of each its probes and their mates' scores."""
        images = np.stack(draw_galleries(self.groups))
        mates = images.T[self.group]  # int64 [n, galleries]
        score = np.full(mates.shape, -np.inf, np.float32)
        probe, gallery = np.nonzero(mates != _count(self.ids)[:, None])  # an image is no probe of its own gallery
        score[probe, gallery] = self.pair_scores[self.pair_number(probe, mates[probe, gallery])]
        self._start_placing(pool, images, mates, score)
        probes = [self.members[mate[self.members] != self.members] for mate in mates.T]
        return [_Trial(some, score[some, number]) for number, some in enumerate(probes)]

    def _start_placing(self, pool: Executor, images: np.ndarray, mates: np.ndarray, score: np.ndarray) -> None:
        """Let the pool find where each probe's mate stands in each gallery, int64 [n, galleries]: score descending,
        equal scores larger probe index first; the last place for pairs that cannot be scored."""
        self.position, self.placing = np.full(mates.shape, images.shape[1] - 1), []
        absent = self.absent[images]
        chosen = np.unique(images[~absent])  # images are in several galleries: one product for all
        if not len(chosen):
            return
        column = np.where(absent, -1, np.searchsorted(chosen, images))
        bounds = scores.Bounds(self.survey, exact=False)
        width = bounds.half_width(scores.gallery_class(self.survey, chosen))
        where = torch.from_numpy(chosen).to(self.probes.device)
        right, right_squares = self.probes[where], self.squares[where]

        together = max(1, min(POSITION_ROWS, POSITION_SCORES // len(chosen)))

        def place(start: int) -> None:
            rows = slice(start, min(start + together, len(mates)))
            out = torch.empty(rows.stop - start, len(chosen), device=right.device)
            half = scores.half_scores(self.probes[rows], right, right_squares, out, torch.empty_like(out))
            some = mates[rows], score[rows], width[rows], self.position[rows]
            kernels.gallery_positions(
                half.cpu().numpy(), start, images, column, *some, self.values, self.survey.squares
            )

        self.placing = [pool.submit(place, start) for start in range(0, len(mates), together)]

    # ------------------------------------------------------------------------------------------ questions

    def _questions(self) -> Questions:
        """Collect every threshold on a probe's distractor scores; remember where each one went."""
        rows = [self.pairs[:, 0], *(np.arange(len(trial.score)) for trial in self.galleries)]
        values = [self.pair_scores, *(trial.score for trial in self.galleries)]
        row, value = np.concatenate(rows), np.concatenate(values)
        asked = np.isfinite(value) & ~self.absent[row]
        order = np.flatnonzero(asked)[np.argsort((row[asked].astype(np.uint64) << 32) | ascending_bits(value[asked]))]
        new = np.ones(len(order), bool)
        new[1:] = (row[order][1:] != row[order][:-1]) | (value[order][1:] != value[order][:-1])
        starts = np.searchsorted(row[order][new], np.arange(len(self.ids)))
        slot = np.cumsum(new) - 1 - starts[row[order]]
        self.row = row
        self.slot = np.full(len(row), -1)  # -1: the comparison fails
        self.slot[order] = slot
        thresholds = np.full((len(self.ids), int(slot.max(initial=-1)) + 1), np.inf, np.float32)
        thresholds[row[order], slot] = value[order]
        unordered = self.pair_scores[self.pairs[:, 0] < self.pairs[:, 1]]
        genuine, self.genuine_counts = np.unique(unordered[np.isfinite(unordered)], return_counts=True)
        self.genuine_total = len(unordered)
        impostors = np.flatnonzero(~self.absent[:IMPOSTOR_PROBES])
        return Questions(thresholds, impostors, genuine)

    # ------------------------------------------------------------------------------------------ answers

    def result(self, size: int, columns: int, answer: Tally) -> Identification:
        """Turn the counts for the first `columns` distractors into ranks and curves."""
        counts = np.full(len(self.row), columns)
        asked = self.slot >= 0
        counts[asked] = answer.above[self.row[asked], self.slot[asked]]
        ranks = counts[: len(self.pairs)]
        cmc = np.bincount(ranks, minlength=columns + 1).cumsum().astype(np.float32) / np.float32(len(ranks))
        impostor_probes = min(len(self.ids), IMPOSTOR_PROBES)
        return Identification(
            size=size,
            distractors=columns,
            ids=self.ids,
            pairs=self.pairs,
            scores=self.pair_scores,
            ranks=ranks,
            cmc=cmc,
            roc=self._roc(answer.accepted, impostor_probes * columns),
            traditional_cmc=self._traditional(counts[len(self.pairs) :], columns),
            best_index=answer.best_index,
            best_score=answer.best_score,
            impostor_probes=impostor_probes,
            recomputed=answer.recomputed,
        )

    def _roc(self, accepted: np.ndarray, impostors: int) -> Roc:
        # Highest genuine score first: the numbers of accepted impostors rise.
        accepts, first = np.unique(accepted[::-1], return_index=True)
        reached = self.genuine_counts[::-1].cumsum()
        last = np.append(first[1:], len(accepted)) - 1
        counts = reached[last] if len(accepted) else np.empty(0, np.int64)
        if not len(accepts) or accepts[-1] < impostors:  # pairs that cannot be scored are accepted when everything is
            accepts, counts = np.append(accepts, impostors), np.append(counts, self.genuine_total)
        else:
            counts[-1] = self.genuine_total
        return Roc(accepts, counts.astype(np.float32) / np.float32(self.genuine_total), impostors)

    def _traditional(self, beaten: np.ndarray, columns: int) -> np.ndarray:
        for task in self.placing:
            task.result()
        position = np.concatenate([self.position[trial.probe, number] for number, trial in enumerate(self.galleries)])
        histogram = np.bincount(position + beaten, minlength=columns + len(self.groups)).astype(np.float32)
        # The devkit adds float32 shares one after the other, so the curve ends a little off 1.
        return np.cumsum(histogram / np.float32(len(position)), dtype=np.float32)


@dataclass(frozen=True)
class _Trial:
    """The probes of one traditional gallery. The devkit compares the i-th of them with the distractors of probe i of
    the *list* (a defect, part of its published numbers), so their order matters."""

    probe: np.ndarray  # int64 [Q]
    score: np.ndarray  # float32 [Q]: S(probe, mate)


def ascending_bits(values: np.ndarray) -> np.ndarray:
    """uint64 numbers below 2^32 in the order of finite float32 values; one sort of integers beats two of columns."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)


def _groups(ids: Sequence[str]) -> list[np.ndarray]:
    """The probes of each identity in list order; identities sorted by their bytes."""
    members: dict[str, list[int]] = {}
    for probe, identity in enumerate(ids):
        members.setdefault(identity, []).append(probe)
    return [
        np.array(members[name]) for name in sorted(members, key=lambda name: name.encode("utf-8", "surrogateescape"))
    ]


def _count(some: Sequence | np.ndarray) -> np.ndarray:
    """0, 1, ... for each of some."""
    return np.arange(len(some))


def draw_galleries(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Ten galleries of one probe per identity, int64 [identities], drawn as libstdc++ draws them.

    `std::uniform_int_distribution` over minstd_rand0 with seed 1: reject the incomplete last interval, then divide.
    """
    state = 1

    def draw(count: int) -> int:
        nonlocal state
        scaling = (MODULUS - 2) // count
        while True:
            state = MULTIPLIER * state % MODULUS
            if state - 1 < count * scaling:
                return (state - 1) // scaling

    return [np.array([members[draw(len(members))] for members in groups]) for _ in range(GALLERIES)]
