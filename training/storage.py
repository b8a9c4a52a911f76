"""The files of a run's state: written beside training, each process its own part, and read by any number of processes.

A run's folder holds `checkpoint.pt`, the last state, and `checkpoint-previous.pt`, the one before; both are whole at
any moment. `best.pt` is the state after the best epoch and `embedding.pt` its network alone.

One process writes one file. Of several, each writes its own rows of the head (centres, and what the optimiser keeps for
them) to a file in `heads/`, and when all have done so rank 0 writes `checkpoint.pt`, which names them: until that
moment the checkpoint before counts. So no process ever holds or sends more than its own part; of 2 million identities
with 512 dimensions on 8 processes that is 1.1 GB instead of 8.4. Read again, a process opens those parts in which its
rows lie. A file of rows is named by the run's start and the step and never written twice; what no checkpoint names any
more is deleted. The price: to carry a run away, take the folder `heads/` along.

Writing happens in a thread, so that training and verification go on meanwhile; the state is copied to the host first,
which costs that much memory of the host for the time.
"""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

import utils
from training.distributed import World
from training.margin import identity_range
from utils import InputError

CHECKPOINT, PREVIOUS, BEST, EMBEDDING = "checkpoint.pt", "checkpoint-previous.pt", "best.pt", "embedding.pt"
IDENTITIES, RESULTS, RUN = "identities.tsv", "results.json", "run.json"
HEADS = "heads"

# What a checkpoint holds a row of for each identity, besides the head's buffers: (section, first letters of the key).
PER_IDENTITY = (
    ("head", "centres"),
    ("head", "velocity"),
    ("head", "squares"),
    ("head", "updates"),
    ("optimizer", "head_"),
)


