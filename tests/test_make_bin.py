"""make_bin.py: what goes in comes out of every reader of .bin files, in order."""

import json

import cv2
import numpy as np
import pytest

import make_bin
from formats.verification_bin import read_bin


def write_crops(folder, count=3):
    generator = np.random.default_rng(1)
    for person in "ab":
        (folder / person).mkdir(parents=True)
        for number in range(count):
            crop = generator.integers(0, 255, (112, 112, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / person / f"{number}.jpg"), crop)


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["make_bin.py", *map(str, words)])
    return make_bin.main()


def test_crops_go_in_as_they_are(tmp_path, monkeypatch):
    write_crops(tmp_path / "crops")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("file1,file2,same\na/0.jpg,a/1.jpg,1\nb/2.jpg,a/1.jpg,0\n")
    out = tmp_path / "set.bin"
    assert run(monkeypatch, "--photos", tmp_path / "crops", "--pairs", pairs, "--out", out, "--aligned") == 0
    images, same = read_bin(out)
    names = ["a/0.jpg", "a/1.jpg", "b/2.jpg", "a/1.jpg"]
    assert images == [(tmp_path / "crops" / name).read_bytes() for name in names] and same.tolist() == [True, False]
    record = json.loads((tmp_path / "set.bin.json").read_text())
    assert record["pairs"] == 2 and record["source"]["pairs"] == str(pairs)


def test_photos_without_a_crop_stop_it_or_are_left_out(tmp_path, monkeypatch, capsys):
    write_crops(tmp_path / "crops")
    (tmp_path / "crops" / "a" / "0.jpg").write_bytes(b"\xff\xd8\xff no photo")
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("a/0.jpg a/1.jpg 1\nb/2.jpg a/1.jpg 0\n")
    words = ["--photos", tmp_path / "crops", "--pairs", pairs, "--out", tmp_path / "set.bin", "--aligned"]
    assert run(monkeypatch, *words) == 1
    assert "a/0.jpg" in capsys.readouterr().err and not (tmp_path / "set.bin").exists()
    assert run(monkeypatch, *words, "--skip-missing") == 0
    assert len(read_bin(tmp_path / "set.bin")[1]) == 1
    assert json.loads((tmp_path / "set.bin.json").read_text())["left_out"][0]["pair"] == 0


@pytest.mark.parametrize("missing", ["--photos", "--pairs"])
def test_what_is_not_there_is_named(tmp_path, monkeypatch, capsys, missing):
    write_crops(tmp_path / "crops")
    given = {"--photos": tmp_path / "crops", "--pairs": tmp_path / "pairs.txt", "--out": tmp_path / "set.bin"}
    if missing != "--pairs":
        given["--pairs"].write_text("a/0.jpg a/1.jpg 1\n")
    given[missing] = tmp_path / "nowhere"
    assert run(monkeypatch, *(word for pair in given.items() for word in pair), "--aligned") == 1
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
