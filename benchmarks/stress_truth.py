"""Does stress.py tell the truth? Its curves against photos of real people, for the same models.

    python stress.py --checkpoint A.onnx B.onnx --factors yaw blur --out stress
    python benchmarks/stress_truth.py --checkpoint A.onnx B.onnx --stress stress/results.json --lfw lfw

Photos of LFW are put into bins by yaw (from the landmarks), blur (how far the sharpest photos have to be blurred to be
as soft) and size (pixels between the eyes). In each bin, a genuine pair is one of its photos and one of the same person
from the easiest bin; it is lost below the threshold that gives --far among all pairs of two people. Beside the share
that is lost, and the mean angle, stands what stress.py says of the bin's median. Real photos differ in more than one
thing, so levels are not comparable; orders are: the rank correlation (Spearman) over the bins of each model, over all
bins of all models, and of the models (three or more; by how much the angle rises from the first bin to the last). Ranks
are of angles: within what a set such as LFW has of yaw and blur, people who do not exist may lose no pair at all.
Size has no counterpart in stress.py as long as no face is smaller than a crop; its bins are listed all the same.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
import utils
from auditing.measures import sharpness
from config import DETECTION_SIDE
from cropping.photos import identity_of, list_photos
from embedding import normalise, open_embedder
from formats.tables import CROP
from options import REQUIRED, option, parse
from utils import InputError
from verification import lfw

# The tip of an adult's nose lies some 35 mm before the line between the eyes, whose centres are 63 mm apart.
NOSE = 35 / 63
SIGMAS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # pixels of the crop
BLOCK = 1024
FACTORS = {"yaw": "yaw", "blur": "blur", "size": None}  # ours: stress.py's


@dataclass
class StressTruth(config.Feeding):
    """What is compared."""

    checkpoint: list[str] = option(REQUIRED, "the models of --stress, in its order", metavar="FILE")
    stress: Path = option(REQUIRED, "results.json of stress.py", metavar="FILE")
    lfw: Path = option(REQUIRED, "photos in a folder per person", metavar="DIR")
    far: float = option(1e-3, "false accept rate among the real photos", above=0, below=1)
    bins: int = option(5, "bins of equally many photos", at_least=2)
    out: Path = option(Path("results/stress_truth"), "folder of crops and results", metavar="DIR")


def yaw(landmarks: np.ndarray) -> np.ndarray:
    """Degrees of yaw, float [n], without a sign, of landmarks [n, 5, 2]: how far the nose is off the eyes' middle.

    Along the line between the eyes the nose's tip moves by its depth times the sine, and that line shrinks by the
    cosine.
    """
    left, right, nose = landmarks[:, 0], landmarks[:, 1], landmarks[:, 2]
    line = right - left
    length = np.maximum(np.linalg.norm(line, axis=1), 1e-6)
    offset = np.einsum("nd,nd->n", nose - (left + right) / 2, line) / length
    return np.degrees(np.arctan(np.abs(offset) / (NOSE * length)))


def blur(crops: np.ndarray) -> np.ndarray:
    """Pixels of blur (sigma), float [n], that make the sharpest tenth of uint8 crops [n, 112, 112, 3] as soft."""
    found = np.array([sharpness(crop) for crop in crops])
    sharpest = crops[found >= np.quantile(found, 0.9)][:200]
    softened = [
        np.median([sharpness(cv2.GaussianBlur(crop, (0, 0), sigma) if sigma else crop) for crop in sharpest])
        for sigma in SIGMAS.tolist()
    ]
    return np.interp(-found, -np.array(softened), SIGMAS)


def threshold(unit: np.ndarray, people: np.ndarray, far: float) -> float:
    """The lowest cosine that accepts no more than `far` of all pairs of two people."""
    counts = np.zeros(200_001, np.int64)
    for start in range(0, len(unit), BLOCK):
        cosines = unit[start : start + BLOCK] @ unit.T
        others = np.triu(np.ones(cosines.shape, bool), start + 1)
        others &= people[start : start + BLOCK, None] != people
        counts += np.bincount(((cosines[others] + 1) * 100_000).astype(np.int64).clip(0, 200_000), minlength=200_001)
    above = np.cumsum(counts[::-1])[::-1]
    allowed = above <= far * above[0]
    return float((np.argmax(allowed) if allowed.any() else len(above)) / 100_000 - 1)


def lost(unit: np.ndarray, people: np.ndarray, bins: np.ndarray, limit: float) -> list[tuple[int, int, float]]:
    """(genuine pairs, how many of them are lost, mean angle in degrees) of each bin: one photo in it, the other in
    bin 0."""
    rows = []
    for number in range(bins.max() + 1):
        pairs, missed, angles = 0, 0, 0.0
        for person in np.unique(people[bins == number]):
            easy, hard = np.flatnonzero((people == person) & (bins == 0)), (people == person) & (bins == number)
            cosines = unit[hard] @ unit[easy].T
            if number == 0:
                cosines = cosines[np.triu_indices(len(easy), 1)]
            pairs, missed = pairs + cosines.size, missed + int((cosines < limit).sum())
            angles += float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).sum())
        rows.append((pairs, missed, angles / max(pairs, 1)))
    return rows


def in_bins(values: np.ndarray, count: int) -> np.ndarray:
    """Numbers int64 [n] of bins with equally many of the values each, the smallest in bin 0."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable") * count // len(values)


