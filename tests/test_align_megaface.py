"""Stage 5, distractors: a crop or a reason for every photo, under its own name, in its own format, whatever happens."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.painted_faces import PaintedFaces, paint, save
from PIL import Image

import align_megaface
from cropping import chunks, crop_tree, faces
from cropping.faces import centre_crop
from cropping.photos import list_photos
from formats.tables import CENTRE_CROP, CROP, NO_CROP, read_faces

ROOT = Path(__file__).resolve().parent.parent


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def painted(monkeypatch):
    """`align_megaface.main` in this process, with painted faces and small chunks."""
    monkeypatch.setattr(chunks, "CHUNK", faces.WINDOW)
    monkeypatch.setattr(align_megaface, "open_detector", lambda options: PaintedFaces())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["align_megaface.py", *map(str, arguments)])
        return align_megaface.main()

    return run


def make_photos(root, count=80):
    """A tree as MegaFace's: folders of three digits, Flickr users, photos, and a .json beside each."""
    suffixes = [".jpg", ".JPG", ".jpeg", ".png", ".PNG", ".gif", "", ".bmp", ".tif", ".webp"]
    for number in range(count):
        path = root / f"{number % 7:03d}" / f"{number}@N00" / f"{number}_0{suffixes[number % 10]}"
        faces_there = [] if number % 9 == 4 else [(5, 6, 30), (40, 10, 44)]
        save(path, paint(90 + number, 60, faces_there, seed=number))
        path.with_name(path.name + ".json").write_text("{}")
    (root / "000" / "0@N00" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    save(root / "000" / "0@N00" / "tiny.jpg", paint(2, 3, []))
    return root


def test_one_crop_per_photo_under_the_same_name(painted, tmp_path, capsys):
    src, dst = make_photos(tmp_path / "MegaFace"), tmp_path / "aligned"
    assert painted("--src", src, "--dst", dst) == 0
    rows = read_faces(dst / "faces.tsv")
    assert [row.file for row in rows] == list_photos(src).files
    made = set(contents(dst)) - {"faces.tsv", "report.json"}
    assert made == {row.file for row in rows if row.status != NO_CROP}
    assert {row.file: row.reason.split(":")[0] for row in rows if row.status == NO_CROP} == {
        "000/0@N00/broken.jpg": "truncated"
    }
    for row in rows:
        if row.status == CENTRE_CROP:
            assert row.reason == "no face" and row.faces == 0
        elif row.status == CROP:
            assert row.faces == 2 and row.box[0] > 30  # the face with the best score
    report = json.loads((dst / "report.json").read_text())
    assert report["photos"] == len(rows) == 82 and sum(report["statuses"].values()) == 82
    assert report["statuses"] == {CROP: 71, CENTRE_CROP: 10, NO_CROP: 1} and report["companions"] == {".json": 80}
    printed = capsys.readouterr().out
    assert "82 photos" in printed and "10 centre_crop: 10 no face" in printed and "1 no_crop: 1 truncated" in printed


def test_what_is_in_a_crop_is_what_its_name_says(painted, tmp_path):
    src, dst = make_photos(tmp_path / "MegaFace", 30), tmp_path / "aligned"
    assert painted("--src", src, "--dst", dst) == 0
    expected = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".webp": "WEBP"}
    lossless = {}
    for row in read_faces(dst / "faces.tsv"):
        if row.status == NO_CROP:
            continue
        with Image.open(dst / row.file) as image:
            assert image.format == expected.get(Path(row.file).suffix.lower(), "PNG") and image.size == (112, 112)
            if row.status == CENTRE_CROP and image.format != "JPEG":
                lossless[image.format] = (np.asarray(image.convert("RGB"))[:, :, ::-1], row.file)
    assert lossless
    for pixels, file in lossless.values():
        np.testing.assert_array_equal(pixels, centre_crop(cv2.imdecode(np.fromfile(src / file, np.uint8), 1)))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.WEBP", "a", "a.gif", "a.b_c", "x.jpg?w=3"])
