"""Stage 1: open what a data set came as, safely, into one folder of original photos per identity.

    python extract.py photos.zip --out data/raw
    python extract.py MsCelebV1-Faces-Aligned.tsv --out data/raw
    python extract.py part1.tar.gz part2.tar.gz more_photos/ faces_emore/train.rec --out data/raw
    python extract.py shards/*.tar --out data/raw                    # WebDataset, labels in .cls or .json
    python extract.py photos.tar.00 --out data/raw                   # a split archive: its first part, or its folder
    python extract.py a/faces b/faces --prefix a b --out data/raw    # two sets whose identities have the same names

Result: `data/raw/<identity>/<name>.<ext>` with the original bytes, `listing.tsv` (source, member, status, reason, path,
bytes, SHA-256: one row per member of each source) and `listing.json` (the counts). A member ends as

    extracted   at the place that it asked for
    renamed     extracted under another name: taken already (also by another spelling that a Mac or Windows holds for
                the same name) or not safe as a file name
    skipped     not a photo (an archive inside an archive is a source of its own)
    refused     would leave the folder, is a link or a device, too large, encrypted, nobody's
    damaged     its data cannot be had

and the counts add up. Identity: the folder that holds the photo (`--identity-level 2`: the one above); the folder's
own name for photos in no folder of a folder; the MID in an MS-Celeb TSV; the label, as `<set>-<label>` where it is a
number, in RecordIO, WebDataset, Parquet and lists of `path label`. Photos in no folder of an archive are nobody's until
`--identity NAME` says whose. Aligned RecordIO need not be extracted: `train.py --data` reads it as it is.

Different people never share a folder. Sources that are parts of one set (`part1`, `part2`; numbered shards; chunks)
have their people in common; people of one name in other sources are kept apart and named, `--prefix` gives them names
of their own, and `--join` says that they are the same people.

Kill it at any time; the same command goes on. A run on finished sources checks that every file is still there. When a
source is cut off, members are damaged or not one photo could be had from a source, what is good is kept, the rest is
named and the exit code is 1.
"""

import contextlib
import errno
import hashlib
import os
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import config
import utils
from formats import archives
from formats.archives import Broken, Member, NotTaken, Source
from formats.names import TakenNames, matching, path_parts, printable, safe_name
from options import parse
from processes import Shard
from utils import InputError

GONE = "gone"  # by somebody else's hand since it was extracted
STATUSES = ("extracted", "renamed", "skipped", "refused", "damaged", GONE)
COLUMNS = ("source", "member", "status", "reason", "path", "bytes", "sha256")

_STATE = ".extract"  # hidden folder below the output: journals, state, lock
_LISTINGS = ("listing.tsv", "listing.json")
_KNOWN_FOLDERS = 4096  # folders whose file names are kept in memory
_SHOWN = 20  # refused and damaged members printed; all are in the listing


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
        reason, member = (printable(text) for text in (self.reason, self.member))
        size = str(self.size) if self.path else ""
        return "\t".join([member, self.status, reason, self.path, size, self.sha256])

    @staticmethod
    def from_line(line: str) -> "Row":
        """Read what `to_line` wrote; reason and member stay escaped. `ValueError` if it is not a row, or one whose
        path is none that we give."""
        member, status, reason, path, size, sha256 = line.split("\t")
        parts = path.split("/")  # as we made them: a colon is no drive there
        if status not in STATUSES or (path and (len(parts) != 2 or "\\" in path or {"", ".", ".."} & set(parts))):
            raise ValueError("not a row")
        return Row(status, reason, path, int(size or 0), sha256, member)


class Ledger:
    """Lines that are only ever added, each with a checksum of itself and of all before it.

    A line that was edited, lost or swapped is noticed when the file is read; one torn by a kill at the end of the file
    is dropped, since what it speaks of was not done yet. A line that does not fit on the disk leaves no trace.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count, self.check = 0, ""
        self._file: int | None = None  # opened by the first line that is added: a run may have thousands of ledgers

    def lines(self) -> Iterator[str]:
        """The lines as they were added; `InputError` for a damaged one. To be read once, before anything is added."""
        end = 0
        with open(self.path, "a+b") as file:
            file.seek(0)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                text, _, check = raw[:-1].decode("utf-8", "surrogateescape").rpartition("\t")
                if check != self._next(text):
                    raise self.damaged(f"line {self.count + 1} is damaged, or one before it is lost")
                self.count, self.check = self.count + 1, check
                end += len(raw)
                yield text
            file.truncate(end)

    def damaged(self, what: str) -> InputError:
        """The error that says what is wrong and what to do."""
        return InputError(
            f"{self.path}: {what}; remove {self.path.parent.parent} and start again, or give another --out"
        )

    def _next(self, text: str) -> str:
        data = f"{self.check}\n{text}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(data, digest_size=6).hexdigest()

    def append(self, text: str) -> None:
        """Add a line, or, if there is no room for all of it, nothing: OSError."""
        check = self._next(text)
        data = f"{text}\t{check}\n".encode("utf-8", "surrogateescape")
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        size = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(data):  # a nearly full disk takes a part and says so only the next time
                written += os.write(self._file, data[written:])
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self.count, self.check = self.count + 1, check

    def close(self) -> None:
        """Close the file; the next line that is added opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


