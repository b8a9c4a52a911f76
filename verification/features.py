"""A model on a set of pairs: features of all crops, kept in chunks so that a killed run goes on, and their cosines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils
from cropping import faces
from embedding import Embedder, normalise
from formats import cached
from utils import InputError
from verification.metrics import FAR_LEVELS, VerificationResult, evaluate
from verification.sets import VerificationSet

CHUNK = 64  # crops whose features are computed, and cached, together


# --- a model on a set -----------------------------------------------------------------------------------------------


def verify(
    embedder: Embedder,
    pairs: VerificationSet,
    *,
    cache_dir: Path | None = None,
    far_levels: Sequence[float] = FAR_LEVELS,
) -> VerificationResult:
    """Embed all crops of the set and evaluate the cosines of its pairs.

    With `cache_dir`, features are kept there in chunks named by what they were computed from, so that an interrupted
    run goes on where it was. Raises InputError, naming the image, when a feature is not finite or zero.
    """
    found = _features(embedder, pairs, cache_dir)
    return result_of(found, pairs, embedder.name, far_levels=far_levels)


def result_of(
    features: np.ndarray, pairs: VerificationSet, model: str, *, far_levels: Sequence[float] = FAR_LEVELS
) -> VerificationResult:
    """What the features of the crops of `chunks_of`, one after the other, say about the set; see `verify`."""
    cosines = _cosines(features, pairs, model)
    result = evaluate(cosines, pairs.same, pairs.folds, name=pairs.name, far_levels=far_levels)
    result.notes[:0] = pairs.notes
    return result


def chunks_of(pairs: VerificationSet) -> list[list[int]]:
    """The crops that are there, by index, in the chunks whose features are computed together."""
    return list(faces.windows(_present(pairs).tolist(), CHUNK))


def _present(pairs: VerificationSet) -> np.ndarray:
    return np.setdiff1d(np.arange(len(pairs.crops)), list(pairs.missing))


def _cosines(features: np.ndarray, pairs: VerificationSet, model: str) -> np.ndarray:
    present = _present(pairs)
    embeddings = normalise(features)
    broken = np.flatnonzero(np.isnan(embeddings).any(axis=1))
    if len(broken):
        image = pairs.names[present[broken[0]]]
        raise InputError(
            f"{pairs.name}: {model} gives no finite feature other than zero for {len(broken)} of "
            f"{len(present)} images; the first is {image}"
        )
    row = np.full(len(pairs.crops), -1)
    row[present] = np.arange(len(present))
    first, second = row[pairs.pairs].T
    cosines = np.full(len(first), np.nan)
    found = (first >= 0) & (second >= 0)
    cosines[found] = np.einsum("nd,nd->n", embeddings[first[found]], embeddings[second[found]])
    return np.clip(cosines, -1.0, 1.0)


def _features(embedder: Embedder, pairs: VerificationSet, cache_dir: Path | None) -> np.ndarray:
    chunks = []
    parts = chunks_of(pairs)
    if not parts:
        raise InputError(f"{pairs.name}: none of its {len(pairs.crops)} photos gives a crop")
    with utils.progress(sum(map(len, parts)), f"{pairs.name}: features", unit="crop") as bar:
        # One thread decodes ahead of the network, two chunks at most.
        for crops in faces.ordered_map(lambda part: pairs.crops[part], parts, 1):
            chunks.append(cached_features(embedder, crops, cache_dir))
            bar.update(len(crops))
    return np.concatenate(chunks)


def cached_features(embedder: Embedder, crops: np.ndarray, cache_dir: Path | None) -> np.ndarray:
    """Features float32 [n, D] of crops, from the cache where they are there unharmed and of this very model."""
    fingerprint = embedder.fingerprint
    if cache_dir is None or fingerprint is None:
        return embedder.features(crops)
    key = cached.key_of(fingerprint, crops)
    path = cache_dir / "features" / f"{key}.cache"
    found = cached.read(path, key)
    if found is not None:
        return found["features"]
    features = embedder.features(crops)
    cached.write(path, key, {"features": features})
    return features
