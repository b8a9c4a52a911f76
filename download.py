"""Checkpoints by name: `released`, an http(s) address, or a file.

The released network is a plain state_dict of some 200 MB at a fixed address whose hash was never published. So the
trust is "on first use": the SHA-256 of the first whole download is recorded beside the file and every later use of
the file, and every later download, must match it. The price is one hash of the file at each start (about 0.3 s).

Every other address has a folder of its own, named by a hash of the whole address, because most networks are called
`embedding.pt` or `model.onnx`. An address whose parameters change (`?signature=...`) is another address each time.

A download that breaks off is continued with a range request, also by a later run; the file gets its name only when
its length is what the server announced and its first bytes are those of a model. Whatever a server does, it ends:
see `LARGEST`, `LARGEST_UNANNOUNCED`, `ATTEMPTS`, `TIMEOUT_S` and `SLOWEST`.
"""

import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from email.message import Message
from pathlib import Path
from typing import IO, Any

from utils import InputError, begins_safetensors, fsync_directory, locked, progress, require_file, sha256_of, write_text

# Release v1.0 of foamliu/InsightFace-v3: SE-LResNet101E-IR, 99.80 % on LFW.
RELEASED_URL = "https://github.com/foamliu/InsightFace-v3/releases/download/v1.0/insight-face-v3.pt"
WEIGHTS = Path(__file__).resolve().parent / "weights"
ATTEMPTS = 5  # connections in a row that bring nothing to speak of
TIMEOUT_S = 30.0  # without a byte
SLOWEST = 64 << 10  # bytes that have to come in each `PATIENCE_S` seconds, and in a connection that counts as progress
PATIENCE_S = 60.0
LARGEST = 16 << 30  # bytes of a model; a training checkpoint with two million identities has 9 GB
LARGEST_UNANNOUNCED = 2 << 30  # of one whose length the server does not announce
BLOCK = 1 << 20
# torch.save writes a zip since 1.6 and a bare protocol-2 pickle before; ONNX (protobuf) starts with field 1, varint.
PYTORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02")
ONNX_MAGIC = (b"\x08",)
START = 9  # bytes by which a model is recognised (safetensors: a length, and a brace)


def checkpoint_path(name: str | Path, folder: Path = WEIGHTS) -> Path:
    """The file behind a `--checkpoint` value, downloaded into `folder` if need be.

    `released` is the published network, an http or https address any other one, everything else a path, which is
    returned as it is. Raises `InputError` when the download fails or the file is not the one recorded at first use.
    """
    text = str(name)
    if text == "released":
        return fetch(RELEASED_URL, folder)
    if text.lower().startswith(("http://", "https://")):
        return fetch(text, folder)
    return Path(name)


