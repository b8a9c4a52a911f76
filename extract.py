"""Stage 1: open what a data set came as, safely, into one folder of original photos per identity.

    python extract.py photos.zip --out data/raw
    python extract.py MsCelebV1-Faces-Aligned.tsv --out data/raw
    python extract.py part1.tar.gz part2.tar.gz more_photos/ faces_emore/train.rec --out data/raw

Result: `data/raw/<identity>/<name>.<ext>` with the original bytes, `listing.tsv` (source, member, status, reason, path,
bytes, SHA-256: one row per member of each source) and `listing.json` (the counts). A member ends as

    extracted   at the place that it asked for
    renamed     extracted under another name: taken already (also by another spelling that a Mac or Windows holds for
                the same name) or not safe as a file name
    skipped     not a photo (an archive inside an archive is a source of its own)
    refused     would leave the folder, is a link or a device, too large, encrypted
    damaged     its data cannot be had

and the counts add up. Identity: the folder that holds the photo (`--identity-level 2`: the one above); the archive's
or folder's own name for photos in no folder; the MID in an MS-Celeb TSV; `<set>-<label>` in RecordIO. Aligned RecordIO
need not be extracted: `train.py --data` reads it as it is.

Kill it at any time; the same command goes on. A run on finished sources checks that every file is still there. When a
source is cut off, members are damaged or not one photo could be had from a source, what is good is kept, the rest is
named and the exit code is 1.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import config
import utils
from formats import archives
from formats.archives import Broken, Member, NotTaken, Source
from options import parse
from utils import InputError

STATUSES = ("extracted", "renamed", "skipped", "refused", "damaged")
COLUMNS = ("source", "member", "status", "reason", "path", "bytes", "sha256")

_STATE = ".extract"  # hidden folder below the output: journals, state, lock
_LISTINGS = ("listing.tsv", "listing.json")
_MAX_NAME = 200  # bytes; file systems hold 255, and room is needed for "~2" and temporary names
_KNOWN_FOLDERS = 4096  # folders whose file names are kept in memory
_SHOWN = 20  # refused and damaged members printed; all are in the listing
# Characters that no file name or table should hold: separators, controls, halves of a surrogate pair.
_UNSAFE = {ord(c): "_" for c in "/\\"} | dict.fromkeys([*range(32), *range(0x7F, 0xA0), *range(0xD800, 0xE000)], "_")
_ESCAPED = {ord("\\"): "\\\\"} | {c: f"\\x{c:02x}" for c in [*range(32), *range(0x7F, 0xA0)]}


class Row(NamedTuple):
    """A line of a source's journal, which becomes a line of the listing."""

    status: str
    reason: str = ""
    path: str = ""
    size: int = 0
    sha256: str = ""
    member: str = ""

    def to_line(self) -> str:
        """The row as TAB-separated text; what would break the table stands as an escape."""
        reason, member = (_printable(text) for text in (self.reason, self.member))
        size = str(self.size) if self.path else ""
        return "\t".join([member, self.status, reason, self.path, size, self.sha256])

    @staticmethod
    def from_line(line: str) -> "Row":
        """Read what `to_line` wrote; reason and member stay escaped. `ValueError` if it is not a row."""
        member, status, reason, path, size, sha256 = line.split("\t")
        return Row(status, reason, path, int(size or 0), sha256, member)


def _printable(text: str) -> str:
    return text.translate(_ESCAPED).encode("utf-8", "backslashreplace").decode()


