"""Robust centres of identities, and the nearest other centre of each crop.

A third of an identity's crops may show somebody else. So a centre begins at the medoid (the crop with the largest
median cosine to the others), keeps the crops that are nearer to it than to be expected of strangers, and is the mean of
those, a few times over. Wrong crops are of many different people, so the majority's middle wins. Identities of one or
two crops have no majority; their crops are all trusted and the findings say so.

A crop also fits its identity if one of its photos shows the same face in the same way: a profile, or a child, is far
from the centre and yet no stranger. So how well a crop fits is its cosine to the centre and, with half that weight, to
the nearest other crop of the identity. A centre of m crops is off by what m photos share by chance, which brings all
cosines to it down. So for small m the fit is drawn towards the set's median, by sqrt(m / (m + 1)): the correlation of
such a mean with what it estimates if two photos of a person have a cosine of a half.

The nearest other centre of every crop is exact: blocked matrix products in half precision find candidates, and where
the bound of their rounding leaves a doubt, the product is made again in float32. On a CPU without fast half precision
the products are in float32 from the start. Memory: one block of products, the centres, and what is mapped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

import utils

MEDOID = 128  # crops of an identity that are compared with each other; more are represented by as many of them
ROUNDS = 3  # of choosing crops and averaging them; the choice rarely changes after the second
NEAREST = 1 / 3  # weight of the nearest crop; from a fifth to a half as much is found (docs/audit.md)
BLOCK_CROPS, BLOCK_CENTRES = 4096, 16384  # one product: 256 MB in float32

# Unit vectors rounded to a format with this unit roundoff u: each product is off by at most about 2 u times the sum of
# |x_i y_i| <= 1, and sums are in float32. With another u for the second-order terms and the result's own rounding.
_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_CANDIDATES = 8  # kept per crop and block in half precision


class Rows(Protocol):
    """Embeddings [n, D], as they are, mapped, or computed where they are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


@dataclass
class Centres:
    """Centres float32 [identities, D] of length 1 (zero where no crop could be used), and what they are made of.

    `trusted` bool [crops]; `own` float32 [crops]: cosine to the identity's centre, made without the crop itself where
    it is trusted; NaN where nothing is left then. `fit` float32 [crops]: the same, with the cosine to the identity's
    nearest other crop (of `MEDOID` where there are more) weighed in, drawn towards `typical`, the median of all, where
    few other crops are trusted.
    """

    centres: np.ndarray
    trusted: np.ndarray
    own: np.ndarray
    fit: np.ndarray
    typical: float


def groups(labels: np.ndarray, identities: int) -> Iterator[tuple[int, np.ndarray]]:
    """(label, indices of its crops, ascending) for every identity with crops."""
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(identities + 1))
    for label in range(identities):
        if bounds[label] < bounds[label + 1]:
            yield label, order[bounds[label] : bounds[label + 1]]


def first_with(order: np.ndarray, sizes: np.ndarray, crops: int) -> np.ndarray:
    """The first identities of `order` that have at least so many crops together; all of them if there are fewer."""
    return order[: int(np.searchsorted(np.cumsum(sizes[order]), crops)) + 1]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """float32 rows of length 1; zero where a row is zero or not finite."""
    rows = np.asarray(rows, np.float32)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        unit = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    unit = unit.astype(np.float32)
    unit[~np.isfinite(unit).all(axis=1)] = 0
    return unit


def stranger_cosine(embeddings: Rows, labels: np.ndarray, seed: int = 0, pairs: int = 20_000) -> float:
    """The median cosine of crops of two identities, from random pairs."""
    random = np.random.default_rng(seed)
    first, second = random.integers(0, len(labels), (2, pairs))
    differ = labels[first] != labels[second]
    if not differ.any():
        return 0.0
    first, second = unit_rows(embeddings[first[differ]]), unit_rows(embeddings[second[differ]])
    return float(np.median(np.einsum("nd,nd->n", first, second)))