Person = tuple[str, str]  # the space that a name is meant in (formats.archives), and the name


class Shelf:
    """Gives every member a folder and a name of its own below `out`.

    Whose folder is whose is kept in a ledger, which a folder's name cannot say: `bob~2` may be the second bob, or
    somebody of that name. Which file names are taken is looked up in the folders themselves, those of the latest few
    thousand being kept in memory, so 8 million files need no table of 8 million names.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._ledger = Ledger(out / _STATE / "folders.tsv")
        self._folders: dict[Person, str] = {}
        self._owners: dict[str, Person] = {}  # by the folder's name
        for line in self._ledger.lines():
            cells = line.split("\t")
            if len(cells) != 3:
                raise self._ledger.damaged(f"{line[:60]!r} is no line of it")
            self._folders[cells[0], cells[1]] = cells[2]
            self._owners[cells[2]] = (cells[0], cells[1])
        with os.scandir(out) as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        strange = {name for name in names if name not in self._owners}
        self._others = {name for name in strange if names[name]}  # the user's own; a link would lead elsewhere
        self.found: list[str] = []  # of these, those that people were given
        self._taken = TakenNames({*strange, *self._owners, *_LISTINGS, _STATE})
        self._files: OrderedDict[str, TakenNames] = OrderedDict()
        self._reserved: dict[str, set[str]] = {}

    def reserve(self, path: str) -> None:
        """Keep the name of a file that is missing and will be extracted again."""
        folder, _, name = path.partition("/")
        self._reserved.setdefault(folder, set()).add(name)

    def owns(self, folder: str) -> bool:
        """Whether a folder is somebody's."""
        return folder in self._owners

    def damaged(self, what: str) -> InputError:
        """The error about the ledger of folders."""
        return self._ledger.damaged(what)

    def folder(self, space: str, identity: str) -> str:
        """The folder of a person, made if need be. Whoever has the same name in another space, or one that is the same
        as a file name, gets another."""
        person = (printable(space), printable(identity))
        if person in self._folders:
            return self._folders[person]
        wanted = safe_name(identity)
        # A folder that was there before we came is the person's whose name it has.
        used = wanted if wanted in self._others and wanted == identity else self._taken.free(wanted, ending=False)
        if used in self._others:
            self._others.discard(used)
            self.found.append(used)
        self._taken.add(used)
        self._ledger.append("\t".join((*person, used)))  # before the folder, so that none is without an owner
        self._folders[person], self._owners[used] = used, person
        (self.out / used).mkdir(exist_ok=True)
        return used

    def known(self, space: str, identity: str) -> str:
        """The folder that a person has, "" if none."""
        return self._folders.get((printable(space), printable(identity)), "")

    def namesake(self, space: str, identity: str) -> str:
        """The space of somebody else who has the folder that this person wanted, "" if there is nobody."""
        person = (printable(space), printable(identity))
        owner = self._owners.get(safe_name(identity), person)
        return owner[0] if owner != person and owner[1] == person[1] else ""

    def file(self, folder: str, name: str) -> str:
        """A name in `folder` that is not taken; it counts as taken from now on."""
        names = self._files.get(folder)
        if names is None:
            (self.out / folder).mkdir(exist_ok=True)
            with os.scandir(self.out / folder) as entries:
                there = {entry.name for entry in entries}
            names = self._files[folder] = TakenNames(there | self._reserved.get(folder, set()))
            if len(self._files) > _KNOWN_FOLDERS:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(folder)
        used = names.free(safe_name(name))
        names.add(used)
        return used

    def close(self) -> None:
        """Nobody gets a folder any more."""
        self._ledger.close()


