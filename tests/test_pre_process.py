"""Stage 2 as a user runs it: on real photos, on damaged ones, killed, sharded, restarted and re-aligned."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.painted_faces import PaintedFaces, paint, save

import pre_process
from cropping import chunks, faces, photos
from cropping.chunks import Chunks
from cropping.photos import list_photos
from formats import crop_sets
from formats.tables import CROP, NO_CROP, FaceRow, read_faces, table_text
from processes import Shard
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
FILES = {"train.rec", "train.idx", "property", "faces.tsv", "identities.tsv", "report.json"}


def script(name, *arguments, **environment):
    """Run a script as a user does; returns (exit code, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, ROOT / name, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=250,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def painted(monkeypatch):
    """`pre_process.main` in this process, with painted faces and small chunks."""
    monkeypatch.setattr(chunks, "CHUNK", faces.WINDOW)
    monkeypatch.setattr(pre_process, "open_detector", lambda options: PaintedFaces())
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pre_process.py", *map(str, arguments)])
        return pre_process.main()

    return run


def make_photos(root, identities=6, per_identity=18):
    """Identities with painted faces; photos without a face, broken ones, and one identity of nothing else."""
    for identity in range(identities):
        for number in range(per_identity):
            path = root / f"person {identity}" / f"{number}.jpg"
            side = 25 + (identity * 7 + number) % 20
            save(path, paint(50 + number, 52, [] if number == 3 else [(5, 6, side)], seed=number))
    (root / "person 0" / "broken.jpg").write_bytes(b"broken")
    (root / "person 0" / "empty").write_bytes(b"")
    for number in range(3):
        save(root / "a nobody" / f"{number}.png", paint(60, 60, []))
    return root


def test_crops_labels_and_tables_agree(painted, tmp_path, capsys):
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "crops"
    save(photos / "loose.png", paint(60, 60, [(5, 5, 40)]))
    (photos / "listing.tsv").write_text("from extract.py")
    assert painted("--photos", photos, "--out", out, "--workers", 2) == 0
    assert set(contents(out)) == FILES

    rows = read_faces(out / "faces.tsv")
    assert [row.file for row in rows] == list_photos(photos).files
    reasons = {row.file: row.reason for row in rows if row.status == NO_CROP}
    assert reasons.pop("loose.png").startswith("no identity")
    assert reasons.pop("person 0/broken.jpg").startswith("not a photo")
    assert reasons.pop("person 0/empty") == "empty file"
    assert set(reasons.values()) == {"no face"} and len(reasons) == 6 + 3

    names = [line.split("\t") for line in (out / "identities.tsv").read_text().splitlines()]
    assert names[0] == ["label", "identity", "crops"]
    assert [name for _, name, _ in names[1:]] == [f"person {identity}" for identity in range(6)]

    crops = crop_sets.open_crops(out)
    kept = [row for row in rows if row.status == CROP]
    assert len(crops) == len(kept) == 6 * 17 and crops.identities == 6
    for index, row in enumerate(kept):
        data, label = crops.read(index)
        assert names[1 + label][1] == row.identity
        crop = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert crop.shape == (112, 112, 3) and crop[20, 56, 0] > 200 > 90 > crop[90, 56, 0]

    report = json.loads((out / "report.json").read_text())
    assert report["photos"] == len(rows) == sum(report["statuses"].values()) == 6 * 18 + 2 + 3 + 1
    assert report["statuses"] == {CROP: 102, NO_CROP: 12}
    assert report["reasons"] == {NO_CROP: {"empty file": 1, "no face": 9, "no identity": 1, "not a photo": 1}}
    assert report["identities_without_crop"] == ["a nobody"] and report["companions"] == {".tsv": 1}
    printed = capsys.readouterr().out
    for text in ("114 photos", "102 crop", "12 no_crop", "9 no face", "6 identities with a label", "a nobody", ".tsv"):
        assert text in printed


def test_a_slow_disk_is_named_by_the_progress_line(painted, tmp_path, monkeypatch, capsys):
    make_photos(tmp_path / "photos", identities=2, per_identity=10)
    assert painted("--photos", tmp_path / "photos", "--out", tmp_path / "fast", "--workers", 1) == 0
    capsys.readouterr()
    read = faces.read_file

    def slowly(path):
        with photos.READING.running():
            time.sleep(0.05)
        return read(path)

    monkeypatch.setattr(faces, "read_file", slowly)
    assert painted("--photos", tmp_path / "photos", "--out", tmp_path / "slow", "--workers", 1) == 0
    assert "% of the time waiting for files" in capsys.readouterr().err
    assert (tmp_path / "slow" / "train.rec").read_bytes() == (tmp_path / "fast" / "train.rec").read_bytes()


def test_every_way_of_cutting_the_work_gives_the_same_bytes(painted, tmp_path, monkeypatch, capsys):
    photos = make_photos(tmp_path / "photos")
    assert painted("--photos", photos, "--out", tmp_path / "whole", "--workers", 1) == 0
    whole = contents(tmp_path / "whole")

    assert painted("--photos", photos, "--out", tmp_path / "workers", "--workers", 5) == 0
    assert contents(tmp_path / "workers") == whole

    for shard in ("2/3", "3/3", "1/3"):
        assert not (tmp_path / "shards" / "train.rec").exists()
        assert painted("--photos", photos, "--out", tmp_path / "shards", "--shard", shard) == 0
    assert contents(tmp_path / "shards") == whole

    monkeypatch.setenv("WORLD_SIZE", "7")  # more processes than chunks
    for rank in range(7):
        monkeypatch.setenv("RANK", str(rank))
        capsys.readouterr()
        assert painted("--photos", photos, "--out", tmp_path / "ranks") == 0
        if rank == 0:
            assert "shard 1/7 is done; 3 chunks are left to the shards 2/7, 3/7, 4/7" in capsys.readouterr().out
    assert contents(tmp_path / "ranks") == whole


def test_shards_of_separate_machines_are_brought_together(painted, tmp_path):
    photos = make_photos(tmp_path / "photos")
    assert painted("--photos", photos, "--out", tmp_path / "whole") == 0
    for shard in ("1/2", "2/2"):
        assert painted("--photos", photos, "--out", tmp_path / shard[0], "--shard", shard) == 0
    shutil.copytree(tmp_path / "2" / ".parts", tmp_path / "1" / ".parts", dirs_exist_ok=True)
    assert painted("--photos", photos, "--out", tmp_path / "1") == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "whole")


