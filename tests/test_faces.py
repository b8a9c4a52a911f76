"""From photos to rows and crops: the table, the choice, the second look, and that cutting the work changes nothing."""

import itertools
import math
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.painted_faces import BLUE, RED, PaintedFaces, paint, save
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from cropping import faces
from cropping.align import TEMPLATE
from cropping.faces import (
    FaceFinder,
    Photo,
    box_crop,
    centre_crop,
    clip_box,
    encode_jpeg,
    find_faces,
    ordered_map,
    realign,
    windows,
)
from cropping.photos import content_of
from formats import tables
from formats.tables import BOX_CROP, CENTRE_CROP, CROP, NO_CROP, FaceRow, FaceTable, read_faces, table_text
from retinaface import RetinaFace
from utils import InputError


def one(tmp_path, bgr, detector=None, *, box=None, note="", **settings):
    """The row and the crop of a single photo."""
    save(tmp_path / "id" / "photo.png", bgr)
    photo = Photo(tmp_path / "id" / "photo.png", "id/photo.png", "id", box, note)
    return FaceFinder(detector or PaintedFaces(), **settings)([photo])[0]


def unread(row):
    """The row without what ties it to its photo."""
    return replace(row, width=0, height=0, sha256="")


def shows_a_face(crop):
    """Whether the crop is a painted face filling the crop upright."""
    return (crop[20, 56] == BLUE).all() and (crop[90, 56] == RED).all()


# The table

numbers = st.floats(-1e6, 1e6, width=32)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
rows = st.builds(
    FaceRow,
    identity=texts,
    file=st.binary(min_size=1, max_size=12).map(os.fsdecode),
    status=st.sampled_from(tables.STATUSES),
    reason=texts,
    faces=st.integers(0, 750),
    box=st.none() | st.tuples(*[numbers] * 4),
    landmarks=st.none() | st.tuples(*[st.tuples(numbers, numbers)] * 5),
    score=st.none() | st.floats(0, 1, width=32),
    width=st.integers(0, 40_000),
    height=st.integers(0, 40_000),
    sha256=st.just("") | st.binary(min_size=32, max_size=32).map(bytes.hex),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(rows, max_size=4))
def test_table_round_trip(some):
    data = tables.table_text(some)
    assert data.count(b"\n") == len(some) + 1
    assert tables.parse_table(data, "table") == some


def test_table_files_and_names_of_other_encodings(tmp_path):
    some = [FaceRow("a\tb", "a\\b\n/caf\udce9.jpg", CROP), FaceRow("é", "é/\\t.jpg", NO_CROP, "no face")]
    (tmp_path / "faces.tsv").write_bytes(table_text(some))
    assert read_faces(tmp_path / "faces.tsv") == some
    assert b"caf\xe9" in (tmp_path / "faces.tsv").read_bytes()
    table = FaceTable(tmp_path / "faces.tsv")
    assert list(table) == [row.file for row in some]
    assert [table.get(file) for file in table] == some and table.get("absent") is None


GOOD = FaceRow("a", "a/1.jpg", CROP, "", 1, (1.0, 2.0, 3.0, 4.0), ((1.0, 2.0),) * 5, 0.5).to_line()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (GOOD.replace("crop", "cropped"), "unknown status"),
        (GOOD + "\t", "12 columns"),
        (GOOD.replace("\t0.5", ""), "10 columns"),
        (GOOD.replace("1.0,2.0 ", "", 1), "five landmarks"),
        (GOOD.replace("3.0,4.0", "3.0"), "expected 4 numbers"),
        (GOOD.replace("3.0", "nan"), "expected 4 numbers"),
        (GOOD.replace("3.0", "__import__('os')"), "could not convert"),
    ],
)
def test_damaged_rows_name_file_and_line(tmp_path, line, complaint):
    path = tmp_path / "faces.tsv"
    path.write_text("\t".join(tables.COLUMNS) + f"\n{GOOD.replace('1.jpg', '2.jpg')}\n{line}\n")
    with pytest.raises(InputError, match=rf"faces.tsv, line 3: .*{complaint}"):
        read_faces(path)
    with pytest.raises(InputError, match=rf"faces.tsv, line 3: .*{complaint}"):
        FaceTable(path).get("a/1.jpg")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a table of faces"),
        ("a\tb\n", "not a table of faces"),
        ("\t".join(tables.COLUMNS) + "\n" + GOOD, "cut off"),
    ],
)
@pytest.mark.parametrize("read", [read_faces, FaceTable])
def test_files_that_are_no_tables(tmp_path, text, complaint, read):
    (tmp_path / "faces.tsv").write_text(text)
    with pytest.raises(InputError, match=complaint):
        read(tmp_path / "faces.tsv")


