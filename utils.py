"""What every stage shares: errors a user can act on, files written whole or not at all, hashes, progress, devices."""

import collections
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pickle
import platform
import re
import secrets
import stat
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

if TYPE_CHECKING:  # loaded where it is used: two seconds and 250 MB that extract.py and its workers do without
    import torch

_IMAGE_STARTS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF87a": ".gif",
    b"GIF89a": ".gif",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"\0\0\0\x0cjP  \r\n": ".jp2",
    b"P5\n": ".pgm",
    b"P6\n": ".ppm",
}
# ISO base media files: the brand after "ftyp" says which image it is.
_IMAGE_BRANDS = {
    b"avif": ".avif",
    b"avis": ".avif",
    b"heic": ".heic",
    b"heix": ".heic",
    b"hevc": ".heic",
    b"mif1": ".heif",
}
# What a write to an open file fails with; Python does not know its name then.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
# Control characters, and those that turn the direction of writing: in a file's name they could rewrite what a terminal
# shows, or send it commands. Bytes that are not UTF-8 are no characters at all.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(Exception):
    """Something the user gave cannot be used. The message names the file (or option) and the reason, in one line."""


class Busy(InputError):
    """Another process holds what this one wants (see `locked`)."""


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Make `main` the entry point of a script.

    An `InputError` or a file that cannot be read or written (missing, no permission, disk full) becomes one line on
    standard error and exit code 1, Ctrl-C exit code 130. Any other exception is a bug of ours and keeps its traceback.
    Inside, no control character of a name reaches the terminal, and a reader that closes its end of a pipe (`| head`)
    misses the rest of the output but does not stop the work.
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        with _safe_output():
            return guarded(*args, **kwargs)

    def guarded(*args: Any, **kwargs: Any) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            message = printable(str(error), keep="\n")
            # The newline in the same write: processes of torchrun that all fail must not mix their lines.
            print(f"error: {message}\n", end="", file=sys.stderr)
            return 1
        except OSError as error:
            if error.filename is None and error.errno not in _DISK_ERRORS:
                raise
            name = printable(str(error.filename or "writing"))
            print(f"error: {name}: {error.strerror}\n", end="", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130

    return run


def worker_count(workers: int | None = None) -> int:
    """Threads or processes for work that can be shared: as asked for, or one per CPU that this process may use.

    0 asks for none beside the caller's own, so the work is done one piece after the other.
    """
    if workers is not None:
        return max(1, workers)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def printable(text: str, keep: str = "") -> str:
    """`text` with each control character (but those in `keep`) written as Python would write it in a string."""
    return _UNPRINTABLE.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text
    )


class _Output:
    """Standard output or standard error, fit for any name; everything else is the stream's own."""

    def __init__(self, stream: TextIO, keep: str) -> None:
        self._stream, self._keep = stream, keep

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        shown = printable(text, self._keep).encode(encoding, "backslashreplace").decode(encoding)
        with self._reader_may_leave():
            self._stream.write(shown)
        return len(text)

    def flush(self) -> None:
        with self._reader_may_leave():
            self._stream.flush()

    @contextlib.contextmanager
    def _reader_may_leave(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is still in the buffer would fail again when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _safe_output() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, _Output):
        yield
        return
    # A progress bar goes back to the start of its line.
    sys.stdout, sys.stderr = _Output(sys.stdout, "\n\t"), _Output(sys.stderr, "\n\t\r")  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_TOKEN = secrets.token_hex(4)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over `path`.

    On an exception `path` is untouched and the temporary file is removed; a full disk's names `path`, which a write
    alone does not know. Readers never see half a file. The temporary name is fixed per process, so what a `kill -9`
    leaves behind is `.<name>.<pid>-<token>.tmp`; by the token, two containers' processes do not share a name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{_TOKEN}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        # What the user knows is the file that was meant, such as a folder that stands in its place.
        if error.filename == str(temporary) or (error.filename is None and error.errno in _DISK_ERRORS):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all; newlines are kept as they are.

    Bytes of a file's name that are not UTF-8 become \\udcXX: JSON reads that as the name it was.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN is refused because JSON has no NaN."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def locked(path: str | Path, busy: str | None = None, *, forks: bool = False, leave: bool = True) -> Iterator[None]:
    """Hold a lock among processes for as long as the block lasts; a killed process holds none.

    `path` is a file for the lock alone, or one that is only added to. With `busy`, a `Busy` of that text if
    another process holds it; otherwise wait. With `forks`, processes that this one forks meanwhile have no part in the
    lock, which ends with this one whatever becomes of them. A file system that has no locks (Lustre, unless mounted
    with `flock`) gets a file `PATH.owner`, made exclusively: what a killed process on the same machine left is taken
    over, one of another machine's is waited for or told about, because nothing can say whether that process still runs.
    Without `leave`, the file is gone afterwards.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = fcntl.lockf if forks else fcntl.flock  # the kernel gives one to a process, the other to an open file
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "ab"))
            try:
                lock(file, fcntl.LOCK_EX if busy is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:  # POSIX lets lockf fail with either
                raise Busy(str(busy)) from error
            except OSError:
                stack.enter_context(_owned(path.with_name(f"{path.name}.owner"), busy))
                break
            if leave or _is_at(path, file):
                break
            file.close()  # whoever had the lock has removed the file; another one may be there by now
        try:
            yield
        finally:
            if not leave:
                path.unlink(missing_ok=True)


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether a path leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))  # noqa: PTH116 - the pair of fstat
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _owned(path: Path, busy: str | None) -> Iterator[None]:
    """`locked` without locks: whoever makes the file owns it."""
    mine = f"{platform.node()} {os.getpid()} {_started(os.getpid())}"
    while True:
        try:
            with open(path, "x") as file:
                file.write(mine)
            break
        except FileExistsError:
            pass
        with contextlib.suppress(FileNotFoundError):
            owner = path.read_text()
            if _has_ended(owner):
                # By way of a name of one's own: two that find the same leftover must not both remove a file.
                aside = path.with_name(f"{path.name}.{os.getpid()}")
                os.replace(path, aside)
                if aside.read_text() != owner:
                    with contextlib.suppress(OSError):
                        os.link(aside, path)
                aside.unlink()
                continue
            if busy is not None:
                raise Busy(f"{busy} ({owner}; if that process is gone, remove {path})")
        time.sleep(0.2)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _started(process: int) -> str:
    """When a process of this machine began, in its kernel's ticks; "" where that is not known."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _has_ended(owner: str) -> bool:
    """Whether the text of an owner's file is that of a process of this machine that no longer runs."""
    node, _, rest = owner.partition(" ")
    process, _, started = rest.partition(" ")
    if node != platform.node() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _started(int(process)) != started