def same_name(name: str) -> str:
    """What names are compared by: some file systems ignore case, some ignore how accents are composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def safe_name(name: str) -> str:
    """`name` as a single, visible file name: no separators, control characters, leading dot or excessive length."""
    clean = name.translate(_UNSAFE)
    if clean.startswith("."):
        clean = "_" + clean[1:]
    stem, suffix = os.path.splitext(clean)  # noqa: PTH122 - a bare name
    room = _MAX_NAME - len(suffix.encode())
    if len(stem.encode()) <= room:
        return clean
    if room < 1:
        return clean.encode()[:_MAX_NAME].decode("utf-8", "ignore")
    return stem.encode()[:room].decode("utf-8", "ignore") + suffix


class Shelf:
    """Gives every member a folder and a name of its own below `out`.

    Which names are taken is looked up in the folders themselves, those of the latest few thousand being kept in memory,
    so 8 million files need no table of 8 million names.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._renames = out / _STATE / "folders.tsv"
        self._folders: dict[str, str] = {}  # wanted -> used
        with os.scandir(out) as entries:
            names = [entry.name for entry in entries]
        self._taken = {same_name(name) for name in (*names, *_LISTINGS)}
        self._folders = {name: name for name in names if name not in _LISTINGS and (out / name).is_dir()}
        if self._renames.exists():
            for line in self._renames.read_text("utf-8").rstrip("\n").split("\n"):
                wanted, _, used = line.partition("\t")
                self._folders[wanted] = used
                self._taken.add(same_name(used))
        self._files: OrderedDict[str, set[str]] = OrderedDict()
        self._reserved: dict[str, set[str]] = {}

    def reserve(self, path: str) -> None:
        """Keep the name of a file that is missing and will be extracted again."""
        folder, _, name = path.partition("/")
        self._reserved.setdefault(folder, set()).add(same_name(name))

    def folder(self, identity: str) -> str:
        """The folder of an identity, made if need be; another spelling of an existing one gets a folder of its own."""
        wanted = safe_name(identity)
        if wanted in self._folders:
            return self._folders[wanted]
        used = _free(wanted, self._taken)
        self._taken.add(same_name(used))
        self._folders[wanted] = used
        if used != wanted:
            with self._renames.open("a", encoding="utf-8") as file:
                file.write(f"{wanted}\t{used}\n")
        (self.out / used).mkdir(exist_ok=True)
        return used

    def file(self, folder: str, name: str) -> str:
        """A name in `folder` that is not taken; it counts as taken from now on."""
        names = self._files.get(folder)
        if names is None:
            (self.out / folder).mkdir(exist_ok=True)
            with os.scandir(self.out / folder) as entries:
                names = self._files[folder] = {same_name(entry.name) for entry in entries}
            names |= self._reserved.get(folder, set())
            if len(self._files) > _KNOWN_FOLDERS:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(folder)
        used = _free(safe_name(name), names)
        names.add(same_name(used))
        return used


def _free(name: str, taken: set[str]) -> str:
    """`name`, or the first of `name~2.ext`, `name~3.ext` ... that is not taken."""
    if same_name(name) not in taken:
        return name
    stem, suffix = os.path.splitext(name)  # noqa: PTH122 - a bare name
    number = 2
    while same_name(candidate := f"{stem}~{number}{suffix}") in taken:
        number += 1
    return candidate


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a journal; `InputError` if one of them is damaged."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                yield Row.from_line(line.rstrip("\n"))
            except ValueError as error:
                raise InputError(
                    f"{path}: line {number} is damaged; remove {path.parent.parent} and start again"
                ) from error