def correlation(first: list[float], second: list[float]) -> float | None:
    """Spearman's; None where one of the two has no order."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)


def compare(
    units: list[np.ndarray], people: np.ndarray, values: np.ndarray, curves: list[Any], options: StressTruth
) -> dict[str, Any]:
    """One factor: losses and angles of each bin and model, beside the curves (levels, losses, angles) of stress.py, and
    the ranks of the angles."""
    bins = in_bins(values, options.bins)
    medians = [float(np.median(values[bins == number])) for number in range(options.bins)]
    limits = [threshold(unit, people, options.far) for unit in units]
    real = [lost(unit, people, bins, limit) for unit, limit in zip(units, limits, strict=True)]
    angles = [[angle for _, _, angle in rows] for rows in real]
    record: dict[str, Any] = {
        "medians": medians,
        "pairs": [pairs for pairs, _, _ in real[0]],
        "real": [[missed / max(pairs, 1) for pairs, missed, _ in rows] for rows in real],
        "real angles": angles,
        "order of bins": [correlation(medians, row) for row in angles],
    }
    if all(curve is not None for curve in curves):
        said = [np.interp(medians, levels, found).tolist() for levels, _, found in curves]
        rises = [[row[-1] - row[0] for row in rows] for rows in (angles, said)]
        record |= {
            "stress": [np.interp(medians, levels, losses).tolist() for levels, losses, _ in curves],
            "stress angles": said,
            "each model": [correlation(*rows) for rows in zip(angles, said, strict=True)],
            "all models": correlation(np.ravel(angles).tolist(), np.ravel(said).tolist()),
            "models": correlation(*rises),
        }
    return record


def curve_of(model: dict[str, Any], name: str | None) -> tuple[list[float], list[float], list[float]] | None:
    """(levels, losses, angles) of a factor, from the reference photo on; None if it was not moved."""
    if name is None or name not in model["factors"]:
        return None
    levels = model["factors"][name]["levels"]
    losses = [0.0, *(row["fnmr"]["value"] for row in levels)]
    angles = [0.0, *(row["mean_genuine_angle"]["value"] for row in levels)]
    return [0.0, *(abs(row["level"]) for row in levels)], losses, angles


@utils.command
def main() -> None:
    """See the file's docstring."""
    options = parse(StressTruth, __doc__)
    try:
        models = utils.read_json(options.stress)["models"]
        curves = {other: [curve_of(model, other) for model in models] for other in FACTORS.values()}
        labels = [str(model["label"]) for model in models]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{options.stress}: not a results.json of stress.py") from error
    if len(models) != len(options.checkpoint):
        raise InputError(
            f"{options.stress}: speaks of {len(models)} models, --checkpoint names {len(options.checkpoint)}"
        )
    device = utils.choose_device("auto")
    fed = {field.name: getattr(options, field.name) for field in dataclasses.fields(config.Feeding)}
    embedders = [open_embedder(config.Model(checkpoint=name, **fed), device) for name in options.checkpoint]
    for embedder, model in zip(embedders, models, strict=True):
        now = embedder.describe()
        if any(model.get(name) != value for name, value in now.items() if "sha256" in name):
            raise InputError(f"{options.stress}: {model['label']} is another model than {embedder.name}")
        if json.loads(json.dumps(now["preprocessing"])) != model.get("preprocessing"):
            raise InputError(f"{options.stress}: {model['label']} was fed otherwise than {embedder.name} is now")
    listed = [file for file in list_photos(options.lfw).files if identity_of(file)]
    faces = lfw.crop_faces(
        [options.lfw / file for file in listed],
        max_side=DETECTION_SIDE, device=device, cache_dir=options.out / "cache", name=options.lfw.name,
    )  # fmt: skip
    shown = np.array([index for index, row in enumerate(faces.rows) if row.status == CROP])
    if len(shown) < options.bins:
        raise InputError(
            f"{options.lfw}: {len(shown)} of {len(listed)} photos show a face, too few for {options.bins} bins"
        )
    crops = np.concatenate([faces.crops[shown[start : start + BLOCK]] for start in range(0, len(shown), BLOCK)])
    landmarks = np.array([faces.rows[index].landmarks for index in shown])
    people = np.unique([str(Path(listed[index]).parent) for index in shown], return_inverse=True)[1]
    units = []
    for embedder in embedders:
        with utils.progress(len(crops), embedder.name, unit="crop") as bar:
            parts = []
            for start in range(0, len(crops), BLOCK):
                parts.append(embedder.features(crops[start : start + BLOCK]))
                bar.update(len(parts[-1]))
        units.append(normalise(np.concatenate(parts)).astype(np.float32))
    eyes = np.linalg.norm(landmarks[:, 1] - landmarks[:, 0], axis=1)
    values = {"yaw": yaw(landmarks), "blur": blur(crops), "size": -eyes}  # the largest faces are the easiest
    record = {name: compare(units, people, values[name], curves[other], options)
              for name, other in FACTORS.items()}  # fmt: skip
    utils.write_json(options.out / "results.json", {"far": options.far, "photos": len(crops), "models": labels,
                                                    "factors": record, "environment": utils.environment()})  # fmt: skip
    for name, found in record.items():
        print(f"\n{name}, {len(crops)} photos; real | stress.py, at the bins' medians")
        print(f"{'':30}" + "".join(f"{abs(median):>16.1f}" for median in found["medians"]))
        for k, label in enumerate(labels):
            for what, key, style in (("lost", "", ".1%"), ("angle", " angles", ".1f")):
                real, said = found[f"real{key}"][k], found.get(f"stress{key}")
                cells = [f"{value:{style}}" for value in real]
                if said is not None:
                    cells = [f"{cell} | {value:{style}}" for cell, value in zip(cells, said[k], strict=True)]
                print(f"{f'{label[:22]}, {what}':30}" + "".join(f"{cell:>16}" for cell in cells))
        for what in ("order of bins", "each model", "all models", "models"):
            if what in found:
                print(f"rank correlation, {what}: {found[what]}")


if __name__ == "__main__":
    sys.exit(main())
