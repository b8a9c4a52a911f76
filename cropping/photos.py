"""Photos from disk as arrays, whatever their format, and an honest reason for each file that is not a whole photo.

Design: Pillow reads the header of every file (format, size, orientation) before anything is decoded, so an image that
is too large costs nothing. Plain JPEGs, nearly everything in practice, are then decoded by OpenCV, which takes half the
time and gives the same pixels; all else is decoded by Pillow. Both libraries turn half a JPEG that was given an end
mark into a photo with a grey rest, so a photo that ends in that grey is looked at again in a way that shows whether
data is missing. Price: the few photos with that very grey in their last corner are decoded twice. Damage inside the
data that the decoders get over is not noticed; OpenCV may remark on it on standard error.
"""

import contextlib
import functools
import hashlib
import heapq
import io
import math
import os
import re
import stat
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from config import CROP_SIZE
from formats.names import is_litter
from utils import InputError, image_suffix

# Formats that hold photos. Pillow knows others that start programs (EPS runs Ghostscript) or are not pictures.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")

# Files that accompany photos in the known data sets (lists, annotations, MegaFace's .json per photo). Everything else
# counts as a photo, with or without an extension, and gets a row.
COMPANIONS = frozenset(
    ".json .txt .tsv .csv .md .html .htm .xml .yaml .yml .log .ini .db .lst "
    ".idx .rec .bin .npy .npz .mat .pkl .py .sh".split()
)

# What a photo may cost. A JPEG of 100 megapixels, more than nearly all cameras write, takes some seconds and 0.7 GB,
# turned by EXIF 1 GB, in CMYK 1.5 GB.
# The other formats need copies on their way (JPEG 2000 19 bytes a pixel, WebP 18, the rest 10 to 12), so that half as
# many pixels take about 1 GB. Of those, one that is larger than `_LARGE` is decoded at a time, whatever the workers.
MAX_PIXELS = 100_000_000
MAX_PIXELS_OTHERS = 50_000_000
MAX_BYTES = 256 << 20
_LARGE = 12_000_000
# A bomb says in few bytes that it is large. Photos have 0.1 bytes a pixel and more, drawings of one colour 0.003.
_PIXELS_PER_BYTE = 500
_PLAUSIBLE = 4_000_000  # pixels that any file may have
# Each scan of a progressive JPEG goes over the whole picture, at 2 to 20 ms a megapixel; encoders write about ten.
MAX_SCANS = 100
_MAX_SCANNED = 1_500_000_000  # scans times pixels
_MAX_SEGMENTS = 20_000  # of a JPEG
_large_ones = threading.Lock()

REDUCTIONS = (8, 4, 2)  # scales at which libjpeg decodes: an eighth, a quarter, a half
_READ = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
# What ends a run of compressed JPEG data: any marker but a stuffed zero byte, a restart mark or a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN, _END_OF_IMAGE, _PROGRESSIVE_FRAME = 0xDA, 0xD9, 0xC2
# What libjpeg shows where a JPEG's data is missing: all coefficients zero.
_MISSING_GREY = 128
# Put in the place of the end mark to see whether a JPEG's data suffices: libjpeg fetches up to 8 bytes ahead, and 16
# bytes of zeros are too few to stand for more than a few missing blocks.
_PADDING = bytes(16)

# Pillow's remarks on odd metadata say nothing that the result or a PhotoError does not; they would tear up the progress
# bar. The guard against decompression bombs is `MAX_PIXELS`.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# So would OpenCV's remarks on damaged files.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class PhotoError(Exception):
    """A file that gives no photo. `reason` is "category" or "category: detail", in one line."""

    def __init__(self, category: str, detail: object = "") -> None:
        # A row may hold several reasons, "; " between them: a decoder's semicolon must not look like that.
        text = " ".join(str(detail).replace(";", ",").split())
        self.reason = f"{category}: {text}" if text else category
        super().__init__(self.reason)


class Reduced(NamedTuple):
    """A photo of width x height pixels, upright, each `factor` x `factor` of them as one: BGR uint8 [H, W, 3], where W
    and H are those sides over the factor, rounded up."""

    bgr: NDArray[np.uint8]
    factor: int
    width: int
    height: int


def reduction(size_wh: tuple[int, int], side: int) -> int:
    """By how much a photo may be reduced so that its longer side still has `side` pixels: 8, 4, 2 or 1."""
    return next((factor for factor in REDUCTIONS if max(size_wh) >= side * factor), 1)


