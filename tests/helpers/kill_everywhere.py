"""Run a stage once per file operation it makes, killed at that operation, start it again and compare with a clean run.

    python -m helpers.kill_everywhere MODULE STRIDE OUT ARGUMENT...

OUT stands for `@` in the arguments. Each run is a forked process with painted faces for a detector and small chunks. It
ends by `os._exit` at its n-th operation (n = 0, STRIDE, ...): before the operation or, for writes, once with half of
the data written and once with all of it. Prints how many runs were killed and which did not end as the clean run.
"""

import importlib
import io
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from helpers.painted_faces import PaintedFaces

from cropping import chunks, faces

KILLED = 9


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hook(kill_at, half):
    """Count the operations that change files; leave the process at number `kill_at`."""
    done = []

    def due(name):
        done.append(name)
        return len(done) - 1 == kill_at

    def wrap(module, name):
        plain = getattr(module, name)

        def hooked(*args, **kwargs):
            if due(name):
                os._exit(KILLED)
            return plain(*args, **kwargs)

        setattr(module, name, hooked)

    for name in ("replace", "unlink", "rmdir", "mkdir", "fsync"):
        wrap(os, name)
    write = Path.write_bytes

    def hooked_write(path, data):
        if due("write"):
            write(path, data[: len(data) // 2] if half else data)
            os._exit(KILLED)
        return write(path, data)

    Path.write_bytes = hooked_write  # type: ignore[method-assign]  # in a process that ends soon
    return done


def run(stage, arguments, kill_at=-1, half=False):
    """Fork, run the stage, and return its exit code and the operations it made."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 99
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            sys.stderr = io.StringIO()
            sys.argv = [stage.__name__, *arguments]
            done = hook(kill_at, half)
            code = stage.main()
            os.write(write, " ".join(done).encode())
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text.split()


def main(name, stride, out, *arguments):
    out = Path(out)
    stage: Any = importlib.import_module(name)
    chunks.CHUNK = faces.WINDOW
    stage.open_detector = lambda options: PaintedFaces()
    filled = [argument.replace("@", str(out)) for argument in arguments]
    code, operations = run(stage, filled)
    assert code == 0 and len(operations) > 10, (code, operations)
    clean = contents(out)
    killed, different = 0, []
    for kill_at in range(0, len(operations), int(stride)):
        for half in (False, True) if operations[kill_at] == "write" else (False,):
            shutil.rmtree(out)
            killed += run(stage, filled, kill_at, half)[0] == KILLED
            if run(stage, filled)[0] != 0 or contents(out) != clean:
                different.append((kill_at, half))
    print(f"killed {killed} different {different}")


if __name__ == "__main__":
    main(*sys.argv[1:])