def require_file(path: str | Path) -> None:
    """Raise `InputError` for what is no regular file: reading a device or a pipe may never end.

    What does not exist, or must not be looked at, is an `OSError` as from `open`.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 - also for paths that are texts
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}, not a file")


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a regular file of at most `most` bytes; `InputError` for anything else, `OSError` as from `open`."""
    require_file(path)
    with open(path, "rb") as file:
        data = file.read() if most is None else file.read(most + 1)
    if most is not None and len(data) > most:
        raise InputError(f"{path}: the file has more than {most >> 20} MiB")
    return data


def parse_json(data: bytes | str, **settings: Any) -> Any:
    """`json.loads`; bytes that are no text, and brackets nested without end, are a `ValueError` in a few words."""
    try:
        return json.loads(data, **settings)
    except UnicodeDecodeError as error:  # which carries all of the file along
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    except RecursionError as error:
        raise ValueError("brackets are nested too deeply") from error


def read_json(path: str | Path, **settings: Any) -> Any:
    """The contents of a JSON file; `ValueError` if it holds something else, `InputError` as from `read_bytes`."""
    return parse_json(read_bytes(path), **settings)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. `InputError` for a folder, a device or a pipe."""
    require_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_sha256(*files: str | Path) -> str:
    """SHA-256 over source files, for the key of what they computed. Read once: what runs is what was there at first."""
    digest = hashlib.sha256()
    for path in sorted(map(str, files)):
        data = Path(path).read_bytes()
        digest.update(f"{Path(path).name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def refuse_training(out: Path) -> None:
    """Raise `InputError` where results would be written over those of a training."""
    path = out / "results.json"
    with contextlib.suppress(OSError, ValueError):
        content = read_json(path)
        if isinstance(content, dict) and "history" in content:
            raise InputError(f"--out {out}: holds the results of a training ({path}); choose another folder")


def progress(total: int, description: str, *, initial: int = 0, unit: str = "it") -> tqdm:
    """A progress bar with a total; sparse when standard error is a log file, silent never.

    `initial` is what an earlier, interrupted run had finished already.
    """
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=interactive,
        mininterval=0.1 if interactive else 10.0,
        smoothing=0.1,
    )


def image_suffix(data: bytes) -> str | None:
    """`.jpg`, `.png`, ... by how encoded image data begins; None if it does not begin as an image file does."""
    for start, suffix in _IMAGE_STARTS.items():
        if data.startswith(start):
            return suffix
    if data[:4] == b"RIFF":
        return ".webp" if data[8:12] == b"WEBP" else None
    if data[:2] == b"BM":  # two letters are not enough: the reserved fields must be zero
        return ".bmp" if data[6:10] == bytes(4) else None
    return _IMAGE_BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None


def choose_device(name: str) -> "torch.device":
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that exists here; `InputError` otherwise.

    An NVIDIA GPU whose driver is too old for this PyTorch is an error, too, not a CPU: training would take weeks.
    """
    import torch

    if name != "cpu" and _NVIDIA_DRIVER.exists() and torch.version.cuda and not torch.cuda.is_available():
        version = _NVIDIA_DRIVER.read_text().splitlines()[0]
        raise InputError(
            f"--device {name}: PyTorch, made for CUDA {torch.version.cuda}, cannot use the NVIDIA driver that is here "
            f"({version}); CUDA 13 needs driver 580 or newer. Update it, or give --device cpu"
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: not a device name (cpu, cuda, cuda:0, ...)") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def own_device(name: str) -> "torch.device":
    """`choose_device` for one of several processes that share no memory: under torchrun or srun each takes its own GPU,
    or the only one that it is shown.
    """
    import torch

    device = choose_device(name)
    number = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    several = device.type == "cuda" and device.index is None and number.isdecimal() and int(number) > 0
    return torch.device("cuda", int(number) % torch.cuda.device_count()) if several else device


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees for its next request; with another C library nothing happens.

    It hands large blocks back to the system, so that each activation of each batch lies in new pages, which the system
    has to clear first. With `mfn` on one core that took a third of a training step of 64 crops, and a seventh of the
    time to embed 16. The process stays as large as it was at its largest.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_trim_threshold, -1)  # never
        mallopt(m_mmap_max, 0)