def read_photo(
    source: str | Path | bytes, *, orient: bool = True, min_side: int = 1, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """The photo in a file (or in the file's bytes) as BGR uint8 [H, W, 3].

    The format comes from the content, not from the name. The EXIF orientation is applied unless `orient` is false
    (boxes that others drew refer to the stored pixels). Grey becomes three equal channels; 16 bits become the upper 8;
    CMYK becomes RGB; transparent pixels are laid over white; of an animation the first frame is taken.

    Raises `PhotoError` with one of the categories: missing, empty file, not a photo, unreadable, truncated, too small
    (a side shorter than `min_side`), too large (more than `max_pixels`).
    """
    data = source if isinstance(source, bytes) else read_file(source)
    return read_reduced(data, lambda size_wh: 1, orient=orient, min_side=min_side, max_pixels=max_pixels).bgr


def read_reduced(
    data: bytes,
    choose: Callable[[tuple[int, int]], int],
    *,
    orient: bool = True,
    min_side: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> Reduced:
    """As `read_photo`, but a JPEG is decoded at one of its own smaller scales, which takes a fraction of the time.

    `choose` is asked for the factor, one of `REDUCTIONS` or 1, with the width and height of the whole photo. libjpeg
    makes the smaller picture from the lowest frequencies of each block, which is smoother than to leave pixels out.
    Other formats, and JPEGs that only Pillow decodes (CMYK, a missing end mark), come whole.
    """
    if not data:
        raise PhotoError("empty file")
    image = _open(data)
    width, height = image.size
    is_jpeg = image.format in ("JPEG", "MPO")
    limit = max_pixels if is_jpeg else min(max_pixels, MAX_PIXELS_OTHERS)
    if width * height > limit:
        raise PhotoError("too large", f"{width}x{height}, the limit is {limit / 1e6:g} megapixels")
    if width * height > max(_PLAUSIBLE, _PIXELS_PER_BYTE * len(data)):
        raise PhotoError("too large", f"{width}x{height} pixels out of {len(data)} bytes, which no photo has")
    if min(width, height) < min_side:
        raise PhotoError("too small", f"{width}x{height}, the limit is {min_side}")
    if is_jpeg:
        bgr = _decode_jpeg(image, data, choose((width, height)))
    else:
        with _large_ones if width * height > _LARGE else contextlib.nullcontext():
            bgr = _decode(image, data)
    factor = math.ceil(max(width, height) / max(bgr.shape[:2]))
    turn = _orientation(image) if orient else 1
    if turn in _SIDEWAYS:
        width, height = height, width
    return Reduced(_upright(bgr, turn), factor, width, height)


def _may_be_transparent(encoded: bytes) -> bool:
    """Whether a PNG or WebP has an alpha channel or a transparent colour, by its first chunks."""
    if encoded.startswith(b"\x89PNG"):
        return encoded[25:26] in (b"\4", b"\6") or b"tRNS" in encoded[: encoded.find(b"IDAT")]
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        extended = encoded[12:16] == b"VP8X" and len(encoded) > 20
        return encoded[12:16] == b"VP8L" or (extended and bool(encoded[20] & 0x10))
    return False


def decode_crop(encoded: bytes) -> np.ndarray:
    """An encoded crop as RGB uint8 [112, 112, 3], turned as its EXIF says. `ValueError` with the reason if it is none.

    For sets of crops that are read over and over. OpenCV first, several times as fast as `read_photo` and with the same
    pixels; half a JPEG with an end mark is a crop with a grey rest to it. `read_crop` is for files that anybody made.
    """
    if not encoded:
        raise ValueError("empty")
    clear = _may_be_transparent(encoded)  # OpenCV would drop that, `read_photo` lays it over white
    try:
        rgb = None if clear else cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        rgb = None
    if rgb is None:
        kind = image_suffix(encoded)
        if not clear and kind in (None, ".jpg", ".png"):
            raise ValueError("not an image" if kind is None else f"{kind[1:]} image, but damaged or cut short")
        try:
            rgb = np.ascontiguousarray(read_photo(encoded)[..., ::-1])  # a format that OpenCV does not know
        except PhotoError as error:
            raise ValueError(error.reason) from error
    if rgb.shape != (CROP_SIZE, CROP_SIZE, 3):
        raise ValueError(
            f"{rgb.shape[1]}x{rgb.shape[0]} pixels, not {CROP_SIZE}x{CROP_SIZE}; align it with pre_process.py"
        )
    return rgb


def read_crop(source: str | Path | bytes, *, resize: bool = False) -> NDArray[np.uint8]:
    """A crop in a file (or in its bytes) as RGB uint8 [112, 112, 3], with the pixels of `decode_crop`.

    Raises `PhotoError` as `read_photo`, thus also for a JPEG that lacks data, and `ValueError` with the reason for
    another size; with `resize` other squares are resized.
    """
    bgr = read_photo(source)
    height, width = bgr.shape[:2]
    if height != width and resize:
        raise ValueError(f"{width}x{height} pixels, not a square crop")
    if (height, width) != (CROP_SIZE, CROP_SIZE):
        if not resize:
            raise ValueError(f"{width}x{height} instead of {CROP_SIZE}x{CROP_SIZE}")
        interpolation = cv2.INTER_AREA if width > CROP_SIZE else cv2.INTER_LINEAR
        bgr = np.asarray(cv2.resize(bgr, (CROP_SIZE, CROP_SIZE), interpolation=interpolation), np.uint8)
    return np.ascontiguousarray(bgr[..., ::-1])


class Stopwatch:
    """Seconds that threads have spent in a section, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The section."""
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds += time.perf_counter() - began


READING = Stopwatch()  # how long `read_file` took in all: what a slow disk or network costs


def read_ahead(paths: Iterable[Path]) -> None:
    """Ask the system to fetch these files, without waiting for it, so that `read_file` finds them in memory.

    Of use where files come from far away; nothing happens where the system has no such call (macOS, Windows).
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # `read_file` says what is wrong with a file
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


def read_file(path: str | Path) -> bytes:
    """The bytes of a file; `PhotoError` if there is none, it cannot be read, or it is larger than any photo.

    A device or a pipe, also behind a link, is neither waited for nor read.
    """
    try:
        with READING.running(), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PhotoError("not a photo", "a device or a pipe, not a file")
            data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise PhotoError("too large", f"the file has more than {MAX_BYTES >> 20} MiB")
            return data
    except FileNotFoundError:
        raise PhotoError("missing") from None
    except OSError as error:
        raise PhotoError("unreadable", error.strerror or error) from error


def content_key(data: bytes) -> str:
    """What identifies a photo: the SHA-256 of its file's bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def content_of(path: str | Path) -> str:
    """The `content_key` of a file, "" if it cannot be read."""
    try:
        return content_key(read_file(path))
    except PhotoError:
        return ""


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has, and HEIF where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    """Pillow's view of the header; nothing is decoded yet."""
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        raise _unidentified(data) from None
    except Image.DecompressionBombError as error:
        raise PhotoError("too large", error) from error
    except Exception as error:  # foreign bytes make the format readers raise nearly anything
        raise _broken(data, error) from error


def _unidentified(data: bytes) -> PhotoError:
    suffix = image_suffix(data)
    if suffix in (".heic", ".heif") and "HEIF" not in _formats():
        return PhotoError("unreadable", "HEIC needs pillow-heif: pip install pillow-heif")
    if _is_cut(data):
        return PhotoError("truncated", "the header is not complete")
    if suffix is not None:
        return PhotoError("unreadable", f"begins like {suffix}, but the header is damaged")
    if not any(data):
        return PhotoError("unreadable", "nothing but zero bytes")
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<", b"{"))
    return PhotoError("not a photo", "HTML, XML or JSON" if text else "no known image format")


def _broken(data: bytes, error: Exception) -> PhotoError:
    """What a decoder's exception says about a file that looked like a photo."""
    if "truncated" in str(error).lower() or _is_cut(data):
        return PhotoError("truncated", error)
    return PhotoError("unreadable", str(error) or type(error).__name__)


def _is_cut(data: bytes) -> bool:
    """Whether a file of a known format lacks the end that its format asks for."""
    if data.startswith(b"\xff\xd8"):
        return _follow_marks(data).end is None
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-4096:]
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"GIF8"):
        return data.rstrip(b"\0")[-1:] != b";"
    if data.startswith((b"II*\0", b"MM\0*")):  # the directory that a TIFF's header points to: n entries of 12 bytes
        order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
        start = int.from_bytes(data[4:8], order)
        return start + 2 + 12 * int.from_bytes(data[start : start + 2], order) + 4 > len(data)
    return data[4:8] in (b"ftyp", b"jP  ") and not _boxes_fit(data)


def _boxes_fit(data: bytes) -> bool:
    """Whether the boxes of an ISO base media file (AVIF, JPEG 2000) end within the file."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 0:  # up to the end of the file
            return True
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:
            return True  # damaged, not cut
        at += size
    return at == len(data)


def _decode(image: Image.Image, data: bytes) -> NDArray[np.uint8]:
    """Decode by Pillow, which raises when data is missing (as long as `LOAD_TRUNCATED_IMAGES` is off, its default)."""
    try:
        return _to_bgr(image)
    except PhotoError:
        raise
    except Exception as error:  # as in _open
        raise _broken(data, error) from error


def _to_bgr(image: Image.Image) -> np.ndarray:
    """Pixels of any mode as BGR uint8 [H, W, 3]."""
    image.load()
    if image.mode.startswith("I"):  # 16 bits, also where Pillow keeps them in 32
        upper = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return cv2.cvtColor(upper, cv2.COLOR_GRAY2BGR)
    if image.mode == "F":
        raise PhotoError("unreadable", "pixels are 32-bit floats of unknown range")
    if image.mode == "L" and not image.has_transparency_data:
        return cv2.cvtColor(np.asarray(image), cv2.COLOR_GRAY2BGR)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return cv2.cvtColor(np.asarray(rgb), cv2.COLOR_RGB2BGR)


@dataclass(frozen=True)
class _Marks:
    """What the marker segments of a JPEG say: where the end mark is (None: nowhere), and whether it is progressive and,
    if so, whether its scans bring all bits of all coefficients."""

    end: int | None
    progressive: bool
    complete: bool


def _follow_marks(data: bytes) -> _Marks:
    """Walk over the segments of the first image in a JPEG file (a thumbnail or a second image has marks of its own).

    `PhotoError` for one with more scans than a photo has, which would take minutes to decode.
    """
    at, progressive, segments, scans, pixels = 2, False, 0, 0, 0
    missing: dict[int, int] = {}  # component -> bit mask of the 64 coefficients that have not come in full
    while (found := _JPEG_MARKER.search(data, at)) is not None:
        mark, start = data[found.end() - 1], found.end()
        if mark == _END_OF_IMAGE:
            return _Marks(found.start(), progressive, not any(missing.values()))
        length = int.from_bytes(data[start : start + 2], "big")
        segment = data[start + 2 : start + length]
        segments += 1
        scans += mark == _START_OF_SCAN
        if segments > _MAX_SEGMENTS or scans > MAX_SCANS or scans * pixels > _MAX_SCANNED:
            raise PhotoError("unreadable", f"{scans} scans and {segments} segments so far, which no photo has")
        if mark == _PROGRESSIVE_FRAME and len(segment) > 5:
            progressive = True
            pixels = int.from_bytes(segment[1:3], "big") * int.from_bytes(segment[3:5], "big")
            missing = dict.fromkeys(segment[6::3], (1 << 64) - 1)
        if mark == _START_OF_SCAN and progressive and len(segment) >= 6:
            _note_scan(segment, missing)
        at = start + max(length, 2)
    return _Marks(None, progressive, False)


def _note_scan(segment: bytes, missing: dict[int, int]) -> None:
    """Strike out what one progressive scan brings (ITU-T T.81, B.2.3: components, Ss, Se, Ah and Al)."""
    first, last, bits = segment[-3:]
    if bits & 15 or last < first:  # lower bits are still to come
        return
    brought = ((1 << (last - first + 1)) - 1) << first
    for component in segment[1:-3:2]:
        missing[component] = missing.get(component, 0) & ~brought


def _decode_jpeg(image: Image.Image, data: bytes, factor: int) -> np.ndarray:
    """Decode a JPEG, reduced by `factor` where OpenCV decodes it; `PhotoError` if a part of the picture is missing,
    also when the file has an end mark."""
    marks = _follow_marks(data)
    if marks.end is None:
        return _decode(image, data)  # decoders stop here if data is missing, and not if only the mark is
    if not marks.complete:
        raise PhotoError("truncated", "scans of a progressive JPEG are missing")
    if image.mode in ("RGB", "L"):
        flags = _READ[factor] | cv2.IMREAD_IGNORE_ORIENTATION
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if bgr is not None and (marks.progressive or (bgr[-1, -1] != _MISSING_GREY).any()):
            return bgr
    if marks.progressive:
        return _decode(image, data)
    # Without the end mark the decoder asks for more data instead of making it up.
    return _decode(_open(data[: marks.end] + _PADDING), data)


def orientation(data: bytes) -> int:
    """The EXIF orientation of an encoded photo, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        return _orientation(_open(data))
    except PhotoError:
        return 1


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    if "exif" not in image.info and image.format == "JPEG":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not spoil the pixels
        return 1
    return value if value in range(1, 9) else 1


def _upright(bgr: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (CIPA DC-008, tag 274)."""
    if orientation in _SIDEWAYS:
        bgr = cv2.transpose(bgr)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return bgr if flip is None else cv2.flip(bgr, flip)


@dataclass(frozen=True)
class Listing:
    """The photos under a folder: `files` are paths relative to it (with `/`), ordered by identity and then by name.

    `digest` is a SHA-256 over names and sizes in bytes, so that a restart notices another set of photos, also on
    another machine with a copy of them. `stamp` covers times of change as well: as long as it is the same, nobody has
    written to these files. When it differs, `content_key` says whether they are still the same photos (a copy and a
    `touch` change times only). What it does not notice: a change by somebody who sets the clock back for it, since the
    system keeps one of the two times (ctime) itself. `companions` counts the files by extension that are no photos by
    name.
    """

    files: list[str]
    digest: str
    stamp: str
    companions: dict[str, int]

    def __str__(self) -> str:
        return f"{len(self.files)} files with the digest {self.digest[:16]}"


def identity_of(file: str) -> str:
    """The identity of a photo: the first folder of its relative path, "" for a photo outside of any folder."""
    return file.split("/", 1)[0] if "/" in file else ""


def note_on_depth(files: Sequence[str]) -> str:
    """A sentence about photos that all lie deeper than in the folder of their identity, in more folders than there are
    identities: these may be the people. "" for all others."""
    deeper = {file.rsplit("/", 1)[0] for file in files if identity_of(file)}
    if not deeper or any("/" not in folder for folder in deeper):
        return ""
    people, lowest = len({identity_of(file) for file in files} - {""}), min(deeper)
    if len(deeper) == people:
        return ""
    first = f"{people} folders count as the people" if people > 1 else "one folder counts as one person"
    return (
        f"{first}, though their photos lie in {len(deeper)} folders below ({lowest} ...); if these are the people, "
        "name the folder that they lie in, or gather them by extract.py"
    )


def in_order(files: Iterable[str]) -> list[str]:
    """Photos by identity, then by name, by code point whatever the file system and the language."""
    return sorted(files, key=lambda file: (identity_of(file), file))


def list_photos(folder: str | Path) -> Listing:
    """Every photo below a folder; links are followed, to each folder once, and hidden files are not photos.

    `InputError` if none is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of photos")
    companions: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    stamps = 0  # a sum, so that the order in which a folder is read does not matter and nothing need be kept
    for file, status in _walk(str(folder)):
        suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122 - a Path per file costs more than all the rest
        if suffix in COMPANIONS:
            companions[suffix] += 1
            continue
        sizes[file] = 0 if status is None else status.st_size
        times = (0, 0) if status is None else (status.st_mtime_ns, status.st_ctime_ns)
        text = f"{file}\0{sizes[file]}\0{times[0]}\0{times[1]}".encode("utf-8", "surrogateescape")
        stamps += int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")
    if not sizes:
        raise InputError(f"{folder}: no photos in this folder or below it")
    files = in_order(sizes)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0{sizes[file]}\0".encode("utf-8", "surrogateescape"))
    stamp = f"{stamps % (1 << 128):032x}"
    return Listing(files, digest.hexdigest(), stamp, dict(sorted(companions.items())))


def _walk(root: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """Relative path and status of the files below, None for a link to no regular file: to nowhere, a device, a pipe.

    Each folder is entered once, by its own path or the first of the links to it: links may lead back, or to one folder
    in exponentially many ways.
    """
    own: list[tuple[str, str]] = [("", root)]
    links: list[tuple[str, str]] = []  # a heap, so that the order in which a folder is read decides nothing
    entered: set[tuple[int, int]] = set()
    while own or links:
        prefix, folder = own.pop() if own else heapq.heappop(links)
        status = os.stat(folder)  # noqa: PTH116
        here = (status.st_dev, status.st_ino)
        if here in entered:
            continue
        entered.add(here)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                except OSError:  # links in a circle
                    is_folder = is_file = False
                if is_folder:
                    if is_litter(entry.name):
                        continue
                    below = f"{prefix}{entry.name}/"
                    if entry.is_symlink():
                        heapq.heappush(links, (below, entry.path))
                    else:
                        own.append((below, entry.path))
                elif is_file:
                    yield f"{prefix}{entry.name}", entry.stat()
                elif entry.is_symlink():  # a photo that is missing, or none
                    yield f"{prefix}{entry.name}", None
