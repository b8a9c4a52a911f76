"""MS-Celeb-1M TSV rows against the expected contents of the sample, and damaged rows one by one."""

import base64
import contextlib
import gzip
import hashlib
import io
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import extract
from formats import msceleb

SAMPLE = "MsCelebV1-Faces-Aligned.sample.tsv"


@pytest.fixture
def folder(shared):
    return shared / "formats" / "msceleb_tsv"


def lines_of(path):
    with open(path, "rb") as file:
        yield from msceleb.read_lines(file)


def run(out, source):
    before = sys.argv
    sys.argv = ["extract.py", str(source), "--out", str(out)]
    try:
        return extract.main()
    finally:
        sys.argv = before


def rows_of(out):
    lines = (out / "listing.tsv").read_text().rstrip("\n").split("\n")[1:]
    return [dict(zip(extract.COLUMNS, line.split("\t"), strict=True)) for line in lines]


@pytest.mark.parametrize("name", [SAMPLE, "crlf.tsv", "no_final_newline.tsv"])
def test_every_row_is_as_expected(folder, name):
    expected = json.loads((folder / "expected.json").read_text())
    faces = [msceleb.parse_line(line, number) for number, line in lines_of(folder / name)]
    assert faces
    for face, want in zip(faces, expected, strict=False):
        assert (face.line, face.mid) == (want["line"], want["mid"])
        assert f"{face.mid}/{face.name}.jpg" == want["name"]
        assert hashlib.sha256(face.image()).hexdigest() == want["sha256"] and len(face.image()) == want["len"]
        assert face.rectangle().dtype == np.float32
        assert face.rectangle().tolist() == want["rect"]
    if name == SAMPLE:
        assert len(faces) == len(expected) == 200


def test_the_development_set_has_six_columns(folder):
    faces = [msceleb.parse_line(line, number) for number, line in lines_of(folder / "devset_6col.sample.tsv")]
    assert [face.name for face in faces[:2]] == ["1-FaceId-0", "2-FaceId-0"]
    assert all(face.image().startswith(b"\xff\xd8") for face in faces)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", [SAMPLE, "crlf.tsv", "no_final_newline.tsv", "devset_6col.sample.tsv"])
def test_extraction_keeps_every_image(folder, tmp_path, name, pack):
    source = tmp_path / "source"
    source.write_bytes(pack((folder / name).read_bytes()))
    assert run(tmp_path / "raw", source) == 0
    rows = rows_of(tmp_path / "raw")
    images = [msceleb.parse_line(line, number).image() for number, line in lines_of(folder / name)]
    assert [row["sha256"] for row in rows] == [hashlib.sha256(image).hexdigest() for image in images]
    assert [(tmp_path / "raw" / row["path"]).read_bytes() for row in rows] == images
    if name == SAMPLE:
        assert sum(row["status"] == "renamed" for row in rows) == 12
        want = [row["name"] for row in json.loads((folder / "expected.json").read_text())]
        assert [row["path"].replace("~2", "") for row in rows] == want


def test_each_damaged_row_is_named_with_its_reason(folder, tmp_path, capsys):
    assert run(tmp_path / "raw", folder / "damaged.tsv") == 1
    rows = rows_of(tmp_path / "raw")
    cases = json.loads((folder / "damaged.json").read_text())
    assert len(rows) == len(cases) == 14
    expected = {
        "good": ("extracted", ""),
        "6 columns": ("damaged", "the image column holds 16 bytes that are no image"),
        "8 columns": ("damaged", "8 columns instead of 7 or 6"),
        "base64 with one char cut (bad padding)": ("damaged", "the image is not base64"),
        "not base64": ("damaged", "the image is not base64"),
        "rect is 12 bytes": ("extracted", "the rectangle has 12 bytes"),  # the image is whole; only the row is remarked
        "payload is no JPEG": ("damaged", "no image"),
        "truncated JPEG": ("extracted", ""),  # original bytes; stage 2 says that it is truncated
        "MID with path traversal": ("refused", "a path with '..'"),
        "FaceID with slash": ("renamed", "wanted m.0jq1yh3/43-FaceId/0.jpg"),
        "empty MID": ("damaged", "no MID"),
        "empty line": ("skipped", "a blank line"),
        "7 empty columns": ("damaged", "no MID"),
    }
    for number, case in cases.items():
        row = rows[int(number) - 1]
        status, reason = expected[case]
        assert row["member"].startswith(f"line {number}") and row["status"] == status and reason in row["reason"], case
        assert (status in ("extracted", "renamed")) == bool(row["path"])
    assert not (tmp_path / "etc").exists() and not (tmp_path / "raw" / "etc").exists()
    assert "7 members are damaged" in capsys.readouterr().err


