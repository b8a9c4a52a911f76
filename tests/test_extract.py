"""Stage 1: every kind of source, hostile and damaged ones, names, restarts."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import extract
from formats import archives, crop_sets, names, recordio

ROOT = Path(__file__).resolve().parent.parent
LIMITS = archives.Limits(1 << 20, 200.0)


def photo(seed: int) -> bytes:
    """A small JPEG of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


PHOTOS = {
    "set/Ann/1.jpg": photo(1),
    "set/Ann/2.jpg": photo(2),
    "set/Bob/1.jpg": photo(3),
    "set/Bob/deep/4.png": cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes(),
}
PLACES = {"Ann/1.jpg": 1, "Ann/2.jpg": 2, "Bob/1.jpg": 3}


def make_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_bytes(files, end=True):
    """A tar of (name or TarInfo, data) pairs."""
    stream = io.BytesIO()
    archive = tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
    for entry, data in files:
        info = entry if isinstance(entry, tarfile.TarInfo) else tarfile.TarInfo(entry)
        if info.isreg():
            info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    if end:
        archive.close()
    return stream.getvalue()


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def run(out, *sources, options=()):
    """The exit code of extract.py, in this process."""
    before = sys.argv
    sys.argv = ["extract.py", *map(str, sources), "--out", str(out), *options]
    try:
        return extract.main()
    finally:
        sys.argv = before


