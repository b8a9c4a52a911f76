"""Files of synthetic people: photos or crops, their truth, and the lists that the later stages want.

The unit of work is an identity: its photos are written to a hidden folder that is renamed when it is complete, its rows
of truth (and its crops, when crops are wanted) to a part as in stage 2. A killed run therefore repeats at most one
identity per process, shards need only a common folder, and what is merged in the end depends on the settings alone.
"""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

import cv2
import numpy as np
import torch
import warp as wp
from threadpoolctl import threadpool_limits

import utils
from cropping import align
from cropping.align import align_face
from cropping.chunks import MADE_BY, Chunks
from formats.crop_sets import CropWriter
from formats.tables import IDENTITY_COLUMNS, identity_line
from megaface import facescrub
from processes import Shard
from synthetic import kernels
from synthetic.head import data_folder
from synthetic.parameters import Identity, PhotoParameters, draw_identity, draw_look, draw_photo
from synthetic.photo import encode
from synthetic.render import Renderer, Truth
from utils import InputError

COLUMNS = (
    "identity", "file", "x0", "y0", "x1", "y1", "eye_right_x", "eye_right_y", "eye_left_x", "eye_left_y", "nose_x",
    "nose_y", "mouth_right_x", "mouth_right_y", "mouth_left_x", "mouth_left_y", "yaw", "pitch", "roll", "parameters",
)  # fmt: skip
CROP_QUALITY = 95
# Photos that are traced before any is encoded: a person may have more of them than memory holds.
PIECE = 64
# What a process may take of a GPU: its context, and the buffers of a batch of 64 photos at 256 px (10 MB each).
GPU_BYTES = 1.5e9


# What decides how the photos look and where they are cut.
CODE = (*Path(__file__).parent.glob("*.py"), Path(align.__file__))


def made_by() -> dict[str, str]:
    """Code and libraries that decide the photos, for the record of a run."""
    return {"code": utils.code_sha256(*CODE)[:12], **utils.versions("anny", "warp-lang", "opencv-python", "numpy")}


@dataclass(frozen=True)
class Plan:
    """Everything that the files depend on."""

    identities: int
    images: int
    first: int
    seed: int
    size: int
    layout: str  # photos, lfw, facescrub or megaface
    crops: bool
    poses: str
    off: tuple[str, ...]
    folds: int
    pairs: int
    looks: int = 1

    def name(self, identity: int) -> str:
        """The identity's name in this layout (FaceScrub's have a blank, LFW's an underscore)."""
        pattern = {"lfw": "Synthetic_{:06d}", "facescrub": "Synthetic {:06d}"}.get(self.layout, "s{:06d}")
        return pattern.format(identity)

    def face_id(self, identity: int, image: int) -> int:
        """FaceScrub's number of a face, unique over the set."""
        return identity * self.images + image + 1

    def folder(self, identity: int) -> str:
        """The folder of an identity's photos, relative to the output folder."""
        name = self.name(identity)
        if self.layout == "lfw":
            return f"photos/{name}"
        if self.layout == "megaface":  # MegaFace: a few hundred folders of accounts
            return f"{identity % 1000:03d}/{name}"
        return name

    def file(self, identity: int, image: int) -> str:
        """A photo's name inside its folder."""
        name = self.name(identity)
        if self.layout == "lfw":
            return f"{name}_{image + 1:04d}.jpg"
        if self.layout == "facescrub":
            return f"{name}_{self.face_id(identity, image)}.jpg"
        return f"{image:04d}.jpg" if self.layout == "photos" else f"{image:04d}_0.jpg"