def robust_centres(embeddings: Rows, labels: np.ndarray, identities: int) -> Centres:
    """Centres of all identities. `embeddings` [crops, D] may be mapped and of any length; one identity
    is read at once."""
    dim = embeddings.shape[1]
    centres = np.zeros((identities, dim), np.float32)
    trusted = np.zeros(len(labels), bool)
    own = np.full(len(labels), np.nan, np.float32)
    fit = np.full(len(labels), np.nan, np.float32)
    others = np.zeros(len(labels), np.int64)
    between = stranger_cosine(embeddings, labels)
    with utils.progress(identities, "centres", unit="identity") as bar:
        for label, members in groups(labels, identities):
            unit = unit_rows(embeddings[members])
            chosen = _trusted(unit, between)
            total = unit[chosen].sum(axis=0, dtype=np.float64)
            length = np.linalg.norm(total)
            if length > 0:
                centres[label] = total / length
                trusted[members] = chosen
                # Without the crop itself, which would pull the centre of a small identity towards it.
                without = total[None] - np.where(chosen[:, None], unit, 0)
                lengths = np.linalg.norm(without, axis=1)
                usable = (lengths > 1e-6) & unit.any(axis=1)
                dots = np.einsum("nd,nd->n", without, unit)
                own[members[usable]] = (dots[usable] / lengths[usable]).clip(-1, 1)
                fit[members] = fitting(own[members], nearest_of(unit, unit))
                others[members] = chosen.sum() - chosen
            bar.update()
    typical = float(np.median(fit[np.isfinite(fit)])) if np.isfinite(fit).any() else 0.0
    return Centres(centres, trusted, own, drawn(fit, others, typical), typical)


def fitting(to_centre: np.ndarray, to_nearest: np.ndarray) -> np.ndarray:
    """How well crops fit an identity, float [n], by their cosines to its centre and to the nearest of its crops."""
    return (1 - NEAREST) * to_centre + NEAREST * to_nearest


def drawn(fit: np.ndarray, others: np.ndarray | int, typical: float) -> np.ndarray:
    """Fits float [n] drawn towards the typical one where `others`, the trusted other crops, are few."""
    others = np.asarray(others, np.float32)
    return typical + (fit - np.float32(typical)) * np.sqrt(others / (others + 1))


