"""What becomes of photos that show somebody else: three treatments of the noise lists, side by side.

* raw: nothing; the lists as they are.
* exclude: noisy probes and distractors do not take part; all counts shrink.
* replace: as InsightFace's tool does it, and with it most published results. A noisy probe takes the normalised mean of
  its identity's clean features, which can only help the score; a noisy distractor can match nothing. All counts stay.
  InsightFace adds a random 0.001 to the mean, so that noisy probes of one identity are not identical; here they are,
  which makes the result repeatable. A noisy distractor is taken out of every comparison instead of being moved far
  away, which holds for any score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedding import normalise
from utils import InputError

RAW, EXCLUDE, REPLACE = "raw", "exclude", "replace"
TREATMENTS = (RAW, EXCLUDE, REPLACE)


class RowView:
    """Some rows of a large array [M, d], in their order, without copying it: what `identification` asks of one."""

    ndim = 2

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self.array, self.rows = array, rows
        self.shape = (len(rows), array.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | np.ndarray | int) -> "np.ndarray | RowView":
        """A slice from the first row on is a view again; anything else reads rows."""
        if isinstance(index, slice) and index.start is None:
            return RowView(self.array, self.rows[index])
        return self.array[self.rows[index]]


@dataclass(frozen=True)
class Entrants:
    """Who takes part under one treatment, ready for `identification`."""

    treatment: str
    probes: np.ndarray  # float32 [n, d]
    ids: list[str]
    distractors: "np.ndarray | RowView"  # [M, d]
    absent: np.ndarray  # bool [n]: probes without a feature
    ignored: np.ndarray  # bool [M]: distractors that match nothing
    probe_rows: np.ndarray  # int64 [n]: which of all probes these are
    distractor_rows: np.ndarray  # int64 [M]
    replaced: int  # probes that became their identity's mean


def treat(
    treatment: str,
    probes: np.ndarray,
    ids: Sequence[str],
    distractors: np.ndarray,
    *,
    absent: np.ndarray,
    missing: np.ndarray,
    noisy_probes: np.ndarray,
    noisy_distractors: np.ndarray,
) -> Entrants:
    """Apply one of `TREATMENTS` to embeddings [n, d] and [M, d].

    `absent` bool [n] and `missing` bool [M] have no feature, `noisy_probes` bool [n] and `noisy_distractors` bool [M]
    are on the noise lists. `InputError` when exclusion leaves nobody, or an identity has no clean feature to replace
    noisy ones by.
    """
    everyone, all_distractors = np.arange(len(probes)), np.arange(len(distractors))
    if treatment == RAW:
        return Entrants(RAW, probes, list(ids), distractors, absent, missing, everyone, all_distractors, 0)
    if treatment == REPLACE:
        cleaned = with_means(probes, ids, noisy_probes, absent)
        ignored = missing | noisy_distractors
        return Entrants(
            REPLACE,
            cleaned,
            list(ids),
            distractors,
            absent & ~noisy_probes,
            ignored,
            everyone,
            all_distractors,
            int(noisy_probes.sum()),
        )
    rows, columns = np.flatnonzero(~noisy_probes), np.flatnonzero(~noisy_distractors)
    if not len(rows) or not len(columns):
        raise InputError(f"all {'probes' if not len(rows) else 'distractors'} are on the noise list")
    kept_ids = [ids[row] for row in rows.tolist()]
    view = RowView(distractors, columns)
    return Entrants(EXCLUDE, probes[rows], kept_ids, view, absent[rows], missing[columns], rows, columns, 0)


def with_means(probes: np.ndarray, ids: Sequence[str], noisy: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """Probes [n, d] with each noisy one replaced by the normalised mean of its identity's clean embeddings."""
    cleaned = np.array(probes)
    names = np.array(ids, object)
    usable = ~noisy & ~absent
    for name in dict.fromkeys(names[noisy]):
        members = names == name
        mean = np.full((1, probes.shape[1]), np.nan)
        if (members & usable).any():
            mean = normalise(normalise(probes[members & usable]).mean(axis=0, keepdims=True))
        if not np.isfinite(mean).all():
            raise InputError(f"identity {name}: no clean feature to replace its noisy ones by; exclude them instead")
        cleaned[members & noisy] = mean
    return cleaned
