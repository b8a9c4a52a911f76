"""How like people are synthetic people, to a network that knows people? A judge that answers without any training.

    python benchmarks/bench_likeness.py --checkpoint FILE --real data/crops --synthetic data/synthetic_crops

FILE is a network trained on real crops, the better the more it says; --real and --synthetic are sets of crops as
train.py takes them (a folder with train.rec). From each as many crops of as many identities are taken, and compared
among themselves, whole and with nothing left but the inner face (an ellipse; the rest is grey):

* angles between two crops of one identity, and of two identities, mean and deviation in degrees. Real people are nearly
  at right angles to each other; people of a poor renderer look like kin.
* TAR: the share of same pairs that are accepted at the threshold that lets through a share --far of all others.
* length of the mean embedding: 0 where nothing is common to all, 1 where all are the same: the "look" of a set.
* dimensions: (sum of eigenvalues)^2 / sum of squares, of the identities' centres. Their number is the limit.

The last row takes the common look of the synthetic set off (subtracts its mean, normalises again): what is left of the
people when a network has learnt to overlook it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np

import utils
from config import CROP_SIZE
from cropping.photos import decode_crop
from embedding import load_embedder, normalise
from formats.crop_sets import open_crops

# Centre and half axes of the inner face in a crop: brows to below the lips, between the outer corners of the eyes.
ELLIPSE = (56, 72), (27, 36)
GREY = 128


def crops_of(path: Path, identities: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 RGB [n, 112, 112, 3] and identities [n] of the first people that have so many crops, and only so many."""
    opened = open_crops(path)
    wanted: dict[int, list[int]] = {}
    for index, label in enumerate(opened.labels.tolist()):
        members = wanted.setdefault(label, [])
        if len(members) < images:
            members.append(index)
    full = [members for members in wanted.values() if len(members) == images][:identities]
    if len(full) < 2:
        raise utils.InputError(f"{path}: fewer than two identities have {images} crops")
    crops = []
    for index in (index for members in full for index in members):
        try:
            crops.append(decode_crop(opened.read(index)[0]))
        except ValueError as error:
            raise utils.InputError(f"{opened.describe(index)}: {error}") from error
    return np.stack(crops), np.repeat(np.arange(len(full)), images)


def inner_face(crops: np.ndarray) -> np.ndarray:
    """Crops whose outside is grey."""
    mask = np.zeros((CROP_SIZE, CROP_SIZE), np.uint8)
    cv2.ellipse(mask, ELLIPSE[0], ELLIPSE[1], 0, 0, 360, 1, -1)
    return np.where(mask[None, :, :, None] > 0, crops, np.uint8(GREY))


def judged(embeddings: np.ndarray, people: np.ndarray, far: float) -> dict[str, float]:
    """All figures of embeddings [n, d] of length 1 with identities [n]."""
    first, second = np.triu_indices(len(people), 1)
    cosines = np.clip((embeddings @ embeddings.T)[first, second], -1, 1)
    same = people[first] == people[second]
    angles = np.degrees(np.arccos(cosines))
    others = np.sort(cosines[~same])[::-1]
    threshold = others[int(far * len(others))]
    centres = normalise(np.stack([embeddings[people == who].mean(0) for who in np.unique(people)]))
    eigen = np.linalg.svd(centres - centres.mean(0), compute_uv=False) ** 2
    return {
        "same_mean": float(angles[same].mean()),
        "same_deviation": float(angles[same].std()),
        "different_mean": float(angles[~same].mean()),
        "different_deviation": float(angles[~same].std()),
        "tar": float((cosines[same] > threshold).mean()),
        "mean_length": float(np.linalg.norm(embeddings.mean(0))),
        "dimensions": float(eigen.sum() ** 2 / (eigen**2).sum()),
        "centres": len(centres),
    }


@utils.command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="the judge: a network trained on real crops")
    parser.add_argument("--mean", type=float, nargs=3, help="of an .onnx file that does not say how it is fed")
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--real", type=Path, required=True, help="crops of real people")
    parser.add_argument("--synthetic", type=Path, required=True, nargs="+", help="crops of people who do not exist")
    parser.add_argument("--identities", type=int, default=64)
    parser.add_argument("--images", type=int, default=12, help="crops of each")
    parser.add_argument("--far", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    if not 0 < options.far < 1:
        parser.error(f"--far {options.far:g}: has to be above 0 and below 1")
    if options.images < 2:
        parser.error(f"--images {options.images}: one crop has none to be compared with")
    judge = load_embedder(options.checkpoint, mean=options.mean, std=options.std)
    rows: dict[str, dict[str, float]] = {}
    for name, path in [("real", options.real), *((f"synthetic {path}", path) for path in options.synthetic)]:
        crops, people = crops_of(path, options.identities, options.images)
        for part, shown in (("", crops), (", inner face", inner_face(crops))):
            embeddings = normalise(judge.features(shown))
            if not np.isfinite(embeddings).all():
                raise utils.InputError(f"{judge.name}: gives no finite feature other than zero for a crop of {path}")
            rows[name + part] = judged(embeddings, people, options.far)
            if name != "real" and not part:
                rows[name + ", common look off"] = judged(
                    normalise(embeddings - embeddings.mean(0)), people, options.far
                )
    width = max(map(len, rows))
    print(f"{judge.name}, {options.images} crops of up to {options.identities} identities, TAR at FAR {options.far:g}")
    print(f"{'':{width}s}  same person    two persons    TAR    mean length  dimensions")
    for name, row in rows.items():
        angles = "{same_mean:4.1f} +- {same_deviation:4.1f}   {different_mean:4.1f} +- {different_deviation:4.1f}"
        rest = "{tar:6.3f}  {mean_length:8.2f}     {dimensions:5.1f} of {centres}"
        print(f"{name:{width}s}  " + (angles + rest).format(**row))
    if options.json:
        utils.write_json(options.json, {"judge": judge.describe(), "rows": rows, "environment": utils.environment()})


if __name__ == "__main__":
    sys.exit(main())