@contextlib.contextmanager
def computing_threads(count: int, each: int = 1) -> Iterator[Executor]:
    """`count` threads that compute with torch at the same time, each with `each` threads inside a computation.

    torch asks per thread how many it may start, and BLAS as many again.
    """
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "computing", initializer=torch.set_num_threads, initargs=(each,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what threads that start later begin with


def emulates_bfloat16(device: "torch.device") -> bool:
    """Whether this is a processor without AVX-512, on which PyTorch's bfloat16 takes many times as long as float32."""
    import torch

    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_precision = threading.RLock()


@contextlib.contextmanager
def true_float32(device: "torch.device") -> Iterator[None]:
    """Inside, a GPU's convolutions and matrix products keep float32's 24 bits, and are the same in every run.

    By default cuDNN multiplies with TensorFloat-32, whose 11 bits of mantissa move features by a thousandth and
    landmarks by tenths of a pixel, and train.py lets it choose kernels by trial. That is right for training and wrong
    for what is measured. The price: an H100 computes several times as long. The switches are the whole process's, so
    threads that want them take turns; on a CPU nothing happens.
    """
    if device.type == "cpu":
        yield
        return
    import torch

    with _precision:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


CHECKPOINT_FORMAT = "face-checkpoint-1"
REPEATED_BYTES = 1 << 24  # what a tensor may take in memory of which fewer values are stored


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a training checkpoint, whole or not at all: nested dicts and lists of tensors, numbers, strings, None.

    The key `format` is added.
    """
    save_tensors(path, {"format": CHECKPOINT_FORMAT, **content})


def save_tensors(path: str | Path, content: dict[str, Any]) -> None:
    """torch.save, whole or not at all. Raises OSError, naming the file, when it cannot be written (disk full).

    Through a file of Python's, because torch's own does not say why a write failed.
    """
    import torch

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if not isinstance(error.__context__, OSError):
                raise
            raise error.__context__ from None


def load_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read weights on the CPU: a training checkpoint (has the key `format`) or a plain state_dict.

    Only plain tensors are loaded, never code. With `mmap`, tensors stay on disk until they are used. Raises
    `InputError`, naming the file and the way out, for whole pickled modules, damaged files and anything that holds no
    weights.
    """
    import torch

    content = read_tensors(path, mmap=mmap)
    if "format" not in content and not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"{path}: neither a training checkpoint nor a plain state_dict")
    return content


