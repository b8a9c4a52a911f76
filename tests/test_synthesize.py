"""Synthetic people: files and restarts of the script, the geometry behind the truth, and what the detector says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("warp")
pytest.importorskip("anny")

import torch
import warp as wp

import synthesize
import utils
from cropping.align import align_face
from cropping.photos import list_photos
from formats.crop_sets import open_crops
from formats.tables import read_identities
from processes import Shard
from synthetic import dataset, hair, kernels, parameters, photo, props, render, skin
from synthetic.head import CAVITY, EYE, LASH, SKIN, TEETH, TONGUE, data_folder, load_head
from utils import InputError
from verification.lfw import find_photos, read_pairs

ROOT = Path(__file__).resolve().parent.parent
IDENTITIES, IMAGES = 3, 2

# Runs of the script cost 7 s of CPU each; on a machine that is shared they may take minutes.
pytestmark = pytest.mark.timeout(900)


@wp.kernel(enable_backward=False)
def covered(
    mesh: wp.uint64,
    points: wp.array(dtype=wp.vec3),
    directions: wp.array(dtype=wp.vec3),
    hidden: wp.array(dtype=wp.int32),
):
    i = wp.tid()
    if wp.mesh_query_ray_anyhit(mesh, points[i], directions[i], 100.0):
        hidden[i] = 1


def start(out, *options, environment=None, **settings):
    command = [sys.executable, str(ROOT / "synthesize.py"), "--identities", str(IDENTITIES), "--images", str(IMAGES)]
    return subprocess.Popen(
        [*command, "--out", str(out), "--device", "cpu", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        **settings,
    )


def run(out, *options, **settings):
    process = start(out, *options, **settings)
    stdout, stderr = process.communicate(timeout=800)
    return process.returncode, stdout, stderr


def command_of(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }


def table_of(folder):
    lines = (folder / "truth.tsv").read_text().splitlines()
    header = lines[0].split("\t")
    return [dict(zip(header, line.split("\t"), strict=True)) for line in lines[1:]]


@pytest.fixture(scope="module")
def renderer():
    torch.set_num_threads(1)
    return render.Renderer(torch.device("cpu"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One plain run of the script."""
    out = tmp_path_factory.mktemp("synthetic") / "people"
    code, stdout, stderr = run(out, "--workers", "1")
    assert code == 0, stderr
    assert "3 identities, 6 photos" in stdout
    return out


def test_folders_photos_and_the_table_of_truth(made):
    rows = table_of(made)
    assert [row["file"] for row in rows] == list_photos(made).files
    assert [row["identity"] for row in rows] == [f"s{i:06d}" for i in range(IDENTITIES) for _ in range(IMAGES)]
    for row in rows:
        image = cv2.imread(str(made / row["file"]))
        assert image.shape == (256, 256, 3)
        assert 5 < image.mean() < 250 and image.std() > 8
        box = np.array([float(row[name]) for name in ("x0", "y0", "x1", "y1")])
        points = np.array([float(row[name]) for name in dataset.COLUMNS[6:16]]).reshape(5, 2)
        assert (points >= box[:2]).all() and (points <= box[2:]).all()
        assert box[2] - box[0] > 40 and box[3] - box[1] > 60
        record = json.loads(row["parameters"])
        assert record["yaw"] == pytest.approx(float(row["yaw"]), abs=0.01)
        assert {"lights", "expression", "camera", "glasses", "makeup", "background"} <= record.keys()
    head, *people = [line.split("\t") for line in (made / "identities.tsv").read_text().splitlines()]
    assert head == ["label", "identity", "crops", "number", "parameters"]  # the first three as of any set
    assert [person[:4] for person in people] == [[str(i), f"s{i:06d}", "", str(i)] for i in range(3)]
    assert json.loads(people[0][4])["local"] and json.loads(people[0][4])["melanin"] > 0
    assert read_identities(made / "identities.tsv") == [f"s{i:06d}" for i in range(3)]
    assert json.loads((made / "report.json").read_text())["photos"] == 6
    assert not (made / ".parts").exists()


def test_a_second_run_does_nothing_and_other_settings_are_refused(made):
    before = {name: (made / name).stat().st_mtime_ns for name in files_of(made)}
    code, stdout, _ = run(made, "--workers", "1")
    assert code == 0 and "6 photos" in stdout
    assert before == {name: (made / name).stat().st_mtime_ns for name in files_of(made)}
    code, _, stderr = run(made, "--seed", "1")
    assert code == 1 and stderr.count("\n") == 1 and "other settings (seed" in stderr