def test_a_cut_off_gzip_keeps_the_rows_before(folder, tmp_path, capsys):
    packed = gzip.compress((folder / SAMPLE).read_bytes())
    (tmp_path / "s.gz").write_bytes(packed[: len(packed) // 2])
    assert run(tmp_path / "raw", tmp_path / "s.gz") == 1
    rows = rows_of(tmp_path / "raw")
    assert 50 < len(rows) < 150 and {row["status"] for row in rows} <= {"extracted", "renamed"}
    assert "cut off" in capsys.readouterr().err


def test_a_cut_off_plain_file_names_its_last_row(folder, tmp_path):
    data = (folder / SAMPLE).read_bytes()
    (tmp_path / "s.tsv").write_bytes(data[: data.index(b"\n", 20_000) + 2000])
    assert run(tmp_path / "raw", tmp_path / "s.tsv") == 1
    rows = rows_of(tmp_path / "raw")
    assert [row["status"] for row in rows[:-1]] == ["extracted"] * (len(rows) - 1)
    # Four bytes of base64 are three of an image, so three cuts in four show; the rest stage 2 finds truncated.
    assert rows[-1]["status"] in ("damaged", "extracted")


def test_a_table_of_other_things_is_refused(folder, tmp_path, capsys):
    assert run(tmp_path / "raw", folder / "Top1M_MidList.Name.sample.tsv") == 1
    assert "neither a zip" in capsys.readouterr().err


def test_a_line_without_end_is_passed_over(monkeypatch):
    monkeypatch.setattr(msceleb, "MAX_LINE", 1000)
    stream = io.BytesIO(b"a\n" + b"x" * 5000 + b"\n" + b"b" * 999 + b"\nc")
    assert list(msceleb.read_lines(stream)) == [(1, b"a"), (2, None), (3, b"b" * 999), (4, b"c")]


def test_a_byte_order_mark_is_no_part_of_the_first_mid():
    assert next(msceleb.read_lines(io.BytesIO(b"\xef\xbb\xbfm.1\t")))[1] == b"m.1\t"


text = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n"), max_size=20)


@given(
    st.lists(st.tuples(text, text, text, st.binary(min_size=1, max_size=40)), min_size=1),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_rows_round_trip(rows, newline):
    rectangle = base64.b64encode(np.array([0, 0.5, 0.25, 1], "<f4").tobytes())
    lines = [
        b"\t".join([f"m.{mid}".encode(), b"1", url.encode(), b"", face.encode(), rectangle, base64.b64encode(image)])
        for mid, url, face, image in rows
    ]
    read = list(msceleb.read_lines(io.BytesIO(newline.join(lines))))
    for (number, line), (mid, _, face, image) in zip(read, rows, strict=True):
        got = msceleb.parse_line(line, number)
        assert got.mid.encode() == f"m.{mid}".encode().strip() and got.name.encode() == b"1-" + face.encode().strip()
        assert got.image() == image and got.rectangle().tolist() == [0, 0.5, 0.25, 1]


@given(st.binary(max_size=300))
def test_any_bytes_are_a_row_or_a_reason(data):
    for number, line in msceleb.read_lines(io.BytesIO(data)):
        with contextlib.suppress(ValueError):
            assert msceleb.parse_line(line, number).image() is not None
