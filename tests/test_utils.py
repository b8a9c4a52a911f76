"""What every script shares: errors as one line, files whole or not at all, weights that hold no code."""

import ctypes
import errno
import fcntl
import functools
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.training import ROOT
from torch import nn

import utils
from embedding import Embedder
from formats.embeddings import EmbeddingStore
from training import distributed, monitor
from utils import InputError


def ends(error):
    """Exit code of a script that stops with `error`."""

    @utils.command
    def main():
        raise error

    return main()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("a.txt: empty"), "error: a.txt: empty"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "b.txt"), "error: b.txt: No such file"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), "error: out: File exists"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "File name too long"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: writing: No space left on device"),
    ],
)
def test_what_a_user_can_act_on_is_one_line(error, line, capsys):
    assert ends(error) == 1
    out, said = capsys.readouterr()
    assert line in said and said.count("\n") == 1 and out == ""


@pytest.mark.parametrize("error", [ValueError("ours"), OSError("of no file"), ConnectionResetError(104, "reset")])
def test_what_is_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        ends(error)


HOSTILE = "a\x1b]0;title\x07\x1b[2Jb\x9bc\u202egpj.exe\udcff\r\x7f.jpg"


def test_no_control_character_reaches_the_terminal(capsys):
    @utils.command
    def main():
        print(f"photo {HOSTILE}", end="\n")
        print(HOSTILE, file=sys.stderr)
        raise InputError(f"{HOSTILE}: not a photo")

    assert main() == 1
    out, said = capsys.readouterr()
    for text in (out, said.replace("\r", "", 1)):  # a progress bar may return to its line's start, an error may not
        assert all(character == "\n" or character.isprintable() for character in text), ascii(text)
        assert "\\x1b]0;title\\x07" in text and "\\u202egpj.exe\\udcff" in text
    assert sys.stdout.__class__.__name__ != "_Output"  # put back


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_does_not_stop_the_work(tmp_path, unbuffered):
    code = (
        "import sys, utils\n"
        "@utils.command\n"
        "def main():\n"
        "    for number in range(20000): print('line', number)\n"
        "    utils.write_text('done', 'all')\n"
        "sys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""
    assert (tmp_path / "done").read_text() == "all"


def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", ""):
        with pytest.raises(InputError, match="not a file"):
            utils.sha256_of(tmp_path / name)


def test_a_lock_that_another_process_holds(tmp_path):
    with (
        utils.locked(tmp_path / "lock"),
        pytest.raises(InputError, match="busy"),
        utils.locked(tmp_path / "lock", "busy"),
    ):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(utils.fcntl, "flock", refuse)
    with utils.locked(tmp_path / "lock", "busy"):
        pass


def test_interrupted(capsys):
    assert ends(KeyboardInterrupt()) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "write",
    [
        "utils.write_bytes('results.json', bytes(100_000))",
        "utils.save_checkpoint('results.json', {'a': torch.zeros(25_000)})",
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, write):
    """Files may not grow beyond a limit in this process, as on a full disk."""
    code = (
        "import resource, signal, sys, torch, utils; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"main = utils.command(lambda: {write})\n"
        "sys.exit(main())"
    )
    (tmp_path / "results.json").write_bytes(b"old")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "error: results.json: File too large\n")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_bytes() == b"old"


def test_atomic_path_leaves_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "deep" / "results.json"
    utils.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        utils.write_json(path, {"a": float("nan")})

    def half():
        with utils.atomic_path(path) as temporary:
            temporary.write_text("{")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_a_whole_pickled_network_is_refused_with_the_way_out(tmp_path):
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pt"
        torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match=r"holds Python objects.*save it again with torch\.save"):
            utils.load_checkpoint(path)


@pytest.mark.parametrize("beside", [{Path("/a"): 1}, {"set": {Path("/a")}}, {"call": functools.partial(print, 1)}])
def test_objects_that_nothing_stands_for_are_refused_with_the_way_out(tmp_path, beside):
    path = tmp_path / "net.pt"
    torch.save({"state_dict": {"weight": torch.ones(3)}, **beside}, path)
    with pytest.raises(InputError, match=r"holds Python objects.*save it again with torch\.save"):
        utils.read_tensors(path, stand_ins=True)


def test_a_torchscript_program_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "program.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(InputError, match=r"program\.pt: a TorchScript program.*state_dict"):
        utils.load_checkpoint(path)


def test_damaged_weights_are_named(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"weight": torch.arange(1000.0)}, whole)
    data = whole.read_bytes()
    middle = data.index(torch.arange(1000.0).numpy().tobytes()) + 1234
    damages = {
        "empty": b"",
        "cut": data[:-100],
        "start": data[:100],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "text": b"<html>404</html>",
    }
    for name, content in damages.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.pt: .*(damaged|not a)"):
            utils.load_checkpoint(path)
    for name, content in {"list": [torch.zeros(1)], "empty": {}, "numbers": {"a": 1}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(InputError, match=rf"{name}\.pt: (holds|neither)"):
            utils.load_checkpoint(tmp_path / f"{name}.pt")


def test_weights_of_the_old_format_cut_anywhere_are_named(tmp_path):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save({"weight": torch.arange(10.0)}, whole, _use_new_zipfile_serialization=False)
    data = whole.read_bytes()
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"cut\.pt: "):
            utils.load_checkpoint(cut)