def swap_pixels(path):
    """Another photo of the same name, size and time of change."""
    before = path.stat()
    bgr = cv2.imread(str(path))[::-1]
    cv2.imwrite(str(path), bgr)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("finished", [True, False])
def test_photos_replaced_under_their_names_are_noticed(painted, tmp_path, monkeypatch, capsys, finished):
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(80):
        (photos / f"p{number % 4}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(photos / f"p{number % 4}" / f"{number}.bmp"), paint(60, 60, [(5, 5, 40)], seed=number))
    if finished:
        assert painted("--photos", photos, "--out", out) == 0
    else:
        assert painted("--photos", photos, "--out", out, "--shard", "1/2") == 0
    # A copy and a touch change no photo.
    shutil.copytree(photos, tmp_path / "copy")
    shutil.rmtree(photos)
    (tmp_path / "copy").rename(photos)
    os.utime(photos / "p0" / "0.bmp")
    before = contents(out)
    if finished:
        assert painted("--photos", photos, "--out", out) == 0
        assert {**contents(out), "report.json": b""} == {**before, "report.json": b""}
        assert painted("--photos", photos, "--out", out) == 0
    before = contents(out)
    for number in range(0, 80, 2):
        swap_pixels(photos / f"p{number % 4}" / f"{number}.bmp")
    assert painted("--photos", photos, "--out", out) == 1
    text = capsys.readouterr().err
    assert re.search(r"photos/p0/0.bmp: has changed since it was read \(\d+ of \d+ photos have\)", text)
    assert contents(out) == before


def test_detections_are_tied_to_their_photos(painted, tmp_path):
    for name, scale in (("small", 1), ("large", 2)):
        for number in range(6):
            bgr = paint(60, 60, [(5, 5, 40)], seed=number)
            save(tmp_path / name / "p" / f"{number}.png", cv2.resize(bgr, None, fx=scale, fy=scale))
    shutil.copy(tmp_path / "small" / "p" / "5.png", tmp_path / "large" / "p" / "5.png")
    assert painted("--photos", tmp_path / "small", "--out", tmp_path / "first") == 0
    table = tmp_path / "first" / "faces.tsv"
    assert {(row.width, row.height, len(row.sha256)) for row in read_faces(table)} == {(60, 60, 64)}
    assert painted("--photos", tmp_path / "large", "--out", tmp_path / "second", "--from-detections", table) == 0
    rows = read_faces(tmp_path / "second" / "faces.tsv")
    reason = "another photo: 120x120 pixels, the detections are of one of 60x60"
    assert [row.reason for row in rows] == [reason] * 5 + [""]
    assert [row.status for row in rows] == [NO_CROP] * 5 + [CROP]


def test_a_face_that_was_not_there_is_not_said_of_another_photo(painted, tmp_path):
    folder = tmp_path / "photos" / "p"
    for number, painting in enumerate(([(5, 5, 40)], [], [], [])):
        save(folder / f"{number}.png", paint(60, 60, painting, seed=number))
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:100])
    assert painted("--photos", folder.parent, "--out", tmp_path / "first") == 0
    for number in (1, 2):
        shutil.copy(folder / "0.png", folder / f"{number}.png")
    (folder / "3.png").unlink()
    table = tmp_path / "first" / "faces.tsv"
    assert painted("--photos", folder.parent, "--out", tmp_path / "second", "--from-detections", table) == 0
    rows = read_faces(tmp_path / "second" / "faces.tsv")
    assert [row.reason.split(":")[0] for row in rows] == ["", "another photo", "another photo", "missing"]
    assert {row.sha256 for row in rows[:3]} == {photos.content_of(folder / "0.png")}