def test_all_but_jpeg_is_lossless(name):
    crop = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    data = np.frombuffer(crop_tree.encode_as_named(name, crop, 50), np.uint8)
    np.testing.assert_array_equal(cv2.imdecode(data, cv2.IMREAD_COLOR), crop)


def test_shards_workers_and_restarts_give_the_same_files(painted, tmp_path):
    src = make_photos(tmp_path / "MegaFace")
    assert painted("--src", src, "--dst", tmp_path / "whole", "--workers", 1) == 0
    whole = contents(tmp_path / "whole")
    for shard in ("3/3", "1/3", "2/3"):
        assert painted("--src", src, "--dst", tmp_path / "shards", "--shard", shard) == 0
    assert contents(tmp_path / "shards") == whole
    for shard in ("1/2", "2/2"):  # on two machines without a common disk
        assert painted("--src", src, "--dst", tmp_path / shard[0], "--shard", shard) == 0
    shutil.copytree(tmp_path / "2", tmp_path / "1", dirs_exist_ok=True)
    assert painted("--src", src, "--dst", tmp_path / "1") == 0
    assert contents(tmp_path / "1") == whole


def test_killed_at_any_file_operation_it_ends_the_same(tmp_path):
    src = make_photos(tmp_path / "MegaFace", 36)
    done = subprocess.run(
        [sys.executable, "-m", "helpers.kill_everywhere", "align_megaface", "15", tmp_path / "dst",
         "--src", src, "--dst", "@", "--workers", "2"],
        capture_output=True, text=True, timeout=250, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    killed, different = re.fullmatch(r"killed (\d+) different (.*)\n", done.stdout).groups()
    assert int(killed) > 8 and different == "[]", done.stderr


def test_lost_crops_are_noticed(painted, tmp_path, capsys):
    src, dst = make_photos(tmp_path / "MegaFace", 40), tmp_path / "aligned"
    assert painted("--src", src, "--dst", dst, "--shard", "1/2") == 0
    first = next(path for path in sorted(dst.rglob("*_0.jpg")))
    data = first.read_bytes()
    first.write_bytes(b"")
    assert painted("--src", src, "--dst", dst, "--shard", "2/2") == 1
    assert f"{first}: this crop is missing or empty (1 in all)" in capsys.readouterr().err
    assert not (dst / "report.json").exists()
    first.write_bytes(data)
    assert painted("--src", src, "--dst", dst) == 0
    first.unlink()
    assert painted("--src", src, "--dst", dst) == 1 and str(first) in capsys.readouterr().err


def test_other_settings_and_other_photos_are_not_mixed_in(painted, tmp_path, capsys):
    src, dst = make_photos(tmp_path / "MegaFace", 10), tmp_path / "aligned"
    assert painted("--src", src, "--dst", dst) == 0
    before = contents(dst)
    assert painted("--src", src, "--dst", dst, "--rule", "largest") == 1
    assert "rule was best_score and is now largest" in capsys.readouterr().err
    save(src / "more.png", paint(40, 40, []))
    assert painted("--src", src, "--dst", dst) == 1
    assert "photos was 12 files" in capsys.readouterr().err
    assert contents(dst) == before


@pytest.mark.parametrize("dst", [".", "inside/deeper", ".."])
def test_photos_are_never_overwritten(painted, tmp_path, capsys, dst):
    src = make_photos(tmp_path / "data" / "MegaFace", 3)
    before = contents(tmp_path)
    assert painted("--src", src, "--dst", src / dst) == 1
    assert "must lie outside" in capsys.readouterr().err and contents(tmp_path) == before


def test_real_photos(shared, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "align_megaface.py", "--src", shared / "photos", "--dst", tmp_path / "aligned"],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_faces(tmp_path / "aligned" / "faces.tsv")
    assert len(rows) == 22 and {row.status for row in rows} == {CROP}
    assert all(cv2.imread(str(tmp_path / "aligned" / row.file)).shape == (112, 112, 3) for row in rows)
    assert "22 photos" in done.stdout and "22 crop" in done.stdout and "photo/s" in done.stderr
