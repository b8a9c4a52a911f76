"""A first look: faces in a photo, one person or two, who is this?

    python demo.py photo.jpg                                  draws every face with its landmarks, and its crop
    python demo.py a.jpg b.jpg                                one person or not, with angle, threshold and confidence
    python demo.py --gallery people/ photo.jpg                names every face after the nearest people of the gallery

A gallery is a folder with a folder of photos per person, whatever folders are inside, or with one photo per person. The
network is --checkpoint: `released` downloads the published one; without the option the released one is taken if it has
been downloaded, else the one that `make demo` trained on synthetic people. Pictures go to --out; faces, their crops and
what is printed have the same numbers.
"""

import passive_threads  # noqa: F401  # isort: skip

import itertools
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw

import config
import download
import plotting
import utils
from config import CROP_SIZE
from cropping.align import AlignmentError, Rule, align_face, choose_face
from cropping.photos import PhotoError, identity_of, list_photos, read_photo
from embedding import Embedder, normalise, open_checkpoint
from options import parse
from retinaface import Detections, RetinaFace
from retinaface.network import ANCHOR_SIZES
from utils import InputError
from verification.decision import Decision, find_decision
from verification.lfw import crop_faces
from verification.metrics import to_angle

PHOTO_SIDE = 480  # pixels of the longer side of a photo on a picture
FACE_SIDE, LARGEST_SIDE = 40, 3000  # small faces are shown in so many pixels, if the picture does not become larger
LABEL = 12  # pixels of the letters on a label
DEMO_NETWORK = Path("runs/demo/train/embedding.pt")
BAR, GAP = 96, 12


@dataclass
class Look:
    """One photo with its faces; `crops` uint8 RGB [n, 112, 112, 3], one for each detection, best first.

    `rule` says which face the photo is about.
    """

    path: Path
    rgb: np.ndarray
    faces: Detections
    crops: np.ndarray
    rule: Rule

    @property
    def central(self) -> int:
        """The face that the photo is about; `InputError` when it shows none."""
        height, width = self.rgb.shape[:2]
        index = choose_face(self.faces.boxes, self.faces.scores, (width, height), self.rule)
        if index is None:
            raise InputError(f"{self.path}: no face found")
        return index


def look_at(path: Path, detector: RetinaFace, rule: Rule = "central") -> Look:
    """Read a photo and find its faces. Raises `InputError` naming the file when it cannot be read.

    Says so when the photo was shrunk, and which faces were too small to be seen then.
    """
    try:
        bgr = read_photo(path)
    except PhotoError as error:
        raise InputError(f"{path}: {error.reason}") from error
    (found,) = detector.detect([bgr])
    height, width = bgr.shape[:2]
    if detector.max_side is not None and max(height, width) > detector.max_side:
        least = min(min(sizes) for sizes in ANCHOR_SIZES) * max(height, width) / detector.max_side
        print(
            f"{path}: {width}x{height} pixels, shrunk to {detector.max_side} for detection: faces below about "
            f"{least:.0f} pixels were not looked for (--max-side 0 shrinks nothing)"
        )
    kept, crops = [], []
    for index, landmarks in enumerate(found.landmarks):
        try:
            crops.append(align_face(bgr, landmarks)[..., ::-1])
        except AlignmentError as error:
            print(f"{path}: a face is left out: {error}", file=sys.stderr)
            continue
        kept.append(index)
    faces = Detections(found.boxes[kept], found.scores[kept], found.landmarks[kept])
    return Look(path, bgr[..., ::-1], faces, np.array(crops, np.uint8).reshape(-1, CROP_SIZE, CROP_SIZE, 3), rule)


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_faces(look: Look, labels: list[str], main: int | None = None) -> Image.Image:
    """The photo with boxes, landmarks and a label at each face, beside the faces where there is room.

    Its longer side has `PHOTO_SIDE` pixels, twice that at most, or as many as small faces need to be seen.
    """
    height, width = look.rgb.shape[:2]
    scale = max(PHOTO_SIDE, min(max(height, width), 2 * PHOTO_SIDE)) / max(height, width)
    if len(look.faces):
        side = float(np.median(look.faces.boxes[:, 2:] - look.faces.boxes[:, :2]))
        scale = min(max(scale, FACE_SIDE / max(side, 1.0)), max(scale, LARGEST_SIDE / max(height, width)))
    picture = Image.fromarray(np.ascontiguousarray(look.rgb)).resize(
        (max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.LANCZOS
    )
    pen = ImageDraw.Draw(picture)
    boxes = look.faces.boxes * scale
    taken = boxes.copy()
    for index, (box, landmarks) in enumerate(zip(boxes, look.faces.landmarks, strict=True)):
        colour = plotting.ORANGE if index == main or main is None else plotting.SKY
        pen.rectangle([float(value) for value in box], outline=colour, width=2)
        radius = min(2.0, (box[2] - box[0]) / 20)
        for x, y in landmarks * scale:
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=plotting.GREEN)
    for index, box in enumerate(boxes):
        if labels[index]:
            colour = plotting.ORANGE if index == main or main is None else plotting.SKY
            length = plotting.font(LABEL).getlength(plotting.legible(labels[index])) + 6
            place = _beside(box, (min(length, picture.width), LABEL + 4), taken, picture.size)
            pen.rectangle(place.tolist(), fill=colour)
            xy, room = (int(place[0]) + 3, int(place[1]) + 1), picture.width - 6
            plotting.draw_text(picture, xy, labels[index], size=LABEL, width=room)
            taken = np.concatenate([taken, place[None]])
    return picture