def read_tensors(path: str | Path, *, mmap: bool = False, stand_ins: bool = False) -> dict[str, Any]:
    """The dictionary that torch.save wrote to a file: tensors, numbers, texts, nested; see `load_checkpoint`. Or the
    tensors of a safetensors file.

    With `stand_ins`, objects of other programs that lie beside the weights (the settings and callbacks in a checkpoint
    of Lightning) are read as empty dictionaries; nothing of their code is looked for or run. Raises InputError.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a file of weights")
    require_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch remarks about a file that is none; the error says it in one line
        content = _read_tensors(path, mmap, stand_ins)
    if not isinstance(content, dict) or not content:
        kind = "nothing" if content is None or content == {} else type(content).__name__
        raise InputError(f"{path}: holds {kind}, not a dictionary of weights")
    if content.get("format", CHECKPOINT_FORMAT) != CHECKPOINT_FORMAT:
        raise InputError(f"{path}: format {shown(content['format'])}; this version reads {CHECKPOINT_FORMAT!r}")
    _check_values(path, content)
    return content


def percent(rate: float | None, unit: str = " %") -> str:
    """A rate in [0, 1] with two decimals, more where these would make it all or nothing, which it is not; "-" for None.

    One wrong pair in 60,000 is 99.998 %, not 100.00 %.
    """
    if rate is None:
        return "-"
    digits = next((n for n in range(2, 6) if not 0 < rate < 1 or 0 < float(f"{100 * rate:.{n}f}") < 100), 6)
    return f"{100 * rate:.{digits}f}{unit}"


def shown(text: object, most: int = 60) -> str:
    """A name out of a file, quoted, cut, and on one line, for an error message."""
    return repr(text[:most] if isinstance(text, str) else type(text).__name__)


def _check_values(path: Path, content: Any) -> None:
    """Raise `InputError` for a tensor that claims far more values than are stored for it, or has no shape at all.

    A few bytes could fill the memory else. Each object is looked at once, however often it is referred to.
    """
    import torch

    todo, seen = [content], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, torch.Tensor):
            if value.is_nested:
                raise InputError(f"{path}: holds a nested tensor, which no network has")
            dense = value.layout == torch.strided and value.device.type != "meta"
            needed = value.numel() * value.element_size() if dense else 0
            if needed > max(value.untyped_storage().nbytes() if dense else 0, REPEATED_BYTES):
                raise InputError(f"{path}: holds a tensor of {needed} bytes of which few are stored")


def _read_tensors(path: Path, mmap: bool, stand_ins: bool) -> Any:
    import torch

    foreign: list[str] = []
    try:
        if _is_safetensors(path):
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            _verify_zip(path)
            if stand_ins:
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(_stand_in(name), name) for name in foreign]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, InputError):
        raise
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower() and not foreign:
            raise InputError(f"{path}: not a file of weights, or damaged") from error
        raise _holds_objects(path) from error
    except Exception as error:  # foreign bytes make the readers raise nearly anything
        if foreign:  # whole, but holds objects that stand-ins cannot be put in the place of
            raise _holds_objects(path) from error
        raise InputError(f"{path}: not a file of weights, or damaged") from error
    if foreign and not content:  # one object and nothing else: a whole pickled module
        raise _holds_objects(path)
    return content


def begins_safetensors(start: bytes) -> bool:
    """Whether the first 9 bytes of a file are the length of a JSON header and a brace (the format's README)."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000  # the format's own limit


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        return begins_safetensors(file.read(9))


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path}: reading it needs safetensors: pip install safetensors") from None
    return load_file(path)


class _Absorbed:
    """Stands for a NumPy object, whose state comes as a tuple."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(name: str) -> type:
    """A class that stands for the foreign one of this name: whatever is made of it is empty.

    torch fills nothing but true dictionaries, and objects of most classes are restored like one.
    """
    if name.startswith("numpy."):
        return type("StandIn", (_Absorbed,), {})
    return type("StandIn", (), {"__new__": lambda cls, *_: collections.OrderedDict()})


def _holds_objects(path: Path) -> InputError:
    return InputError(
        f"{path}: holds Python objects, not plain tensors, and is not loaded, because that could run code; where it "
        'was made, save it again with torch.save(model.state_dict(), FILE), or the "state_dict" of a checkpoint alone'
    )


def _verify_zip(path: Path) -> None:
    """Compare every part of a checkpoint with its CRC-32, which torch.load does not do. About 1 GB/s."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                raise InputError(
                    f"{path}: a TorchScript program, not plain weights; where it was made, save the network's "
                    "state_dict() with torch.save, or export it to ONNX"
                )
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: damaged ({error})") from error
    if damaged is not None:
        raise InputError(f"{path}: damaged (checksum of {damaged} does not fit)")


def versions(*packages: str) -> dict[str, str]:
    """The versions of those of the packages that are installed; nothing is imported."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def environment() -> dict[str, Any]:
    """What a result was computed with, for reports: command, versions, machine, and the state of this code.

    `source_sha256` is of all Python files of the repository in order of their names, so that it also tells versions
    apart where there is no git (`commit` is None then).
    """
    import torch

    root = Path(__file__).resolve().parent
    sources = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        sources.update(f"{path.relative_to(root)}\0{sha256_of(path)}\n".encode())
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "machine": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "commit": _git(root, "rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "source_sha256": sources.hexdigest(),
    }


def _git(root: Path, *words: str) -> str | None:
    """Output of a git command about the repository's folder; None without git or outside a work tree."""
    try:
        run = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