class Journal:
    """What became of the members of one source, in their order: the memory of a restart.

    A row is written before its file gets its name, so a file with a name always has a row; a row whose file is missing
    or of another size is done again under the same name. A row torn by a crash is dropped.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path, self._out = path, out
        self.count = 0
        self.missing: dict[int, Row] = {}
        if path.exists():
            self._mend()
        for row in read_rows(path):
            if row.path and not self._there(row):
                self.missing[self.count] = row
            self.count += 1
        self._file = path.open("ab", buffering=0)

    def _mend(self) -> None:
        with self.path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - (1 << 16))
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    file.truncate(start + newline + 1)
                    return
                end = start
            file.truncate(0)

    def _there(self, row: Row) -> bool:
        try:
            return os.stat(self._out / row.path).st_size == row.size  # noqa: PTH116 - called millions of times
        except OSError:
            return False

    def append(self, row: Row) -> None:
        """Add the row of the next member."""
        self._file.write((row.to_line() + "\n").encode())
        self.count += 1

    def close(self) -> None:
        """Close the file; nothing can be added afterwards."""
        self._file.close()


class Extraction:
    """The extraction of one source into `shelf.out`."""

    def __init__(self, source: Source, journal: Journal, shelf: Shelf) -> None:
        self._source, self._journal, self._shelf = source, journal, shelf
        self._temporary = shelf.out / _STATE / "part"
        self._parents: dict[str, str] = {}
        self._merged: dict[str, tuple[str, str]] = {}  # identities gathered from two folders of the source

    def run(self) -> str:
        """Extract what the journal does not have yet; returns why the source ended early, "" if it did not."""
        bar = utils.progress(self._source.total, self._source.path.name, unit=self._source.unit)
        if self._source.unit == "B":
            bar.unit_scale = True
        try:
            for index, member in enumerate(self._source.members()):
                bar.update(member.position - bar.n)
                self._note_parent(member)
                if index >= self._journal.count:
                    self._take(member)
                elif index in self._journal.missing:
                    self._again(member, self._journal.missing[index])
        except Broken as error:
            return str(error)
        else:
            bar.update(self._source.total - bar.n)
        finally:
            bar.close()
        return ""

    def merged_note(self) -> str:
        """A sentence about identities whose photos lie in several folders of the source, "" if there are none."""
        if not self._merged:
            return ""
        identity, (one, other) = next(iter(self._merged.items()))
        return (
            f"{len(self._merged)} identities gather photos from several folders "
            f"({identity!r} from {one!r} and {other!r}); if these are different people, choose another --identity-level"
        )

    def _note_parent(self, member: Member) -> None:
        parent = member.name.rpartition("/")[0]
        if parent.startswith("__MACOSX/"):  # metadata of the photos
            return
        if member.identity and self._parents.setdefault(member.identity, parent) != parent:
            self._merged.setdefault(member.identity, (self._parents[member.identity], parent))

    def _take(self, member: Member) -> None:
        try:
            data = member.read()
        except NotTaken as outcome:
            self._journal.append(Row(outcome.status, str(outcome), member=member.name))
            return
        file = member.file
        suffix = utils.image_suffix(data)
        remarks = [member.note] if member.note else []
        if not archives.is_image_name(file):
            file += suffix or ""
        elif suffix is None:
            remarks.append("does not begin as an image does")
        folder = self._shelf.folder(member.identity)
        name = self._shelf.file(folder, file)
        wanted = f"{member.identity}/{file}"
        path = f"{folder}/{name}"
        if path != wanted:
            remarks.append(f"wanted {wanted}")
        status = "extracted" if path == wanted else "renamed"
        row = Row(status, "; ".join(remarks), path, len(data), hashlib.sha256(data).hexdigest(), member.name)
        self._write(row, data, journal=True)

    def _again(self, member: Member, row: Row) -> None:
        try:
            data = member.read()
        except NotTaken as outcome:
            raise InputError(
                f"{self._source.path}: {member.name}: {outcome}; it was sound in an earlier run"
            ) from outcome
        if hashlib.sha256(data).hexdigest() != row.sha256:
            raise InputError(f"{self._source.path}: {member.name}: its contents are not those of an earlier run")
        (self._shelf.out / row.path).parent.mkdir(exist_ok=True)
        self._write(row, data, journal=False)

    def _write(self, row: Row, data: bytes, journal: bool) -> None:
        self._temporary.write_bytes(data)
        if journal:
            self._journal.append(row)
        os.replace(self._temporary, self._shelf.out / row.path)


class Workplace:
    """The hidden folder below the output: which sources were begun, and how they ended."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / _STATE
        self._file = self.folder / "sources.json"
        self.entries: list[dict[str, Any]] = json.loads(self._file.read_text("utf-8")) if self._file.exists() else []

    def entry(self, source: Source, options: dict[str, Any]) -> dict[str, Any]:
        """The state of a source, new if it was never begun; `InputError` if the source or an option has changed."""
        path = str(source.path.resolve())
        for entry in self.entries:
            if entry["path"] != path:
                continue
            changed = [
                what
                for what, same in (
                    ("the source has changed", entry["fingerprint"] == source.fingerprint),
                    ("other options were given", entry["options"] == options),
                )
                if not same
            ]
            if changed:
                raise InputError(
                    f"{source.path}: {' and '.join(changed)} since it was extracted to {self.out}; "
                    "use another --out, or remove that folder"
                )
            return entry
        entry = {
            "path": path,
            "fingerprint": source.fingerprint,
            "options": options,
            "journal": f"{len(self.entries):04d}.tsv",
            "finished": False,
            "broken": "",
            "merged": {},
        }
        self.entries.append(entry)
        self.save()
        return entry

    def save(self) -> None:
        """Write the states of all sources."""
        utils.write_json(self._file, self.entries)

    def journal(self, entry: dict[str, Any]) -> Path:
        """Where the rows of a source are."""
        return self.folder / entry["journal"]


