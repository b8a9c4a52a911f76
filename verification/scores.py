"""The cosine of every pair beside a results.json, so that two models can be compared on the same pairs afterwards.

`STEM-scores.npz` has arrays only: cosines float64 [P] (NaN without two faces), same bool [P], folds int64 [P], pairs
int64 [P, 2] (numbers of photos), identities int64 [M] (of each photo; empty where unknown). results.json names the file
with its SHA-256, and the set with that of its pairs and photos.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils
from utils import InputError
from verification.metrics import VerificationResult
from verification.sets import VerificationSet

ARRAYS = ("cosines", "same", "folds", "pairs", "identities")


@dataclass(frozen=True)
class Scores:
    """What a results.json says of one set, and the set's pairs; see above for the arrays."""

    model: dict[str, Any]
    entry: dict[str, Any]
    cosines: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    pairs: np.ndarray
    identities: np.ndarray

    @property
    def sides(self) -> np.ndarray | None:
        """Who is on each side of each pair, int64 [P, 2]; None where that is not known."""
        return self.identities[self.pairs] if len(self.identities) else None


def plain_name(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "set"


def stems(sets: Sequence[VerificationSet]) -> list[str]:
    """A file name for each set, see `distinct_names`."""
    return distinct_names([pairs.name for pairs in sets])


def distinct_names(texts: Sequence[str]) -> list[str]:
    """A file name for each text: without what file systems dislike, numbered where two are the same."""
    names: list[str] = []
    for text in texts:
        plain = plain_name(text)
        count = 1
        name = plain
        while name.lower() in (other.lower() for other in names):
            count += 1
            name = f"{plain}-{count}"
        names.append(name)
    return names


def describe(stem: str, pairs: VerificationSet, result: VerificationResult) -> dict[str, str]:
    """What results.json says of the scores: their file beside it, and a SHA-256 of the arrays in it."""
    return {"file": f"{stem}-scores.npz", "sha256": _hash(_of(pairs, result))}


def write_scores(out: Path, stem: str, pairs: VerificationSet, result: VerificationResult) -> None:
    """Write the scores of a set into the folder of its results.json."""
    buffer = io.BytesIO()
    columns: dict[str, Any] = dict(_of(pairs, result))
    np.savez(buffer, **columns)
    utils.write_bytes(out / describe(stem, pairs, result)["file"], buffer.getvalue())


def _of(pairs: VerificationSet, result: VerificationResult) -> dict[str, np.ndarray]:
    identities = np.zeros(0, np.int64) if pairs.identities is None else pairs.identities
    arrays = (result.cosines, pairs.same, pairs.folds, pairs.pairs, identities)
    return dict(zip(ARRAYS, arrays, strict=True))


def _hash(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def read_scores(results: Path) -> list[Scores]:
    """The sets of a results.json that have scores; InputError for another file, or scores that are gone or changed."""
    path = results / "results.json" if results.is_dir() else results
    try:
        content = utils.read_json(path)
        model, entries = content["model"] | {"name": str(content["model"]["name"])}, content["sets"]
        named = [entry for entry in entries if entry.get("scores")]
        for entry in named:
            source = entry.get("source", {})
            if not (isinstance(entry["name"], str) and isinstance(entry["sha256"], str) and isinstance(source, dict)):
                raise TypeError("a set needs a name, a sha256 and a source")
        files = [(path.parent / Path(entry["scores"]["file"]).name, entry["scores"]["sha256"]) for entry in named]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a results.json of lfw_eval.py ({error!r})") from error
    if not named:
        raise InputError(f"{path}: names no scores of pairs; run lfw_eval.py again")
    return [Scores(model, entry, *_arrays(*file)) for entry, file in zip(named, files, strict=True)]


def _arrays(path: Path, sha256: str) -> list[np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ARRAYS}
    except FileNotFoundError:
        raise InputError(f"{path}: the scores that results.json speaks of are gone; run lfw_eval.py again") from None
    except Exception as error:  # foreign bytes make the readers raise nearly anything
        raise InputError(f"{path}: no scores of pairs, or damaged ({error})") from error
    if _hash(arrays) != sha256:
        raise InputError(f"{path}: not the scores that results.json speaks of; run lfw_eval.py again")
    return list(arrays.values())
