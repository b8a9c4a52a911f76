"""Stage 5, probes: annotation files of every condition, and the annotated face of every photo or a marked crop."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.painted_faces import PaintedFaces, paint, save
from hypothesis import given, settings
from hypothesis import strategies as st

import align_facescrub
from align_facescrub import combine, photo_of
from cropping import chunks, faces
from cropping.photos import list_photos
from formats.tables import BOX_CROP, CENTRE_CROP, CROP, NO_CROP, read_faces
from megaface.facescrub import COLUMNS, file_key, normal_name, parse_box, read_annotations
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sample(shared):
    return shared / "megaface" / "facescrub_sample"


@pytest.fixture
def expected(sample):
    return json.loads((sample / "expected.json").read_text())


@pytest.fixture
def annotations(sample):
    return read_annotations([sample / "facescrub_actors.txt", sample / "facescrub_actresses.txt"])


# Annotation files


def test_sample_annotations_are_as_expected(annotations, expected):
    assert len(annotations.faces) == len(expected)
    for face, line in zip(annotations.faces.values(), expected, strict=True):
        assert (face.name, face.image_id, face.face_id, face.url) == (
            line["name"], line["image_id"], line["face_id"], line["url"],
        )  # fmt: skip
    assert [problem.split(", ", 1)[1] for problem in annotations.problems] == [
        "line 14: 4 columns instead of 6",
        "line 16: 7 columns instead of 6",
    ]


def test_sample_files_on_disk_are_found_whatever_their_extension(annotations, expected, sample):
    on_disk = {file_key(file): file for file in list_photos(sample / "FaceScrub").files}
    for face, line in zip(annotations.faces.values(), expected, strict=True):
        assert on_disk.pop(face.key, None) == line["on_disk"]
        assert line["on_disk"] in (None, face.file)
    assert not on_disk


def test_sample_boxes(annotations, expected):
    usable = {
        "60,40,172,152": (60, 40, 172, 152),
        "150,40,200,90": (150, 40, 200, 90),
        "-20,-10,100,110": (-20, -10, 100, 110),
        "60,40,900,800": (60, 40, 900, 800),
        "60.5,40.25,172.0,152.9": (60.5, 40.25, 172, 152.9),
        "60, 40, 172, 152": (60, 40, 172, 152),
    }
    for face, line in zip(annotations.faces.values(), expected, strict=True):
        assert face.box == usable.get(line["bbox"])
        assert bool(face.box_problem) == (face.box is None)


@pytest.mark.parametrize("name", ["no_header.txt", "crlf.txt", "bom.txt"])
def test_sample_variants_say_the_same(sample, annotations, name):
    variant = read_annotations([sample / name])
    assert not variant.problems and len(variant.faces) == 5
    for key, face in variant.faces.items():
        other = annotations.faces[key]
        assert (face.file, face.box, face.sha256, face.url) == (other.file, other.box, other.sha256, other.url)


def test_sample_latin1_says_the_same(sample, annotations):
    (key,) = read_annotations([sample / "latin1.txt"]).faces
    assert annotations.faces[key].name == "Renée Élève"


def annotation_file(path, *lines, header=True, encoding="utf-8", end="\n"):
    head = ["\t".join(COLUMNS)] if header else []
    path.write_bytes(end.join([*head, *lines, ""]).encode(encoding))
    return path


LINE = "Some Body\t1\t2\thttp://x.invalid/a.jpg\t1,2,30,40\t" + "ab" * 32


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252"])
@pytest.mark.parametrize(
    ("header", "end"), [(True, "\n"), (True, "\r\n"), (False, "\n"), (False, "\r\n"), (True, "\r")]
)
def test_encodings_headers_and_line_ends(tmp_path, encoding, header, end):
    line = LINE.replace("Some", "Zoë")
    path = annotation_file(tmp_path / "a.txt", line, "", header=header, encoding=encoding, end=end)
    found = read_annotations([path])
    assert not found.problems and list(found.faces) == [("Zoë Body", 2)]
    assert found.faces["Zoë Body", 2].sha256 == "ab" * 32


def test_lines_that_are_no_annotations_are_named(tmp_path):
    bad = ["Too Few\t1\t2", LINE + "\textra", LINE.replace("\t2\t", "\ttwo\t"), LINE.replace("Some Body", ""),
           LINE.replace("\t1\t", "\t-1\t"), LINE[:30]]  # fmt: skip
    path = annotation_file(tmp_path / "a.txt", *bad, LINE)
    found = read_annotations([path])
    assert len(found.faces) == 1 and len(found.problems) == len(bad)
    for number, problem in enumerate(found.problems, start=2):
        assert problem.startswith(f"{path}, line {number}: ")


def test_two_lines_for_one_face(tmp_path):
    broken, other = LINE.replace("1,2,30,40", "?"), LINE.replace("1,2,30,40", "5,5,9,9")
    path = annotation_file(tmp_path / "a.txt", broken, LINE, LINE, other)
    found = read_annotations([path])
    (face,) = found.faces.values()
    assert face.box == (1, 2, 30, 40)
    assert found.problems == [f"{path}, line 5: another box for the face of {path}, line 3, which counts"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_sixteen_bits_with_a_bom(tmp_path, encoding):
    text = ("" if encoding == "utf-16" else "\ufeff") + LINE.replace("Some", "Zoë 张") + "\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    found = read_annotations([tmp_path / "a.txt"])
    assert list(found.faces) == [("Zoë 张 Body", 2)] and not found.problems


def test_columns_are_where_the_header_says(tmp_path):
    (tmp_path / "a.txt").write_text(
        "Name\tFace_ID\tImage_ID\tgender\tbbox\tsha256\turl\n"
        "Some Body\t2\t1\tf\t1,2,30,40\t\thttp://x.invalid/a.jpg\n"
        "Some Body\t3\t1\t1,2,30,40\t\thttp://x.invalid/a.jpg\n"
        + "\t".join(COLUMNS) + "\n" + LINE.replace("\t2\t", "\t4\t")
    )  # fmt: skip
    found = read_annotations([tmp_path / "a.txt"])
    assert [(face.image_id, face.face_id, face.box, face.file) for face in found.faces.values()] == [
        (1, number, (1, 2, 30, 40), f"Some Body/Some Body_{number}.jpg") for number in (2, 4)
    ]
    assert found.problems == [f"{tmp_path / 'a.txt'}, line 3: 6 columns instead of 7"]


def test_cells_in_quotes(tmp_path):
    lines = ['"Some Body"\t"1"\t"2"\t""\t"1,2,30,40"\t""', 'A "The" B\t1\t3\t\t1,2,30,40\t',
             '"A ""The"" B"\t1\t4\t\t1,2,30,40\t', '"A" or "B"\t1\t5\t\t1,2,30,40\t']  # fmt: skip
    found = read_annotations([annotation_file(tmp_path / "a.txt", *lines)])
    assert list(found.faces) == [("Some Body", 2), ('A "The" B', 3), ('A "The" B', 4), ('"A" or "B"', 5)]
    assert all(face.box == (1, 2, 30, 40) for face in found.faces.values())


@pytest.mark.parametrize("name", ["../../out", "/etc", "a/b", "..", ".", "x\0y", "x" * 201, "x" * 10_000_000])
def test_names_that_no_folder_has(tmp_path, name):
    found = read_annotations([annotation_file(tmp_path / "a.txt", LINE.replace("Some Body", name), LINE)])
    assert list(found.faces) == [("Some Body", 2)]
    (problem,) = found.problems
    assert "line 2: name, image_id and face_id expected" in problem and len(problem) < len(str(tmp_path)) + 150


def test_addresses_that_are_none_give_no_extension(tmp_path):
    lines = [LINE.replace("x.invalid/a.jpg", "[::1"), LINE.replace("http://x.invalid/a.jpg", "?").replace("\t2", "\t3")]
    found = read_annotations([annotation_file(tmp_path / "a.txt", *lines)])
    assert [face.file for face in found.faces.values()] == ["Some Body/Some Body_2", "Some Body/Some Body_3"]


@pytest.mark.parametrize("text", ["", "\n\n", "some text\nthat is no list\n", "\t".join(COLUMNS) + "\n"])
def test_files_without_annotations_are_an_error(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=r"a.txt: holds no annotation"):
        read_annotations([tmp_path / "a.txt"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no box"),
        ("1,2,3", "3 numbers"),
        ("1,2,3,4,5", "5 numbers"),
        ("a,b,c,d", "not numbers"),
        ("nan,1,2,3", "not numbers"),
        ("1,2,inf,3", "not numbers"),
        ("1e9,1,2,3", "not numbers"),
        ("1_0,1,20,30", "not numbers"),
        ("\u0661,\u0662,\u0663,\u0664", "not numbers"),
        ("9999999999,1,2,3", "not numbers"),
        ("(1,2,3,4)", "not numbers"),
        ("30,40,1,2", "wrong order"),
        ("5,5,5,5", "no area"),
        ("5,5,5,9", "wrong order"),
        ("__import__('os')._exit(3)", "not numbers"),
    ],
)
def test_unusable_boxes(text, problem):
    box, why = parse_box(text)
    assert box is None and problem in why


@settings(deadline=None)
@given(st.tuples(*[st.floats(-1e6, 1e6, allow_nan=False, width=32)] * 4), st.sampled_from([",", ", ", " ,"]))
def test_usable_boxes(numbers, comma):
    x1, x2 = sorted(numbers[:2])
    y1, y2 = sorted(numbers[2:])
    texts = [f"{value:.3f}" for value in (x1, y1, x2, y2)]
    box, why = parse_box(comma.join(texts))
    values = tuple(map(float, texts))
    assert (box, why) == (values, "") if values[0] < values[2] and values[1] < values[3] else box is None


@settings(deadline=None)
@given(st.text(max_size=40))
def test_no_text_in_the_box_column_does_anything(text):
    box, why = parse_box(text)
    assert (box is None) == bool(why)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("Aaron Sample/Aaron Sample_200.jpg", ("Aaron Sample", 200)),
        ("Aaron_Sample/Aaron_Sample_200.png", ("Aaron Sample", 200)),
        ("actors/faces/Aaron Sample/Aaron Sample_200", ("Aaron Sample", 200)),
        ("J. R. Dotted Jr./J. R. Dotted Jr._220", ("J. R. Dotted Jr.", 220)),
        ("J. R. Dotted Jr./J. R. Dotted Jr._220.jpg", ("J. R. Dotted Jr.", 220)),
        ("x/Rene\u0301e_7.jpg", ("Renée", 7)),
        ("x/Aaron Sample_212.jpg?w=600&h=400", ("Aaron Sample", 212)),
        ("x/Some_Body_12_13.jpg", ("Some Body 12", 13)),
        ("x/IMG1234.jpg", None),
        ("x/_5.jpg", None),
        ("x/name_5.tar_gz", None),
    ],
)
def test_keys_of_files(file, key):
    assert file_key(file) == key


def test_names_of_people():
    assert normal_name("  Mary_Ann   O'Hara ") == "Mary Ann O'Hara"


# Photos and annotations together


def test_every_photo_and_every_annotation_has_its_place(annotations, sample, tmp_path):
    files = [*list_photos(sample / "FaceScrub").files, "Aaron Sample/unknown.jpg", "Aaron Sample/Aaron Sample_200.png"]
    both = combine(files, annotations)
    assert set(both) == {*files, "Aaron Sample/Aaron Sample_213.jpg"}
    assert both["Aaron Sample/unknown.jpg"] is None
    assert both["Aaron Sample/Aaron Sample_200.png"] is both["Aaron Sample/Aaron Sample_200.jpg"]
    assert photo_of(tmp_path, "A B/x.jpg", None).note == "no annotation"
    assert photo_of(tmp_path, "A B/x.jpg", None).identity == "A B"
    wrong = photo_of(sample / "FaceScrub", "Sha Wrong/Sha Wrong_250.jpg", both["Sha Wrong/Sha Wrong_250.jpg"])
    assert wrong.note == "not the annotated file: another sha256" and wrong.box is not None
    code = photo_of(sample / "FaceScrub", "Broken Box/Broken Box_239.jpg", both["Broken Box/Broken Box_239.jpg"])
    assert code.note == "no usable box: not numbers" and code.box is None


def test_the_sample_as_a_user_runs_it(sample, expected, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "align_facescrub.py", "--src", sample / "FaceScrub", "--dst", tmp_path / "aligned",
         "--annotations", sample / "facescrub_actors.txt", sample / "facescrub_actresses.txt"],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "line 14: 4 columns instead of 6" in done.stderr and "line 16: 7 columns" in done.stderr
    rows = {row.file: row for row in read_faces(tmp_path / "aligned" / "faces.tsv")}
    assert len(rows) == len(expected) == 31
    for line in expected:
        row = rows[line["on_disk"] or line["foamliu_name"]]
        assert row.identity == line["name"]
        assert (row.status, row.reason) == (NO_CROP, "missing") if line["on_disk"] is None else row.status != NO_CROP
        assert (tmp_path / "aligned" / row.file).exists() == (row.status != NO_CROP)
    # The other person of the photo is not taken for the annotated one, and a box beside the face shows what it shows.
    assert [row.file[-7:] for row in rows.values() if row.status == BOX_CROP] == ["214.jpg", "234.jpg"]
    assert {row.status for row in rows.values()} == {CROP, BOX_CROP, NO_CROP}
    report = json.loads((tmp_path / "aligned" / "report.json").read_text())
    assert report["photos"] == 31 and len(report["not_annotations"]) == 2
    assert report["reasons"][CROP] == {"no usable box": 6, "not the annotated file": 1}


@pytest.fixture
def painted(monkeypatch):
    """`align_facescrub.main` in this process, with painted faces and small chunks."""
    monkeypatch.setattr(chunks, "CHUNK", faces.WINDOW)
    monkeypatch.setattr(align_facescrub, "open_detector", lambda options: PaintedFaces())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["align_facescrub.py", *map(str, arguments)])
        return align_facescrub.main()

    return run


def make_photos(root, count=40):
    """Photos with two people, the annotated one changing; some show too little for the first look."""
    lines = []
    for number in range(count):
        name = f"Person {number % 4}"
        small = number % 5 == 4
        people = [(8, 9, 30), (60, 20, 12 if small else 40)]
        if number % 11 == 10:
            people = people[:1]
        save(root / "FaceScrub" / name / f"{name}_{number}.jpg", paint(120, 80, people, seed=number))
        x, y, side = (60, 20, 12 if small else 40) if number % 2 or small else (8, 9, 30)
        lines.append(f"{name}\t9\t{number}\thttp://x.invalid/{number}.png\t{x},{y},{x + side},{y + side}\t")
    lines.append("Person 9\t9\t999\thttp://x.invalid/gone.jpg\t1,1,9,9\t")
    save(root / "FaceScrub" / "Person 0" / "holiday.png", paint(90, 90, []))
    return root / "FaceScrub", annotation_file(root / "list.txt", *lines)


def test_the_annotated_person_is_taken(painted, tmp_path, capsys):
    src, annotated = make_photos(tmp_path)
    arguments = ("--src", src, "--annotations", annotated)
    assert painted(*arguments, "--dst", tmp_path / "aligned") == 0
    boxes = read_annotations([annotated]).faces
    rows = read_faces(tmp_path / "aligned" / "faces.tsv")
    assert len(rows) == 42
    for row in rows:
        face = boxes.get(file_key(row.file))
        if row.status == CROP:
            np.testing.assert_allclose(row.box, np.subtract(face.box, 0.5), atol=0.6)
            assert row.reason == ("seen when enlarged" if face.face_id % 5 == 4 else "")
    special = {row.file: (row.status, row.reason) for row in rows if row.status != CROP}
    assert special == {
        "Person 0/holiday.png": (CENTRE_CROP, "no face; no annotation"),
        "Person 1/Person 1_21.jpg": (BOX_CROP, "no face in the box"),
        "Person 9/Person 9_999.jpg": (NO_CROP, "missing"),
    }
    assert "42 photos" in capsys.readouterr().out

    for shard in ("2/2", "1/2"):
        assert painted(*arguments, "--dst", tmp_path / "shards", "--shard", shard) == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "aligned")

    annotated.write_text(annotated.read_text().replace("1,1,9,9", "1,1,9,8"))
    assert painted(*arguments, "--dst", tmp_path / "aligned") == 1
    assert "annotations was" in capsys.readouterr().err


def test_a_photo_whose_bytes_cannot_be_read_does_not_stop_the_others(tmp_path, monkeypatch):
    """The hash is taken before the photo is decoded; why it cannot be read is for the decoder to say."""
    (tmp_path / "x.jpg").write_bytes(b"")
    path = annotation_file(tmp_path / "a.txt", LINE)
    (face,) = read_annotations([path]).faces.values()
    monkeypatch.setattr("utils.sha256_of", lambda path: Path("/proc/self/mem").read_bytes())  # an input/output error
    assert photo_of(tmp_path, "x.jpg", face).note == ""


def test_panoramas_without_a_face(painted, tmp_path):
    """Wider than OpenCV's warp can address, looked at again as a whole or around a huge box."""
    for number in (1, 2):
        save(tmp_path / "src" / "A B" / f"A B_{number}.png", np.full((20, 33_000, 3), 40, np.uint8))
    path = annotation_file(tmp_path / "a.txt", "A B\t1\t1\t\t1,1,32999,19\t", "A B\t1\t2\t\t\t")
    assert painted("--src", tmp_path / "src", "--annotations", path, "--dst", tmp_path / "dst") == 0
    assert [row.status for row in read_faces(tmp_path / "dst" / "faces.tsv")] == [BOX_CROP, CENTRE_CROP]


@pytest.mark.parametrize("value", ["-0.1", "1.5"])
def test_overlap_must_be_a_share(painted, tmp_path, capsys, value):
    src, annotated = make_photos(tmp_path, 1)
    code = painted("--src", src, "--annotations", annotated, "--dst", tmp_path / "dst", "--min-overlap", value)
    assert code == 1 and "must be at least 0 and at most 1" in capsys.readouterr().err
