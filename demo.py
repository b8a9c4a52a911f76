"""A first look: faces in a photo, one person or two, who is this?

    python demo.py photo.jpg                                  draws every face with its landmarks, and its crop
    python demo.py a.jpg b.jpg                                one person or not, with angle, threshold and confidence
    python demo.py --gallery people/ photo.jpg                names every face after the nearest people of the gallery

A gallery is a folder with a folder of photos per person, or with one photo per person. The network is --checkpoint:
`released` downloads the published one; without the option the released one is taken if it has been downloaded, else
the one that `make demo` trained on synthetic people. Pictures go to --out.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import config
import download
import plotting
import utils
from config import DETECTION_SIDE
from cropping.align import AlignmentError, align_face, choose_face
from cropping.photos import PhotoError, list_photos, read_photo
from embedding import Embedder, load_embedder, normalise
from options import parse
from retinaface import Detections, RetinaFace
from utils import InputError
from verification.decision import Decision, find_decision
from verification.lfw import crop_faces
from verification.metrics import to_angle

PHOTO_SIDE = 480  # pixels of the longer side of a photo on a picture
DEMO_NETWORK = Path("runs/demo/train/embedding.pt")
BAR, GAP = 96, 12


@dataclass
class Look:
    """One photo with its faces; `crops` uint8 RGB [n, 112, 112, 3], one for each detection, best first."""

    path: Path
    rgb: np.ndarray
    faces: Detections
    crops: np.ndarray

    @property
    def central(self) -> int:
        """The face that the photo is about; `InputError` when it shows none."""
        height, width = self.rgb.shape[:2]
        index = choose_face(self.faces.boxes, self.faces.scores, (width, height))
        if index is None:
            raise InputError(f"{self.path}: no face found")
        return index


def look_at(path: Path, detector: RetinaFace) -> Look:
    """Read a photo and find its faces. Raises `InputError` naming the file when it cannot be read."""
    try:
        bgr = read_photo(path)
    except PhotoError as error:
        raise InputError(f"{path}: {error.reason}") from error
    (found,) = detector.detect([bgr])
    kept, crops = [], []
    for index, landmarks in enumerate(found.landmarks):
        try:
            crops.append(align_face(bgr, landmarks)[..., ::-1])
        except AlignmentError as error:
            print(f"{path}: a face is left out: {error}", file=sys.stderr)
            continue
        kept.append(index)
    faces = Detections(found.boxes[kept], found.scores[kept], found.landmarks[kept])
    return Look(path, bgr[..., ::-1], faces, np.array(crops, np.uint8).reshape(-1, 112, 112, 3))


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_faces(look: Look, labels: list[str], main: int | None = None) -> Image.Image:
    """The photo, its longer side `PHOTO_SIDE` pixels or more, with boxes, landmarks and a label at each face."""
    height, width = look.rgb.shape[:2]
    scale = max(PHOTO_SIDE, min(max(height, width), 2 * PHOTO_SIDE)) / max(height, width)
    picture = Image.fromarray(np.ascontiguousarray(look.rgb)).resize(
        (max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.LANCZOS
    )
    pen = ImageDraw.Draw(picture)
    for index, (box, landmarks) in enumerate(zip(look.faces.boxes, look.faces.landmarks, strict=True)):
        colour = plotting.ORANGE if index == main or main is None else plotting.SKY
        pen.rectangle([float(value) * scale for value in box], outline=colour, width=2)
        for x, y in landmarks * scale:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=plotting.GREEN, outline="white")
        x, y = box[0] * scale, box[1] * scale - 16
        if labels[index]:
            face = plotting.font(12)
            place = (max(int(x), 0), max(int(y), 0))
            pen.rectangle([*place, place[0] + face.getlength(labels[index]) + 6, place[1] + 15], fill=colour)
            plotting.draw_text(picture, (place[0] + 3, place[1] + 1), labels[index], size=12)
    return picture


def crop_strip(crops: np.ndarray, width: int) -> Image.Image:
    """All crops in rows, at most `width` pixels wide."""
    side = crops.shape[1]
    across = max(min(len(crops), (width + GAP) // (side + GAP)), 1)
    rows = -(-len(crops) // across)
    strip = Image.new("RGB", (width, rows * (side + GAP)), "white")
    for index, crop in enumerate(crops):
        place = (index % across * (side + GAP), index // across * (side + GAP))
        strip.paste(Image.fromarray(np.ascontiguousarray(crop)), place)
    return strip


def stack(pictures: list[Image.Image]) -> Image.Image:
    """Pictures one below the other on white."""
    width = max(picture.width for picture in pictures) + 2 * GAP
    sheet = Image.new("RGB", (width, sum(picture.height + GAP for picture in pictures) + GAP), "white")
    y = GAP
    for picture in pictures:
        sheet.paste(picture, ((width - picture.width) // 2, y))
        y += picture.height + GAP
    return sheet


def draw_pair(looks: list[Look], verdict: str, detail: str, colour: str) -> Image.Image:
    """Two photos side by side with the faces that were compared, their crops, and the answer below."""
    sides = []
    for look in looks:
        picture = draw_faces(look, [""] * len(look.faces), look.central)
        picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
        sides.append(stack([picture, Image.fromarray(np.ascontiguousarray(look.crops[look.central]))]))
    height = max(side.height for side in sides)
    sheet = Image.new("RGB", (max(sum(side.width for side in sides), 640), height + BAR), "white")
    x = (sheet.width - sum(side.width for side in sides)) // 2
    for side in sides:
        sheet.paste(side, (x, 0))
        x += side.width
    ImageDraw.Draw(sheet).rectangle([0, height, sheet.width, sheet.height], fill=colour)
    plotting.draw_text(sheet, (GAP, height + 12), verdict, size=28, bold=True, colour="white")
    plotting.draw_text(sheet, (GAP, height + 58), detail, size=16, colour="white", width=sheet.width - 2 * GAP)
    return sheet


def show_faces(look: Look, out: Path) -> None:
    """Print and draw every face of one photo."""
    count = len(look.faces)
    print(f"{look.path}: {count} face{'' if count == 1 else 's'}")
    for index, (box, score) in enumerate(zip(look.faces.boxes, look.faces.scores, strict=True)):
        left, top, right, bottom = box
        size = f"{right - left:.0f} x {bottom - top:.0f} pixels"
        print(f"  {index + 1}: {size} at ({left:.0f}, {top:.0f}), score {score:.3f}")
    labels = [f"{index + 1}: {score:.2f}" for index, score in enumerate(look.faces.scores)]
    picture = draw_faces(look, labels)
    save(
        stack([picture, crop_strip(look.crops, picture.width)] if count else [picture]), out, f"{look.path.stem}-faces"
    )


def save(picture: Image.Image, out: Path, name: str) -> None:
    """Write a picture and say where."""
    path = out / f"{name}.png"
    plotting.save_png(path, picture)
    print(f"picture: {path}")


# --- answers ---------------------------------------------------------------------------------------------------------


def compare(looks: list[Look], embedder: Embedder, decision: Decision, out: Path) -> None:
    """One person or not."""
    crops = np.stack([look.crops[look.central] for look in looks])
    first, second = normalise(embedder.features(crops))
    angle = float(to_angle(first @ second))
    same = decision.same(angle)
    verdict = "the same person" if same else "two different people"
    detail = f"angle {angle:.1f}°, threshold {decision.threshold:.1f}°, {_confidence(decision, angle)}"
    for look in looks:
        if len(look.faces) > 1:
            print(f"{look.path}: {len(look.faces)} faces, the one nearest to the centre is compared")
    print(f"{verdict}: {detail}\nnetwork {embedder.name}, threshold {decision.source}")
    picture = draw_pair(looks, verdict, detail, plotting.GREEN if same else plotting.RED)
    save(picture, out, f"{looks[0].path.stem}-{looks[1].path.stem}")


def _confidence(decision: Decision, angle: float) -> str:
    confidence = decision.confidence(angle)
    if confidence is None:
        return "confidence unknown"
    return f"confidence {'over 99.9 %' if confidence > 0.999 else f'{confidence:.1%}'}"


def read_gallery(folder: Path, embedder: Embedder, options: config.Demo) -> tuple[list[str], np.ndarray]:
    """Names of the people in a gallery and their mean embeddings float64 [n, D], length 1.

    Photos without a usable face are named on standard error; a person without any other photo is an error.
    """
    files = [folder / photo for photo in list_photos(folder).files]
    people = [path.parent.name if path.parent != folder else path.stem for path in files]
    found = crop_faces(
        files, max_side=DETECTION_SIDE, device=embedder.model.device, cache_dir=options.out / "cache", name=folder.name
    )
    usable = np.array([row.landmarks is not None for row in found.rows])
    for path, row in zip(files, found.rows, strict=True):
        if row.landmarks is None:
            print(f"{path}: left out: {row.reason}", file=sys.stderr)
    names = sorted(set(people))
    embeddings = normalise(embedder.features(found.crops[usable]))
    owners = np.array(people)[usable]
    empty = [name for name in names if name not in owners]
    if empty:
        raise InputError(f"{folder}: no usable photo of {', '.join(empty)}")
    return names, normalise(np.stack([embeddings[owners == name].sum(axis=0) for name in names]))


def identify(
    look: Look, names: list[str], gallery: np.ndarray, embedder: Embedder, decision: Decision, options: config.Demo
) -> None:
    """Name every face of a photo after the nearest person of the gallery, or nobody."""
    labels = []
    print(f"{look.path}: {len(look.faces)} face{'' if len(look.faces) == 1 else 's'}")
    angles = to_angle(normalise(embedder.features(look.crops)) @ gallery.T)
    for index, row in enumerate(angles):
        nearest = np.argsort(row, kind="stable")[: options.nearest]
        angle = float(row[nearest[0]])
        known = decision.same(angle)
        labels.append(f"{names[nearest[0]]} {angle:.0f}°" if known else "unknown")
        listing = ", ".join(f"{names[person]} {row[person]:.1f}°" for person in nearest)
        print(f"  {index + 1}: {names[nearest[0]] if known else 'nobody of the gallery'} ({listing})")
    print(f"network {embedder.name}, threshold {decision.threshold:.1f}° {decision.source}")
    save(draw_faces(look, labels), options.out, f"{look.path.stem}-named")


def choose_checkpoint(name: str | None) -> Path:
    """`--checkpoint`, else the released network if it is there, else the one of `make demo`."""
    if name is not None:
        return download.checkpoint_path(name)
    released = download.WEIGHTS / Path(download.RELEASED_URL).name
    own = Path(__file__).resolve().parent / DEMO_NETWORK
    for path in (released, own):
        if path.is_file():
            return path
    raise InputError(
        f"no network: neither {released} nor {own} is there; run make demo, or give --checkpoint released or a file"
    )


@utils.command
def main() -> None:
    """See the file's docstring."""
    options = parse(config.Demo, __doc__)
    if options.gallery is None and len(options.photos) > 2:
        raise InputError(f"{len(options.photos)} photos: give one, or two to compare, or --gallery DIR")
    if options.gallery is not None and not options.gallery.is_dir():
        raise InputError(f"--gallery {options.gallery}: no such folder")
    device = utils.choose_device(options.device)
    detector = RetinaFace(device=device, max_side=DETECTION_SIDE)
    looks = [look_at(path, detector) for path in options.photos]
    if options.gallery is None and len(looks) == 1:
        show_faces(looks[0], options.out)
        return
    checkpoint = choose_checkpoint(options.checkpoint)
    embedder = load_embedder(checkpoint, device)
    decision = find_decision(embedder, checkpoint, options.figures, options.threshold, options.far)
    if options.gallery is None:
        compare(looks, embedder, decision, options.out)
        return
    names, gallery = read_gallery(options.gallery, embedder, options)
    for look in looks:
        identify(look, names, gallery, embedder, decision, options)


if __name__ == "__main__":
    sys.exit(main())