def test_shards_killed_and_continued_give_the_same_bytes(made, tmp_path):
    """Two processes killed as soon as a first identity is there, then shard 2/2, then the rest unsharded."""
    out = tmp_path / "people"
    process = start(out, "--workers", "2")
    children, workers = Path(f"/proc/{process.pid}/task/{process.pid}/children"), set()
    deadline = time.monotonic() + 700
    while not list((out / ".parts").glob("*.zip")) and process.poll() is None and time.monotonic() < deadline:
        workers |= {child for child in children.read_text().split() if b"spawn_main" in command_of(child)}
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "truth.tsv").exists() and len(workers) == 2
    while any(b"spawn_main" in command_of(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(b"spawn_main" in command_of(worker) for worker in workers)  # they end with who started them
    (out / ".parts" / "000002.zip").unlink(missing_ok=True)
    code, stdout, _ = run(out, "--shard", "2/2", "--workers", "1")
    assert code == 0 and "identities are left" in stdout
    # What a kill in the middle of an identity leaves: an unfinished folder, and a finished one without its part.
    shutil.copytree(made / "s000002", out / ".parts" / "2.99.partial")
    (out / "s000002").mkdir(exist_ok=True)
    (out / "s000002" / "stale.jpg").write_bytes(b"from another time")
    code, _, stderr = run(out, "--workers", "2")
    assert code == 0, stderr
    assert files_of(out) == files_of(made)


def test_crops_are_what_aligning_with_the_true_landmarks_gives(made, renderer, tmp_path):
    plan = dataset.Plan(1, 2, 1, 0, 256, "photos", True, "all", (), 3, 100)
    people = dataset.People(tmp_path / "crops", plan)
    assert not people.open(dataset.outputs(plan))
    maker = dataset.Maker.__new__(dataset.Maker)
    maker.people, maker.renderer = people, renderer
    assert maker.make(0) == 2
    dataset.merge(people)
    crops = open_crops(tmp_path / "crops")
    assert len(crops) == 2 and crops.identities == 1
    assert crops.identity_names == ["s000001"]  # as train.py does
    rows = [row for row in table_of(made) if row["identity"] == "s000001"]
    for index, row in enumerate(rows):
        points = np.array([float(row[name]) for name in dataset.COLUMNS[6:16]]).reshape(5, 2)
        expected = align_face(cv2.imread(str(made / row["file"])), points)
        found = cv2.imdecode(np.frombuffer(crops.read(index)[0], np.uint8), cv2.IMREAD_COLOR)
        assert found.shape == (112, 112, 3)
        assert np.abs(found.astype(int) - expected.astype(int)).mean() < 12  # the photo went through its own JPEG


def test_lfw_layout_is_read_by_the_verification_stage(tmp_path):
    out = tmp_path / "lfw"
    code, _, stderr = run(out, "--layout", "lfw", "--folds", "1", "--pairs", "3", "--first", "50", "--workers", "1")
    assert code == 0, stderr
    pairs = read_pairs(out / "pairs.txt")
    assert pairs.same.sum() == 3 and (~pairs.same).sum() == 3
    files = find_photos(out, pairs, out / "pairs.txt")
    assert all(path.name.startswith("Synthetic_00005") for path in files)


def test_more_photos_than_memory_holds_are_made_in_pieces(made, renderer, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PIECE", 1)
    plan = dataset.Plan(1, IMAGES, 1, 0, 256, "photos", False, "all", (), 3, 100)
    people = dataset.People(tmp_path, plan)
    people.open(dataset.outputs(plan))
    maker = dataset.Maker.__new__(dataset.Maker)
    maker.people, maker.renderer = people, renderer
    assert maker.make(0) == IMAGES
    assert files_of(tmp_path / "s000001") == files_of(made / "s000001")
    rows = people.load_identity(0)[0].splitlines()[1:]
    assert rows == [line for line in (made / "truth.tsv").read_text().splitlines() if line.startswith("s000001")]
    assert people.missing() == []
    shutil.rmtree(tmp_path / "s000001")  # by somebody else, before the run is finished
    assert people.missing() == [0]


def hear_interrupts():
    """As in a terminal: what a shell starts in the background ignores them, and so does all that it starts."""
    return signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_all_processes_at_once_and_says_one_line(tmp_path):
    """A terminal sends it to all of them, here while they load their modules."""
    process = start(tmp_path / "people", "--workers", "2", start_new_session=True, preexec_fn=hear_interrupts)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline, workers = time.monotonic() + 700, set()
    while len(workers) < 2 and process.poll() is None and time.monotonic() < deadline:
        workers = {child for child in children.read_text().split() if b"spawn_main" in command_of(child)}
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=800)
    assert process.returncode == 130 and "Traceback" not in stderr and "KeyboardInterrupt" not in stderr
    assert stderr.endswith("interrupted; the same command goes on from here\n")
    assert not list((tmp_path / "people" / ".parts").glob("*.zip"))  # nothing was waited for
    assert not any(b"spawn_main" in command_of(worker) for worker in workers)


def test_ctrl_c_heard_by_another_thread_waits_until_all_processes_are_started():
    threading.Thread(target=threading.Event().wait, args=(60,), daemon=True).start()
    child, before = None, hear_interrupts()
    try:
        with pytest.raises(KeyboardInterrupt), dataset._deaf_to_interrupts():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGINT)  # this thread does not take it, the other one does
            time.sleep(0.2)
            code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
            child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with dataset._deaf_to_interrupts():
            os.kill(os.getpid(), signal.SIGINT)  # ignored, as it was asked
    finally:
        signal.signal(signal.SIGINT, before)
    assert child is not None and child.stdout == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "0"), "--images 0"),
        (("--identities", "0"), "--identities 0"),
        (("--identities", "-3"), "--identities -3"),
        (("--identities", "9000000000"), "--identities 9000000000"),
        (("--images", "1000000"), "--images 1000000"),
        (("--layout", "facescrub", "--crops"), "--layout facescrub"),
        (("--size", "20"), "--size"),
        (("--size", "100000"), "--size"),
        (("--workers", "-1"), "--workers -1"),
        (("--first", "-1"), "--first"),
        (("--layout", "lfw", "--pairs", "500"), "--pairs 500"),
        (("--shard", "4/3"), "--shard 4/3"),
        (("--out", "FILE"), "taken"),
    ],
)
def test_impossible_requests_are_one_line_before_any_work(tmp_path, monkeypatch, capsys, options, message):
    (tmp_path / "taken").write_text("a file")
    options = [str(tmp_path / "taken") if option == "FILE" else option for option in options]
    command = ["--identities", "3", "--images", "2", "--out", str(tmp_path / "out"), "--device", "cpu", *options]
    monkeypatch.setattr(sys, "argv", ["synthesize.py", *command])
    code = synthesize.main()
    stderr = capsys.readouterr().err
    assert code == 1 and message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out" / ".parts").exists() and (tmp_path / "taken").read_text() == "a file"