def _beside(box: np.ndarray, size: tuple[float, float], taken: np.ndarray, picture: tuple[int, int]) -> np.ndarray:
    """Where a label of (width, height) covers least of what is `taken` [k, 4]: above a box, below or beside it."""
    (width, height), (left, top, right, bottom) = size, box
    corners = [
        (left, top - height),
        (left, bottom),
        (right, top),
        (left - width, top),
        (right - width, top - height),
        (right - width, bottom),
        (right, bottom - height),
        (left - width, bottom - height),
    ]
    best, least = box, np.inf
    for x, y in corners:
        x, y = min(max(x, 0), picture[0] - width), min(max(y, 0), picture[1] - height)
        place = np.array([x, y, x + width, y + height])
        shared = np.minimum(taken[:, 2:], place[2:]) - np.maximum(taken[:, :2], place[:2])
        covered = float(np.prod(np.maximum(shared, 0), axis=1).sum())
        if covered < least:
            best, least = place, covered
    return best


def crop_strip(crops: np.ndarray, width: int) -> Image.Image:
    """All crops in rows, at most `width` pixels wide, each with the number of its face."""
    side = crops.shape[1]
    across = max(min(len(crops), (width + GAP) // (side + GAP)), 1)
    rows = -(-len(crops) // across)
    strip = Image.new("RGB", (max(width, side), rows * (side + GAP)), "white")
    for index, crop in enumerate(crops):
        x, y = index % across * (side + GAP), index // across * (side + GAP)
        strip.paste(Image.fromarray(np.ascontiguousarray(crop)), (x, y))
        length = plotting.font(LABEL).getlength(str(index + 1)) + 6
        ImageDraw.Draw(strip).rectangle([x, y, x + length, y + LABEL + 4], fill=plotting.ORANGE)
        plotting.draw_text(strip, (x + 3, y + 1), str(index + 1), size=LABEL)
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
    pictures = [draw_faces(look, [""] * len(look.faces), look.central) for look in looks]
    for picture in pictures:
        picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    tallest = max(picture.height for picture in pictures)
    sides = []
    for look, picture in zip(looks, pictures, strict=True):
        frame = Image.new("RGB", (picture.width, tallest), "white")  # so that both crops stand at one height
        frame.paste(picture, (0, (tallest - picture.height) // 2))
        sides.append(stack([frame, Image.fromarray(np.ascontiguousarray(look.crops[look.central]))]))
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
    picture = draw_faces(look, [str(index + 1) for index in range(count)])
    save(stack([picture, crop_strip(look.crops, picture.width)] if count else [picture]), out, _stem(look, "faces"))


def _stem(*parts: Look | str) -> str:
    """The name of a picture of some photos, short enough for any file system."""
    names = [part if isinstance(part, str) else part.path.stem for part in parts]
    return "-".join(os.fsencode(name)[:90].decode("utf-8", "ignore") for name in names)


def save(picture: Image.Image, out: Path, name: str, written: set[str] | None = None) -> None:
    """Write a picture and say where; a name that is `written` already gets a number."""
    written = set() if written is None else written
    number = next(n for n in itertools.count(1) if (name if n == 1 else f"{name}-{n}") not in written)
    name = name if number == 1 else f"{name}-{number}"
    written.add(name)
    path = out / f"{name}.png"
    plotting.save_png(path, picture)
    print(f"picture: {path}")


# --- answers ---------------------------------------------------------------------------------------------------------


def directions(embedder: Embedder, crops: np.ndarray) -> np.ndarray:
    """Embeddings [n, D] of length 1; `InputError` for a model that gives none."""
    found = normalise(embedder.features(crops))
    if not np.isfinite(found).all():
        raise InputError(f"{embedder.name}: gives no finite feature other than zero for a face; it is broken")
    return found


def compare(looks: list[Look], embedder: Embedder, decision: Decision, out: Path) -> None:
    """One person or not."""
    crops = np.stack([look.crops[look.central] for look in looks])
    first, second = directions(embedder, crops)
    angle = float(to_angle(first @ second))
    verdict, detail = answer(decision, angle)
    for look in looks:
        if len(look.faces) > 1:
            which = {
                "central": "nearest to the centre",
                "largest": "that is largest",
                "best_score": "of the best score",
            }
            print(f"{look.path}: {len(look.faces)} faces, the one {which[look.rule]} is compared")
    print(f"{verdict}: {detail}\nnetwork {embedder.name}, fed with {embedder.feeding}; threshold {decision.source}")
    picture = draw_pair(looks, verdict, detail, plotting.GREEN if decision.same(angle) else plotting.RED)
    save(picture, out, _stem(*looks))


def answer(decision: Decision, angle: float) -> tuple[str, str]:
    """One person or not, and the figures that say so.

    A threshold for few false accepts is not where both are equally likely: between the two it is said that the answer
    goes against the odds.
    """
    same, confidence = decision.same(angle), decision.confidence(angle)
    figures = f"angle {angle:.1f}°, threshold {decision.threshold:.1f}°"
    if confidence is not None and confidence < 0.5:
        against = "two are likelier, but it is within" if same else "one is likelier, but it is beyond"
        return "not sure: one person or two", f"{figures}; {against} the threshold"
    return "the same person" if same else "two different people", f"{figures}, {_as_text(confidence)}"


def _as_text(confidence: float | None) -> str:
    if confidence is None:
        return "confidence unknown"
    return f"confidence {'over 99.9 %' if confidence > 0.999 else f'{confidence:.1%}'}"


def read_gallery(folder: Path, embedder: Embedder, options: config.Demo) -> tuple[list[str], np.ndarray]:
    """Names of the people in a gallery and their mean embeddings float64 [n, D], length 1.

    The first folder of a photo's path is the person, as everywhere in this repository; a photo outside of any folder is
    a person of its own. Photos without a usable face are named on standard error; a person without any other photo is
    an error, and so are two photos or folders that would be one person by their names alone.
    """
    listed = list_photos(folder).files
    files = [folder / photo for photo in listed]
    people = [identity_of(photo) or Path(photo).stem for photo in listed]
    alone = Counter(Path(photo).stem for photo in listed if not identity_of(photo))
    folders = {identity_of(photo) for photo in listed}
    for name, count in alone.items():
        if count > 1 or name in folders:
            raise InputError(
                f"{folder}: {name!r} is the name of {count} photos{' and of a folder' if name in folders else ''}; put "
                "the photos of one person into one folder, and give others another name"
            )
    found = crop_faces(
        files,
        max_side=options.max_side or None,
        device=embedder.model.device,
        cache_dir=options.out / "cache",
        name=folder.name,
    )
    usable = np.array([row.landmarks is not None for row in found.rows])
    for path, row in zip(files, found.rows, strict=True):
        if row.landmarks is None:
            print(f"{path}: left out: {row.reason}", file=sys.stderr)
    names = sorted(set(people))
    embeddings = directions(embedder, found.crops[usable])
    owners = np.array(people)[usable]
    empty = [name for name in names if name not in owners]
    if empty:
        raise InputError(f"{folder}: no usable photo of {', '.join(empty)}")
    return names, normalise(np.stack([embeddings[owners == name].sum(axis=0) for name in names]))


def identify(
    look: Look,
    names: list[str],
    gallery: np.ndarray,
    embedder: Embedder,
    decision: Decision,
    options: config.Demo,
    written: set[str],
) -> None:
    """Name every face of a photo after the nearest person of the gallery, or nobody.

    A name that our font cannot show stands in what is printed, at the number that the picture has.
    """
    labels = []
    print(f"{look.path}: {len(look.faces)} face{'' if len(look.faces) == 1 else 's'}")
    angles = to_angle(directions(embedder, look.crops) @ gallery.T)
    for index, row in enumerate(angles):
        nearest = np.argsort(row, kind="stable")[: options.nearest]
        angle = float(row[nearest[0]])
        known = decision.same(angle)
        name = names[nearest[0]]
        shown = name if plotting.legible(name) == name else "(see the list)"
        labels.append(f"{index + 1}: {f'{shown} {angle:.0f}°' if known else 'unknown'}")
        listing = ", ".join(f"{names[person]} {row[person]:.1f}°" for person in nearest)
        print(f"  {index + 1}: {names[nearest[0]] if known else 'nobody of the gallery'} ({listing})")
    print(f"network {embedder.name}, threshold {decision.threshold:.1f}° {decision.source}")
    save(draw_faces(look, labels), options.out, _stem(look, "named"), written)


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
    detector = RetinaFace(device=device, max_side=options.max_side or None)
    rule: Rule = cast("Rule", options.rule)
    looks = [look_at(path, detector, rule) for path in options.photos]
    if options.gallery is None and len(looks) == 1:
        show_faces(looks[0], options.out)
        return
    checkpoint = choose_checkpoint(options.checkpoint)
    embedder = open_checkpoint(checkpoint, options, device)
    decision = find_decision(embedder, checkpoint, options.figures, options.threshold, options.far)
    if options.gallery is None:
        compare(looks, embedder, decision, options.out)
        return
    names, gallery = read_gallery(options.gallery, embedder, options)
    written: set[str] = set()
    for look in looks:
        identify(look, names, gallery, embedder, decision, options, written)


if __name__ == "__main__":
    sys.exit(main())
