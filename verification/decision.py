"""One person or two? A threshold on the angle, and how sure the answer is, from figures measured on pairs.

The threshold and the angles of both kinds of pairs (mean and deviation) come with the model: in the metadata of an
exported .onnx file, or in a results.json that train.py or lfw_eval.py wrote. Nothing here has a threshold of its own,
because it differs between networks by tens of degrees, and none is taken that was measured on another model, or on
this one fed in another way.

Where a false accept rate was measured its threshold is taken, not the one of best accuracy: that depends on how many
pairs of two persons there are for each of one person, which is half in every test and never in use.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import utils
from embedding import Embedder
from utils import InputError

USUAL_FAR = 1e-3  # where nobody says which
# What reading figures out of another program's JSON can raise; OverflowError comes of whole numbers without end.
_NOT_UNDERSTOOD = (ValueError, LookupError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Normal:
    """Mean and standard deviation of angles, degrees."""

    mean: float
    std: float

    def log_density(self, angle: float) -> float:
        """Natural logarithm of the density, but for the constant that all normals share."""
        distance = (angle - self.mean) / self.std
        return -0.5 * distance * distance - math.log(self.std)


@dataclass(frozen=True)
class Decision:
    """Angles up to `threshold` degrees are one person; `source` says where that is from: "as given", "at FAR ...".

    `genuine`, `impostor`: None where nobody measured them.
    """

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


def find_decision(
    embedder: Embedder,
    checkpoint: Path,
    figures: Path | None = None,
    threshold: float | None = None,
    far: float | None = None,
) -> Decision:
    """The decision rule for a model: `threshold` in degrees if given, else what was measured.

    Measured figures are looked for in `figures`, in the model's own metadata, and in results.json beside
    `checkpoint`. `far`: the false accept rate whose threshold is wanted; None takes `USUAL_FAR`, or the next higher one
    that the pairs resolve, or the threshold of best accuracy where none is. Raises `InputError`, saying what to do,
    when there are none, when `far` was not measured, or when `figures` are those of another model.
    """
    found, why = _measured(embedder, checkpoint, figures)
    if threshold is not None:
        if not 0 < threshold < 180:
            raise InputError(f"--threshold {threshold:g}: an angle between 0 and 180 degrees is expected")
        if far is not None:
            raise InputError("--threshold and --far both name a threshold: give one")
        return Decision(threshold, "as given", *(found.normals if found else (None, None)))
    if found is None:
        raise InputError(
            f"{checkpoint}: no threshold is known for this model{why}; measure it with lfw_eval.py and give --figures "
            "DIR/results.json, or give --threshold DEGREES"
        )
    return found.decide(far)


def measured_entry(path: Path, embedder: Embedder) -> dict[str, Any]:
    """What a results.json of lfw_eval.py says of the first set with both kinds of pairs, checked; all its figures.

    Raises InputError, naming the file, if that is none, or was measured on another model or this one fed otherwise.
    """
    found, wrong = _from_results(path, embedder)
    if found is None or wrong:
        raise InputError(f"--figures {path}: {wrong or 'no set there has both kinds of pairs'}")
    content = utils.read_json(path)
    if "sets" in content and str(content["model"].get("engine")).endswith(" bf16"):
        raise InputError(f"--figures {path}: measured with --precision bf16; leave that out of lfw_eval.py")
    for entry in content.get("sets", []):
        if entry["threshold_best"] is not None:
            return entry
    raise InputError(f"--figures {path}: of train.py; lfw_eval.py writes what is wanted here")


@dataclass(frozen=True)
class _Figures:
    """What was measured on one set: points (FAR, cosine, FAR's interval), resolved ones only, and the best cosine."""

    source: str
    points: list[tuple[float, float, tuple[float, float] | None]]
    best: float | None
    normals: tuple[Normal | None, Normal | None]

    def decide(self, far: float | None) -> Decision:
        """The threshold at a false accept rate, see `find_decision`."""
        if far is None:
            usual = [point for point in self.points if point[0] >= USUAL_FAR * (1 - 1e-9)]
            if usual:
                return self._at(min(usual))
            if self.points:
                return self._at(max(self.points))
            if self.best is None:
                raise InputError(f"{self.source}: holds no threshold")
            return Decision(_degrees(self.best), f"of best accuracy, from {self.source}", *self.normals)
        for point in self.points:
            if math.isclose(point[0], far, rel_tol=1e-6):
                return self._at(point)
        known = ", ".join(f"{point[0]:g}" for point in self.points) or "none"
        raise InputError(
            f"--far {far:g}: {self.source} has the thresholds of these false accept rates: {known}; lfw_eval.py --far "
            f"{far:g} measures another, on at least {math.ceil(1 / far):,} pairs of two persons"
        )

    def _at(self, point: tuple[float, float, tuple[float, float] | None]) -> Decision:
        far, cosine, interval = point
        between = "" if interval is None else f" (95 % interval {interval[0]:.2g} to {interval[1]:.2g})"
        return Decision(_degrees(cosine), f"at FAR {far:g}{between}, from {self.source}", *self.normals)


def _measured(embedder: Embedder, checkpoint: Path, figures: Path | None) -> tuple[_Figures | None, str]:
    """What was measured, or None and why not."""
    if figures is not None:
        found, wrong = _from_results(figures, embedder)
        if wrong:
            raise InputError(f"--figures {figures}: {wrong}")
        if found is None:
            raise InputError(f"--figures {figures}: no set there has both kinds of pairs, so it holds no threshold")
        return found, ""
    why = ""
    if {"threshold", "figures"} & embedder.metadata.keys():
        found = _from_metadata(embedder)
        if embedder.as_stated and (found.points or found.best is not None):
            return found, ""
        if not embedder.as_stated:
            why = f" fed in this way (the threshold in its metadata is of mirror: {embedder.metadata['mirror']})"
    beside = checkpoint.parent / "results.json"
    if not beside.is_file():
        return None, why
    try:
        found_beside, wrong = _from_results(beside, embedder)
    except InputError as error:  # nobody named this file: it may be another program's
        return None, f"{why} ({error})"
    return (None, f"{why} ({beside}: {wrong})") if wrong else (found_beside, "")


def _from_metadata(embedder: Embedder) -> _Figures:
    """What an exported file says. Where its pairs did not resolve --far, it has figures and no threshold of its own."""
    try:
        threshold, known = embedder.metadata.get("threshold", {}), embedder.metadata.get("figures", {})
        source = f"{embedder.name}, {threshold.get('data', known.get('data', 'its metadata'))}"
        points = [
            _point(point, point["threshold"]["cosine"]) for point in known.get("tar_at_far", ()) if point["resolved"]
        ]
        stated = known.get("threshold_best")
        best = None if stated is None else _cosine(stated["cosine"])
        if "far" in threshold:
            points = [point for point in points if point[0] != threshold["far"]]
            points.append(_point(threshold, threshold["cosine"]))
        elif threshold:
            best = _cosine(threshold["cosine"])
        return _Figures(source, points, best, _normals(known.get("angles")))
    except _NOT_UNDERSTOOD as error:
        raise InputError(f"{embedder.name}: the threshold in its metadata is not understood ({error!r})") from error


def _from_results(path: Path, embedder: Embedder) -> tuple[_Figures | None, str]:
    """The first set of a results.json that has both kinds of pairs, and why it must not be used, if so."""
    try:
        content = utils.read_json(path, parse_constant=_refuse)
        if "sets" in content:
            model, sets = content["model"], [(entry["name"], entry) for entry in content["sets"]]
            measured = model["sha256"], model["preprocessing"]
        else:
            sets = list(content["best"]["verification"].items())
            measured = content.get("embedding_sha256"), None
        for name, entry in sets:
            if entry["threshold_best"] is None:
                continue
            points = [
                _point(point, point["threshold"]["cosine"])
                for point in entry.get("tar_at_far", ())
                if point["resolved"]
            ]
            best = _cosine(entry["threshold_best"]["cosine"])
            found = _Figures(f"{path}, {name}", points, best, _normals(entry["angles"]))
            return found, _mismatch(measured, embedder)
    except _NOT_UNDERSTOOD as error:
        raise InputError(f"{path}: not a results.json of train.py or lfw_eval.py ({error!r})") from error
    return None, ""


def _mismatch(measured: tuple[str | None, dict[str, Any] | None], embedder: Embedder) -> str:
    """Why figures of a model with this hash, fed in this way, do not hold for `embedder`; "" if they do."""
    sha256, way = measured
    if sha256 is None:
        return "does not say of which network its figures are"
    if sha256 != embedder.sha256:
        return f"its figures are of the network {sha256[:12]}, not of {embedder.name} ({str(embedder.sha256)[:12]})"
    now = json.loads(json.dumps(dataclasses.asdict(embedder.preprocessing)))
    changed = [key for key in now if way is not None and way[key] != now[key]]
    if changed:
        return f"its figures are of this network fed with other {', '.join(changed)}"
    return ""


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _cosine(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1.0000001:
        raise ValueError(f"{value!r} is no cosine")
    return float(value)


def _point(point: dict[str, Any], cosine: Any) -> tuple[float, float, tuple[float, float] | None]:
    far, interval = point["far"], point.get("far_interval_95")
    if isinstance(far, bool) or not isinstance(far, int | float) or not 0 < far < 1:
        raise ValueError(f"{far!r} is no false accept rate")
    return float(far), _cosine(cosine), None if interval is None else (float(interval[0]), float(interval[1]))


def _degrees(cosine: float) -> float:
    return math.degrees(math.acos(min(max(cosine, -1.0), 1.0)))


def _normals(angles: dict[str, Any] | None) -> tuple[Normal | None, Normal | None]:
    return _normal((angles or {}).get("genuine")), _normal((angles or {}).get("impostor"))


def _normal(moments: dict[str, float] | None) -> Normal | None:
    if not moments or not moments["std"] > 0:
        return None
    mean, std = float(moments["mean"]), float(moments["std"])
    if not (0 <= mean <= 180 and std <= 180):
        raise ValueError(f"mean {mean:g} and deviation {std:g} are not of angles")
    return Normal(mean, std)