def test_a_zip_of_several_disks_is_named(tmp_path):
    path = tmp_path / "disks.pt"
    torch.save({"weight": torch.arange(10.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\6\7") + 16] = 2  # of the zip64 end-of-directory locator: how many disks there are
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"disks\.pt: "):
        utils.load_checkpoint(path)


def test_extract_starts_without_torch():
    """Its workers would pay two seconds and 250 MB each for nothing."""
    code = "import sys, extract; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_devices():
    assert utils.choose_device("cpu") == torch.device("cpu")
    assert utils.choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="--device gpu: not a device name"):
        utils.choose_device("gpu")
    with pytest.raises(InputError, match="--device cuda:99: this machine has"):
        utils.choose_device("cuda:99")


def is_busy(path, message):
    with pytest.raises(InputError, match=message), utils.locked(path, "busy"):
        pass
    return True


@pytest.mark.parametrize("supported", [True, False])
def test_a_lock_is_held_once_and_let_go(tmp_path, monkeypatch, supported):
    if not supported:  # Lustre, unless it is mounted with flock

        def refuse(*_):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with utils.locked(tmp_path / "lock", "busy"):
            assert is_busy(tmp_path / "lock", "busy")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("use", ["embeddings", "training"])
def test_embeddings_and_training_do_without_locks(tmp_path, monkeypatch, use):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    for _ in range(2):
        if use == "embeddings":
            EmbeddingStore(tmp_path, {"model": "a"}, 3, 2)
            continue
        with monitor.RunLog() as log:
            log.open(tmp_path / "log.txt")
            log("one line")
            with pytest.raises(InputError, match="another process is training"), monitor.RunLog() as other:
                other.open(tmp_path / "log.txt")
    assert not list(tmp_path.rglob("*.owner"))
    if use == "training":
        assert (tmp_path / "log.txt").read_text().count("one line") == 2


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, capsys):
    (tmp_path / "results.json").mkdir()

    @utils.command
    def main():
        utils.write_json(tmp_path / "results.json", {})

    assert main() == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'results.json'}: Is a directory\n"


def test_nothing_is_said_beside_the_error_about_a_file_that_holds_no_weights(tmp_path, recwarn):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(["no", "weights"], protocol=3))
    with pytest.raises(InputError, match=r"a.pt"):
        utils.read_tensors(tmp_path / "a.pt")
    assert not recwarn.list


def test_bytes_of_files_alone(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert utils.read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(InputError, match="the file has more than"):
        utils.read_bytes(tmp_path / "file", 4)
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match="not a file"):
            utils.read_bytes(path)


def test_json_that_is_nested_without_end_is_no_traceback(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        utils.read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        utils.parse_json(b"{\x80" + bytes(1000))


def test_without_locks_what_a_killed_process_left_is_taken_over(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    child = os.fork()
    if child == 0:
        with utils.locked(tmp_path / "lock", "busy"):
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / "lock.owner").exists()
    with utils.locked(tmp_path / "lock", "busy"):
        assert f" {os.getpid()} " in (tmp_path / "lock.owner").read_text()
    # Nobody here can say whether a process of another machine still runs.
    (tmp_path / "lock.owner").write_text("elsewhere 1 2")
    assert is_busy(tmp_path / "lock", r"busy \(elsewhere 1 2; if that process is gone, remove .*lock.owner\)")


def test_a_driver_that_is_too_old_is_no_cpu(tmp_path, monkeypatch):
    driver = tmp_path / "version"
    monkeypatch.setattr(utils, "_NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert utils.choose_device("auto").type == "cpu"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.1\nGCC version\n")
    assert utils.choose_device("cpu").type == "cpu"
    for name in ("auto", "cuda"):
        with pytest.raises(InputError, match=r"needs driver 580 or newer"):
            utils.choose_device(name)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux what the processor has")
def test_processors_that_emulate_bfloat16():
    flags = Path("/proc/cpuinfo").read_text().split()
    if platform.machine() == "x86_64":
        assert utils.emulates_bfloat16(torch.device("cpu")) == ("avx512bw" not in flags)
    assert not utils.emulates_bfloat16(torch.device("cuda"))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    code = (
        "import resource, torch\n"
        "import utils\n"
        "def fresh_pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(25_000_000).sum()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "fresh_pages()\n"
        "handed_back = sum(fresh_pages() for _ in range(12))\n"
        "utils.keep_freed_memory()\n"
        "settling = [fresh_pages() for _ in range(24)]\n"
        "print(handed_back, sum(fresh_pages() for _ in range(12)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    handed_back, kept = map(int, done.stdout.split())
    assert kept < handed_back / 4  # usually nothing, once a few blocks have been laid anew and the heap has settled


def test_training_and_embedding_on_a_cpu_keep_memory_and_on_a_gpu_leave_it(monkeypatch):
    kept = []
    monkeypatch.setattr(utils, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for begin in (distributed.prepare_device, lambda device: Embedder.from_network(nn.Identity(), device)):
        for name, expected in (("cuda", 0), ("cpu", 1)):
            kept.clear()
            begin(torch.device(name))
            assert len(kept) == expected


def test_a_rate_is_all_or_nothing_only_where_it_is():
    assert [utils.percent(rate) for rate in (0, 1, 0.5, None)] == ["0.00 %", "100.00 %", "50.00 %", "-"]
    assert utils.percent(59_999 / 60_000) == "99.998 %" and utils.percent(1 / 60_000) == "0.002 %"
    assert utils.percent(0.99995) == "99.995 %" and utils.percent(0.9999) == "99.99 %"