def test_a_file_twice_in_a_table(tmp_path):
    (tmp_path / "faces.tsv").write_text("\t".join(tables.COLUMNS) + f"\n{GOOD}\n{GOOD}\n")
    with pytest.raises(InputError, match=r"line 3: a second row for a/1.jpg"):
        FaceTable(tmp_path / "faces.tsv")


# One photo

FACES = [(10, 10, 40), (90, 60, 30), (150, 5, 60)]  # in 220 x 140: largest and best is the third, central the second


@pytest.mark.parametrize(("rule", "expected"), [("central", 1), ("largest", 2), ("best_score", 2)])
def test_the_chosen_face_is_cut_out(tmp_path, rule, expected):
    row, crop = one(tmp_path, paint(220, 140, FACES), rule=rule)
    x, y, side = FACES[expected]
    assert (row.status, row.reason, row.faces, row.identity, row.file) == (CROP, "", 3, "id", "id/photo.png")
    np.testing.assert_allclose(row.box, [x - 0.5, y - 0.5, x + side - 0.5, y + side - 0.5], atol=0.01)
    assert crop.shape == (112, 112, 3) and shows_a_face(crop)
    assert (crop[5:50, 5:107] == BLUE).all() and (crop[62:107, 5:107] == RED).all()


def test_size_of_crops(tmp_path):
    assert one(tmp_path, paint(100, 100, [(20, 20, 50)]), size=64)[1].shape == (64, 64, 3)


def test_photos_without_a_face_say_so(tmp_path):
    row, crop = one(tmp_path, paint(60, 50, []))
    assert crop is None and unread(row) == FaceRow("id", "id/photo.png", NO_CROP, "no face")
    assert (row.width, row.height, row.sha256) == (60, 50, content_of(tmp_path / "id" / "photo.png"))


@pytest.mark.parametrize(
    ("settings", "category"), [({"min_side": 101}, "too small"), ({"min_face": 51}, "face too small")]
)
def test_limits(tmp_path, settings, category):
    row, crop = one(tmp_path, paint(100, 100, [(20, 20, 50)]), **settings)
    assert crop is None and row.status == NO_CROP and row.reason.split(":")[0] == category
    assert one(tmp_path, paint(100, 100, [(20, 20, 50)]), **dict.fromkeys(settings, 50))[0].status == CROP


def test_files_without_a_photo_say_why(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    (tmp_path / "b.jpg").write_bytes(b"")
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "c.jpg"]
    detector = PaintedFaces()
    results = list(find_faces(paths, detector, workers=1))
    assert [row.reason.split(":")[0] for row, _ in results] == ["not a photo", "empty file", "missing"]
    assert [row.identity for row, _ in results] == [tmp_path.name] * 3
    assert not detector.sizes


def test_landmarks_without_a_crop(tmp_path):
    class Nowhere(PaintedFaces):
        def detect(self, images):
            found = super().detect(images)
            for one in found:
                one.landmarks[:] = 7
            return found

    row, crop = one(tmp_path, paint(100, 100, [(20, 20, 50)]), Nowhere())
    assert crop is None and row.status == NO_CROP and row.reason.startswith("not alignable")
    row, crop = one(tmp_path, paint(100, 100, [(20, 20, 50)]), Nowhere(), fallback=True)
    assert row.status == CENTRE_CROP and row.reason.startswith("not alignable") and crop is not None