class Journal:
    """What became of the members of one source, in their order: the memory of a restart.

    A row is written before its file gets its name, so a file with a name always has a row; a row whose file is missing
    or of another size is done again under the same name.
    """

    def __init__(self, path: Path, shelf: Shelf) -> None:
        self._ledger, self._out = Ledger(path), shelf.out
        self.missing: dict[int, Row] = {}
        for number, row in enumerate(self.rows()):
            if row.path and not shelf.owns(row.path.partition("/")[0]):
                raise shelf.damaged(f"does not say whose {row.path.partition('/')[0]} is")
            if row.path and not self._there(row):
                self.missing[number] = row

    def rows(self) -> Iterator[Row]:
        """The rows of an earlier run; `InputError` if one of them is damaged."""
        for line in self._ledger.lines():
            try:
                yield Row.from_line(line)
            except ValueError as error:
                raise self._ledger.damaged(f"line {self._ledger.count} is damaged") from error

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self._ledger.count

    @property
    def check(self) -> str:
        """The checksum of all rows."""
        return self._ledger.check

    def _there(self, row: Row) -> bool:
        try:
            return os.stat(self._out / row.path).st_size == row.size  # noqa: PTH116 - called millions of times
        except OSError:
            return False

    def expect(self, count: int, check: str) -> None:
        """`InputError` unless these are the rows of a finished source."""
        if (count, check) != (self.count, self.check):
            raise self._ledger.damaged(f"holds {self.count} rows instead of {count}, or others")

    def append(self, row: Row) -> None:
        """Add the row of the next member."""
        self._ledger.append(row.to_line())

    def close(self) -> None:
        """Close the file; the next row that is added opens it again."""
        self._ledger.close()


class Extraction:
    """The extraction of one source into `shelf.out`.

    `prefix` is put before each identity, `join` makes people of one name one person whatever source they come from.
    """

    def __init__(self, source: Source, journal: Journal, shelf: Shelf, prefix: str, join: bool) -> None:
        self._source, self._journal, self._shelf = source, journal, shelf
        self._prefix, self._join = prefix, join
        self._temporary = shelf.out / _STATE / "part"
        self._parents: dict[str, str] = {}
        self._merged: dict[str, tuple[str, str]] = {}  # identities gathered from two folders of the source
        self._apart: dict[str, tuple[str, str]] = {}  # who has a namesake: where, and the folder given instead

    def run(self) -> str:
        """Extract what the journal does not have yet; returns why the source ended early, "" if it did not."""
        bar = utils.progress(self._source.total, self._source.path.name, unit=self._source.unit)
        if self._source.unit == "B":
            bar.unit_scale = True
        index = -1
        try:
            for index, member in enumerate(self._source.members()):
                bar.update(member.position - bar.n)
                if member.identity:
                    member.identity = self._prefix + member.identity
                    member.space = "" if self._join else f"{self._source.space}\n{member.space}"
                self._note_parent(member)
                if index >= self._journal.count:
                    self._take(member)
                elif index in self._journal.missing:
                    self._again(member, self._journal.missing[index])
                if member.identity:
                    self._note_namesake(member)
        except Broken as error:
            return str(error)
        else:
            bar.update(self._source.total - bar.n)
            if index + 1 < self._journal.count:
                raise InputError(
                    f"{self._source.path}: {index + 1} members, but {self._journal.count} in an earlier run"
                )
        finally:
            bar.close()
        return ""

    def notes(self) -> list[str]:
        """Sentences about identities whose photos lie in several folders of the source, and about namesakes."""
        notes = []
        if self._merged:
            identity, (one, other) = next(iter(self._merged.items()))
            notes.append(
                f"{len(self._merged)} identities gather photos from several folders ({identity!r} from {one!r} and "
                f"{other!r}); if these are different people, choose another --identity-level"
            )
        if self._apart:
            identity, (elsewhere, folder) = next(iter(self._apart.items()))
            notes.append(
                f"{len(self._apart)} identities have the names of others in {elsewhere} and were kept apart "
                f"({identity!r} became {folder!r}); --prefix gives names of your own, --join says that they are the "
                "same people"
            )
        if self._shelf.found:
            notes.append(
                f"{len(self._shelf.found)} identities joined folders that were there before "
                f"({self._shelf.found[0]!r}); if these are different people, give another --out"
            )
            self._shelf.found.clear()
        return notes

    def _note_parent(self, member: Member) -> None:
        if not member.identity:
            return
        try:
            folders = path_parts(member.name)[:-1]
        except ValueError:  # a name that only a label gives a place
            return
        if folders[:1] == ["__MACOSX"]:  # metadata of the photos
            return
        # What is in no folder is the source's own; an identity that is no folder is a label.
        if member.identity.removeprefix(self._prefix) not in (folders or [self._source.root]):
            return
        parent = "/".join(folders) or "."
        person = f"{member.space}\n{member.identity}"
        if self._parents.setdefault(person, parent) != parent:
            self._merged.setdefault(member.identity, (self._parents[person], parent))

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
        folder = self._shelf.folder(member.space, member.identity)
        name = self._shelf.file(folder, file)
        wanted = f"{member.identity}/{file}"
        path = f"{folder}/{name}"
        if path != wanted:
            remarks.append(f"wanted {wanted}")
        status = "extracted" if path == wanted else "renamed"
        row = Row(status, "; ".join(remarks), path, len(data), hashlib.sha256(data).hexdigest(), member.name)
        self._write(row, data, journal=True)

    def _note_namesake(self, member: Member) -> None:
        """Remember who was kept apart, also of members that an earlier run has taken."""
        folder = self._shelf.known(member.space, member.identity)
        if folder and folder != member.identity and member.identity not in self._apart:
            space = self._shelf.namesake(member.space, member.identity)
            if space:
                self._apart[member.identity] = (space.replace("\\x0a", " ").strip(), folder)

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