def test_reasons_with_semicolons_are_counted_once(painted, tmp_path, monkeypatch, capsys):
    for name in "abc":
        save(tmp_path / "photos" / "p" / f"{name}.png", paint(60, 60, [(5, 5, 40)]))
    plain = faces.read_reduced

    def read(data, choose, **settings):
        if data == (tmp_path / "photos" / "p" / "b.png").read_bytes():
            raise photos.PhotoError("unreadable", "one thing; another; a third")
        return plain(data, choose, **settings)

    save(tmp_path / "photos" / "p" / "b.png", paint(61, 60, [(5, 5, 40)]))
    monkeypatch.setattr(faces, "read_reduced", read)
    assert painted("--photos", tmp_path / "photos", "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reasons"] == {NO_CROP: {"unreadable": 1}}
    tally = chunks.Tally()
    for _ in range(4):
        tally.add(FaceRow("a", "a/1", NO_CROP, "no face; no annotation"))
    assert tally.report()["reasons"] == {NO_CROP: {"no face and no annotation": 4}}


def test_killed_at_any_file_operation_it_ends_the_same(tmp_path):
    # Operations come in groups of four (flush, rename, flush, unlink): every third one meets all kinds.
    photos = make_photos(tmp_path / "photos", identities=3, per_identity=12)
    done = subprocess.run(
        [sys.executable, "-m", "helpers.kill_everywhere", "pre_process", "3", tmp_path / "out",
         "--photos", photos, "--out", "@", "--workers", "2"],
        capture_output=True, text=True, timeout=250, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    killed, different = re.fullmatch(r"killed (\d+) different (.*)\n", done.stdout).groups()
    assert int(killed) >= 20 and different == "[]", done.stderr


def test_a_run_killed_on_real_photos_goes_on(shared, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for identity in sorted((shared / "lfw" / "lfw-deepfunneled").iterdir())[:170]:
        (photos / identity.name).symlink_to(identity)
    assert script("pre_process.py", "--photos", photos, "--out", tmp_path / "whole")[0] == 0
    whole = contents(tmp_path / "whole")
    rows = read_faces(tmp_path / "whole" / "faces.tsv")
    assert len(rows) > 1.3 * chunks.CHUNK and {row.status for row in rows} == {CROP}

    command = [sys.executable, ROOT / "pre_process.py", "--photos", photos, "--out", tmp_path / "killed"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not list(tmp_path.glob("killed/.parts/*.zip")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "train.rec").exists()
    code, out, error = script("pre_process.py", "--photos", photos, "--out", tmp_path / "killed", "--workers", 1)
    assert code == 0 and contents(tmp_path / "killed") == whole
    assert f"{len(rows):,} crop" in out and "Traceback" not in error

    table = tmp_path / "whole" / "faces.tsv"
    command = ["pre_process.py", "--photos", photos, "--out", tmp_path / "again", "--from-detections", table]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert pre_process.main() == 0
    again = contents(tmp_path / "again")
    assert all(again[name] == whole[name] for name in FILES - {"report.json"})


def test_a_finished_run_is_left_alone_and_lost_outputs_are_made_again(painted, tmp_path, monkeypatch, capsys):
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "crops"
    assert painted("--photos", photos, "--out", out) == 0
    whole = contents(out)
    printed = capsys.readouterr().out
    monkeypatch.setattr(pre_process, "open_detector", None)  # must not be needed
    assert painted("--photos", photos, "--out", out) == 0
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(pre_process, "open_detector", lambda options: PaintedFaces())
    for name in FILES - {"report.json"}:
        (out / name).unlink()
        assert painted("--photos", photos, "--out", out) == 0
        assert contents(out) == whole
    for name in ("train.rec", "faces.tsv"):  # a copy that was cut short
        (out / name).write_bytes(whole[name][:-1])
        assert painted("--photos", photos, "--out", out) == 1
        assert f"{out / name}: {len(whole[name]) - 1} bytes, but {len(whole[name])} were" in capsys.readouterr().err
        (out / name).write_bytes(whole[name])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--rule", "largest"), "rule was central and is now largest"),
        (("--min-face", "20"), "min_face was 0.0 and is now 20.0"),
        (("--jpeg-quality", "90"), "jpeg_quality was 95 and is now 90"),
        (("--score-threshold", "0.8"), "score_threshold was 0.9 and is now 0.8"),
        (("--reduced",), "reduced was None and is now True"),
        ((), "photos was"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_not_mixed_in(painted, tmp_path, capsys, change, named, finished):
    photos, out = make_photos(tmp_path / "photos", 2), tmp_path / "crops"
    assert painted("--photos", photos, "--out", out, *([] if finished else ["--shard", "1/2"])) == 0
    before = contents(out)
    if not change:
        save(photos / "person 0" / "one more.png", paint(60, 60, [(5, 5, 40)]))
    assert painted("--photos", photos, "--out", out, *change) == 1
    error = capsys.readouterr().err
    assert named in error and str(out) in error and "give another folder" in error
    assert contents(out) == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_code_is_not_mixed_in_and_not_passed_over(painted, tmp_path, monkeypatch, capsys, finished):
    """Half a set goes on with the code that began it; a whole one stays, and says that it is older."""
    photos, out = make_photos(tmp_path / "photos", 2), tmp_path / "crops"
    assert painted("--photos", photos, "--out", out, *([] if finished else ["--shard", "1/2"])) == 0
    before, now = contents(out), pre_process.made_by()
    monkeypatch.setattr(pre_process, "made_by", lambda: now | {"another": "1.0"})
    assert painted("--photos", photos, "--out", out) == (0 if finished else 1)
    error = capsys.readouterr().err
    assert "another was None and is now 1.0" in error and ("was not made anew" in error) == finished
    assert contents(out) == before


def test_a_report_that_another_process_has_just_written_stays(tmp_path, monkeypatch):
    late, other = (Chunks(tmp_path, 2, {}) for _ in range(2))
    assert not other.open(["faces.tsv"])
    row = FaceRow("A", "A/1.jpg", "no_crop", "no face")

    def recorded(path):
        found = read(path)
        if path.name == "settings.json" and not (tmp_path / "report.json").exists():
            other.save(0, [(row, None), (row, None)])
            (tmp_path / "faces.tsv").write_bytes(table_text([row, row]))
            with other.merging():
                other.finish({})
        return found

    read = late._recorded
    monkeypatch.setattr(late, "_recorded", recorded)
    late.open(["faces.tsv"])
    assert (tmp_path / "report.json").exists()
    assert Chunks(tmp_path, 2, {}).open(["faces.tsv"])


def test_realigning_changes_what_is_asked_for(painted, tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos")
    assert painted("--photos", photos, "--out", tmp_path / "first") == 0
    monkeypatch.setattr(pre_process, "open_detector", None)
    table = tmp_path / "first" / "faces.tsv"
    arguments = ("--photos", photos, "--from-detections", table)
    assert painted(*arguments, "--out", tmp_path / "same") == 0
    assert (tmp_path / "same" / "train.rec").read_bytes() == (tmp_path / "first" / "train.rec").read_bytes()
    assert (tmp_path / "same" / "faces.tsv").read_bytes() == table.read_bytes()
    assert painted(*arguments, "--out", tmp_path / "small", "--min-face", 40) == 0
    few = read_faces(tmp_path / "small" / "faces.tsv")
    small = [row for row in few if row.reason.startswith("face too small")]
    assert small and all(min(np.subtract(row.box[2:], row.box[:2])) < 40 for row in small)

    # Photos that came, photos that went and rows in any order: everything has its row.
    save(photos / "person 0" / "new.png", paint(60, 60, [(5, 5, 40)]))
    (photos / "person 0" / "0.jpg").unlink()
    (photos / "person 1" / "1.jpg").write_bytes(b"broken now")
    (tmp_path / "shuffled.tsv").write_bytes(table_text(read_faces(table)[::-1]))
    code = painted("--photos", photos, "--out", tmp_path / "changed", "--from-detections", tmp_path / "shuffled.tsv")
    assert code == 0
    rows = {row.file: row for row in read_faces(tmp_path / "changed" / "faces.tsv")}
    assert rows["person 0/new.png"].reason == "not in the detections"
    assert rows["person 0/0.jpg"].reason == "missing"
    assert rows["person 1/1.jpg"].reason.startswith("not a photo")
    assert len(rows) == len(read_faces(table)) + 1 and list(rows) == sorted(rows, key=lambda f: (f.split("/")[0], f))


def test_realigning_refuses_options_that_would_do_nothing(painted, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", 1)
    (tmp_path / "faces.tsv").write_bytes(table_text([FaceRow("a", "a/1", NO_CROP, "no face")]))
    arguments = ("--photos", photos, "--out", tmp_path / "out", "--from-detections", tmp_path / "faces.tsv")
    assert painted(*arguments, "--rule", "largest") == 1
    assert "--rule: has no effect with --from-detections" in capsys.readouterr().err
    (tmp_path / "faces.tsv").write_text("nonsense")
    assert painted(*arguments) == 1 and "not a table of faces" in capsys.readouterr().err


def test_realigning_refuses_faces_of_photos_as_they_are_stored(painted, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", 1)
    (tmp_path / "faces.tsv").write_bytes(table_text([FaceRow("a", "a/1", NO_CROP, "no face")]))
    arguments = ("--photos", photos, "--out", tmp_path / "out", "--from-detections", tmp_path / "faces.tsv")
    for stage, refused in (("align_facescrub", True), ("align_megaface", False)):
        (tmp_path / "report.json").write_text(json.dumps({"settings": {"stage": stage}}))
        assert painted(*arguments) == 1
        assert ("looks at photos as they are stored" in capsys.readouterr().err) == refused
    (tmp_path / "report.json").write_text("[]")
    assert painted(*arguments) == 1 and "not one of" in capsys.readouterr().err


def test_no_crop_at_all_is_an_error_that_leaves_the_reasons(painted, tmp_path, capsys):
    for number in range(3):
        save(tmp_path / "photos" / "a" / f"{number}.png", paint(60, 60, []))
    assert painted("--photos", tmp_path / "photos", "--out", tmp_path / "out") == 1
    assert "not one of 3 photos gave a crop" in capsys.readouterr().err
    assert [row.reason for row in read_faces(tmp_path / "out" / "faces.tsv")] == ["no face"] * 3
    assert not (tmp_path / "out" / "train.rec").exists() and not (tmp_path / "out" / "report.json").exists()
    assert painted("--photos", tmp_path / "photos", "--out", tmp_path / "out") == 1


def test_inputs_of_other_kinds_are_told_what_to_do(painted, shared, tmp_path, capsys):
    def error(photos):
        assert painted("--photos", photos, "--out", tmp_path / "out") == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    record = shared / "formats" / "recordio" / "std"
    assert f"needs no pre-processing: python train.py --data {record}" in error(record)
    assert f"python train.py --data {record}" in error(record / "train.rec")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a/1.jpg", b"")
    assert "python extract.py" in error(tmp_path / "photos.zip")
    assert "no such folder" in error(tmp_path / "nothing")
    save(tmp_path / "flat" / "1.png", paint(60, 60, []))
    assert "no folders of identities" in error(tmp_path / "flat")
    for person in ("Ann", "Bob"):
        save(tmp_path / "around" / "faces" / person / "1.png", paint(60, 60, []))
    assert "name the folder that they lie in" in error(tmp_path / "around")


def test_people_who_lie_deeper_are_pointed_out(painted, tmp_path, capsys):
    """One folder a person, whose photos lie in folders of their own, or a folder around several people?"""
    make_photos(tmp_path / "photos", 2, 2)
    assert painted("--photos", tmp_path / "photos", "--out", tmp_path / "plain") == 0
    assert "count as the people" not in capsys.readouterr().err
    for person in list((tmp_path / "photos").iterdir()):
        for number, file in enumerate(sorted(person.iterdir())):
            (person / f"day{number}").mkdir()
            file.rename(person / f"day{number}" / file.name)
    assert painted("--photos", tmp_path / "photos", "--out", tmp_path / "deep") == 0
    assert "3 folders count as the people, though their photos lie in" in capsys.readouterr().err


def test_outputs_of_others_are_not_overwritten(painted, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.rec").write_bytes(b"precious")
    assert painted("--photos", photos, "--out", tmp_path / "out") == 1
    assert "no record of how it was made" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"train.rec": b"precious"}
    assert painted("--photos", photos, "--out", photos / "crops") == 1
    assert "lies in --photos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--jpeg-quality", "0"), "at most 100"),
        (("--workers", "-1"), "must be at least 0"),
        (("--shard", "0/3"), "expected K/N"),
        (("--shard", "4/3"), "expected K/N"),
        (("--shard", "two"), "expected K/N"),
        (("--reduced", "--max-side", "0"), "--reduced: has no effect with --max-side 0"),
    ],
)
def test_values_that_make_no_sense(painted, tmp_path, capsys, arguments, complaint):
    make_photos(tmp_path / "photos", 1, 1)
    assert painted("--photos", tmp_path / "photos", "--out", tmp_path / "out", *arguments) == 1
    assert complaint in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_shards(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Shard.parse(None) == Shard(0, 1) and Shard.parse("3/16") == Shard(2, 16) and str(Shard(2, 16)) == "3/16"
    owners = [[chunk for chunk in range(50) if Shard(index, 16).owns(chunk)] for index in range(16)]
    assert sorted(itertools.chain.from_iterable(owners)) == list(range(50)) and {len(owned) for owned in owners} == {
        3,
        4,
    }
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert Shard.parse(None) == Shard(2, 16) and Shard.parse("1/2") == Shard(0, 2)
    monkeypatch.setenv("RANK", "16")
    with pytest.raises(InputError, match="RANK=16"):
        Shard.parse(None)


def test_a_byte_changed_anywhere_in_a_part_changes_no_result(tmp_path):
    chunks = Chunks(tmp_path, 2, {})
    found = FaceRow("A", "A/1.jpg", "crop", "", 1, (1.0, 2.0, 3.0, 4.0), ((1.0, 2.0),) * 5, 0.5)
    chunks.save(0, [(found, b"jpeg"), (FaceRow("A", "A/2.jpg", "no_crop", "no face"), None)])
    good, results = chunks.path(0).read_bytes(), list(chunks.results())
    for at in range(len(good)):
        for value in (good[at] ^ 1, good[at] ^ 0x90):
            chunks.path(0).write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            with contextlib.suppress(InputError):
                assert list(chunks.results()) == results, (at, value)


def test_damaged_parts_are_named(painted, tmp_path, capsys):
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    assert painted("--photos", photos, "--out", out, "--shard", "1/2") == 0
    part = sorted((out / ".parts").glob("*.zip"))[0]
    good = part.read_bytes()
    for bad in (good[:-9], good[: len(good) // 2], good.replace(b"person 0", b"person 7", 1), b""):
        part.write_bytes(bad)
        assert painted("--photos", photos, "--out", out) == 1
        error = capsys.readouterr().err
        assert f"{part}: damaged" in error and "run the same command again" in error
        assert not (out / "report.json").exists()
    part.unlink()
    assert painted("--photos", photos, "--out", out) == 0
    (out / "report.json").write_text("{")
    assert painted("--photos", photos, "--out", out) == 1 and "not a record of a run" in capsys.readouterr().err


def test_one_process_per_shard(tmp_path):
    runs = [Chunks(tmp_path, 100, {"a": 1}) for _ in range(2)]
    assert not any(run.open(["x"]) for run in runs)
    with runs[0].working(Shard(0, 2)):
        with pytest.raises(InputError, match="another process is working on shard 1/2"), runs[1].working(Shard(0, 2)):
            pass
        with runs[1].working(Shard(1, 2)):
            pass
    with runs[1].working(Shard(0, 2)):
        pass