class People(Chunks):
    """The finished identities of a run; a chunk is an identity, counted from 0."""

    def __init__(self, out: Path, plan: Plan) -> None:
        super().__init__(out, plan.identities, {**plan.__dict__, MADE_BY: made_by()})
        self.count = plan.identities
        self.plan = plan

    def open(self, outputs: Sequence[str]) -> bool:
        """As in stage 2; besides, photos that no run here has made are not overwritten, and lost ones are noticed."""
        begun = (self._parts / "settings.json").exists()
        finished = self._report.exists()
        folders = range(0 if self.plan.crops else self.count)
        if not begun and not finished:
            for path in map(self._photos, folders):
                if path.exists():
                    raise InputError(f"{path}: exists, but no record of how it was made; give another folder")
        complete = super().open(outputs)
        lost = [chunk for chunk in folders if complete and not self._has_photos(chunk)]
        if lost:
            raise InputError(
                f"{self._photos(lost[0])}: gone from a finished set, or some photos of it ({len(lost)} identities); "
                f"remove {self.out / outputs[0]} and run the same command again, which makes all anew"
            )
        return complete

    def missing(self) -> list[int]:
        """The identities that are not finished: without their rows, or with photos that somebody has removed since."""
        missing = set(super().missing())
        if self.plan.crops or self._report.exists():
            return sorted(missing)
        return [chunk for chunk in range(self.count) if chunk in missing or not self._has_photos(chunk)]

    @property
    def images(self) -> int:
        """Photos of an identity."""
        return self.plan.images

    def maker(self, device: str) -> Callable[[int], int]:
        """What makes an identity, for one process."""
        return Maker(self, device).make

    def _photos(self, chunk: int) -> Path:
        return self.out / self.plan.folder(self.plan.first + chunk)

    def _has_photos(self, chunk: int) -> bool:
        """Whether a finished identity's photos are there, all of them."""
        folder, number = self._photos(chunk), self.plan.first + chunk
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return all(self.plan.file(number, image) in there for image in range(self.plan.images))

    def numbers(self, chunk: int) -> range:
        """The one identity of a chunk."""
        return range(chunk, chunk + 1)

    def save_identity(self, chunk: int, rows: str, crops: list[bytes]) -> None:
        """Write an identity's rows of truth and its crops, whole or not at all."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo("rows.tsv"), rows)
            for index, crop in enumerate(crops):
                archive.writestr(zipfile.ZipInfo(f"{index:06d}"), crop)
        utils.write_bytes(self.path(chunk), buffer.getvalue())

    def load_identity(self, chunk: int) -> tuple[str, list[bytes]]:
        """Read what `save_identity` wrote; `InputError` if the file is damaged."""
        path = self.path(chunk)
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(name for name in archive.namelist() if name != "rows.tsv")
                return archive.read("rows.tsv").decode(), [archive.read(name) for name in names]
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it and run the same command again") from error


class Maker:
    """Makes one identity after the other on one device and writes its files."""

    def __init__(self, people: People, device: str) -> None:
        self.people = people
        self.renderer = Renderer(torch.device(device))

    def make(self, chunk: int) -> int:
        """Photograph identity number `first + chunk`; returns its number of photos."""
        plan = self.people.plan
        number = plan.first + chunk
        off = frozenset(plan.off)
        identity = draw_identity(plan.seed, number, self.renderer.head, off)
        rows, encoded, crops = [f"{json.dumps(_plain(identity.record()))}\n"], [], []
        looks = [draw_look(identity, look, off) for look in range(min(plan.looks, plan.images))]
        for start in range(0, plan.images, PIECE):
            for photo, image, truth in self._photographed(looks, range(start, min(start + PIECE, plan.images))):
                rows.append(_row(plan, identity, photo, truth))
                if plan.crops:
                    crops.append(encode(align_face(np.ascontiguousarray(image), truth.landmarks), CROP_QUALITY))
                else:
                    encoded.append(encode(image, photo.camera["quality"]))
        if encoded:
            self._write(number, encoded)
        self.people.save_identity(chunk, "".join(rows), crops)
        return plan.images

    def _photographed(self, looks: list[Identity], piece: range) -> list[tuple[PhotoParameters, np.ndarray, Truth]]:
        """Photos with these numbers, in their order; number k shows look k modulo the number of looks."""
        plan, off, head = self.people.plan, frozenset(self.people.plan.off), self.renderer.head
        made: list[tuple[PhotoParameters, np.ndarray, Truth]] = []
        for number, look in enumerate(looks):
            photos = [draw_photo(look, k, head, off, plan.poses) for k in piece if k % len(looks) == number]
            if number:
                changed = {"number": number, "years": look.who["years"], "hair": look.hair, "beard": look.beard}
                photos = [replace(photo, look=changed) for photo in photos]
            if photos:
                made += zip(photos, *self.renderer.photograph(look, photos, plan.size, off), strict=True)
        return sorted(made, key=lambda one: one[0].image)

    def _write(self, number: int, encoded: list[bytes]) -> None:
        plan, out = self.people.plan, self.people.out
        final = out / plan.folder(number)
        partial = out / ".parts" / f"{number}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for image, data in enumerate(encoded):
                (partial / plan.file(number, image)).write_bytes(data)
        except OSError as error:  # a full disk does not say where
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(error.errno, error.strerror, str(final)) from error
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # complete, but its part was not written any more
            shutil.rmtree(final)
        os.replace(partial, final)


def _plain(value: Any) -> Any:
    """Numbers rounded to five digits, so that a row of truth has 2 KB instead of 4."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _row(plan: Plan, identity: Identity, photo: PhotoParameters, truth: Truth) -> str:
    name = plan.name(identity.number)
    file = f"{plan.folder(identity.number)}/{plan.file(identity.number, photo.image)}"
    numbers = [*truth.box, *truth.landmarks.reshape(-1)]
    angles = (photo.yaw, photo.pitch, photo.roll)
    fields = [
        name,
        file,
        *(f"{x:.2f}" for x in numbers),
        *(f"{x:.2f}" for x in angles),
        json.dumps(_plain(photo.record())),
    ]
    return "\t".join(fields) + "\n"