def test_photos_of_unknown_origin_and_lost_ones_are_one_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "people"
    monkeypatch.setattr(
        sys, "argv", ["synthesize.py", "--identities", "2", "--images", "1", "--out", str(out), "--device", "cpu"]
    )
    (out / "s000001").mkdir(parents=True)
    (out / "s000001" / "mine.jpg").write_bytes(b"not ours")
    assert synthesize.main() == 1
    assert capsys.readouterr().err == f"error: {out}/s000001: exists, but no record of how it was made; " + (
        "give another folder\n"
    )
    assert (out / "s000001" / "mine.jpg").read_bytes() == b"not ours" and len(list(out.iterdir())) == 1
    # A finished set that has lost an identity is not called finished.
    people = dataset.People(out, dataset.Plan(2, 1, 0, 0, 256, "photos", False, "all", (), 3, 100))
    (out / "s000000").mkdir()
    for identity in ("s000000", "s000001"):
        (out / identity / "0000.jpg").touch()
    for name in ("truth.tsv", "identities.tsv"):
        (out / name).write_text("")
    people.finish({"photos": 2})
    assert people.open(["truth.tsv", "identities.tsv"])
    (out / "s000000" / "0000.jpg").unlink()
    with pytest.raises(InputError, match="some photos of it"):
        people.open(["truth.tsv", "identities.tsv"])
    (out / "s000000").rmdir()
    assert synthesize.main() == 1
    assert "s000000: gone from a finished set, or some photos of it (1 identities)" in capsys.readouterr().err
    (out / "truth.tsv").unlink()  # as the line says
    assert not people.open(["truth.tsv", "identities.tsv"]) and people.missing() == [0, 1]


@pytest.mark.parametrize(("module", "package"), [("warp", "warp-lang"), ("threadpoolctl", "threadpoolctl")])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys, module, package):
    monkeypatch.setattr(sys, "argv", ["synthesize.py", "--identities", "2", "--images", "1", "--out", str(tmp_path)])
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "synthetic.dataset")
    monkeypatch.delattr("synthetic.dataset")
    assert synthesize.main() == 1
    assert capsys.readouterr().err == (
        f"error: the package {package} is missing: pip install -r requirements-synthetic.txt\n"
    )


def test_a_killed_process_and_a_busy_shard_are_one_line(tmp_path, monkeypatch):
    class Dead(ThreadPoolExecutor):
        def __init__(self, *_):
            super().__init__(1)

        def submit(self, *_):
            future = Future()
            future.set_exception(BrokenProcessPool("terminated abruptly"))
            return future

    plan = dataset.Plan(4, 1, 0, 0, 256, "photos", False, "all", (), 3, 100)
    people = dataset.People(tmp_path / "people", plan)
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", Dead)
    with pytest.raises(InputError, match="a process was killed"):
        dataset.make_people(people, Shard(), torch.device("cpu"), 2)
    with (
        people.working(Shard(0, 2)),
        pytest.raises(InputError, match="another process is working on shard 1"),
    ):
        dataset.make_people(people, Shard(0, 2), torch.device("cpu"), 2)