# What the state of a source holds.
_ENTRY = {
    "path": str,
    "fingerprint": str,
    "options": dict,
    "journal": str,
    "finished": bool,
    "broken": str,
    "notes": list,
    "rows": int,
    "check": str,
}


class Workplace:
    """The hidden folder below the output: which sources were begun, and how they ended."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / _STATE
        self._file = self.folder / "sources.json"
        self.entries = self._read()
        self.gone: dict[str, dict[int, Row]] = {}  # by source: rows whose files were missing when this run began

    def _read(self) -> list[dict[str, Any]]:
        """The states as they were written; `InputError` if anything else is found."""
        journals = {path.name for path in self.folder.glob("[0-9]*.tsv") if path.stat().st_size}
        try:
            entries = utils.read_json(self._file) if self._file.exists() else []
            for number, entry in enumerate(entries):
                if {name: type(entry[name]) for name in _ENTRY} != _ENTRY or entry["journal"] != f"{number:04d}.tsv":
                    raise ValueError(f"entry {number}")
                if not self.journal(entry).is_file():
                    raise ValueError(f"{entry['journal']} is not there")
            if lost := journals - {entry["journal"] for entry in entries}:
                raise ValueError(f"it does not speak of {min(lost)}")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._file}: damaged ({error}); remove {self.out} and start again, or give another --out"
            ) from error
        return entries

    def entry(self, source: Source, options: dict[str, Any]) -> dict[str, Any]:
        """The state of a source, new and to be saved if it was never begun; `InputError` if the source or an option has
        changed."""
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
            "notes": [],
            "rows": 0,
            "check": "",
        }
        self.journal(entry).touch()  # first, so that a state without its journal is damage
        self.entries.append(entry)
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
    with utils.locked(folder / "lock", f"{folder.parent}: another extract.py is writing there"):
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


def _extract(sources: list[tuple[Source, dict[str, Any]]], out: Path) -> tuple[Workplace, list[dict[str, Any]]]:
    """Extract sources, each with its options, one after another, going on where an earlier run ended; returns the
    states of these too."""
    workplace = Workplace(out)
    given = [(source, chosen, workplace.entry(source, chosen)) for source, chosen in sources]
    workplace.save()
    shelf = Shelf(out)
    journals = {entry["path"]: Journal(workplace.journal(entry), shelf) for entry in workplace.entries}
    for entry in workplace.entries:
        if entry["finished"]:
            journals[entry["path"]].expect(entry["rows"], entry["check"])
    for journal in journals.values():
        for row in journal.missing.values():
            shelf.reserve(row.path)
    workplace.gone = {path: journal.missing for path, journal in journals.items()}
    for name in _LISTINGS:  # they would not tell the truth while this runs
        (out / name).unlink(missing_ok=True)
    for source, chosen, entry in given:
        journal = journals[entry["path"]]
        if entry["finished"] and not journal.missing:
            print(f"{source.path}: extracted already")
            # The fingerprint of a file is that of samples, so that an archive of 100 GB need not be read for it.
            if source.path.is_file() and entry.get("changed") not in (None, source.path.stat().st_mtime_ns):
                print(f"note: {source.path} was written to since; if other photos are in it now, give another --out")
            continue
        extraction = Extraction(source, journal, shelf, chosen["prefix"], chosen["join"])
        entry["broken"] = extraction.run()
        entry["notes"] = extraction.notes() or entry["notes"]
        entry |= {"finished": True, "rows": journal.count, "check": journal.check}
        entry["changed"] = source.path.stat().st_mtime_ns
        workplace.save()
        journal.close()
    shelf.close()
    return workplace, [entry for _, _, entry in given]


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
            nobodys = 0
            shown: list[str] = []
            journal = Ledger(workplace.journal(entry))
            gone = {} if entry["path"] in given else workplace.gone[entry["path"]]
            for number, row in enumerate(map(Row.from_line, journal.lines())):
                if number in gone:
                    row = Row(GONE, f"no longer at {row.path}", member=row.member)
                counts[row.status] += 1
                if row.path:
                    identities.add(row.path.partition("/")[0])
                    size += row.size
                elif row.status == "skipped":
                    reasons[row.reason] += 1
                elif row.reason == archives.NOBODY:
                    nobodys += 1
                elif len(shown) < _SHOWN:
                    shown.append(f"  {row.status}: {row.member}: {row.reason}")
                columns = (printable(entry["path"]), row.member, row.status, row.reason, row.path)
                listing.write("\t".join((*columns, str(row.size) if row.path else "", row.sha256)).encode() + b"\n")
            state = {name: entry[name] for name in ("finished", "broken", "notes")}
            other = {"nobody": nobodys, "data_sets": reasons[archives.NESTED]}
            report.append({"source": entry["path"], **state, "members": counts.total(), **counts, **other})
            if nobodys:
                shown.append(f"  refused: {nobodys} x {archives.NOBODY}")
            if gone:
                lines.append(f"note: {len(gone)} files of {entry['path']} are gone; name it again to have them back")
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
    hidden = part["refused"] + part["damaged"] - len(shown) - max(0, part["nobody"] - 1)
    if hidden:
        lines.append(f"  and {hidden} more refused or damaged; all are in listing.tsv")
    lines += [f"  note: {note}" for note in part["notes"]]
    if part["broken"]:
        lines.append(f"  broken: {part['broken']}")
    return lines


def _sources(options: config.Extract) -> list[tuple[Source, dict[str, Any]]]:
    """The sources that the command line means, each with the options that its result depends on."""
    limits = archives.Limits(options.max_file_mb << 20, options.max_ratio)
    if options.prefix and len(options.prefix) != len(options.sources):
        raise InputError(f"--prefix: {len(options.prefix)} for {len(options.sources)} sources; give one for each")
    if options.identity and re.search(r"[/\\]|^\.", options.identity):
        raise InputError(f"--identity {options.identity}: is no name of a folder")
    paths: list[tuple[Path, str]] = []
    for path, prefix in zip(options.sources, options.prefix or [""] * len(options.sources), strict=True):
        found = [path] if path.exists() else matching(path) or [path]
        paths += [(part, f"{prefix}-" if prefix else "") for one in found for part in archives.expand(one)]
    parts = {part.resolve() for path, _ in paths if path.is_file() for part in archives.parts_of(path)[1:]}
    paths = [(path, prefix) for path, prefix in paths if path.resolve() not in parts]
    _check_places([path for path, _ in paths], options.out)
    chosen = {
        name: getattr(options, name) for name in ("identity_level", "max_file_mb", "max_ratio", "identity", "join")
    }
    sources = []
    for path, prefix in paths:
        source = archives.open_source(path, limits, options.identity_level)
        if options.identity:
            source.root = options.identity
        sources.append((source, {**chosen, "prefix": prefix}))
    return sources


@utils.command
def main() -> None:
    """Extract the sources named on the command line."""
    options = parse(config.Extract, __doc__)
    shard = Shard.parse()
    if shard.index:  # names depend on the photos before them, and one process reads as fast as the disk
        print(f"process {shard}: extraction is not shared; the first process does it")
        return
    sources = _sources(options)
    with _only_run(options.out / _STATE):
        workplace, entries = _extract(sources, options.out)
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
            reason = f": whose are they? A photo of it {archives.NOBODY}" if part["nobody"] else ""
            if part["data_sets"]:
                path = Path(part["source"])
                if path.is_dir():
                    reason = ": it holds data sets beside other things; name these as sources, without the folder"
                else:
                    command = archives.unpack_command(path)
                    reason = f": it holds a data set; {command} unpacks it, then name what is in FOLDER"
            raise InputError(f"{part['source']}: not one photo could be had from it{reason}")


if __name__ == "__main__":
    sys.exit(main())