class Making(Protocol):
    """A set whose identities are made one after the other, each by itself."""

    count: int

    @property
    def images(self) -> int:
        """Photos of an identity, for the progress bar."""

    def working(self, shard: Shard) -> contextlib.AbstractContextManager[None]:
        """A section that one process per shard enters."""

    def missing(self) -> list[int]:
        """The identities that are not finished."""

    def maker(self, device: str) -> Callable[[int], int]:
        """What makes an identity and writes its files, for one process; returns how many photos it made."""


_maker: Callable[[int], int] | None = None


def _start_worker(people: Making, device: str) -> None:
    global _maker
    parent = multiprocessing.parent_process()
    if parent is not None:  # of a killed run no process stays behind

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threadpool_limits(1)  # NumPy's BLAS; its idle threads spin, and so slowed every process down on busy cores
    _maker = people.maker(device)


def _work(chunk: int) -> int:
    assert _maker is not None
    return _maker(chunk)


def make_people(people: Making, shard: Shard, device: torch.device, workers: int) -> list[int]:
    """Make the shard's identities with a progress bar; returns the identities (of all shards) still missing."""
    data_folder()  # says what is missing before processes are started that need it
    with people.working(shard):
        mine = [chunk for chunk in range(people.count) if shard.owns(chunk)]
        todo = [chunk for chunk in people.missing() if shard.owns(chunk)]
        images = people.images
        if not todo:
            return people.missing()
        place = str(device) if device.type == "cuda" else "cpu"
        kernels.start(place)
        notice = "compiling the ray tracer (once, about half a minute)"
        timer = threading.Timer(3, print, [notice], {"file": sys.stderr, "flush": True})
        timer.daemon = True
        timer.start()
        # For all workers; from warp's cache within a second. Paint looks for surfaces on the CPU, whatever traces.
        wp.load_module(kernels, device=list({place, "cpu"}))
        timer.cancel()
        initial = (len(mine) - len(todo)) * images
        with utils.progress(len(mine) * images, "synthesize", initial=initial, unit="photo") as bar:
            for made in _results(people, todo, str(device), workers):
                bar.update(made)
        return people.missing()