def test_orientation_is_applied_unless_told_otherwise(tmp_path):
    upright = paint(120, 80, [(20, 20, 40)])
    lying = cv2.rotate(upright, cv2.ROTATE_90_COUNTERCLOCKWISE)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    jpeg = cv2.imencode(".jpg", lying, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    path = tmp_path / "lying.jpg"
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:])
    assert [row.status for row, _ in find_faces([path], PaintedFaces())] == [CROP]
    assert [row.status for row, _ in find_faces([path], PaintedFaces(), orient=False)] == [NO_CROP]


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_links_to_devices_and_pipes_are_rows_at_once(tmp_path, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jpg").symlink_to(tmp_path / target)
    rows = [row for row, _ in find_faces([tmp_path / "a.jpg"], PaintedFaces(), workers=1)]
    assert [row.reason for row in rows] == ["not a photo: a device or a pipe, not a file"]


class AnyWay(PaintedFaces):
    """Finds a lying face too, less surely, as if it stood upright (its landmarks are nonsense) or with them lying."""

    def __init__(self, lying):
        super().__init__()
        self.lying = lying

    def _one(self, bgr):
        found = super()._one(bgr)
        found.scores[:] = 0.9995
        for turn in range(1, 4):
            if not len(found.scores):
                found = super()._one(np.ascontiguousarray(np.rot90(bgr, turn)))
                found.scores[:] = 0.97
                if self.lying:
                    found.landmarks[:] = found.landmarks[..., ::-1]
        return found


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize("turn", ["auto", "always", "never"])
@pytest.mark.parametrize("lying", [True, False])
def test_photos_that_lie_are_turned(tmp_path, quarters, turn, lying):
    upright = paint(120, 90, [(20, 30, 40)])
    bgr = np.ascontiguousarray(np.rot90(upright, quarters))
    row, crop = one(tmp_path, bgr, AnyWay(lying), turn=turn)
    assert row.status == CROP
    if turn == "auto" and not lying and quarters in (1, 3):
        # What stands straight and scores little is upside down, not on its side: there the landmarks would lie.
        assert row.reason == ""
        return
    expected = {0: "", 1: "upright when turned by -90", 2: "upright when turned by 180", 3: "upright when turned by 90"}
    if turn == "never":
        assert row.reason == "" and shows_a_face(crop) == (quarters == 0)
        return
    assert row.reason == expected[quarters] and shows_a_face(crop)
    reference = one(tmp_path, upright, PaintedFaces())[1]
    assert np.abs(crop.astype(int) - reference).mean() < 2
    # The row's landmarks are those of the photo as it is: the crop can be made again from them.
    save(tmp_path / "id" / "photo.png", bgr)
    again = realign(Photo(tmp_path / "id" / "photo.png", "id/photo.png", "id"), row)
    assert (again[1] == crop).all()


def test_a_face_that_is_plausible_in_no_orientation_says_so(tmp_path):
    class Nonsense(PaintedFaces):
        def detect(self, images):
            found = super().detect(images)
            for one in found:
                one.landmarks[:] = one.landmarks[:, ::-1]
            return found

    row, crop = one(tmp_path, paint(100, 100, [(20, 20, 50)]), Nonsense(), turn="auto")
    assert crop is not None and row.reason == "not plausible: its eyes are not above its mouth"


# Boxes, the second look and the last resort


def test_the_face_in_the_box_is_taken(tmp_path):
    for face in FACES:
        x, y, side = face
        box = (x + 3, y - 4, x + side + 3, y + side)
        row, crop = one(tmp_path, paint(220, 140, FACES), box=box, min_overlap=0.5)
        np.testing.assert_allclose(row.box[:2], [x - 0.5, y - 0.5], atol=0.01)
        assert shows_a_face(crop)


def test_a_neighbour_of_the_box_is_not_taken(tmp_path):
    box = (48, 30, 88, 70)  # touches the first face's corner
    assert one(tmp_path, paint(220, 140, FACES), box=box)[0].box[0] < 20
    row, crop = one(tmp_path, paint(220, 140, FACES), box=box, min_overlap=0.2)
    assert crop is None and (row.status, row.reason, row.faces) == (NO_CROP, "no face in the box", 3)
    row, crop = one(tmp_path, paint(220, 140, FACES), box=box, min_overlap=0.2, retry=True, fallback=True)
    assert (row.status, row.reason, row.faces, row.box) == (BOX_CROP, "no face in the box", 3, None)
    np.testing.assert_array_equal(crop, box_crop(paint(220, 140, FACES), np.array(box)))


def test_small_faces_are_seen_enlarged(tmp_path):
    bgr, box = paint(200, 150, [(100, 80, 12)]), (99, 79, 113, 93)
    assert one(tmp_path, bgr, box=box)[0].status == NO_CROP
    detector = PaintedFaces()
    row, crop = one(tmp_path, bgr, detector, box=box, retry=True, min_overlap=0.5)
    assert (row.status, row.reason, row.faces) == (CROP, "seen when enlarged", 1)
    np.testing.assert_allclose(row.box, [99.5, 79.5, 111.5, 91.5], atol=0.5)
    assert shows_a_face(crop)
    assert detector.sizes == [(150, 200), (320, 320)]


def test_small_faces_are_seen_enlarged_without_a_box(tmp_path):
    row, crop = one(tmp_path, paint(200, 150, [(100, 80, 12)]), retry=True)
    assert (row.status, row.reason) == (CROP, "seen when enlarged") and shows_a_face(crop)


@pytest.mark.parametrize("turn", [45, 60, 75, 90, 135, 180, -45, -90])
def test_turned_faces_are_seen_when_turned_back(tmp_path, turn):
    matrix = cv2.getRotationMatrix2D((100, 100), turn, 1)
    bgr = cv2.warpAffine(paint(200, 200, [(70, 70, 60)]), matrix, (200, 200))
    if abs(turn) == 135:  # between two looks: not found is right, lost is not
        row, crop = one(tmp_path, bgr, box=(70, 70, 130, 130), retry=True, fallback=True)
        assert row.status == BOX_CROP and crop is not None
        return
    row, crop = one(tmp_path, bgr, box=(70, 70, 130, 130), retry=True, min_overlap=0.5)
    assert row.status == CROP and row.reason.startswith("seen when turned by") and shows_a_face(crop)
    np.testing.assert_allclose(row.box, [70, 70, 130, 130], atol=2)


def test_a_box_without_a_face_gives_a_crop_where_the_face_would_be():
    """A box with the shape and the place that detections have in crops maps to that very place."""
    bgr = paint(300, 300, [])
    bgr[100:210, 120:202] = 255  # as the median detection: 82 wide, 110 high
    crop = box_crop(bgr, np.array([120.0, 100.0, 202.0, 210.0]))
    ys, xs = np.nonzero((crop > 200).all(axis=2))
    np.testing.assert_allclose([xs.min(), xs.max() + 1, ys.min(), ys.max() + 1], [15, 97, 9, 119], atol=7.5)
    assert crop.shape == (112, 112, 3)


def test_box_crop_reaches_out_of_the_photo():
    crop = box_crop(np.full((50, 50, 3), 99, np.uint8), np.array([0.0, 0.0, 50.0, 50.0]))
    assert (crop[0] == 0).all() and (crop[60, 56] == 99).all()


@pytest.mark.parametrize(("width", "height"), [(300, 200), (150, 400), (112, 112), (5, 3), (1, 1)])
def test_centre_crop_is_the_largest_square_in_the_middle(width, height):
    bgr = np.zeros((height, width, 3), np.uint8)
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    bgr[y : y + side, x : x + side] = 200
    crop = centre_crop(bgr)
    assert crop.shape == (112, 112, 3) and (crop == 200).all()


def test_unusable_boxes_lead_to_the_middle(tmp_path):
    for box in [(500, 500, 600, 600), (10, 10, 10.5, 50), (-90, -90, -5, -5)]:
        row, crop = one(tmp_path, paint(100, 80, []), box=box, retry=True, fallback=True)
        assert (row.status, row.reason) == (CENTRE_CROP, "no face; no usable box: outside of the photo")
        np.testing.assert_array_equal(crop, centre_crop(paint(100, 80, [])))
        row, _ = one(tmp_path, paint(100, 80, [(20, 20, 40)]), box=box)
        assert (row.status, row.reason) == (CROP, "no usable box: outside of the photo")


def test_clip_box():
    np.testing.assert_array_equal(clip_box((-20, -10, 100, 110), (260, 220)), [0, 0, 100, 110])
    np.testing.assert_array_equal(clip_box((60, 40, 900, 800), (260, 220)), [60, 40, 260, 220])
    assert clip_box(None, (9, 9)) is None and clip_box((3, 3, 3.9, 9), (9, 9)) is None


def test_notes_are_kept_beside_reasons(tmp_path):
    assert one(tmp_path, paint(60, 50, [(5, 5, 40)]), note="no annotation")[0].reason == "no annotation"
    assert one(tmp_path, paint(60, 50, []), note="no annotation")[0].reason == "no face; no annotation"


# Realigning


def test_realign_repeats_the_crop_from_the_row(tmp_path):
    row, crop = one(tmp_path, paint(220, 140, FACES))
    photo = Photo(tmp_path / "id" / "photo.png", "id/photo.png", "id")
    stored = FaceRow.from_line(row.to_line())
    again, same = realign(photo, stored)
    assert again == row and stored == row
    np.testing.assert_array_equal(same, crop)
    assert realign(photo, row, min_face=31)[0].reason.startswith("face too small: 30x30")
    back, same = realign(photo, realign(photo, row, min_face=31)[0])
    assert back == row and same is not None
    assert realign(photo, row, min_side=141)[0].reason.startswith("too small")


def test_realign_of_rows_without_a_face_and_of_lost_photos(tmp_path):
    photo = Photo(tmp_path / "gone.jpg", "id/photo.png", "id")
    missing = FaceRow("id", "id/photo.png", NO_CROP, "missing")
    row = FaceRow("id", "id/photo.png", NO_CROP, "no face", width=60, height=50, sha256="0" * 64)
    assert realign(photo, row) == realign(photo, missing) == (missing, None)
    face = FaceRow.from_line(GOOD)
    assert realign(photo, face) == (FaceRow("id", "id/photo.png", NO_CROP, "missing"), None)
    save(photo.path, paint(60, 50, []))
    assert realign(photo, face)[0].reason.startswith("another photo")
    assert realign(photo, row)[0].reason == "another photo: 60x50 pixels, the detections are of one of 60x50"
    assert realign(photo, missing)[0].reason.endswith("the detections are of none that could be read")
    row = replace(row, sha256=content_of(photo.path))
    assert realign(photo, row) == (row, None)
    face = replace(face, sha256=content_of(photo.path))
    assert realign(photo, face)[0].reason.startswith("not alignable")
    for lost in ("box", "landmarks", "score"):
        row, crop = realign(photo, replace(face, **{lost: None}))
        assert crop is None and (row.status, row.reason) == (NO_CROP, "the detections do not say where the face is")
    row = replace(face, status=BOX_CROP, reason="no annotation", box=None, landmarks=None, score=None)
    row, crop = realign(photo, row)
    assert crop is None and row.status == NO_CROP and row.reason.endswith("where the face is; no annotation")


# Many photos


def many(tmp_path, count=75):
    """Photos of many sizes, some without faces, some broken."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        path = tmp_path / f"{index:03d}.png"
        if index % 10 == 9:
            path.write_bytes(b"broken")
        else:
            width, height = rng.integers(70, 200, 2)
            save(path, paint(width, height, [] if index % 7 == 0 else [(5, 8, 50)], seed=index))
        paths.append(path)
    return paths


@pytest.mark.parametrize("limit", [32_000_000, 40_000, 1])
def test_workers_and_memory_limits_change_nothing(tmp_path, limit, monkeypatch):
    paths = many(tmp_path)
    expected = [FaceFinder(PaintedFaces())([faces.as_photo(path)])[0] for path in paths]
    monkeypatch.setattr(faces, "WINDOW_PIXELS", limit)
    for workers in (1, 2, 7):
        results = list(find_faces(iter(paths), PaintedFaces(), workers=workers))
        assert [row for row, _ in results] == [row for row, _ in expected]
        for (_, crop), (_, other) in zip(results, expected, strict=True):
            np.testing.assert_array_equal(crop, other)
    assert {row.status for row, _ in expected} == {CROP, NO_CROP}


def test_detector_sees_the_same_windows_whatever_the_workers(tmp_path):
    paths = many(tmp_path)
    calls = []

    class Recorder(PaintedFaces):
        def detect(self, images):
            calls[-1].append(tuple(image.shape[:2] for image in images))
            return super().detect(images)

    for workers in (1, 3):
        calls.append([])
        list(find_faces(paths, Recorder(), workers=workers))
    assert sorted(calls[0]) == sorted(calls[1]) and len(calls[0]) == math.ceil(75 / faces.WINDOW)


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(faces, "WINDOW_PIXELS", 60_000)
    batches = []

    class Recorder(PaintedFaces):
        def detect(self, images):
            batches.append(sum(image.shape[0] * image.shape[1] for image in images))
            return super().detect(images)

    list(find_faces(many(tmp_path, 40), Recorder(), workers=2))
    assert max(batches) <= 60_000 and len(batches) > 4


def test_gpu_detectors_are_used_by_one_worker_at_a_time(tmp_path):
    inside, most = [], []

    class Gpu(PaintedFaces):
        device = "cuda:0"

        def detect(self, images):
            inside.append(threading.get_ident())
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(threading.get_ident())
            return super().detect(images)

    finder = FaceFinder(Gpu())
    list(ordered_map(finder, windows(map(faces.as_photo, many(tmp_path, 40)), 5), 4))
    assert max(most) == 1 and len(most) > 4


def test_a_detector_that_fails_names_the_photos(tmp_path):
    class Broken(PaintedFaces):
        def detect(self, images):
            raise RuntimeError("out of memory")

    save(tmp_path / "a" / "1.png", paint(60, 50, []))
    with pytest.raises(RuntimeError) as raised:
        list(find_faces([tmp_path / "a" / "1.png"], Broken()))
    assert "a/1.png" in raised.value.__notes__[0]


def test_files_are_fetched_before_a_worker_is_free_for_them(tmp_path, monkeypatch):
    """With one worker: the files of three windows, before anything is done; what is no file does not matter."""
    fetched, done = [], []
    advise = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *rest: (advise(file, *rest), fetched.append(file)))
    files = [tmp_path / f"{number}.jpg" for number in range(10)]
    for file in files[2:]:
        file.write_bytes(b"x" * 5000)
    os.mkfifo(files[1])
    entered = threading.Event()

    def work(window):
        entered.wait()
        done.extend(window)
        return len(window)

    results = ordered_map(work, windows(files, 2, path_of=lambda file: file), 1)
    threading.Timer(0.2, entered.set).start()
    assert next(results) == 2 and len(fetched) >= 4
    assert list(results) == [2] * 4 and done == files
    assert len(fetched) == 8  # neither the missing file nor the pipe


def test_ordered_map_is_lazy_ordered_and_bounded():
    started = []

    def slow(number):
        started.append(number)
        time.sleep(0.002 * (number % 3))
        return number * number

    results = ordered_map(slow, itertools.count(), 3)
    assert [next(results) for _ in range(30)] == [number * number for number in range(30)]
    results.close()
    assert len(started) <= 30 + 2 * 3 + 1


def test_windows_and_workers():
    assert list(windows(range(5), 2)) == [[0, 1], [2, 3], [4]] and list(windows([], 2)) == []
    assert utils.worker_count(3) == 3 and utils.worker_count(0) == 1 and utils.worker_count() >= 1


def test_encode_jpeg_keeps_the_picture():
    crop = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8), (0, 0), 4)
    assert encode_jpeg(None, 95) is None
    fine, coarse = (encode_jpeg(crop, quality) for quality in (95, 40))
    assert len(coarse) < len(fine)
    assert np.abs(cv2.imdecode(np.frombuffer(fine, np.uint8), 1).astype(int) - crop).mean() < 2


def large_photo(tmp_path, faces, quality=95):
    """A JPEG of 1600 x 1200 pixels with painted faces."""
    path = tmp_path / "id" / "large.jpg"
    path.parent.mkdir(exist_ok=True)
    smooth = cv2.GaussianBlur(paint(1600, 1200, faces), (0, 0), 2)
    path.write_bytes(cv2.imencode(".jpg", smooth, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())
    return Photo(path, "id/large.jpg", "id")


@pytest.mark.parametrize(
    ("side", "reduce_to", "detected_at"),
    [(640, 200, (150, 200)), (640, 201, (300, 400)), (320, 200, (150, 200)), (80, 400, (300, 400)), (80, None, None)],
)
def test_large_jpegs_are_read_reduced(tmp_path, side, reduce_to, detected_at):
    """The face's place and crop are those of the whole photo, also where the crop needs more pixels than detection."""
    photo, detector = large_photo(tmp_path, [(800 - side // 2, 620 - side // 2, side)]), PaintedFaces()
    ((row, crop),) = FaceFinder(detector, reduce_to=reduce_to)([photo])
    ((whole, same),) = FaceFinder(PaintedFaces())([photo])
    assert detector.sizes == [detected_at or (1200, 1600)]
    assert np.abs(crop[[20, 90], 56].astype(int) - [BLUE, RED]).max() < 12  # JPEG
    assert (row.width, row.height, row.sha256, row.status) == (1600, 1200, whole.sha256, CROP)
    np.testing.assert_allclose(row.box, whole.box, atol=12)
    np.testing.assert_allclose(row.landmarks, whole.landmarks, atol=12)
    assert np.abs(crop.astype(int) - same).mean() < 10
    again, same = realign(photo, row, reduce_to=reduce_to)
    assert again == row and (same == crop).all()


def test_a_reduced_crop_lies_where_the_whole_one_does(tmp_path):
    """With the same landmarks, sampled where they lie: a crop shifted by half a pixel of the view would differ."""
    noise = np.random.default_rng(1).integers(0, 256, (50, 67, 3), dtype=np.uint8)
    data = cv2.imencode(".jpg", cv2.resize(noise, (1600, 1200), interpolation=cv2.INTER_CUBIC))[1].tobytes()
    landmarks = TEMPLATE.astype(np.float32) * 6 + np.float32([411.3, 217.9])
    whole = faces._Decoded.read(data, None).crop(landmarks, 112)
    for side, factor in ((800, 2), (400, 4)):
        decoded = faces._Decoded.read(data, side)
        assert decoded.view.factor == factor
        here, *shifted = (
            np.abs(decoded.crop(landmarks + move, 112).astype(int) - whole).mean()
            for move in (0, factor / 2, -factor / 2)
        )
        assert here < 1.5 and here < min(shifted) / 2


def test_damage_that_shows_only_in_the_whole_photo_is_a_reason(tmp_path, monkeypatch):
    photo = large_photo(tmp_path, [(760, 580, 80)])
    read = faces.read_reduced

    def damaged(data, choose, **limits):
        found = read(data, choose, **limits)
        if found.factor == 1:
            raise faces.PhotoError("truncated")
        return found

    monkeypatch.setattr(faces, "read_reduced", damaged)
    ((row, crop),) = FaceFinder(PaintedFaces(), reduce_to=400)([photo])
    assert crop is None and (row.status, row.reason) == (NO_CROP, "truncated")


def test_reduced_photos_have_no_second_look(tmp_path):
    for settings_ in ({"retry": True}, {"fallback": True}):
        with pytest.raises(ValueError, match="whole photos"):
            FaceFinder(PaintedFaces(), reduce_to=800, **settings_)
    photo, detector = replace(large_photo(tmp_path, [(480, 300, 640)]), box=(480, 300, 1120, 940)), PaintedFaces()
    FaceFinder(detector, reduce_to=200)([photo])
    assert detector.sizes == [(1200, 1600)]


def test_real_photos_against_the_reference(shared):
    """The original detector's central faces on LFW, found through files, threads and windows."""
    with np.load(shared / "retinaface" / "reference_lfw.npz") as stored:
        reference = {key: stored[key] for key in stored}
    picked = range(0, 3825, 48)
    paths = [shared / "lfw" / "lfw-deepfunneled" / reference["names"][index] for index in picked]
    detector = RetinaFace(shared / "retinaface" / "mobilenet0.25_Final.pth", device="cpu", max_side=800)
    runs = [list(find_faces(paths, detector, workers=workers)) for workers in (1, 2)]
    for (row, crop), (other, same), index in zip(*runs, picked, strict=True):
        face = reference["offsets"][index] + reference["central"][index]
        assert row == other and row.status == CROP
        np.testing.assert_array_equal(crop, same)
        np.testing.assert_allclose(row.landmarks, reference["landmarks"][face], atol=0.5)
        np.testing.assert_allclose(row.box, reference["boxes"][face], atol=0.5)
        assert row.score == pytest.approx(reference["scores"][face], abs=0.005)
    group = shared / "photos" / "selfie-many-people.jpg"
    ((row, crop),) = find_faces([group], detector)
    assert row.faces > 5 and replace(row, file="") != replace(row, file="x") and crop is not None
    assert Path(row.file) == group
