"""Work on a long list of photos that can be killed, continued and shared among machines without changing its result.

Design: the list is cut into chunks of `CHUNK` photos, counted from its start and never from where a run begins. What
comes out of a chunk, its rows and its encoded crops, is written as one file in `OUT/.parts`, whole or not at all. A
shard is a subset of the chunks; whoever finds every chunk there merges them in order. So a restart repeats at most one
chunk per process, shards need nothing but a common folder (or their `.parts` copied into one), and the merged output is
a function of the photos and the settings alone. Price: until the merge is done the crops are on the disk twice.

A part is an uncompressed zip: any tool shows its rows and crops, and its checksums tell a damaged one.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import utils
from cropping.faces import WINDOW, ordered_map, windows
from cropping.photos import READING, content_of
from formats.tables import STATUSES, FaceRow, iterate_faces, parse_table, table_text
from processes import Shard
from utils import InputError

MADE_BY = "made_by"  # of the settings: code and libraries
PARTS = ".parts"  # folder of the finished chunks, there until they are merged
CHUNK = 8 * WINDOW  # a multiple, so that no window spans two chunks

WORTH_SAYING = 0.1  # share of the workers' time that goes into reading files

# What a window of photo numbers is worked into: a row for each, and the bytes of its crop to keep, if any.
Work = Callable[[Sequence[int]], list[tuple[FaceRow, bytes | None]]]


class Chunks:
    """The finished chunks of a run in `out`, and the report that says that the run is complete.

    `settings` is everything that the result depends on but for the photos' contents. An `out` that holds (parts of) a
    run with other settings is an `InputError` naming the differences: nothing is mixed and nothing is deleted. Other
    code or libraries (`MADE_BY`, a flat dictionary in `settings`) are no reason to refuse what is finished, only said.

    The photos themselves lie in `folder`. Each row has its photo's hash; while the `stamp` of the listing is the one
    that was recorded, nobody has written to them, and otherwise the photos of all rows so far are hashed again: if they
    are the same (copied, touched) the run goes on, if not it is an `InputError`.
    """

    def __init__(
        self, out: str | Path, items: int, settings: dict[str, Any], *, folder: str | Path = "", stamp: str = ""
    ) -> None:
        self.out = Path(out)
        self.items = items
        self.settings = json.loads(json.dumps(settings))
        self.folder, self.stamp = Path(folder), stamp
        self.count = -(-items // CHUNK)
        self._parts = self.out / PARTS
        self._report = self.out / "report.json"
        self._outputs: Sequence[str] = ()

    def open(self, outputs: Sequence[str]) -> bool:
        """Begin or continue; returns whether everything is finished (the report and all `outputs` are there).

        `InputError` for an output that has not the size it was written with.
        """
        self._outputs = outputs
        record = self._parts / "settings.json"
        finished, begun = self._recorded(self._report), self._recorded(record)
        if finished is not None:
            self._compare(_without(finished["settings"]), _without(self.settings))
        if begun is not None:
            self._compare(begun["settings"], self.settings)
        present = [name for name in outputs if (self.out / name).exists()]
        if finished is not None and len(present) == len(outputs):
            self._check_sizes(finished)
            if finished["stamp"] != self.stamp:
                self._check_photos(iterate_faces(self.out / "faces.tsv"), self.items)
                utils.write_json(self._report, finished | {"stamp": self.stamp})
            shutil.rmtree(self._parts, ignore_errors=True)
            changes = _changes(finished["settings"], self.settings)
            if changes:
                print(f"note: {self.out}: was finished by other code or libraries ({changes}); it was not made anew",
                      file=sys.stderr)  # fmt: skip
            return True
        if finished is None and begun is None and present:
            raise InputError(f"{self.out / present[0]}: exists, but no record of how it was made; give another folder")
        if begun is not None and begun["stamp"] != self.stamp:
            done = [chunk for chunk in range(self.count) if self.path(chunk).exists()]
            rows = (row for chunk in done for row, _ in self._read(chunk, crops=False))
            self._check_photos(rows, sum(len(self.numbers(chunk)) for chunk in done))
        if begun is None or begun["stamp"] != self.stamp:
            utils.write_json(record, {"settings": self.settings, "stamp": self.stamp})
        if finished is not None:
            with self._lock("merge"):
                if self._recorded(self._report) == finished:  # nobody has finished anew meanwhile
                    self._report.unlink()  # it speaks of outputs that are gone
        return False

    def _recorded(self, path: Path) -> dict[str, Any] | None:
        """What a file says of a run: its `settings` (a dictionary), its `stamp` and more; None without the file."""
        try:
            value = utils.read_json(path)
            return {**value, "settings": dict(value["settings"]), "stamp": value["stamp"]}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a record of a run; remove it or give another folder") from error

    def _check_sizes(self, finished: dict[str, Any]) -> None:
        for name, size in dict(finished.get("bytes", {})).items():
            if (found := (self.out / name).stat().st_size) != size:
                raise InputError(
                    f"{self.out / name}: {found} bytes, but {size} were written; remove it and run this command again"
                )

    def _check_photos(self, rows: Iterable[FaceRow], count: int) -> None:
        """Compare the photos of some rows with the hashes in these rows."""
        changed: list[str] = []
        with utils.progress(count, "have the photos changed?", unit="photo") as bar:
            for row in rows:
                was_read = row.sha256 or row.reason.startswith(("missing", "unreadable"))
                if was_read and content_of(self.folder / row.file) != row.sha256:
                    changed.append(row.file)
                bar.update()
        if changed:
            raise InputError(
                f"{self.folder / changed[0]}: has changed since it was read ({len(changed)} of {count} photos have); "
                f"give another folder than {self.out}, or remove that one"
            )

    def _compare(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        changes = _changes(found, wanted)
        if changes:
            raise InputError(
                f"{self.out}: holds a run with other settings ({changes}); give another folder, or remove this one"
            )

    def path(self, chunk: int) -> Path:
        """The file of a finished chunk."""
        return self._parts / f"{chunk:06d}.zip"

    def numbers(self, chunk: int) -> range:
        """The photos of a chunk, by their numbers in the list."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.items))

    def missing(self) -> list[int]:
        """The chunks that are not finished."""
        if self._report.exists():  # another process has just finished everything
            return []
        done = {entry.name for entry in os.scandir(self._parts)} if self._parts.is_dir() else set()
        return [chunk for chunk in range(self.count) if self.path(chunk).name not in done]

    def save(self, chunk: int, results: Sequence[tuple[FaceRow, bytes | None]]) -> None:
        """Write a finished chunk, whole or not at all."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo("rows.tsv"), table_text(row for row, _ in results))
            for index, (_, crop) in enumerate(results):
                if crop is not None:
                    archive.writestr(zipfile.ZipInfo(str(index)), crop)
        utils.write_bytes(self.path(chunk), buffer.getvalue())

    def results(self, crops: bool = True) -> Iterator[tuple[FaceRow, bytes | None]]:
        """The rows of all chunks in the order of the photos, with their crops or, if `crops` is false, without."""
        for chunk in range(self.count):
            yield from self._read(chunk, crops)

    def _read(self, chunk: int, crops: bool) -> list[tuple[FaceRow, bytes | None]]:
        """A finished chunk; `InputError` if the file is damaged."""
        path = self.path(chunk)
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                rows = parse_table(archive.read("rows.tsv"), path)
                found = set(names)
                numbers = [number for number in map(str, range(len(rows))) if number in found]
                # No checksum covers the directory; a comment that was never written swallows the entry behind it.
                if names != ["rows.tsv", *numbers] or any(info.comment or info.extra for info in archive.infolist()):
                    raise zipfile.BadZipFile("a directory that no part has")
                kept = found if crops else set()
                read = [archive.read(str(index)) if str(index) in kept else None for index in range(len(rows))]
        except FileNotFoundError:
            raise
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it and run the same command again") from error
        if len(rows) != len(self.numbers(chunk)):
            raise InputError(f"{path}: {len(rows)} rows instead of {len(self.numbers(chunk))}; remove it and run again")
        return list(zip(rows, read, strict=True))

    @contextlib.contextmanager
    def merging(self) -> Iterator[bool]:
        """A section that one process at a time enters; yields False if another has merged everything meanwhile."""
        with self._lock("merge"):
            for abandoned in self.out.glob(".*.tmp"):
                abandoned.unlink(missing_ok=True)
            yield not self._report.exists()

    def working(self, shard: Shard) -> contextlib.AbstractContextManager[None]:
        """A section that one process per shard enters; for a second one it is an `InputError`."""
        busy = f"{self.out}: another process is working on shard {shard} here"
        return self._lock(f"shard-{shard.index + 1}-of-{shard.count}", busy)

    def _lock(self, name: str, busy: str | None = None) -> contextlib.AbstractContextManager[None]:
        return utils.locked(self._parts / f"{name}.lock", busy)

    def finish(self, report: dict[str, Any]) -> None:
        """Record that all outputs are written, and drop the parts."""
        sizes = {name: (self.out / name).stat().st_size for name in self._outputs}
        utils.write_json(self._report, {"settings": self.settings, "stamp": self.stamp, "bytes": sizes, **report})
        shutil.rmtree(self._parts, ignore_errors=True)

    def report(self) -> dict[str, Any]:
        """The report of a finished run."""
        return utils.read_json(self._report)


def process(
    chunks: Chunks,
    shard: Shard,
    prepare: Callable[[], Work],
    path_of: Callable[[int], Path],
    workers: int,
    description: str,
) -> list[int]:
    """Finish the shard's chunks with a progress bar; returns the chunks (of all shards) that are still missing.

    `prepare()` is called once, and only if there is anything to do: it may load a network. `path_of` gives the file of
    a photo, so that it can be fetched ahead; the bar says if workers wait for files all the same.
    """
    with chunks.working(shard):
        mine = [chunk for chunk in range(chunks.count) if shard.owns(chunk)]
        missing = set(chunks.missing())
        todo = [chunk for chunk in mine if chunk in missing]
        if todo:
            total = sum(len(chunks.numbers(chunk)) for chunk in mine)
            left = sum(len(chunks.numbers(chunk)) for chunk in todo)
            numbers = chain.from_iterable(chunks.numbers(chunk) for chunk in todo)
            done = chain.from_iterable(ordered_map(prepare(), windows(numbers, path_of=path_of), workers))
            began, before = time.perf_counter(), READING.seconds
            with utils.progress(total, description, initial=total - left, unit="photo") as bar:
                for chunk in todo:
                    results = []
                    for result in islice(done, len(chunks.numbers(chunk))):
                        results.append(result)
                        waited = (READING.seconds - before) / (workers * (time.perf_counter() - began))
                        if waited >= WORTH_SAYING:
                            bar.set_postfix_str(f"{waited:.0%} of the time waiting for files", refresh=False)
                        bar.update()
                    chunks.save(chunk, results)
        return chunks.missing()


def waiting_for(shard: Shard, missing: Sequence[int]) -> str:
    """What to tell the user of a shard that is done before others are."""
    others = sorted({chunk % shard.count + 1 for chunk in missing})
    names = ", ".join(f"{other}/{shard.count}" for other in others)
    return f"shard {shard} is done; {len(missing)} chunks are left to the shards {names}, the last of which merges all"


class Tally:
    """Counts what became of the photos of a run, from its rows."""

    def __init__(self) -> None:
        self.photos = 0
        self.statuses: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = {}

    def add(self, row: FaceRow) -> None:
        """Count one row: by its status, and within that once, by the categories of all its remarks together."""
        self.photos += 1
        self.statuses[row.status] += 1
        if row.reason:
            categories = dict.fromkeys(remark.split(":", 1)[0] for remark in row.reason.split("; "))
            self.reasons.setdefault(row.status, Counter())[" and ".join(categories)] += 1

    def report(self) -> dict[str, Any]:
        """The counts for report.json; the statuses add up to the photos."""
        return {
            "photos": self.photos,
            "statuses": {status: self.statuses[status] for status in STATUSES if self.statuses[status]},
            "reasons": {status: dict(sorted(self.reasons[status].items())) for status in sorted(self.reasons)},
        }


def describe(report: dict[str, Any]) -> str:
    """The counts of a report as lines for the user."""
    lines = [f"{report['photos']:>10,} photos, of which"]
    for status, count in report["statuses"].items():
        reasons = report["reasons"].get(status, {})
        detail = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
        lines.append(f"{count:>10,} {status}" + (f": {detail}" if detail else ""))
    for suffix, count in report.get("companions", {}).items():
        lines.append(f"{count:>10,} other files not read: {suffix}")
    return "\n".join(lines)


def _without(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != MADE_BY}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two settings, in words; "" if nothing does."""
    flat = [_without(settings) | settings.get(MADE_BY, {}) for settings in (before, now)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name} was {flat[0].get(name)} and is now {flat[1].get(name)}" for name in names)