def worker_processes(device: torch.device, workers: int | None = None) -> int:
    """As asked for, or a process per core (of torchrun's share); with a GPU fewer where its memory is too small."""
    if workers is not None:
        return max(1, workers)
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type != "cuda":
        return cores
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(cores, int(free / GPU_BYTES)))


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Inside, Ctrl-C waits until the end, and processes that are started never hear it.

    A terminal sends it to the whole group. The mask is for the processes, which inherit it; here it is not enough,
    because another thread may be given the signal, and the interruption then hits a process half started.
    """
    noted: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if noted and callable(handler):  # it is not where the signal is ignored, as under nohup
        handler(signal.SIGINT, None)


def _results(people: Making, todo: list[int], device: str, workers: int) -> Iterator[int]:
    workers = min(workers, len(todo))
    if workers <= 1:
        _start_worker(people, device)
        yield from map(_work, todo)
        return
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _start_worker, (people, device)) as pool:
        try:
            with _deaf_to_interrupts():
                futures = [pool.submit(_work, chunk) for chunk in todo]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a process was killed (out of memory? then take fewer --workers); the same command goes on from here"
            ) from error
        except BaseException:  # else they would finish the identities that they have, and those that wait for them
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            raise


def outputs(plan: Plan) -> list[str]:
    """The files that a finished run consists of, besides the photos."""
    names = ["truth.tsv", "identities.tsv"]
    if plan.crops:
        return [*names, "train.rec", "train.idx", "property"]
    return names + {"lfw": ["pairs.txt"], "facescrub": ["annotations.txt"]}.get(plan.layout, [])


def merge(people: People) -> dict[str, Any]:
    """Write the tables (and crops or lists) from all parts, then the report; returns the report.

    One identity after the other: the truth of a million photos has two gigabytes.
    """
    plan = people.plan
    with people.merging() as needed:
        if not needed:
            return people.report()
        with contextlib.ExitStack() as stack:

            def table(name: str, header: Sequence[str]) -> TextIO:
                path = stack.enter_context(utils.atomic_path(people.out / name))
                file = stack.enter_context(open(path, "w", encoding="utf-8", newline="\n"))
                file.write("\t".join(header) + "\n")
                return file

            truth = table("truth.tsv", COLUMNS)
            persons = table("identities.tsv", (*IDENTITY_COLUMNS, "number", "parameters"))
            annotations = table("annotations.txt", facescrub.COLUMNS) if plan.layout == "facescrub" else None
            writer = stack.enter_context(CropWriter(people.out)) if plan.crops else None
            for chunk in range(people.count):
                text, crops = people.load_identity(chunk)
                record, _, rows = text.partition("\n")
                number = plan.first + chunk
                count = plan.images if plan.crops else None
                persons.write(identity_line(chunk, plan.name(number), count, str(number), record))
                truth.write(rows)
                for crop in crops:
                    assert writer is not None
                    writer.write(crop, chunk)
                if annotations is not None:
                    annotations.write(annotation_rows(plan, people.out, number, rows))
        if plan.layout == "lfw":
            utils.write_text(people.out / "pairs.txt", pairs_text(plan))
        report = {"identities": plan.identities, "photos": plan.identities * plan.images}
        people.finish(report)
        return people.report()


def pairs_text(plan: Plan) -> str:
    """LFW's pairs file: `folds` folds of `pairs` same and `pairs` different pairs; no identity is in two folds."""
    rng = np.random.default_rng([plan.seed, plan.first, plan.identities, 1 << 23])
    people = np.arange(plan.first, plan.first + plan.identities)
    lines = [f"{plan.folds}\t{plan.pairs}"]
    for fold in np.array_split(rng.permutation(people), plan.folds):
        couples = plan.images * (plan.images - 1) // 2
        same = [(int(who), a, b) for who in fold for a in range(plan.images) for b in range(a + 1, plan.images)]
        if len(same) < plan.pairs or len(fold) < 2 or len(fold) * (len(fold) - 1) // 2 * plan.images**2 < plan.pairs:
            raise InputError(
                f"--pairs {plan.pairs}: a fold has {len(fold)} identities with {couples} pairs each; fewer --pairs or "
                "--folds, or more --identities or --images"
            )
        for index in np.sort(rng.choice(len(same), plan.pairs, replace=False)):
            who, a, b = same[index]
            lines.append(f"{plan.name(who)}\t{a + 1}\t{b + 1}")
        chosen: set[tuple[int, int, int, int]] = set()
        while len(chosen) < plan.pairs:
            one, other = np.sort(rng.choice(fold, 2, replace=False))
            a, b = rng.integers(0, plan.images, 2)
            chosen.add((int(one), int(a), int(other), int(b)))
        for one, a, other, b in sorted(chosen):
            lines.append(f"{plan.name(one)}\t{a + 1}\t{plan.name(other)}\t{b + 1}")
    return "\n".join(lines) + "\n"


def annotation_rows(plan: Plan, out: Path, identity: int, truth: str) -> str:
    """The rows of FaceScrub's annotation table (`facescrub.COLUMNS`) for an identity's rows of truth."""
    lines = []
    for image, row in enumerate(truth.splitlines()):
        fields = row.split("\t")
        number = plan.face_id(identity, image)
        box = ",".join(str(round(min(max(float(x), 0), plan.size))) for x in fields[2:6])
        digest = utils.sha256_of(out / fields[1])
        lines.append(f"{fields[0]}\t{number}\t{number}\tsynthetic\t{box}\t{digest}\n")
    return "".join(lines)