def fetch(url: str, folder: Path = WEIGHTS) -> Path:
    """Download `url` once, into a folder of its own in `folder`, and return the file; ever after check its SHA-256.

    Several processes may ask for the same file: one downloads, the others wait for it.
    """
    target = place_of(url, folder)
    if target.exists() and _record_of(target).exists():  # nothing to write, so the folder may be for reading only
        _check_recorded_hash(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock")):
        if not target.exists():
            _download(url, target)
            if target.parent != folder:
                write_text(target.parent / "address.txt", url + "\n")  # for people
        _check_recorded_hash(target)
    return target


def place_of(url: str, folder: Path = WEIGHTS) -> Path:
    """Where the file of an address lies, or will lie, below `folder`. Raises `InputError` for what is no address."""
    try:
        path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    except ValueError as error:
        raise InputError(f"{url}: not an address: {error}") from error
    if not re.fullmatch(r"[!-~]+", url) or "\0" in path:
        raise InputError(
            f"{url!r}: not an address: blanks and letters beyond ASCII have to be written as %20, %C3%BC, ..."
        )
    file_name = Path(path).name
    if not file_name or file_name.startswith("."):
        raise InputError(f"{url}: the address names no file")
    if url == RELEASED_URL:
        return folder / file_name
    return folder / hashlib.sha256(url.encode()).hexdigest()[:16] / file_name


def _record_of(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _check_recorded_hash(target: Path) -> None:
    require_file(target)
    record = _record_of(target)
    digest = sha256_of(target)
    if not record.exists():
        write_text(record, f"{digest}  {target.name}\n")
        return
    recorded = record.read_text(encoding="utf-8").split()
    if recorded[:1] != [digest]:
        raise InputError(
            f"{target}: SHA-256 is {digest}, but {recorded[0] if recorded else 'nothing'} was recorded at first use; "
            f"delete the file to download it again, or {record.name} if the change is meant"
        )


def _by_hand(url: str, target: Path) -> str:
    return f"download {url} elsewhere and put it at {target}, or name another address or file with --checkpoint"


class _CutOffError(Exception):
    """The connection ended before the announced length; asking for the rest may help."""


class _RefusedError(Exception):
    """The server's answer will not get better by asking again."""


class _WrongStartError(_RefusedError):
    """What comes is no model."""


def _download(url: str, target: Path) -> None:
    """Fetch `url` into `target` over as many connections as it takes (at most `ATTEMPTS` in a row without progress)."""
    part = target.with_name(f"{target.name}.part")
    failures, furthest = 0, _size_of(part)
    while True:
        try:
            _receive(url, part)
            break
        except _RefusedError as error:
            raise InputError(f"{url}: {error}; {_by_hand(url, target)}") from error
        except (OSError, http.client.HTTPException, _CutOffError) as error:
            received = _size_of(part)
            # What came before and had to be thrown away is no progress when it comes again.
            failures = 0 if received >= furthest + SLOWEST else failures + 1
            furthest = max(furthest, received)
            if failures >= ATTEMPTS or _is_unreachable(error):
                reason = getattr(error, "reason", error)
                raise InputError(
                    f"{url}: {reason} ({received:,} bytes so far, kept for the next try); {_by_hand(url, target)}"
                ) from error
            time.sleep(min(2.0**failures * 0.1, 5.0))
    _check_looks_like_a_model(part, url, target)
    os.replace(part, target)
    fsync_directory(target.parent)


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _is_unreachable(error: Exception) -> bool:
    """No network at all (no name, no route, refused): waiting seconds will not change that."""
    return isinstance(error, urllib.error.URLError) and not isinstance(error.reason, TimeoutError)


def _receive(url: str, part: Path) -> None:
    """One connection: append to `part` what is missing; returns when the file is as long as announced."""
    have = _size_of(part)
    tag_file = part.with_name(part.name + ".etag")
    request = urllib.request.Request(url, headers={"User-Agent": "face-recognition", "Accept-Encoding": "identity"})
    tag: str | None = None
    if have and tag_file.exists():
        # If-Range: the rest of the same file, or all of a file that has changed meanwhile.
        request.add_header("Range", f"bytes={have}-")
        tag = tag_file.read_text(encoding="utf-8")
        request.add_header("If-Range", tag)
    try:
        response = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            # Our part does not fit what the server has now: start over.
            part.unlink(missing_ok=True)
            raise _CutOffError("the server has no such range") from error
        if error.code in (429, 500, 502, 503, 504):
            raise _CutOffError(f"the server answered {error.code} {error.reason}") from error
        reason = str(error.reason).partition("\n")[0]
        raise _RefusedError(f"the server answered {error.code} {reason}") from error
    except ValueError as error:  # UnicodeError is one: a name that no server can have
        raise _RefusedError(f"no such address, or a redirect to none ({error})") from error
    with response:
        if response.status == 206:
            total: int | None = _total_of_rest(response.headers, have, tag)
            if total is None:
                part.unlink(missing_ok=True)
                raise _CutOffError("the server answered a range request with something else")
        else:
            have = 0
            length = response.headers.get("Content-Length")
            known = length and length.isascii() and length.isdecimal() and len(length) <= 18
            total = int(length) if known else None
            if response.headers.get_content_type() == "text/html":
                raise _RefusedError("the answer is a web page, not a model")
            # The old part goes before the new tag comes, so that a kill between the two cannot marry them.
            part.unlink(missing_ok=True)
            tag_file.unlink(missing_ok=True)
            if tag := _strong_validator(response.headers):
                write_text(tag_file, tag)
        _check_size(total, have, part)
        with (
            open(part, "ab") as file,
            progress(total or 0, part.stem, initial=have, unit="B") as bar,
        ):
            try:
                _copy(response, file, total, bar)
            except _RefusedError:
                file.truncate(0)  # to go on from there would be to take it
                raise
            file.flush()
            os.fsync(file.fileno())
    have = part.stat().st_size
    if total is not None and have < total:
        raise _CutOffError(f"the connection ended after {have:,} of {total:,} bytes")
    tag_file.unlink(missing_ok=True)


def _check_size(total: int | None, have: int, part: Path) -> None:
    """Refuse what is no model by its size, and what the disk does not hold."""
    if total is None:
        return
    if total > LARGEST:
        raise _RefusedError(f"the server announces {total:,} bytes; a model has at most {LARGEST:,}")
    free = shutil.disk_usage(part.parent).free
    if total - have > free:
        raise _RefusedError(f"{total - have:,} bytes are to come and the disk of {part.parent} has {free:,} free")


def _copy(response: http.client.HTTPResponse, file: IO[bytes], total: int | None, bar: Any) -> None:
    """Append the body to `file`, up to `total` bytes in the file, or as long as a body of unknown length may be."""
    response.length = None  # http.client would stop at the announced length and hide that more has come
    have = file.tell()
    limit = LARGEST_UNANNOUNCED if total is None else total
    start = b"" if have == 0 else None
    began, arrived = time.monotonic(), 0
    while True:
        try:
            block = response.read1(BLOCK)
        except TimeoutError:
            if have == total:  # all is here; the server only fails to hang up
                return
            raise
        if not block:
            return
        have += len(block)
        if have > limit:
            raise _RefusedError(
                f"more than the announced {total:,} bytes came"
                if total is not None
                else f"no end after {limit:,} bytes"
            )
        if start is not None:
            start = (start + block)[:START]
            if len(start) == START:
                _check_start(start, Path(file.name))
        file.write(block)
        bar.update(len(block))
        arrived += len(block)
        if time.monotonic() - began > PATIENCE_S:
            if arrived < SLOWEST:
                raise _CutOffError(f"only {arrived:,} bytes came in {PATIENCE_S:.0f} s")
            began, arrived = time.monotonic(), 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects from http to http or https, and from https to https; to nothing else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme.lower()
        if scheme != "https" and (scheme, req.type) != ("http", "http"):
            raise _RefusedError(f"the server redirects from {req.type} to {scheme or 'nowhere'}: {newurl!r}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _strong_validator(headers: Message) -> str | None:
    """What If-Range may carry: a strong ETag, else the date of the last change."""
    tag = headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return tag
    return headers.get("Last-Modified")


def _total_of_rest(headers: Message, have: int, tag: str | None) -> int | None:
    """Length of the whole file from `Content-Range: bytes 100-199/200`; None if what comes is not the rest of ours.

    It must begin where we stopped, in the file that we began, which not every server compares with If-Range.
    """
    if tag is not None and _strong_validator(headers) not in (None, tag):
        return None
    try:
        span, total = headers.get("Content-Range", "").removeprefix("bytes ").split("/")
        return int(total) if int(span.split("-")[0]) == have else None
    except ValueError:
        return None


def _check_looks_like_a_model(part: Path, url: str, target: Path) -> None:
    with open(part, "rb") as file:
        head = file.read(START)
    try:
        _check_start(head, part)
        if head.startswith(PYTORCH_MAGIC[0]) and not zipfile.is_zipfile(part):  # its directory comes last
            raise _WrongStartError(f"the end of the {Path(part.stem).suffix} model is missing")
    except _WrongStartError as error:
        part.unlink()
        raise InputError(f"{url}: {error}; {_by_hand(url, target)}") from error


def _check_start(head: bytes, part: Path) -> None:
    suffix = Path(part.stem).suffix.lower()  # net.pt.part
    right = head.startswith(ONNX_MAGIC if suffix == ".onnx" else PYTORCH_MAGIC)
    if suffix == ".safetensors":
        right = begins_safetensors(head)
    if not right:
        raise _WrongStartError(f"what came is not a {suffix} model (first bytes {head[:4]!r})")