@contextlib.contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """Two runs into one folder would write one journal."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{folder.parent}: another extract.py is writing there") from error
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{folder.parent}: no space left; free some, the same command goes on from here"
            ) from error


def _check_places(sources: list[Path], out: Path) -> None:
    target = out.resolve()
    seen = set()
    for source in sources:
        path = source.resolve()
        if path in seen:
            raise InputError(f"{source}: given twice")
        seen.add(path)
        if path == target or target in path.parents:
            raise InputError(f"{source}: lies in the output folder {out}")
        if path in target.parents:
            raise InputError(f"{source}: the output folder {out} lies in it; choose another --out")


def _extract(sources: list[Source], options: dict[str, Any], out: Path) -> tuple[Workplace, list[dict[str, Any]]]:
    """Extract the sources one after another, going on where an earlier run ended; returns their states too."""
    workplace = Workplace(out)
    given = [(source, workplace.entry(source, options)) for source in sources]
    journals = {entry["path"]: Journal(workplace.journal(entry), out) for entry in workplace.entries}
    shelf = Shelf(out)
    for journal in journals.values():
        for row in journal.missing.values():
            shelf.reserve(row.path)
    for name in _LISTINGS:  # they would not tell the truth while this runs
        (out / name).unlink(missing_ok=True)
    for source, entry in given:
        journal = journals[entry["path"]]
        if entry["finished"] and not journal.missing:
            print(f"{source.path}: extracted already")
            continue
        extraction = Extraction(source, journal, shelf)
        entry["broken"] = extraction.run()
        entry["finished"] = True
        entry["merged"] = extraction.merged_note()
        workplace.save()
    for journal in journals.values():
        journal.close()
    return workplace, [entry for _, entry in given]


def _write_listing(workplace: Workplace, given: set[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Write listing.tsv and listing.json from all journals; returns what to print of the sources given this time, and
    their counts.
    """
    identities: set[str] = set()
    report: list[dict[str, Any]] = []
    lines: list[str] = []
    size = 0
    with utils.atomic_path(workplace.out / "listing.tsv") as temporary, temporary.open("wb") as listing:
        listing.write(("\t".join(COLUMNS) + "\n").encode())
        for entry in workplace.entries:
            counts = Counter(dict.fromkeys(STATUSES, 0))
            reasons: Counter[str] = Counter()
            shown = []
            for row in read_rows(workplace.journal(entry)):
                counts[row.status] += 1
                if row.path:
                    identities.add(row.path.partition("/")[0])
                    size += row.size
                elif row.status == "skipped":
                    reasons[row.reason] += 1
                elif len(shown) < _SHOWN:
                    shown.append(f"  {row.status}: {row.member}: {row.reason}")
                columns = (_printable(entry["path"]), row.member, row.status, row.reason, row.path)
                listing.write("\t".join((*columns, str(row.size) if row.path else "", row.sha256)).encode() + b"\n")
            state = {name: entry[name] for name in ("finished", "broken", "merged")}
            report.append({"source": entry["path"], **state, "members": counts.total(), **counts})
            if entry["path"] in given:
                lines += _describe(report[-1], reasons, shown)
    totals = {name: sum(part[name] for part in report) for name in ("members", *STATUSES)}
    summary = {**totals, "identities": len(identities), "bytes": size, "sources": report}
    utils.write_json(workplace.out / "listing.json", summary)
    lines.append(f"{workplace.out}: {_sum(totals)}; {len(identities)} identities, {size / 1e6:.1f} MB")
    return lines, [part for part in report if part["source"] in given]


def _sum(counts: dict[str, Any]) -> str:
    parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    return f"{counts['members']} members = {' + '.join(parts) or '0'}"


def _describe(part: dict[str, Any], reasons: Counter[str], shown: list[str]) -> list[str]:
    """What is printed about one source."""
    lines = [f"{part['source']}: {_sum(part)}"]
    lines += [f"  skipped: {count} x {reason}" for reason, count in reasons.most_common(_SHOWN)]
    lines += shown
    hidden = part["refused"] + part["damaged"] - len(shown)
    if hidden:
        lines.append(f"  and {hidden} more refused or damaged; all are in listing.tsv")
    if part["merged"]:
        lines.append(f"  note: {part['merged']}")
    if part["broken"]:
        lines.append(f"  broken: {part['broken']}")
    return lines


@utils.command
def main() -> None:
    """Extract the sources named on the command line."""
    options = parse(config.Extract, __doc__)
    limits = archives.Limits(options.max_file_mb << 20, options.max_ratio)
    _check_places(options.sources, options.out)
    sources = [archives.open_source(path, limits, options.identity_level) for path in options.sources]
    chosen = {name: getattr(options, name) for name in ("identity_level", "max_file_mb", "max_ratio")}
    with _only_run(options.out / _STATE):
        workplace, entries = _extract(sources, chosen, options.out)
        lines, parts = _write_listing(workplace, {entry["path"] for entry in entries})
    print("\n".join(lines))
    broken = [entry for entry in entries if entry["broken"]]
    if broken:
        more = f" (and {len(broken) - 1} more sources)" if len(broken) > 1 else ""
        raise InputError(f"{broken[0]['path']}: {broken[0]['broken']}{more}; what could be read was extracted")
    damaged = sum(part["damaged"] for part in parts)
    if damaged:
        raise InputError(f"{options.out}: {damaged} members are damaged; listing.tsv names them")
    for part in parts:
        if not part["extracted"] + part["renamed"]:
            raise InputError(f"{part['source']}: not one photo could be had from it")


if __name__ == "__main__":
    sys.exit(main())
