"""One person or two? A threshold on the angle, and how sure the answer is, from figures measured on pairs.

The threshold and the angles of both kinds of pairs (mean and deviation) come with the model: in the metadata of an
exported .onnx file, or in a results.json that train.py or lfw_eval.py wrote. Nothing here has a threshold of its own,
because it differs between networks by tens of degrees.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedding import Embedder
from utils import InputError


@dataclass(frozen=True)
class Normal:
    """Mean and standard deviation of angles, degrees."""

    mean: float
    std: float

    def log_density(self, angle: float) -> float:
        """Natural logarithm of the density, but for the constant that all normals share."""
        return -0.5 * ((angle - self.mean) / self.std) ** 2 - math.log(self.std)


@dataclass(frozen=True)
class Decision:
    """Angles up to `threshold` degrees are one person. `genuine`, `impostor`: None where nobody measured them."""

    threshold: float
    source: str
    genuine: Normal | None = None
    impostor: Normal | None = None

    def same(self, angle: float) -> bool:
        """The answer for two embeddings that are `angle` degrees apart."""
        return angle <= self.threshold

    def confidence(self, angle: float) -> float | None:
        """Probability in [0, 1] that the answer is right, if one pair in two is of one person; None if unknown.

        By Bayes' rule from the two normals. Between their means that is monotonic; beyond them the tails of the wider
        one would win again, which nobody believes, so there the value at the mean holds.
        """
        if self.genuine is None or self.impostor is None or self.genuine.mean >= self.impostor.mean:
            return None
        inside = min(max(angle, self.genuine.mean), self.impostor.mean)
        odds = self.genuine.log_density(inside) - self.impostor.log_density(inside)
        same = 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0
        return same if self.same(angle) else 1 - same


def find_decision(embedder: Embedder, checkpoint: Path, figures: Path | None, threshold: float | None) -> Decision:
    """The decision rule for a model: `threshold` in degrees if given, else what was measured.

    Measured figures are looked for in `figures`, in the model's own metadata, and in results.json beside
    `checkpoint`. Raises `InputError`, saying what to do, when there are none.
    """
    found = _measured(embedder, checkpoint, figures)
    if threshold is not None:
        if not 0 < threshold < 180:
            raise InputError(f"--threshold {threshold:g}: an angle between 0 and 180 degrees is expected")
        given = Decision(threshold, "as given")
        return given if found is None else Decision(threshold, "as given", found.genuine, found.impostor)
    if found is None:
        raise InputError(
            f"{checkpoint}: no threshold is known for this model; measure it with lfw_eval.py and give --figures "
            "DIR/results.json, or give --threshold DEGREES"
        )
    return found


def _measured(embedder: Embedder, checkpoint: Path, figures: Path | None) -> Decision | None:
    if figures is not None:
        return _from_results(figures)
    if "threshold" in embedder.metadata:
        threshold = embedder.metadata["threshold"]
        known = embedder.metadata.get("figures", {})
        return _decision(threshold["cosine"], known.get("angles"), f"{embedder.name}, {threshold.get('data', '')}")
    beside = checkpoint.parent / "results.json"
    return _from_results(beside) if beside.is_file() else None


def _from_results(path: Path) -> Decision | None:
    """The first set of a results.json that has both kinds of pairs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "sets" in content:
            sets = {entry["name"]: entry for entry in content["sets"]}
        else:
            sets = content["best"]["verification"]
        for name, entry in sets.items():
            if entry["threshold_best"] is not None:
                return _decision(entry["threshold_best"]["cosine"], entry["angles"], f"{path}, {name}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a results.json of train.py or lfw_eval.py ({error!r})") from error
    return None


def _decision(cosine: float, angles: dict[str, Any] | None, source: str) -> Decision:
    threshold = math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))
    genuine, impostor = (_normal((angles or {}).get(kind)) for kind in ("genuine", "impostor"))
    return Decision(threshold, source, genuine, impostor)


def _normal(moments: dict[str, float] | None) -> Normal | None:
    if not moments or not moments["std"] > 0:
        return None
    return Normal(moments["mean"], moments["std"])