class Rows:
    """A tensor [identities, ...] in several parts; a slice of it is put together when it is asked for."""

    def __init__(self, identities: int, parts: Sequence[tuple[int, Tensor]]) -> None:
        """`parts` are (first identity, rows), in order; those that nobody will ask for may be missing."""
        self.parts = parts
        self.shape = torch.Size((identities, *parts[0][1].shape[1:]))

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def __getitem__(self, wanted: slice) -> Tensor:
        start, stop, _ = wanted.indices(self.shape[0])
        pieces = []
        for first, rows in self.parts:
            low, high = max(start - first, 0), min(stop - first, len(rows))
            if low < high:
                pieces.append(rows[low:high])
        if sum(map(len, pieces)) != stop - start:
            raise ValueError(f"of the identities {start} to {stop} only {sum(map(len, pieces))} are in the parts")
        if not pieces:  # no identities at all: --loss none
            return self.parts[0][1][:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _is_per_identity(section: str, key: str, value: Any) -> bool:
    named = any(section == where and key.startswith(start) for where, start in PER_IDENTITY)
    return named and isinstance(value, Tensor) and value.dim() > 0


def split(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every process has alike, and what it has rows of: two dictionaries of the same structure."""
    common, own = dict(content), {}
    for section in dict.fromkeys(where for where, _ in PER_IDENTITY):
        values = content[section]
        common[section] = {key: value for key, value in values.items() if not _is_per_identity(section, key, value)}
        own[section] = {key: value for key, value in values.items() if _is_per_identity(section, key, value)}
    return common, own


def part_name(token: str, step: int, rank: int, size: int) -> str:
    """The file of a rank's rows. `token` is of the run's start: no other start writes files of this name."""
    return f"{HEADS}/{step:09d}-{token}-{rank + 1}-of-{size}.pt"


def write_parts(folder: Path, content: dict[str, Any], world: World, token: str) -> None:
    """Write a state of several processes: all parts, then the checkpoint that names them. Collective."""
    common, own = split(content)
    names = [part_name(token, content["step"], rank, world.size) for rank in range(world.size)]
    utils.save_checkpoint(folder / names[world.rank], own)
    world.meet_to_write()
    if not world.is_main:
        return
    utils.fsync_directory(folder / HEADS)
    _await_parts(folder, names)
    common["parts"] = names
    _write_last(folder, common)
    _remove_parts(folder, content["step"], token)


def _await_parts(folder: Path, names: Sequence[str]) -> None:
    """Go on when all parts are seen here. Raises `InputError` if one is not: nobody could read such a checkpoint."""
    until = time.monotonic() + PATIENCE
    while missing := [name for name in names if not (folder / name).exists()]:
        if time.monotonic() > until:
            raise InputError(
                f"{folder / missing[0]}: another process wrote it, but it is not here; all machines must share --out"
            )
        time.sleep(0.5)


def _write_last(folder: Path, content: dict[str, Any]) -> None:
    path = folder / CHECKPOINT
    if path.exists():
        _link(path, folder / PREVIOUS)
    utils.save_checkpoint(path, content)


def _remove_parts(folder: Path, step: int, token: str) -> None:
    """Delete the parts that no checkpoint names; those that are being written now are of a later step of this start."""
    named = {name for file in (CHECKPOINT, PREVIOUS, BEST) for name in _parts_of(folder / file)}
    for path in (folder / HEADS).glob("*.pt"):
        found = re.fullmatch(r"(\d+)-(\w+)-\d+-of-\d+\.pt", path.name)
        coming = found is not None and found[2] == token and int(found[1]) > step
        if found is not None and not coming and f"{HEADS}/{path.name}" not in named:
            path.unlink(missing_ok=True)


def _parts_of(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        return list(torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("parts", []))
    except Exception:  # damaged: it names nothing that could still be read
        return []


class Writer:
    """Writes one state at a time, in a thread. Every process of a run has one and gives it the same states."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.token = world.shared(os.urandom(4).hex())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, content: dict[str, Any]) -> None:
        """Write this state, after the one before; it must not change any more. Raises what `wait` raises."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(content,), daemon=True)
        self._thread.start()

    def _write(self, content: dict[str, Any]) -> None:
        try:
            if self.world.size == 1:
                _write_last(self.folder, content)
            else:
                write_parts(self.folder, content, self.world, self.token)
        except BaseException as error:  # for `check` to raise
            self._error = error

    def check(self) -> None:
        """Raise what went wrong in writing (a full disk), if anything did so far."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Go on when the last state is written. Raises `OSError`, naming the file, if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Let the last state be written, however the run ends. A process of several that is gone is not waited for."""
        if self._thread is not None:
            self._thread.join(None if self.world.size == 1 else 20.0)


@dataclass
class Stored:
    """A checkpoint as it was found."""

    path: Path
    content: dict[str, Any]  # whole, or with `Rows` where the identities are in parts


def open_stored(path: Path, rank: int = 0, size: int = 1) -> Stored:
    """A training checkpoint, with those parts open that this rank's identities lie in.

    Tensors stay on the disk until they are used. Raises `InputError` for what is damaged or no training checkpoint, and
    `FileNotFoundError` for what is missing.
    """
    content = utils.load_checkpoint(path, mmap=True)
    if "format" not in content:
        raise InputError(f"{path}: weights alone; what is wanted is a training checkpoint, such as best.pt")
    if "parts" not in content:
        return Stored(path, content)
    try:
        names, identities = list(content["parts"]), int(content["head"]["identities"])
        wanted = identity_range(identities, rank, size)
        opened = []
        for number, name in enumerate(names):
            first, last = identity_range(identities, number, len(names))
            if (first < wanted[1] and wanted[0] < last) or (identities == 0 == number):
                if not re.fullmatch(rf"{HEADS}/[\w-]+\.pt", name):
                    raise InputError(f"{path}: names {name!r} as a part, which is not one")
                opened.append((first, last, utils.load_checkpoint(path.parent / name, mmap=True)))
        for section in {where for where, _ in PER_IDENTITY}:
            for key in opened[0][2][section]:
                rows = [(first, _rows_of(part[section][key], key, last - first)) for first, last, part in opened]
                if len({(values.shape[1:], values.dtype) for _, values in rows}) > 1:
                    raise ValueError(f"{key} is not alike in all of them")
                content[section][key] = Rows(identities, rows)
    except (AttributeError, KeyError, IndexError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its parts do not fit together ({error})") from error
    return Stored(path, content)


def whole(path: Path) -> dict[str, Any]:
    """A training checkpoint with everything in memory, however many parts it is in."""
    content = open_stored(path).content
    content.pop("parts", None)
    for section in {where for where, _ in PER_IDENTITY}:
        content[section] = {
            key: value[:] if isinstance(value, Rows) else value for key, value in content[section].items()
        }
    return content


def _rows_of(values: Any, key: str, count: int) -> Tensor:
    """A part's rows, once they are that; else ValueError."""
    if not is_dense(values) or values.dim() == 0 or len(values) != count:
        raise ValueError(f"{key} is not {count} rows")
    return values


def is_dense(value: Any) -> TypeGuard[Tensor]:
    """Whether something out of a file is a tensor of real numbers that are there."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type == "meta":
        return False
    return not (value.is_complex() or value.is_quantized)


PATIENCE = 60.0  # seconds in which a network file system may show a file that another node has written


def find_last(folder: Path, world: World, log: Callable[[str], None], patience: float = PATIENCE) -> Stored | None:
    """The newest training checkpoint of a run that all processes can read; None when there is none yet. Collective.

    A damaged one is named in the log and the one before it is taken. Raises `InputError` when no other is left, or when
    after some waiting the processes still do not see the same.
    """
    until = time.monotonic() + (patience if world.size > 1 else 0)
    for name in (CHECKPOINT, PREVIOUS):
        path = folder / name
        while True:
            found, complaint = _look(path, world)
            seen = world.gather(
                (None if found is None else found.content.get("step"), complaint, time.monotonic() > until)
            )
            steps, complaints = {step for step, _, _ in seen}, [text for _, text, _ in seen if text]
            damaged = any(not text.endswith(_MISSING) for text in complaints)
            if damaged or (len(steps) == 1 and not complaints) or any(late for _, _, late in seen):
                break
            time.sleep(0.5)
        if len(steps) == 1 and not complaints:
            if found is None and name == CHECKPOINT:
                continue
            return found
        if not complaints:
            raise InputError(f"{path}: not all processes see the same checkpoint; the nodes must share this folder")
        if name == PREVIOUS or not world.largest(int((folder / PREVIOUS).exists())):
            raise InputError(complaints[0])
        log(f"warning: {complaints[0]}; going back to {PREVIOUS}")
    return None


_MISSING = "is not there"


def _look(path: Path, world: World) -> tuple[Stored | None, str]:
    """What this process makes of a checkpoint: it or nothing, and what is wrong with it."""
    try:
        return open_stored(path, world.rank, world.size), ""
    except FileNotFoundError as error:
        if not path.exists() and error.filename in (None, str(path)):
            return None, ""
        return None, f"{error.filename} {_MISSING}"
    except InputError as error:
        return None, str(error)


def keep(path: Path) -> None:
    """Make the checkpoint that a run goes on from its last one, in place of a damaged one.

    Else the damaged one would take the place of the whole one before it as soon as the next is written.
    """
    if path.name != CHECKPOINT:
        _link(path, path.with_name(CHECKPOINT))


def write_best(folder: Path, network: nn.Module) -> None:
    """Make the last checkpoint the best one, and write its network alone under the released key names."""
    _link(folder / CHECKPOINT, folder / BEST)
    write_embedding(folder / EMBEDDING, network.state_dict())


def write_embedding(path: Path, state: dict[str, Tensor]) -> None:
    """A plain state_dict of an embedding network: contiguous float32 tensors on the CPU."""
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    utils.save_tensors(path, plain)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote; each may be as large as a checkpoint."""
    for name in (CHECKPOINT, PREVIOUS, BEST, EMBEDDING, IDENTITIES, RESULTS, RUN):
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)
    for path in (folder / HEADS).glob(".*.pt.*.tmp"):
        path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one step; neither is ever written to, only replaced."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    utils.fsync_directory(target.parent)