def tree(out):
    """Relative path -> bytes of everything that was extracted."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and extract._STATE not in path.parts and path.name not in extract._LISTINGS
    }


def listing(out):
    lines = (out / "listing.tsv").read_text().rstrip("\n").split("\n")
    assert lines[0].split("\t") == list(extract.COLUMNS)
    return [dict(zip(extract.COLUMNS, line.split("\t"), strict=True)) for line in lines[1:]]


def check_listing(out):
    """The listing names exactly the files that are there, with their hashes, and its counts add up."""
    rows = listing(out)
    files = tree(out)
    assert {row["path"] for row in rows if row["path"]} == set(files)
    for row in rows:
        if row["path"]:
            data = files[row["path"]]
            assert (row["bytes"], row["sha256"]) == (str(len(data)), hashlib.sha256(data).hexdigest())
    counts = json.loads((out / "listing.json").read_text())
    assert counts["members"] == len(rows) == sum(counts[status] for status in extract.STATUSES)
    assert counts["extracted"] + counts["renamed"] == len(files)
    assert counts["bytes"] == sum(map(len, files.values()))
    assert counts["identities"] == len({path.split("/")[0] for path in files})
    for status in extract.STATUSES:
        assert counts[status] == sum(row["status"] == status for row in rows)
        assert counts[status] == sum(source[status] for source in counts["sources"])
    return rows


# ------------------------------------------------------------------------------------------------- kinds of sources


def as_folder(path):
    for name, data in PHOTOS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def packed_tar(pack):
    return lambda path: path.write_bytes(pack(tar_bytes(PHOTOS.items()))) and path


KINDS = {
    "folder": as_folder,
    "zip": lambda path: make_zip(path, PHOTOS),
    "zip-stored": lambda path: make_zip(path, PHOTOS, zipfile.ZIP_STORED),
    "zip-lzma": lambda path: make_zip(path, PHOTOS, zipfile.ZIP_LZMA),
    "tar": packed_tar(bytes),
    "tar.gz": packed_tar(gzip.compress),
    "tar.bz2": packed_tar(bz2.compress),
    "tar.xz": packed_tar(lzma.compress),
    "tar.zst": packed_tar(zstandard.compress),
    "tar.gz of two": packed_tar(lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:])),
    "tar.zst of two": packed_tar(lambda data: zstandard.compress(data[:700]) + zstandard.compress(data[700:])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_original_bytes(kind, tmp_path):
    # The name says nothing: contents decide what a source is.
    source = KINDS[kind](tmp_path / "source.dat")
    assert run(tmp_path / "raw", source) == 0
    expected = {name.removeprefix("set/").replace("Bob/deep", "deep"): data for name, data in PHOTOS.items()}
    assert tree(tmp_path / "raw") == expected
    assert [row["status"] for row in check_listing(tmp_path / "raw")] == ["extracted"] * len(PHOTOS)


def test_the_identity_can_be_a_folder_further_up(tmp_path, capsys):
    files = {"a/X/face/1.jpg": photo(1), "a/Y/face/1.jpg": photo(2), "a/Y/top.jpg": photo(3)}
    source = make_zip(tmp_path / "s.zip", files)
    assert run(tmp_path / "near", source) == 0
    assert set(tree(tmp_path / "near")) == {"face/1.jpg", "face/1~2.jpg", "Y/top.jpg"}
    assert "1 identities gather photos from several folders ('face' from 'a/X/face' and 'a/Y/face')" in (
        capsys.readouterr().out
    )
    assert run(tmp_path / "far", source, options=["--identity-level", "2"]) == 0
    assert set(tree(tmp_path / "far")) == {"X/face_1.jpg", "Y/face_1.jpg", "a/Y_top.jpg"}
    assert run(tmp_path / "bad", source, options=["--identity-level", "0"]) == 1


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["a\\alice\\1.jpg", "b\\alice\\2.jpg"], [], "'alice' from 'a/alice' and 'b/alice'"),
        (["./carl/1.jpg", "carl/2.jpg", "carl//3.jpg"], [], ""),
        (["1.jpg", "./2.jpg"], ["--identity", "bob"], ""),
        (["1.jpg", "bob/2.jpg"], ["--identity", "bob"], "'bob' from '.' and 'bob'"),
    ],
)
def test_several_folders_of_one_name_are_told_however_paths_are_written(names, options, said, tmp_path, capsys):
    source = make_zip(tmp_path / "s.zip", {name: photo(number) for number, name in enumerate(names)})
    assert run(tmp_path / "raw", source, options=options) == 0
    text = capsys.readouterr().out
    assert ("gather photos from several folders" in text) == bool(said) and said in text


def test_a_folder_in_the_folder_of_its_name_is_told(tmp_path, capsys):
    for name in ("1.jpg", "bob/2.jpg"):
        (tmp_path / "bob" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bob" / name).write_bytes(photo(1))
    assert run(tmp_path / "raw", tmp_path / "bob") == 0
    assert "'bob' from '.' and 'bob'" in capsys.readouterr().out


def test_photos_in_no_folder_of_an_archive_are_a_question(tmp_path, capsys):
    source = make_zip(tmp_path / "Carol Jones.zip", {"1.jpg": photo(1), "./2.jpg": photo(2), "readme.txt": b"hello"})
    (tmp_path / "Eve.tar.gz").write_bytes(gzip.compress(tar_bytes([("y.jpg", photo(4)), ("A/1.jpg", photo(5))])))
    assert run(tmp_path / "raw", source) == 1
    text = capsys.readouterr()
    assert "whose are they?" in text.err and "--identity NAME" in text.err
    assert "2 x lies in no folder" in text.out and "1 x not an image" in text.out
    assert run(tmp_path / "two", tmp_path / "Eve.tar.gz") == 0  # others have a folder
    assert set(tree(tmp_path / "two")) == {"A/1.jpg"}
    assert run(tmp_path / "named", source, options=["--identity", "Carol"]) == 0
    assert set(tree(tmp_path / "named")) == {"Carol/1.jpg", "Carol/2.jpg"}
    assert run(tmp_path / "bad", source, options=["--identity", "../Carol"]) == 1


def test_photos_in_no_folder_of_a_folder_are_its_own(tmp_path):
    (tmp_path / "Dan").mkdir()
    (tmp_path / "Dan" / "x.jpg").write_bytes(photo(3))
    assert run(tmp_path / "raw", tmp_path / "Dan") == 0
    assert set(tree(tmp_path / "raw")) == {"Dan/x.jpg"}


def test_what_is_no_photo_is_skipped_and_counted(tmp_path):
    files = {
        "A/readme.txt": b"hello",
        "A/BMW.txt": b"BM is how bitmaps begin, too",
        "A/empty": b"",
        "A/1": photo(1),  # a photo without an ending
        "A/2.php": photo(2),
        "A/broken.jpg": b"<html>not found</html>",  # stage 2 will say what is wrong with it
        "__MACOSX/A/._1.txt": b"\0\5\x16\7",
    }
    assert run(tmp_path / "raw", make_zip(tmp_path / "s.zip", files)) == 0
    rows = {row["member"]: row for row in check_listing(tmp_path / "raw")}
    assert [rows[f"A/{name}"]["status"] for name in ("readme.txt", "BMW.txt", "empty")] == ["skipped"] * 3
    assert rows["A/empty"]["reason"] == "an empty file"
    assert rows["A/1"]["path"] == "A/1.jpg" and rows["A/2.php"]["path"] == "A/2.php.jpg"
    assert rows["A/broken.jpg"]["status"] == "extracted"
    assert rows["A/broken.jpg"]["reason"] == "does not begin as an image does"


def test_metadata_that_a_mac_packs_beside_each_photo_is_no_photo(tmp_path, capsys):
    metadata = b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(100)
    files = {"A/1.jpg": photo(1), "__MACOSX/A/._1.jpg": metadata, "A/._2.jpg": metadata}
    assert run(tmp_path / "raw", make_zip(tmp_path / "s.zip", files)) == 0
    assert set(tree(tmp_path / "raw")) == {"A/1.jpg"}
    assert [row["status"] for row in check_listing(tmp_path / "raw")] == ["extracted", "skipped", "skipped"]
    assert "several folders" not in capsys.readouterr().out


NOTHING_TO_TAKE = {
    "no members": {},
    "no photos": {"A/readme.txt": b"hello"},
    "a tar inside": {"photos.tar": tar_bytes(PHOTOS.items())},
    "RecordIO inside": {"faces_emore/train.rec": recordio.frame(bytes(32)), "faces_emore/train.idx": b"0\t0\n"},
    "a table of faces inside": {"Faces-Aligned.tsv": b"m.01\t1\tu\tp\tFaceId-0\tAAAA\tAAAA\n"},
    "a path that leads out": {"../1.jpg": photo(1)},
}


@pytest.mark.parametrize("name", NOTHING_TO_TAKE)
def test_a_source_that_gives_no_photo_is_an_error(name, tmp_path, capsys):
    source = make_zip(tmp_path / "s.zip", NOTHING_TO_TAKE[name])
    good = make_zip(tmp_path / "good.zip", PHOTOS)
    for _ in range(2):  # also where everything was finished before
        assert run(tmp_path / "raw", good, source) == 1
        text = capsys.readouterr()
        assert f"error: {source}: not one photo could be had from it" in text.err
        assert ("inside" in name) == ("a data set inside a data set" in text.out)
    assert len(tree(tmp_path / "raw")) == len(PHOTOS)


def test_a_folder_of_data_sets_and_other_things_says_to_name_them(shared, tmp_path, capsys):
    tsv = shared / "formats" / "msceleb_tsv" / "MsCelebV1-Faces-Aligned.sample.tsv"
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "faces.tsv").write_bytes(tsv.read_bytes())
    (folder / "x.txt").touch()
    assert run(tmp_path / "raw", folder) == 1
    assert "it holds data sets beside other things; name these as sources" in capsys.readouterr().err


@pytest.mark.parametrize("split", [100, 1000])
def test_volumes_of_a_split_zip_say_how_they_are_joined(tmp_path, capsys, split):
    data = b"PK\7\x08" + make_zip(tmp_path / "whole.zip", PHOTOS).read_bytes()
    end = data.index(b"PK\5\6")
    (tmp_path / "x.z01").write_bytes(data[:split])
    (tmp_path / "x.zip").write_bytes(data[split : end + 4] + struct.pack("<2H", 1, 1) + data[end + 8 :])
    for name in ("x.z01", "x.zip"):
        assert run(tmp_path / "raw", tmp_path / name) == 1
        text = capsys.readouterr().err
        assert f"one volume of a split zip; `zip -s 0 {tmp_path}/x.zip --out whole.zip` joins them" in text
    (tmp_path / "once.zip").write_bytes(data)  # the mark stays in front of volumes that were joined to one
    assert run(tmp_path / "raw", tmp_path / "once.zip") == 0


def test_recordio_becomes_a_folder_per_label(shared, tmp_path):
    source = shared / "formats" / "recordio" / "std"
    assert run(tmp_path / "raw", source) == 0
    crops = crop_sets.open_crops(source)
    expected = {
        f"std-{label:07d}/{key:08d}.jpg": data for key in crops.keys.tolist() for data, label in [crops.read(key - 1)]
    }
    assert tree(tmp_path / "raw") == expected
    assert sum(row["status"] == "skipped" for row in check_listing(tmp_path / "raw")) == 1 + crops.identities


def test_two_record_sets_do_not_share_identities(shared, tmp_path):
    folder = shared / "formats" / "recordio"
    assert run(tmp_path / "raw", folder / "std", folder / "recbuilder" / "train.rec") == 0
    assert {path.split("-")[0] for path in tree(tmp_path / "raw")} == {"std", "recbuilder"}


@pytest.mark.parametrize("name", ["trunc_mid_payload", "trunc_on_boundary", "corrupt_length", "corrupt_magic_mid"])
def test_a_damaged_record_file_gives_its_whole_records(shared, tmp_path, capsys, name):
    folder = shared / "formats" / "recordio"
    assert run(tmp_path / "raw", folder / name) == 1
    rows = check_listing(tmp_path / "raw")
    events = json.loads((folder / name / "expected.json").read_text())["indexed"]["events"]
    whole = {event["payload_sha256"] for event in events if event.get("payload_len")}
    assert {row["sha256"] for row in rows if row["path"]} == whole
    lost = [f"record {event['key']}" for event in events if "error" in event or event.get("none")]
    assert [row["member"] for row in rows if row["status"] == "damaged"] == lost
    assert "error:" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- hostile members

HOSTILE = [
    "../evil.jpg",
    "../../evil.jpg",
    "/tmp/evil.jpg",
    "a/../../evil.jpg",
    "..\\evil.jpg",
    "C:\\evil.jpg",
    "\\\\server\\evil.jpg",
    "a/b/../../../evil.jpg",
]


def check_hostile(tmp_path, source, names):
    before = set(tmp_path.rglob("*"))
    assert run(tmp_path / "out" / "raw", source) == 0
    rows = {row["member"].replace("\\\\", "\\"): row for row in check_listing(tmp_path / "out" / "raw")}
    for name in names:
        assert rows[name]["status"] == "refused" and rows[name]["reason"], name
    assert tree(tmp_path / "out" / "raw") == {"good/1.jpg": photo(1)}
    new = set(tmp_path.rglob("*")) - before
    assert all(tmp_path / "out" in (path, *path.parents) for path in new)


def test_paths_that_leave_the_target_are_refused_in_a_zip(tmp_path):
    source = make_zip(tmp_path / "s.zip", {"good/1.jpg": photo(1)} | dict.fromkeys(HOSTILE, photo(9)))
    check_hostile(tmp_path, source, HOSTILE)


def test_paths_links_and_devices_are_refused_in_a_tar(tmp_path):
    kinds = [
        special("l/sym.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("l/dir", tarfile.SYMTYPE, "/tmp"),
        special("l/hard.jpg", tarfile.LNKTYPE, "good/1.jpg"),
        special("l/char.jpg", tarfile.CHRTYPE),
        special("l/block.jpg", tarfile.BLKTYPE),
        special("l/fifo.jpg", tarfile.FIFOTYPE),
        special("l/contiguous", b"Z"),
    ]
    entries = [("good/1.jpg", photo(1)), *[(name, photo(9)) for name in HOSTILE], *[(info, b"") for info in kinds]]
    source = tmp_path / "s.tar"
    source.write_bytes(tar_bytes(entries))
    assert run(tmp_path / "raw", source) == 0
    rows = {row["member"].replace("\\\\", "\\"): row for row in check_listing(tmp_path / "raw")}
    for info in kinds[:-1]:
        assert rows[info.name]["status"] == "refused", info.name
    assert "link" in rows["l/sym.jpg"]["reason"] and "device" in rows["l/char.jpg"]["reason"]
    assert rows["l/contiguous"]["status"] in ("refused", "skipped")
    assert not (tmp_path / "raw" / "l").exists()
    check_hostile(tmp_path, source, HOSTILE)


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("A/link.jpg")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("A/1.jpg", photo(1))
    assert run(tmp_path / "raw", tmp_path / "s.zip") == 0
    assert [(row["status"], row["reason"]) for row in check_listing(tmp_path / "raw")] == [
        ("refused", "a symbolic link"),
        ("extracted", ""),
    ]


def test_links_and_pipes_in_a_folder_are_refused(tmp_path):
    folder = as_folder(tmp_path / "in")
    (folder / "set" / "Ann" / "link.jpg").symlink_to("1.jpg")
    (folder / "set" / "loop").symlink_to(folder)
    os.mkfifo(folder / "set" / "Ann" / "pipe.jpg")
    assert run(tmp_path / "raw", folder) == 0
    rows = {row["member"]: row for row in check_listing(tmp_path / "raw")}
    assert rows["set/Ann/link.jpg"]["reason"] == rows["set/loop"]["reason"] == "a link"
    assert rows["set/Ann/pipe.jpg"]["reason"] == "not a regular file"
    assert len(tree(tmp_path / "raw")) == len(PHOTOS)


def test_a_bomb_is_given_up_and_what_came_before_is_kept(tmp_path, capsys):
    bomb = b"BM" + bytes(100 << 20)  # 100 MiB that compress to 100 kB and pass for a bitmap
    entries = [("A/1.jpg", photo(1)), ("A/bomb.bmp", bomb), ("A/2.jpg", photo(2))]
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(tar_bytes(entries), 9))
    assert run(tmp_path / "tar", tmp_path / "s.tar.gz") == 1
    assert "expands to more than 200 times its size" in capsys.readouterr().err
    assert tree(tmp_path / "tar") == {"A/1.jpg": photo(1)}
    assert json.loads((tmp_path / "tar" / "listing.json").read_text())["sources"][0]["broken"]

    source = make_zip(tmp_path / "s.zip", dict(entries))
    assert run(tmp_path / "zip", source) == 0  # a zip can step over it
    assert tree(tmp_path / "zip") == {"A/1.jpg": photo(1), "A/2.jpg": photo(2)}
    refused = [row for row in check_listing(tmp_path / "zip") if row["status"] == "refused"]
    assert [row["member"] for row in refused] == ["A/bomb.bmp"] and "no photo expands so far" in refused[0]["reason"]


def test_many_members_that_share_their_data_are_given_up(tmp_path, capsys):
    # A bomb of the kind where every entry of the directory points to the same compressed data.
    entry = b"BM" + bytes(1 << 20)
    source = make_zip(tmp_path / "s.zip", {"A/0.bmp": entry})
    data = source.read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    directory = data[start:end] * 1000
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1000, 1000, len(directory), start, 0)
    source.write_bytes(data[:start] + directory + tail)
    assert run(tmp_path / "raw", source) == 1
    assert "expands to more than 200 times its size" in capsys.readouterr().err
    assert sum(map(len, tree(tmp_path / "raw").values())) <= 64 << 20


def test_a_large_member_is_refused_without_being_read(tmp_path):
    source = make_zip(tmp_path / "s.zip", {"A/1.jpg": photo(1), "A/big.jpg": photo(2) + os.urandom(2 << 20)})
    assert run(tmp_path / "raw", source, options=["--max-file-mb", "1"]) == 0
    assert [row["status"] for row in check_listing(tmp_path / "raw")] == ["extracted", "refused"]


def test_an_extended_header_of_absurd_size_is_not_read(tmp_path, capsys):
    info = special("pax", tarfile.XHDTYPE)
    info.size = 1 << 40
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "s.tar").write_bytes(tar_bytes([("A/1.jpg", photo(1))], end=False) + header + bytes(2048))
    assert run(tmp_path / "raw", tmp_path / "s.tar") == 1
    assert "announces 1099511627776 bytes" in capsys.readouterr().err
    assert set(tree(tmp_path / "raw")) == {"A/1.jpg"}


def test_a_negative_size_does_not_loop(tmp_path):
    info = tarfile.TarInfo("A/x.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + struct.pack(">h", -1024)  # base-256, negative
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(tar_bytes([("A/1.jpg", photo(1))], end=False) + bytes(header) + bytes(2048))
    assert run(tmp_path / "raw", tmp_path / "s.tar") in (0, 1)
    assert set(tree(tmp_path / "raw")) == {"A/1.jpg"}


def test_encrypted_members_are_refused(tmp_path):
    source = make_zip(tmp_path / "s.zip", {"A/1.jpg": photo(1), "A/2.jpg": photo(2)})
    data = bytearray(source.read_bytes())
    for magic, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.rfind(magic) + at] |= 1
    source.write_bytes(data)
    assert run(tmp_path / "raw", source) == 0
    assert [(row["status"], row["reason"]) for row in check_listing(tmp_path / "raw")] == [
        ("extracted", ""),
        ("refused", "encrypted"),
    ]


# ------------------------------------------------------------------------------------------------------------ names


def test_colliding_names_are_renamed_and_reported(tmp_path):
    names = [
        "A/x.jpg",
        "A/X.jpg",
        "A/x.JPG",
        "b/caf\u00e9.jpg",
        "b/cafe\u0301.jpg",
        "a/x.jpg",
        "Stra\u00dfe/1.jpg",
        "STRASSE/1.jpg",
    ]
    source = make_zip(tmp_path / "s.zip", {name: photo(index) for index, name in enumerate(names)})
    assert run(tmp_path / "raw", source) == 0
    rows = check_listing(tmp_path / "raw")
    assert [row["path"] for row in rows] == [
        "A/x.jpg",
        "A/X~2.jpg",
        "A/x~3.JPG",
        "b/caf\u00e9.jpg",
        "b/cafe\u0301~2.jpg",
        "a~2/x.jpg",
        "Stra\u00dfe/1.jpg",
        "STRASSE~2/1.jpg",
    ]
    assert [row["status"] for row in rows] == [
        "extracted",
        "renamed",
        "renamed",
        "extracted",
        "renamed",
        "renamed",
        "extracted",
        "renamed",
    ]
    assert rows[1]["reason"] == "wanted A/X.jpg"
    # All of them could lie on a disk that knows neither case nor composition.
    plain = {unicodedata.normalize("NFD", path).casefold() for path in tree(tmp_path / "raw")}
    assert len(plain) == len(names)


def test_a_name_twice_in_one_archive_and_in_two_parts(tmp_path):
    (tmp_path / "part1.tar").write_bytes(tar_bytes([("A/1.jpg", photo(1)), ("A/1.jpg", photo(2))]))
    (tmp_path / "part2.tar").write_bytes(tar_bytes([("A/1.jpg", photo(3))]))
    assert run(tmp_path / "raw", tmp_path / "part1.tar", tmp_path / "part2.tar") == 0
    assert tree(tmp_path / "raw") == {"A/1.jpg": photo(1), "A/1~2.jpg": photo(2), "A/1~3.jpg": photo(3)}
    assert [row["status"] for row in check_listing(tmp_path / "raw")] == ["extracted", "renamed", "renamed"]


def test_unsafe_characters_lengths_and_our_own_names(tmp_path):
    names = ["A/a\nb\t.jpg", ".extract/lock.jpg", "A/.hidden.jpg", "listing.tsv/1.jpg", "A/" + "\u4eba" * 90 + ".jpeg"]
    entries = [(name, photo(index)) for index, name in enumerate(names)]
    entries.append((tarfile.TarInfo("A/\udcff.jpg"), photo(9)))  # a name that is not UTF-8
    (tmp_path / "s.tar").write_bytes(tar_bytes(entries))
    assert run(tmp_path / "raw", tmp_path / "s.tar") == 0
    rows = check_listing(tmp_path / "raw")
    assert [row["path"] for row in rows] == [
        "A/a_b_.jpg",
        "_extract/lock.jpg",
        "A/_hidden.jpg",
        "listing.tsv~2/1.jpg",
        "A/" + "\u4eba" * 65 + ".jpeg",
        "A/_.jpg",
    ]
    assert {row["status"] for row in rows} == {"renamed"}
    assert rows[0]["member"] == "A/a\\x0ab\\x09.jpg"


@given(st.text(min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_every_name_becomes_a_safe_one(name):
    safe = names.safe_name(name)
    assert 0 < len(safe.encode()) <= names.MAX_NAME
    assert "/" not in safe and "\\" not in safe and "\0" not in safe and not safe.startswith(".")
    assert names.safe_name(safe) == safe


@given(st.lists(st.sampled_from("abAB\u00e9\u00df/.\\"), min_size=1, max_size=12).map("".join))
@settings(max_examples=150, deadline=None)
def test_no_path_leads_out(name):
    try:
        identity, file, _ = archives.place(name, 1, "root")
    except archives.NotTaken:
        return
    inside = Path("/out") / names.safe_name(identity) / names.safe_name(file)
    assert Path(os.path.normpath(inside)).parent.parent == Path("/out")


@pytest.mark.parametrize("cut", [False, True])
def test_names_in_a_zip_are_one_in_every_encoding(tmp_path, cut):
    raw = {"utf8": "Jos\u00e9/1.jpg".encode(), "cp437": "Jos\u00e9/2.jpg".encode("cp437"), "field": b"Jos?/3.jpg"}
    field = struct.pack("<BI", 1, zlib.crc32(raw["field"])) + "Jos\u00e9/3.jpg".encode()
    stale = struct.pack("<BI", 1, 0) + b"Ann/4.jpg"  # of a name that was changed since
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("Jos\u00e9/0.jpg", photo(0))  # with the flag
        for number, (kind, name) in enumerate([*raw.items(), ("stale", b"Bob/4.jpg")], 1):
            info = zipfile.ZipInfo(re.sub(rb"[^\0-\x7f]", b"_", name).decode())  # the library would set the flag
            extra = {"field": field, "stale": stale}.get(kind)
            info.extra = struct.pack("<HH", 0x7075, len(extra)) + extra if extra else b""
            archive.writestr(info, photo(number))
    data = (tmp_path / "s.zip").read_bytes()
    for name in (raw["utf8"], raw["cp437"]):
        data = data.replace(re.sub(rb"[^\0-\x7f]", b"_", name), name)
    (tmp_path / "s.zip").write_bytes(data[: data.index(b"PK\1\2")] if cut else data)
    assert run(tmp_path / "raw", tmp_path / "s.zip") == cut
    assert set(tree(tmp_path / "raw")) == {*(f"Jos\u00e9/{number}.jpg" for number in range(4)), "Bob/4.jpg"}


def test_what_was_in_the_output_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "raw" / "A").mkdir(parents=True)
    (tmp_path / "raw" / "A" / "1.jpg").write_bytes(b"the user's own")
    assert run(tmp_path / "raw", make_zip(tmp_path / "s.zip", {"A/1.jpg": photo(1)})) == 0
    assert tree(tmp_path / "raw") == {"A/1.jpg": b"the user's own", "A/1~2.jpg": photo(1)}
    assert "1 identities joined folders that were there before ('A')" in capsys.readouterr().out


def test_what_was_removed_is_not_reported_as_there(tmp_path, capsys):
    first, second = (
        make_zip(tmp_path / "s.zip", {"A/1.jpg": photo(1)}),
        make_zip(tmp_path / "t.zip", {"B/1.jpg": photo(2)}),
    )
    assert run(tmp_path / "raw", first) == 0
    (tmp_path / "raw" / "A" / "1.jpg").unlink()
    assert run(tmp_path / "raw", second) == 0
    assert f"note: 1 files of {first} are gone" in capsys.readouterr().out
    assert [row["status"] for row in check_listing(tmp_path / "raw")] == ["gone", "extracted"]
    assert run(tmp_path / "raw", first) == 0
    assert [row["status"] for row in check_listing(tmp_path / "raw")] == ["extracted", "extracted"]


# --------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("packing", ["tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_a_cut_off_tar_keeps_what_was_good_and_says_so(packing, share, tmp_path, capsys):
    entries = [(f"A/{index:02d}.jpg", photo(index) * 20) for index in range(12)]
    pack = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
    pack["tar.zst"] = zstandard.compress
    data = pack[packing](tar_bytes(entries))
    source = tmp_path / "s.bin"
    source.write_bytes(data[: int(len(data) * share)])
    assert run(tmp_path / "raw", source) == 1
    assert str(source) in capsys.readouterr().err
    good = tree(tmp_path / "raw")
    assert good == dict(list(dict(entries).items())[: len(good)])
    if packing == "tar":
        assert len(good) >= int(12 * share) - 1
    # Again: the same answer, nothing done twice.
    assert run(tmp_path / "raw", source) == 1
    assert tree(tmp_path / "raw") == good


HALVES = [("A/1.jpg", photo(1))], [("A/2.jpg", photo(2)), ("B/1.jpg", photo(3))]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, zstandard.compress])
def test_several_tars_in_one_file_are_all_read(pack, tmp_path):
    (tmp_path / "s.bin").write_bytes(b"".join(pack(tar_bytes(half)) for half in HALVES))
    assert run(tmp_path / "raw", tmp_path / "s.bin") == 0
    assert tree(tmp_path / "raw") == dict(HALVES[0] + HALVES[1])
    check_listing(tmp_path / "raw")


def test_several_zips_in_one_file_are_not_taken_for_one(tmp_path, capsys):
    parts = [make_zip(tmp_path / f"{index}.zip", dict(half)).read_bytes() for index, half in enumerate(HALVES)]
    (tmp_path / "s.zip").write_bytes(b"".join(parts))
    assert run(tmp_path / "raw", tmp_path / "s.zip") == 1
    assert f"{len(parts[0])} bytes in front of its first file" in capsys.readouterr().err
    assert tree(tmp_path / "raw") == dict(HALVES[1])


@pytest.mark.parametrize(
    ("pack", "tail"),
    [(bytes, b"rubbish" * 100), (gzip.compress, b"rubbish" * 100), (lzma.compress, bytes(512))],
)
def test_what_follows_the_end_is_noticed_and_costs_no_photo(pack, tail, tmp_path, capsys):
    (tmp_path / "s.bin").write_bytes(pack(tar_bytes(HALVES[1])) + tail)
    assert run(tmp_path / "raw", tmp_path / "s.bin") == 1
    assert tree(tmp_path / "raw") == dict(HALVES[1])
    assert capsys.readouterr().err.count("error: ") == 1


def test_pzstd_begins_with_a_frame_to_skip(tmp_path):
    skipped = struct.pack("<II", 0x184D2A50, 4) + b"size"
    (tmp_path / "s.tar.zst").write_bytes(skipped + zstandard.compress(tar_bytes(HALVES[1])))
    assert run(tmp_path / "raw", tmp_path / "s.tar.zst") == 0
    assert tree(tmp_path / "raw") == dict(HALVES[1])


@pytest.mark.parametrize(("kind", "body"), [(b"L", b"long name\0"), (b"x", b"12 path=a/b\n")])
def test_thousands_of_extended_headers_are_one_line(kind, body, tmp_path, capsys):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, len(body)
    member = header.tobuf(tarfile.GNU_FORMAT) + body.ljust(512, b"\0")
    (tmp_path / "s.tar").write_bytes(tar_bytes(HALVES[0], end=False) + member * 3000 + tar_bytes(HALVES[1]))
    assert run(tmp_path / "raw", tmp_path / "s.tar") == 1
    assert tree(tmp_path / "raw") == dict(HALVES[0])
    assert "corrupt" in capsys.readouterr().err


def test_a_tar_cut_off_between_two_members_is_noticed(tmp_path, capsys):
    (tmp_path / "s.tar").write_bytes(tar_bytes([("A/1.jpg", photo(1))], end=False))
    assert run(tmp_path / "raw", tmp_path / "s.tar") == 1
    assert "no end-of-archive mark" in capsys.readouterr().err
    assert set(tree(tmp_path / "raw")) == {"A/1.jpg"}


def test_a_corrupt_tar_header_is_noticed(tmp_path, capsys):
    data = bytearray(tar_bytes([(f"A/{index}.jpg", photo(index)) for index in range(4)]))
    data[data.index(b"A/2.jpg") + 1] ^= 0xFF
    (tmp_path / "s.tar").write_bytes(data)
    assert run(tmp_path / "raw", tmp_path / "s.tar") == 1
    assert set(tree(tmp_path / "raw")) == {"A/0.jpg", "A/1.jpg"}
    assert "corrupt" in capsys.readouterr().err


def test_a_corrupt_zip_member_is_named_and_the_others_are_kept(tmp_path, capsys):
    source = make_zip(tmp_path / "s.zip", {f"A/{index}.jpg": photo(index) for index in range(4)}, zipfile.ZIP_STORED)
    data = bytearray(source.read_bytes())
    data[data.index(b"A/2.jpg") + 100] ^= 0xFF
    source.write_bytes(data)
    assert run(tmp_path / "raw", source) == 1
    rows = check_listing(tmp_path / "raw")
    assert [row["status"] for row in rows] == ["extracted", "extracted", "damaged", "extracted"]
    assert "1 members are damaged" in capsys.readouterr().err


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_cut_off_zip_is_searched_for_whole_files(tmp_path, capsys, method):
    files = {f"A/{index}.jpg": photo(index) for index in range(6)}
    source = make_zip(tmp_path / "s.zip", files, method)
    data = source.read_bytes()
    source.write_bytes(data[: data.index(b"A/4.jpg") + 60])
    assert run(tmp_path / "raw", source) == 1
    assert tree(tmp_path / "raw") == dict(list(files.items())[:4])
    assert "cut off or corrupt" in capsys.readouterr().err
    check_listing(tmp_path / "raw")


def test_a_searched_zip_checks_its_files(tmp_path):
    files = {f"A/{index}.jpg": photo(index) for index in range(3)}
    source = make_zip(tmp_path / "s.zip", files, zipfile.ZIP_STORED)
    data = bytearray(source.read_bytes())
    data[data.index(b"A/1.jpg") + 100] ^= 0xFF
    source.write_bytes(data[: data.index(b"PK\1\2")])
    assert run(tmp_path / "raw", source) == 1
    assert [row["status"] for row in check_listing(tmp_path / "raw")] == ["extracted", "damaged", "extracted"]


def test_a_zip_member_without_a_name_is_refused(tmp_path):
    # Found by the fuzzer below: the library's own is_dir() raises on it.
    source = make_zip(tmp_path / "s.zip", {"A/1.jpg": photo(1), "B": photo(2)})
    source.write_bytes(source.read_bytes().replace(b"B\xff\xd8", b"\0\xff\xd8").replace(b"BPK\5\6", b"\0PK\5\6"))
    run(tmp_path / "raw", source)
    assert [row["status"] for row in check_listing(tmp_path / "raw")] == ["extracted", "refused"]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_archives_end_and_never_raise_anything_else(data):
    kind = data.draw(st.sampled_from(["zip", "tar", "tar.gz", "tar.zst"]))
    files = {f"A/{index}.jpg": photo(index) for index in range(3)}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    tar = tar_bytes(files.items())
    whole = {
        "zip": stream.getvalue(),
        "tar": tar,
        "tar.gz": gzip.compress(tar, mtime=0),
        "tar.zst": zstandard.compress(tar),
    }
    damaged = bytearray(whole[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = Path(f"/tmp/damaged-{os.getpid()}")
    path.write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    try:
        source = archives.open_source(path, LIMITS)
        for member in source.members():
            with contextlib.suppress(archives.NotTaken):
                assert member.read() is not None
    except (archives.Broken, archives.InputError):
        pass
    finally:
        path.unlink()


def test_what_is_no_source_is_refused(tmp_path, capsys):
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "half.gz").write_bytes(gzip.compress(b"x" * 100)[:12])
    os.mkfifo(tmp_path / "pipe")
    make_zip(tmp_path / "good.zip", PHOTOS)
    for name in ("text", "empty", "half.gz", "pipe", "nothing"):
        # The good source is not begun when another cannot be used.
        assert run(tmp_path / "raw", tmp_path / "good.zip", tmp_path / name) == 1
        assert f"error: {tmp_path / name}: " in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()


def test_sources_and_output_must_not_contain_each_other(tmp_path, capsys):
    folder = as_folder(tmp_path / "in")
    for out in (folder, folder / "raw", folder / "set" / "Ann" / "deep"):
        assert run(out, folder) == 1
        assert "lies in it" in capsys.readouterr().err or out == folder
    assert run(tmp_path, folder) == 1
    assert "lies in the output folder" in capsys.readouterr().err
    (tmp_path / "alias").symlink_to(folder)
    assert run(tmp_path / "alias" / "raw", folder) == 1
    assert run(tmp_path / "raw", folder, tmp_path / "alias") == 1
    assert "given twice" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- restarts


def test_a_finished_source_is_not_read_again_but_repaired(tmp_path, capsys):
    source = make_zip(tmp_path / "s.zip", PHOTOS)
    out = tmp_path / "raw"
    assert run(out, source) == 0
    first, rows = tree(out), (out / "listing.tsv").read_bytes()
    times = {path: (out / path).stat().st_mtime_ns for path in first}
    assert run(out, source) == 0
    said = capsys.readouterr().out
    assert "extracted already" in said and "was written to since" not in said
    os.utime(source, ns=(1, 1))
    assert run(out, source) == 0 and f"note: {source} was written to since" in capsys.readouterr().out
    assert {path: (out / path).stat().st_mtime_ns for path in first} == times
    (out / "Ann" / "1.jpg").unlink()
    (out / "Bob" / "1.jpg").write_bytes(b"")
    assert run(out, source) == 0
    assert tree(out) == first and (out / "listing.tsv").read_bytes() == rows
    assert (out / "Ann" / "2.jpg").stat().st_mtime_ns == times["Ann/2.jpg"]


def test_a_missing_file_keeps_its_name_when_another_source_comes_first(tmp_path):
    one, two = make_zip(tmp_path / "1.zip", {"A/1.jpg": photo(1)}), make_zip(tmp_path / "2.zip", {"A/1.jpg": photo(2)})
    out = tmp_path / "raw"
    assert run(out, one) == 0
    (out / "A" / "1.jpg").unlink()
    assert run(out, two, one) == 0
    assert tree(out) == {"A/1.jpg": photo(1), "A/1~2.jpg": photo(2)}
    check_listing(out)


def test_a_changed_source_or_option_is_refused(tmp_path, capsys):
    source = make_zip(tmp_path / "s.zip", PHOTOS)
    assert run(tmp_path / "raw", source) == 0
    assert run(tmp_path / "raw", source, options=["--identity-level", "2"]) == 1
    assert "other options were given" in capsys.readouterr().err
    make_zip(source, {"A/1.jpg": photo(1)})
    assert run(tmp_path / "raw", source) == 1
    assert "the source has changed" in capsys.readouterr().err


def test_two_runs_into_one_folder_are_refused(tmp_path, capsys):
    source = make_zip(tmp_path / "s.zip", PHOTOS)
    with extract._only_run(tmp_path / "raw" / extract._STATE):
        assert run(tmp_path / "raw", source) == 1
    assert "another extract.py is writing there" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_killed_and_started_again_it_ends_the_same(tmp_path, kind):
    files = {f"P{index % 40:02d}/{'xX'[index % 2]}{index // 80}.jpg": photo(index) for index in range(1600)}
    if kind == "zip":
        source = make_zip(tmp_path / "s.zip", files, zipfile.ZIP_STORED)
    else:
        (source := tmp_path / "s.tar.gz").write_bytes(gzip.compress(tar_bytes(files.items()), 1))
    assert run(tmp_path / "whole", source) == 0
    expected = (tmp_path / "whole" / "listing.tsv").read_bytes()

    out = tmp_path / "raw"
    journal = out / extract._STATE / "0000.tsv"
    context = multiprocessing.get_context("fork")
    kills = 0
    for rows in (100, 500, 1100):
        process = context.Process(target=run, args=(out, source))
        process.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.is_alive():
            if journal.exists() and journal.read_bytes().count(b"\n") >= rows:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
        process.join()
        assert not (out / "listing.tsv").exists() or process.exitcode == 0
    assert kills >= 2
    done = {path: (out / path).stat().st_mtime_ns for path in tree(out)}
    assert run(out, source) == 0
    assert tree(out) == tree(tmp_path / "whole")
    assert (out / "listing.tsv").read_bytes() == expected
    again = [path for path, when in done.items() if (out / path).stat().st_mtime_ns != when]
    assert not again
    check_listing(out)


def test_a_torn_journal_row_is_dropped(tmp_path):
    source = make_zip(tmp_path / "s.zip", PHOTOS)
    assert run(tmp_path / "raw", source) == 0
    expected = (tmp_path / "raw" / "listing.tsv").read_bytes()
    journal = tmp_path / "raw" / extract._STATE / "0000.tsv"
    state = journal.with_name("sources.json")
    state.write_text(state.read_text().replace('"finished": true', '"finished": false'))
    journal.write_bytes(journal.read_bytes()[:-30])
    (tmp_path / "raw" / "deep" / "4.png").unlink()  # a file gets its name only after its row is written
    assert run(tmp_path / "raw", source) == 0
    assert (tmp_path / "raw" / "listing.tsv").read_bytes() == expected


def test_the_script(tmp_path, shared):
    tsv = shared / "formats" / "msceleb_tsv" / "MsCelebV1-Faces-Aligned.sample.tsv"
    packed = tmp_path / "faces.tsv.gz"
    packed.write_bytes(gzip.compress(tsv.read_bytes()))
    command = [sys.executable, str(ROOT / "extract.py"), str(packed), str(tsv), "--out", str(tmp_path / "raw")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "400 members = 188 extracted + 212 renamed; 17 identities" in done.stdout
    assert "100%" in done.stderr
    check_listing(tmp_path / "raw")


def test_zlib_stream_that_never_ends_is_bounded(tmp_path):
    # One deflate entry that lies about its size in a zip without a directory.
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(b"BM" + bytes(8 << 20)) + packer.flush()
    name = b"A/1.bmp"
    header = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(packed), 100, len(name), 0)
    (tmp_path / "s.zip").write_bytes(header + name + packed)
    assert run(tmp_path / "raw", tmp_path / "s.zip", options=["--max-file-mb", "1"]) == 1
    assert tree(tmp_path / "raw") == {}


def test_of_several_tasks_the_first_extracts(tmp_path, monkeypatch, capsys):
    photo = tmp_path / "in" / "person" / "a.png"
    photo.parent.mkdir(parents=True)
    cv2.imwrite(str(photo), np.zeros((20, 20, 3), np.uint8))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert run(tmp_path / "out", tmp_path / "in") == 0 and not (tmp_path / "out").exists()
    assert "process 2/2: extraction is not shared" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert run(tmp_path / "out", tmp_path / "in") == 0 and len(tree(tmp_path / "out")) == 1