def nearest_of(rows: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Cosine of unit rows [n, D] to the nearest of an identity's crops [m, D], or of `MEDOID` of these; float32 [n].

    A crop is not compared with itself where `rows` is `crops`.
    """
    some = spread(len(crops))
    cosines = rows @ crops[some].T
    if rows is crops:
        cosines[some, np.arange(len(some))] = -1
    return cosines.max(axis=1)


def spread(count: int) -> np.ndarray:
    """At most `MEDOID` of so many places, evenly, ascending."""
    return np.arange(count) if count <= MEDOID else np.linspace(0, count - 1, MEDOID).astype(int)


def _trusted(unit: np.ndarray, between: float) -> np.ndarray:
    """Which of an identity's unit rows [n, D] a centre is made of, bool [n]; `between`: the cosine of strangers."""
    usable = np.asarray(unit.any(axis=1))
    if usable.sum() <= 2:
        return usable
    places = np.flatnonzero(usable)
    some = places[spread(len(places))]
    cosines = unit[some] @ unit[some].T
    np.fill_diagonal(cosines, -1)
    # The upper third: with a third of wrong crops the median still is of right ones, and poses differ.
    centre = unit[some[np.argmax(np.quantile(cosines, 2 / 3, axis=1))]]
    chosen = usable
    for _ in range(ROUNDS):
        near = unit @ centre
        # Half way between what strangers have and what the better half of this identity has.
        least = (between + float(np.median(np.sort(near[usable])[-max(2, int(usable.sum()) // 2) :]))) / 2
        kept = usable & (near >= least)
        if kept.sum() < 2:
            kept = usable & (near >= np.sort(near[usable])[-2])
        if (kept == chosen).all():
            break
        chosen = kept
        total = unit[chosen].sum(axis=0)
        centre = total / max(float(np.linalg.norm(total)), 1e-12)
    return chosen


def nearest_other(
    embeddings: Rows,
    own_label: np.ndarray,
    centres: np.ndarray,
    device: torch.device | str = "cpu",
    *,
    half: torch.dtype | None = None,
    what: str = "nearest other identity",
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the nearest centre but that of `own_label` (-1: none is its own): (label int64 [n],
    cosine float32 [n]).

    Exact in float32; of equal cosines the smaller label. `half` (torch.float16, torch.bfloat16) finds candidates in
    that precision first; None: float16 on a GPU, float32 alone on a CPU. -1 and NaN for a row without direction, and
    where the only centre is its own.
    """
    device = torch.device(device)
    if half is None and device.type == "cuda":
        half = torch.float16
    weights = torch.from_numpy(centres).to(device)
    sieve = None if half is None else weights.to(half)
    best = np.full(len(embeddings), -1, np.int64)
    cosine = np.full(len(embeddings), np.nan, np.float32)
    with utils.progress(len(embeddings), what, unit="crop") as bar, utils.true_float32(device):
        for start in range(0, len(embeddings), BLOCK_CROPS):
            stop = min(start + BLOCK_CROPS, len(embeddings))
            rows = torch.from_numpy(unit_rows(embeddings[start:stop])).to(device)
            labels = torch.from_numpy(np.ascontiguousarray(own_label[start:stop])).to(device)
            values, places = _best(rows, labels, weights, sieve)
            found = torch.isfinite(values) & rows.any(dim=1)
            best[start:stop] = torch.where(found, places, -1).cpu().numpy()
            cosine[start:stop] = torch.where(found, values, torch.nan).cpu().numpy()
            bar.update(stop - start)
    return best, cosine


def _best(
    rows: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, sieve: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.full((len(rows),), -torch.inf, device=rows.device)
    places = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    for first in range(0, len(weights), BLOCK_CENTRES):
        block = weights[first : first + BLOCK_CENTRES]
        if sieve is None:
            new, at = _without_own(rows @ block.T, labels - first).max(dim=1)
        else:
            new, at = _sieved(rows, labels - first, block, sieve[first : first + BLOCK_CENTRES], values)
        better = new > values  # of equal ones the smaller label stays
        values = torch.where(better, new, values)
        places = torch.where(better, at + first, places)
    return values, places


def _without_own(products: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Products [n, m] with minus infinity in each row's own column, where it is among them."""
    inside = torch.nonzero((column >= 0) & (column < products.shape[1])).squeeze(1)
    products[inside, column[inside]] = -torch.inf
    return products


def _sieved(
    rows: torch.Tensor, column: torch.Tensor, block: torch.Tensor, sieve: torch.Tensor, so_far: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best product of each row with a block in float32, from candidates in half precision; -inf if none can win."""
    bound = 4 * _ROUNDOFF[sieve.dtype]
    rough = _without_own((rows.to(sieve.dtype) @ sieve.T).float(), column)
    count = min(_CANDIDATES, rough.shape[1])
    near, at = rough.topk(count, dim=1)
    at, order = at.sort(dim=1)  # ascending, so that of equal products the smaller label is taken
    near = near.gather(1, order)
    exact = torch.einsum("nd,nkd->nk", rows, block[at])
    exact[~torch.isfinite(near)] = -torch.inf
    value, place = exact.max(dim=1)
    winner = at.gather(1, place[:, None]).squeeze(1)
    # A centre outside the candidates has at most the least candidate's rough product, plus the bound.
    doubt = (near.amin(dim=1) + bound >= torch.maximum(value, so_far)) & (rough.shape[1] > count)
    again = torch.nonzero(doubt).squeeze(1)
    if len(again):
        value[again], winner[again] = _without_own(rows[again] @ block.T, column[again]).max(dim=1)
    return value, winner