def test_as_many_processes_as_a_gpu_holds(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert dataset.worker_processes(torch.device("cpu")) == cores
    for free, processes in ((80e9, cores), (1.6e9, 1), (0.3e9, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 80_000_000_000))
        assert dataset.worker_processes(torch.device("cuda", 0)) == processes


def test_a_worker_has_one_thread_in_every_library():
    """NumPy's BLAS keeps a thread per core, and those that wait spin: two processes on two cores took three times as
    long.
    """
    code = (
        "from threadpoolctl import threadpool_info; from synthetic.dataset import _start_worker;"
        "_start_worker(type('Nobody', (), {'maker': lambda self, device: None})(), 'cpu');"
        "print(*(pool['num_threads'] for pool in threadpool_info()))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert set(done.stdout.split()) == {"1"}, done.stderr


def test_processes_of_torchrun_share_cores_and_take_a_gpu_each(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    assert dataset.worker_processes(torch.device("cpu")) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert dataset.worker_processes(torch.device("cpu")) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert utils.own_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert utils.own_device("auto") == torch.device("cuda", 2)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert utils.own_device("cuda") == torch.device("cuda", 3)
    assert utils.own_device("cuda:1") == torch.device("cuda", 1) and utils.own_device("cpu") == torch.device("cpu")


def test_only_what_renders_imports_it():
    """Everything else works without the packages of `requirements-synthetic.txt`."""
    room = {"synthetic", "synthesize", "warp", "anny", "threadpoolctl"}
    rooms = [
        folder.parent
        for folder in ROOT.glob("*/__init__.py")
        if folder.parent.name not in ("synthetic", "tests", "benchmarks")
    ]
    for path in [*ROOT.glob("*.py"), *(path for folder in rooms for path in folder.glob("*.py"))]:
        words = [line.split() for line in path.read_text().splitlines() if line.lstrip().startswith(("import", "from"))]
        names = {words[1].split(".")[0].rstrip(",") for words in words if len(words) > 1}
        assert path.name in ("synthesize.py", "stress.py") or not names & room, path


def test_a_full_disk_is_said_with_the_folder(tmp_path, monkeypatch):
    people = dataset.People(tmp_path, dataset.Plan(1, 2, 0, 0, 256, "photos", False, "all", (), 3, 100))
    maker = dataset.Maker.__new__(dataset.Maker)
    maker.people = people

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as error:
        maker._write(0, [b"1", b"2"])
    assert error.value.filename == str(tmp_path / "s000000") and not list((tmp_path / ".parts").iterdir())


def test_facescrub_and_megaface_names():
    scrub = dataset.Plan(2, 3, 10, 0, 256, "facescrub", False, "all", (), 3, 100)
    assert scrub.folder(11) == "Synthetic 000011"
    assert scrub.file(11, 2) == f"Synthetic 000011_{scrub.face_id(11, 2)}.jpg"
    ids = [scrub.face_id(i, k) for i in range(10, 12) for k in range(3)]
    assert len(set(ids)) == 6
    mega = dataset.Plan(2, 1, 3000, 0, 256, "megaface", False, "all", (), 3, 100)
    assert mega.folder(3001) == "001/s003001" and mega.file(3001, 0) == "0000_0.jpg"


def test_facescrub_annotations(tmp_path):
    plan = dataset.Plan(1, 2, 7, 0, 256, "facescrub", False, "all", (), 3, 100)
    people = dataset.People(tmp_path, plan)
    assert not people.open(dataset.outputs(plan))
    (tmp_path / plan.folder(7)).mkdir()
    rows = ""
    for image, box in enumerate((["-3.2", "10.4", "99", "300"], ["1", "2", "3", "4"])):
        file = f"{plan.folder(7)}/{plan.file(7, image)}"
        (tmp_path / file).write_bytes(b"photo")
        rows += "\t".join([plan.name(7), file, *box]) + "\n"
    people.save_identity(0, "{}\n" + rows, [])
    dataset.merge(people)
    assert (tmp_path / "truth.tsv").read_text() == "\t".join(dataset.COLUMNS) + "\n" + rows
    header, first, second = (tmp_path / "annotations.txt").read_text().splitlines()
    assert header == "name\timage_id\tface_id\turl\tbbox\tsha256"
    name, image, face, _, box, digest = first.split("\t")
    assert (name, image, face, box) == ("Synthetic 000007", "15", "15", "0,10,99,256")
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert second.split("\t")[1:5] == ["16", "16", "synthetic", "1,2,3,4"]


def test_tables_are_not_held_in_memory(tmp_path):
    """A million photos have two gigabytes of truth."""
    plan = dataset.Plan(40, 1, 0, 0, 256, "photos", False, "all", (), 3, 100)
    people = dataset.People(tmp_path, plan)
    people.open(dataset.outputs(plan))
    row = "x" * 1_000_000 + "\n"
    for chunk in range(plan.identities):
        people.save_identity(chunk, "{}\n" + row, [])
    tracemalloc.start()
    dataset.merge(people)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 15e6 and (tmp_path / "truth.tsv").stat().st_size > 40e6


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 6), st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
def test_pairs_are_possible_balanced_and_keep_folds_apart(identities, images, folds, pairs, seed):
    plan = dataset.Plan(identities, images, 5, seed, 256, "lfw", False, "all", (), folds, pairs)
    try:
        lines = dataset.pairs_text(plan).splitlines()
    except InputError:
        fold = identities // folds
        same, different = fold * images * (images - 1) // 2, fold * (fold - 1) // 2 * images**2
        assert fold < 2 or same < pairs or different < pairs
        return
    assert lines[0] == f"{folds}\t{pairs}" and len(lines) == 1 + 2 * folds * pairs
    assert len(set(lines[1:])) == len(lines) - 1
    seen = {}
    for index, line in enumerate(lines[1:]):
        fields = line.split("\t")
        same = index % (2 * pairs) < pairs
        assert len(fields) == (3 if same else 4)
        for name in fields[:1] if same else (fields[0], fields[2]):
            assert seen.setdefault(name, index // (2 * pairs)) == index // (2 * pairs)
        numbers = [int(field) for field in (fields[1:] if same else fields[1::2])]
        assert all(1 <= number <= images for number in numbers)
        assert same is False or numbers[0] != numbers[1]
        assert same or fields[0] != fields[2]


def test_data_is_local_and_a_missing_package_is_one_line(monkeypatch):
    folder = data_folder()
    assert (folder / "mpfb2" / "LICENSE.md").read_text().lstrip().startswith("# Creative Commons CC0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-synthetic\.txt"):
        data_folder()


def test_nothing_is_fetched(tmp_path):
    """A photo with every connection forbidden."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        f"sys.argv = ['synthesize.py', '--identities', '1', '--images', '1', '--out', {str(tmp_path / 'o')!r}, "
        "'--workers', '1', '--device', 'cpu']\n"
        "import synthesize; sys.exit(synthesize.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert "Warp" not in done.stderr  # no news of drivers that a CPU does not need


def test_head_mesh_is_whole_and_named_parts_are_where_they_should_be():
    head = load_head()
    place = head.canonical
    assert set(np.unique(head.material)) == {SKIN, CAVITY, EYE, TEETH, TONGUE, LASH}
    assert len(head.local_labels) > 130 and len(head.expression_labels) == 52
    right, left = (place[eye].mean(0) for eye in head.eye_vertices)
    np.testing.assert_allclose(right * [-1, 1, 1], left, atol=0.02)
    assert place[head.nose_tip, 2] == place[:, 2].max() and abs(place[head.nose_tip, 0]) < 0.1
    assert place[head.corners[0], 0] < -1.5 and place[head.corners[1], 0] > 1.5
    assert place[head.corners[0], 1] < place[head.nose_tip, 1] - 1
    # Normals point outwards.
    corners = place[head.faces[head.material == SKIN]]
    centre = corners.mean(1)
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    forehead = (np.abs(centre[:, 0]) < 3) & (centre[:, 1] > 3) & (centre[:, 1] < 6) & (centre[:, 2] > 0)
    assert forehead.any() and (flat[forehead, 2] > 0).all()


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0, 1), st.floats(18, 85), st.floats(0, 1), st.floats(0, 1), st.tuples(*[st.floats(0.01, 1)] * 3)
)  # fmt: skip
def test_macro_weights_are_a_partition(gender, years, muscle, weight, mixture):
    head = load_head()
    who = {"gender": gender, "years": years, "muscle": muscle, "weight": weight}
    who |= dict(zip(("african", "asian", "caucasian"), mixture, strict=True))
    weights = head.macro_weights(who)
    universal = np.array([len(key) == 4 for key in head.macro_keys])
    assert weights.min() >= 0
    assert weights[universal].sum() == pytest.approx(1, abs=1e-5)
    assert weights[~universal].sum() == pytest.approx(1, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.floats(-90, 90), st.floats(-30, 30), st.floats(-30, 30))
def test_pose_signs(yaw, pitch, roll):
    rotation = render.head_rotation(yaw, pitch, roll)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    forward, left = [0, 0, 1], [1, 0, 0]
    assert (render.head_rotation(yaw, 0, 0) @ forward)[0] == pytest.approx(np.sin(np.radians(yaw)))  # to the right
    assert (render.head_rotation(0, pitch, 0) @ forward)[1] == pytest.approx(np.sin(np.radians(pitch)))  # up
    assert (render.head_rotation(0, 0, roll) @ left)[1] == pytest.approx(np.sin(np.radians(roll)))  # anti-clockwise


def test_canvas_and_its_inverse_agree():
    theta, phi = skin.directions()
    centre = np.array([0, kernels.CENTRE_Y, kernels.CENTRE_Z])
    texel = skin.Canvas.texel(skin.unit(theta, phi) * 11.0 + centre)
    columns, rows = np.meshgrid(np.arange(skin.WIDTH), np.arange(skin.HEIGHT))
    np.testing.assert_allclose(texel[..., 0], columns, atol=1e-3)
    np.testing.assert_allclose(texel[..., 1], rows, atol=1e-3)
    # Texels are finest in front.
    step = np.diff(theta[0])
    assert step[skin.WIDTH // 2] < step[0] / 2


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1.2), st.floats(0.01, 0.3), st.floats(0, 1))
def test_pigments_darken_and_blood_reddens(melanin, more, blood):
    light, dark = skin.reflectance(np.array([melanin, melanin + more]), np.array([blood, blood]))
    assert (dark < light).all() and (dark > 0).all() and (light < 1).all()
    pale, red = skin.reflectance(np.array([melanin] * 2), np.array([blood, blood + more]))
    assert red[0] / red[1] > pale[0] / pale[1]


def test_photos_do_not_depend_on_their_company(renderer):
    """The same photo alone, after others, and in a larger batch: the same bytes."""
    identity = parameters.draw_identity(3, 11, renderer.head)
    photos = [parameters.draw_photo(identity, k, renderer.head) for k in range(3)]
    together, truths = renderer.photograph(identity, photos)
    alone, truth = renderer.photograph(identity, photos[2:])
    np.testing.assert_array_equal(alone[0], together[2])
    np.testing.assert_array_equal(truth[0].landmarks, truths[2].landmarks)
    batched = render.Renderer(torch.device("cpu"), batch=3)
    for one, other in zip(batched.photograph(identity, photos)[0], together, strict=True):
        # A mesh refitted to another photo's tree gives the same hits.
        np.testing.assert_array_equal(one, other)


def test_identity_is_fixed_and_photos_vary(renderer):
    first, again = (parameters.draw_identity(0, 5, renderer.head) for _ in range(2))
    assert first == again
    assert parameters.draw_identity(1, 5, renderer.head) != first
    photos = [parameters.draw_photo(first, k, renderer.head) for k in range(4)]
    assert len({p.yaw for p in photos}) == 4 and len({p.background["seed"] for p in photos}) == 4
    locals_ = np.array([parameters.draw_identity(0, k, renderer.head).local for k in range(40)])
    assert np.abs(locals_).max() <= 1 and 0.1 < locals_.std() < 0.4
    labels = renderer.head.local_labels
    left, right = (locals_[:, labels.index(f"{side}-cheek-bones-incr")] for side in "lr")
    assert np.corrcoef(left, right)[0, 1] > 0.9  # nearly symmetric
    assert not np.array_equal(left, right)


def test_looks_change_hair_and_years_and_leave_the_face(renderer):
    people = [parameters.draw_identity(0, k, renderer.head) for k in range(30)]
    assert all(parameters.draw_look(person, 0) is person for person in people)
    looks = [parameters.draw_look(person, 1) for person in people]
    assert looks == [parameters.draw_look(person, 1) for person in people]
    assert looks != [parameters.draw_look(person, 2) for person in people]
    changed = {"who", "wrinkles", "hair", "beard"}
    for person, look in zip(people, looks, strict=True):
        before, after = person.record(), look.record()
        assert {name for name in before if before[name] != after[name]} <= changed
        assert {name for name in person.who if person.who[name] != look.who[name]} == {"years"}
        assert 18 <= look.who["years"] <= 80
    assert sum(a.hair["style"] != b.hair["style"] for a, b in zip(people, looks, strict=True)) > 15
    assert 18 <= sum(a.hair["root"] == b.hair["root"] for a, b in zip(people, looks, strict=True)) < 30
    bald = parameters.draw_look(people[0], 1, frozenset({"hair"}))
    assert bald.hair["style"] == "bald" and bald.beard["style"] == "none"


def test_a_set_shows_looks_in_turn(tmp_path):
    """Photos of the first look are those of a set without others, byte by byte."""
    common = ["--identities", "1", "--size", "96", "--workers", "0", "--device", "cpu"]
    sets = {looks: tmp_path / str(looks) for looks in (1, 3, 9)}
    for looks, out in sets.items():
        words = [*common, "--images", "5", "--looks", str(looks), "--out", str(out)]
        done = subprocess.run([sys.executable, "synthesize.py", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    files = {looks: [path.read_bytes() for path in sorted(out.rglob("*.jpg"))] for looks, out in sets.items()}
    assert [a == b for a, b in zip(files[1], files[3], strict=True)] == [True, False, False, True, False]
    assert [a == b for a, b in zip(files[3], files[9], strict=True)] == [True, True, True, False, False]
    shown = [json.loads(row["parameters"])["look"] for row in table_of(sets[3])]
    assert [look and look["number"] for look in shown] == [None, 1, 2, None, 1]
    assert shown[1] == shown[4] and shown[1]["hair"] != shown[2]["hair"]


def test_ingredients_can_be_left_out(renderer):
    off = frozenset(parameters.ABLATIONS)
    for number in range(6):
        identity = parameters.draw_identity(0, number, renderer.head, off)
        assert identity.hair["style"] == "bald" and identity.beard["style"] == "none"
        shot = parameters.draw_photo(identity, 0, renderer.head, off)
        assert shot.expression == {} and (shot.lights, shot.ambient) == parameters.EVEN_LIGHT
        assert shot.glasses is shot.hat is shot.scarf is shot.occluder is None
        # All else stays as it was, of the person and of the photo.
        whole = parameters.draw_identity(0, number, renderer.head)
        changed = {"hair": whole.hair | {"style": "bald"}, "beard": identity.beard}
        assert identity.record() == whole.record() | changed
        full = parameters.draw_photo(whole, 0, renderer.head).record()
        kept = ("lights", "ambient", "expression", "gaze", "glasses", "hat", "scarf", "occluder")
        assert shot.record() == full | {name: shot.record()[name] for name in kept}
    a, b = (skin.paint(parameters.draw_identity(0, n, renderer.head, off), off) for n in (1, 2))
    np.testing.assert_array_equal(a, b)


def test_a_gpu_gets_fewer_large_photos_at_a_time(renderer, monkeypatch):
    """Each process may take `GPU_BYTES`: a batch's buffers have so many pixels at most, whatever --size is."""
    sizes = []

    def trace(person, photos, size, *_):
        sizes.append(len(photos))
        return [None] * len(photos), [None] * len(photos), []

    monkeypatch.setattr(renderer, "batch", render.BATCH)
    monkeypatch.setattr(renderer, "_trace", trace)
    monkeypatch.setattr(render, "develop", lambda *_: None)
    identity = parameters.draw_identity(0, 0, renderer.head)
    photos = [parameters.draw_photo(identity, 0, renderer.head)] * 40
    for size, expected in ((256, [40]), (512, [16, 16, 8]), (2048, [1] * 40)):
        sizes.clear()
        renderer.photograph(identity, photos, size)
        assert sizes == expected


@pytest.mark.parametrize("style", parameters.HAIR_STYLES)
def test_every_hair_style_grows_outside_the_head(renderer, style):
    identity = parameters.draw_identity(0, 4, renderer.head)
    identity.hair["style"] = style
    vertices = renderer.head.shape(identity.who, renderer.head.shifts(np.array(identity.local)))
    field = hair.RadiusField(renderer.head, vertices)
    ribbons = hair.grow_hair(identity, renderer.head, vertices, field)
    if style in ("bald", "buzz"):
        assert len(ribbons.faces) == 0
        return
    assert np.isfinite(ribbons.points).all() and len(ribbons.faces) > 1000
    assert ribbons.faces.max() == len(ribbons.points) - 1
    offset = ribbons.points - hair.CENTRE
    radius = np.linalg.norm(offset, axis=1)
    tips = ribbons.strand[:, 1] > 0.4
    inside = radius[tips] < field(offset[tips] / radius[tips, None]) - 1.0
    assert inside.mean() < 0.03


@pytest.mark.parametrize("style", [style for style in parameters.BEARDS if style not in skin.PAINTED_BEARDS])
def test_every_long_beard_grows_below_the_nose(renderer, style):
    identity = parameters.draw_identity(0, 4, renderer.head)
    identity.beard["style"] = style
    ribbons = hair.grow_beard(identity, renderer.head, renderer.head.canonical)
    assert len(ribbons.faces) > 50
    assert np.isfinite(ribbons.points).all() and ribbons.points[:, 1].max() < 2


@pytest.mark.parametrize("style", [style for style in parameters.BEARDS if style != "none"])
def test_beards_darken_their_region_and_leave_the_corners_of_the_mouth_free(renderer, style):
    identity = parameters.draw_identity(0, 4, renderer.head)
    identity.beard |= {"style": "none", "shadow": 0.0, "density": 1.0, "grey": 0.0, "colour": [0.02, 0.02, 0.02]}
    bare = skin.paint(identity).astype(int)
    identity.beard["style"] = style
    darker = (bare - skin.paint(identity))[..., :3].mean(-1)
    region = skin.beard_region(style, skin.load_canvas().place, skin.load_canvas().lips)
    assert darker[region > 0.9].mean() > 8 and abs(darker[cv2.dilate(region, np.ones((15, 15))) == 0]).max() <= 1
    corners = skin.Canvas.texel(renderer.head.canonical[list(renderer.head.corners)]).round().astype(int)
    assert region[corners[:, 1], corners[:, 0]].max() < 0.2


def test_light_is_coloured_on_stage_only(renderer):
    """Ambient light has about one hue from whichever side it comes; no light is much redder than white."""
    identity = parameters.draw_identity(0, 3, renderer.head)
    plain = 0
    for k in range(120):
        shot = parameters.draw_photo(identity, k, renderer.head)
        if shot.ambient["kind"] == "stage":
            continue
        plain += 1
        sums = [np.array(shot.ambient["mean"]) + np.array(shot.ambient[axis]) for axis in "xz"]
        sums += [np.array(light["colour"]) for light in shot.lights]
        assert all(colour.max() / colour.min() < 2.5 for colour in sums)
    assert plain > 110  # the stage is rare


def test_what_is_held_hides_little_of_the_face(renderer):
    """Over the objects as drawn: one photo in 25 has one, and it covers a small part of the face."""
    identity = parameters.draw_identity(0, 3, renderer.head)
    shots = [parameters.draw_photo(identity, k, renderer.head) for k in range(1500)]
    held = [shot for shot in shots if shot.occluder]
    assert 0.025 < len(held) / len(shots) < 0.055
    person = render.Person(identity, renderer, frozenset())
    face = person.rest[renderer.face_vertices]
    points = wp.array(face + np.float32([0, 0, 0.1]), dtype=wp.vec3, device="cpu")
    ahead = wp.array(np.tile(np.float32([[0, 0, 1]]), (len(face), 1)), dtype=wp.vec3, device="cpu")
    shares = []
    for shot in held:
        part = props.occluder_piece(shot)
        mesh, hidden = renderer._mesh(part.points, part.faces), wp.zeros(len(face), dtype=wp.int32, device="cpu")
        wp.launch(covered, len(face), [mesh.id, points, ahead, hidden], device="cpu")
        shares.append(hidden.numpy().mean())
    assert np.mean(shares) < 0.12 and np.max(shares) < 0.4 and np.max(shares) > 0.02


def test_everything_worn_can_be_photographed(renderer):
    """Each kind of glasses, hat and object changes the picture, and none hides the whole face."""
    identity = parameters.draw_identity(0, 3, renderer.head)
    bare = parameters.draw_photo(identity, 0, renderer.head, poses="frontal")
    [plain], _ = renderer.photograph(identity, [bare])
    photos = []
    for k in range(1500):
        shot = parameters.draw_photo(identity, k, renderer.head)
        for worn in ("glasses", "hat", "scarf", "occluder"):
            what = getattr(shot, worn)
            kind = what and (worn, what.get("kind", what.get("shape")))
            if what and kind not in [kind for kind, _ in photos]:
                dressed = parameters.draw_photo(identity, 0, renderer.head, poses="frontal")
                setattr(dressed, worn, what)
                photos.append((kind, dressed))
    assert len(photos) >= 14
    images, _ = renderer.photograph(identity, [shot for _, shot in photos])
    for (kind, _), image in zip(photos, images, strict=True):
        changed = (np.abs(image.astype(int) - plain.astype(int)).max(-1) > 25).mean()
        assert 0.004 < changed < 0.75, kind


def test_hair_that_no_ray_met_is_filled_from_its_neighbours(renderer):
    identity = parameters.draw_identity(0, 4, renderer.head)
    identity.hair |= {"style": "bob", "volume": 1.0, "length": 1.0}
    shot = parameters.draw_photo(identity, 0, renderer.head, poses="frontal")
    renderer.photograph(identity, [shot])
    buffers, (irradiance, albedo, *_), _ = renderer._buffers(1, 256)
    material, detail = buffers.flat.numpy()[0, ..., 3], buffers.detail.numpy()[0, ..., 3]
    left_out = (material == kernels.HAIR) & (detail == kernels.UNSEEN)
    y, x = np.nonzero(left_out)
    assert len(y) > 1000 and ((x + y) % 2 == 1).all()
    assert irradiance.numpy()[0, ..., 3].min() >= 0  # no mark is left
    colour = albedo.numpy()[0, ..., :3]
    beside = np.stack([colour[y, x - 1], colour[y, np.minimum(x + 1, 255)], colour[y - 1, x], colour[(y + 1) % 256, x]])
    inner = (x > 0) & (x < 255) & (y > 0) & (y < 255)
    assert (colour[y, x] <= beside.max(0) + 1e-6)[inner].all() and colour[y, x].min() > 0


@pytest.mark.parametrize("shape", ["round", "square", "wide", "oval", "aviator"])
def test_arms_of_glasses_lie_along_the_head(renderer, shape):
    for number in range(12):
        identity = parameters.draw_identity(1, number, renderer.head)
        shot = parameters.draw_photo(identity, 0, renderer.head, poses="frontal")
        shot.glasses = {"shape": shape, "size": 1.1, "rim": 0.2, "colour": (0.1,) * 3, "gloss": 0.5, "drop": 0.0}
        rest = render.Person(identity, renderer, frozenset()).rest
        eyes = np.stack([rest[eye].mean(0) for eye in renderer.head.eye_vertices])
        frame, lenses, _ = props.glasses(shot, rest, eyes)
        arms = np.abs(frame.points[frame.points[:, 2] < -1.0, 0])
        side = np.abs(rest[(np.abs(rest[:, 1]) < 1.5) & (np.abs(rest[:, 2] + 5.5) < 0.8), 0])
        assert len(arms) > 20 and arms.max() < max(np.median(side) + 0.15, np.abs(lenses[:, 0]).max()) + 0.3


def test_develop_keeps_grey_grey_and_is_repeatable(renderer):
    identity = parameters.draw_identity(0, 3, renderer.head)
    shot = parameters.draw_photo(identity, 0, renderer.head, poses="frontal")
    shot.camera |= {"balance": [1.0, 1.0, 1.0], "vignette": 0.0, "noise": 0.0}
    linear = np.full((64, 64, 3), 0.18, np.float32)
    one, two = (photo.develop(linear, np.ones(3, np.float32), shot) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert np.ptp(one.astype(int), axis=-1).max() <= 1
    assert one.mean() == pytest.approx(118 * 1.0, abs=25)  # sRGB of 18 % grey, up to the photo's exposure


def test_landmarks_stay_on_the_face_in_every_pose(renderer):
    """The same face from several sides: the points are where the mesh's eyes, nose tip and lip corners are seen."""
    identity = parameters.draw_identity(3, 21, renderer.head)
    person = render.Person(identity, renderer, frozenset())
    anatomy = [*renderer.head.corners, renderer.head.nose_tip]
    for yaw, pitch in ((0, 0), (40, 10), (-40, -10), (75, 0), (-90, 5)):
        shot = parameters.draw_photo(identity, 0, renderer.head, poses="frontal")
        shot.yaw, shot.pitch, shot.roll = float(yaw), float(pitch), 0.0
        vertices, _ = renderer._pose(person, [shot])
        vertices = vertices[0].numpy()
        eyes = np.stack([vertices[eye].mean(0) for eye in renderer.head.eye_vertices])
        camera = renderer._camera(shot, 256)
        truth = renderer._truth(camera, vertices)
        assert (truth.landmarks >= truth.box[:2]).all() and (truth.landmarks <= truth.box[2:]).all()
        points = np.concatenate([eyes + np.array([0, 0, 1.2]), vertices[anatomy]])
        seen = renderer.project(camera, points)[[0, 1, 4, 2, 3]]
        assert np.linalg.norm(truth.landmarks - seen, axis=1).max() < 0.14 * shot.eye_pixels
        # The nose leaves the middle of the eyes towards the side that the face turns to.
        ahead = (truth.landmarks[2, 0] - truth.landmarks[:2, 0].mean()) / shot.eye_pixels
        assert ahead == pytest.approx(np.sin(np.radians(yaw)) * 0.5, abs=0.3) and ahead * yaw >= 0


def test_normals_are_those_of_the_faces_around_a_vertex(renderer):
    head = renderer.head
    points = wp.array(head.canonical[None], dtype=wp.vec3, device="cpu")
    normals = wp.zeros((1, len(head.canonical)), dtype=wp.vec3, device="cpu")
    renderer._normals(points, normals)
    corners = head.canonical[head.faces].astype(float)
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    expected = np.zeros_like(head.canonical, dtype=float)
    for k in range(3):
        np.add.at(expected, head.faces[:, k], flat)
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(normals.numpy()[0], expected, atol=2e-3)


def test_the_detector_finds_them_where_the_mesh_says(renderer):
    """A small sample of the figures that the README states for hundreds of photos."""
    from retinaface import RetinaFace

    detector = RetinaFace(device="cpu")
    errors = []
    for number in range(200, 206):
        identity = parameters.draw_identity(9, number, renderer.head)
        shots = [parameters.draw_photo(identity, 0, renderer.head, frozenset({"light"}), "frontal")]
        images, truths = renderer.photograph(identity, shots)
        [found] = detector.detect([np.ascontiguousarray(image) for image in images])
        assert len(found.boxes) >= 1 and found.scores[0] > 0.9
        truth = truths[0].landmarks
        errors.append(np.linalg.norm(found.landmarks[0] - truth, axis=1) / np.linalg.norm(truth[0] - truth[1]))
    assert np.median(errors) < 0.08


def test_every_kernel_compiles_for_an_h100(tmp_path):
    """warp brings CUDA's compiler along, which needs no GPU."""
    binary, *_ = wp.compile_aot_module(kernels, arch=90, module_dir=tmp_path)
    assert binary.suffix == ".cubin"
    symbols = set(re.findall(rb"\.text\.([a-z_]+)_[0-9a-f]+_cuda_kernel_forward", binary.read_bytes()))
    defined = {name for name, value in vars(kernels).items() if isinstance(value, wp.Kernel)}
    assert len(defined) == 10 and {symbol.decode() for symbol in symbols} == defined
