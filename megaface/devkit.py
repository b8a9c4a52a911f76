"""The official devkit's binaries, for those who have them: run them, believe nothing, compare.

The binaries (`bin/Identification`, `bin/FuseResults`) report many failures with exit code 0 and garbage, or not at
all, so they are only started on features that were read and found whole, finite and of one dimension, and what they
write is checked. Their results are kept as they are; `compare` says where they differ from ours.
"""

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megaface.features import HEADER
from utils import InputError

MODEL = "jb_identity.bin"  # the devkit's scoring model without learned parts: minus the squared distance


@dataclass(frozen=True)
class Devkit:
    """An unpacked devkit."""

    folder: Path
    model: Path

    @staticmethod
    def at(folder: Path, model: Path | None) -> "Devkit":
        """The devkit in `folder`; `InputError` when something is not there."""
        devkit = Devkit(folder, model or folder / "models" / MODEL)
        for tool in ("Identification", "FuseResults"):
            if not os.access(devkit.tool(tool), os.X_OK):
                raise InputError(f"{devkit.tool(tool)}: no such program of the devkit, or not executable")
        if not devkit.model.is_file():
            raise InputError(f"{devkit.model}: no such scoring model")
        return devkit

    def tool(self, name: str) -> Path:
        """Path of one of the binaries."""
        return (self.folder / "bin" / name).resolve()

    def identification(self, gallery_list: Path, probe_list: Path, out: Path, shape: tuple[int, int]) -> None:
        """Write the score matrix of `shape` (probes, gallery) to `out`; `InputError` if that fails."""
        self._run("Identification", [self.model, "path", gallery_list, probe_list, out], [out])
        rows, columns = shape
        with open(out, "rb") as file:
            header = file.read(HEADER.size)
        size = HEADER.size + 4 * rows * columns
        if header != HEADER.pack(rows, columns, 4 * columns, 5) or out.stat().st_size != size:
            out.unlink()
            raise InputError(f"{out}: Identification wrote no matrix of {rows} x {columns} scores, though it says so")

    def fuse_results(
        self, distractor_scores: Path, probe_scores: Path, probe_list: Path, size: int, cmc: Path, matches: Path
    ) -> None:
        """Write the two results files; `InputError` if that fails."""
        arguments = [distractor_scores, probe_scores, probe_list, size, cmc, matches]
        self._run("FuseResults", arguments, [cmc, matches])

    def _run(self, tool: str, arguments: list[object], outputs: list[Path]) -> None:
        for path in outputs:
            path.unlink(missing_ok=True)
        try:
            code = subprocess.run([self.tool(tool), *map(str, arguments)], check=False).returncode
        except OSError as error:
            raise InputError(f"{self.tool(tool)}: cannot be started: {error.strerror}") from error
        failure = None
        if code < 0:
            failure = f"killed by {signal.Signals(-code).name}"
        elif code:
            failure = f"exit code {code}"
        elif missing := [path for path in outputs if not path.is_file()]:
            failure = f"exit code 0, but {missing[0].name} was not written"
        if failure:
            for path in outputs:
                path.unlink(missing_ok=True)
            raise InputError(f"{self.tool(tool)}: {failure}")


def compare(name: str, theirs: bytes, ours: bytes) -> str | None:
    """The first difference between two versions of a results file, in words; None when they are identical."""
    if theirs == ours:
        return None
    pairs = zip(theirs.split(b"\n"), ours.split(b"\n"), strict=False)
    for number, (their_line, our_line) in enumerate(pairs, start=1):
        if their_line != our_line:
            texts = (line.strip().decode("utf-8", "replace")[:80] for line in (their_line, our_line))
            return "{} differs in line {}: the devkit has {!r}, this program {!r}".format(name, number, *texts)
    return f"{name} differs in length: the devkit's has {len(theirs)} bytes, this program's {len(ours)}"
