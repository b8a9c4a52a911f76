"""RecordIO against what mxnet wrote and read, properties of frames and layouts, and every kind of damage."""

import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import shutil
import struct
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from formats import crop_sets, recordio
from formats.crop_sets import CropSet, CropWriter, claimed, open_crops, write_crops
from formats.recordio import MAGIC, RecordHeader, RecordReader, frame, pack, unpack
from utils import InputError

UNREADABLE_INDEX = {"idx_duplicate_key": "key 10 stands twice, in lines 11 and 50", "idx_malformed_line": "line 11"}
JPEG = b"\xff\xd8\xff\xe0"
DATA = Path(__file__).resolve().parent / "data"


def fixture_names(shared):
    return sorted(path.name for path in (shared / "formats" / "recordio").iterdir() if path.is_dir())


def check_record(record, event):
    assert len(record) == event["len"]
    assert hashlib.sha256(record).hexdigest() == event["sha256"]
    if "unpack_error" in event:
        with pytest.raises(ValueError, match=r"bytes"):
            unpack(record)
        return
    header, payload = unpack(record)
    assert (header.flag, header.id, header.id2) == (event["flag"], event["id"], event["id2"])
    assert header.label.dtype == np.float32
    assert header.label.tobytes().hex() == event["label_f32_hex"]
    assert header.label.tolist() == (event["label"] if event["flag"] else [event["label"]])
    assert len(payload) == event["payload_len"]
    assert hashlib.sha256(payload).hexdigest() == event["payload_sha256"]
    assert pack(header, payload) == record
    if "rgb" in event:
        rgb = cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert list(rgb.shape) == event["rgb"]["shape"]
        assert np.allclose(rgb.mean((0, 1)), event["rgb"]["mean"], atol=0.5)


def test_every_fixture_reads_by_key_as_mxnet_read_it(shared):
    seen = 0
    for name in fixture_names(shared):
        folder = shared / "formats" / "recordio" / name
        events = json.loads((folder / "expected.json").read_text())["indexed"]["events"]
        if name in UNREADABLE_INDEX:
            with pytest.raises(InputError, match=UNREADABLE_INDEX[name]) as caught:
                RecordReader(folder / "train.rec")
            assert "train.idx" in str(caught.value)
            continue
        with RecordReader(folder / "train.rec") as reader:
            assert len(reader) == events[0]["keys"] == len(reader.keys)
            for event in events[1:]:
                if "sha256" in event:
                    check_record(reader.read(event["key"]), event)
                    seen += 1
                    continue
                # mxnet raised, or gave None for a record past the end.
                with pytest.raises(InputError) as caught:
                    reader.read(event["key"])
                assert f"record {event['key']} at offset {event['offset']}: " in str(caught.value)
                assert str(folder / "train.rec") in str(caught.value) and "\n" not in str(caught.value)
    assert seen > 300


def test_every_fixture_reads_in_sequence_as_mxnet_read_it(shared):
    for name in fixture_names(shared):
        folder = shared / "formats" / "recordio" / name
        expected = json.loads((folder / "expected.json").read_text())
        events = expected["sequential"]["events"]
        # The damaged .idx lines are beside the point here, so the file is read without one.
        reader = RecordReader.__new__(RecordReader)
        reader.path, reader.idx_path = folder / "train.rec", None
        reader._open()
        reader._take_index(np.empty(0, np.int64), np.empty(0, np.int64))
        records = iter(reader)
        for event in events[:-1]:
            check_record(next(records), event)
        if events[-1]["end"] == "None":
            assert next(records, None) is None
        else:
            with pytest.raises(InputError, match=f"record number {events[-1]['n']} at offset"):
                next(records)
        frames = expected["raw_frames_by_script"]["frames"]
        offsets = [frame["offset"] for frame in frames if frame.get("cflag") in (0, 1)]
        met = []
        with pytest.raises(InputError) if name.startswith(("corrupt", "trunc_mid")) else contextlib.nullcontext():
            met.extend(offset for offset, _ in reader.walk())
        assert met == offsets[: len(met)] and len(met) == events[-1]["n"]


@pytest.mark.parametrize("name", ["trunc_on_boundary", "idx_past_end"])
def test_a_walk_compares_itself_with_the_index(shared, name):
    folder = shared / "formats" / "recordio" / name
    with pytest.raises(InputError, match=r"record \d+: .*train.idx points to offset"):
        list(RecordReader(folder / "train.rec"))


SETS = {
    "std": (40, 8, 0),
    "recbuilder": (40, 8, 0),
    "std_shuffled_physical": (40, 8, 0),
    "seqrec_noheader": (20, 6, 0),
    "multilabel": (20, 6, 2),
    "no_property": (20, 6, 1),
    "bad_property": (20, 6, 2),
    "crlf_property": (20, 6, 2),
    "other_encodings": (8, 8, 0),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_open_with_the_labels_of_their_records(shared, name):
    folder = shared / "formats" / "recordio" / name
    images, identities, notes = SETS[name]
    crops = open_crops(folder)
    assert (len(crops), crops.identities, crops.name) == (images, identities, name)
    assert len(crops.notes) == notes, crops.notes
    events = json.loads((folder / "expected.json").read_text())["indexed"]["events"][1:]
    expected = {event["key"]: event for event in events if event.get("payload_len")}
    assert sorted(crops.keys.tolist()) == sorted(expected)
    for index, key in enumerate(crops.keys.tolist()):
        payload, label = crops.read(index)
        assert hashlib.sha256(payload).hexdigest() == expected[key]["payload_sha256"]
        own = expected[key]["label"]
        assert label == crops.labels[index] == (own[0] if isinstance(own, list) else own)
    assert crops.labels.dtype == np.int64
    with pytest.raises(IndexError):
        crops.read(images)


UNUSABLE = {
    "trunc_mid_payload": r"record 20 at offset 70480: .*cut off",
    "trunc_on_boundary": r"record 20 at offset 70480: .*past the end .*29 of 49 records",
    "corrupt_length": r"record 20 at offset 70480: its length field says 536870911 bytes",
    "corrupt_magic_mid": r"record 20 at offset 70480: starts with 0xefbeadde",
    "idx_past_end": r"record 10 at offset 151464: the .idx points past the end",
    "idx_duplicate_key": r"key 10 stands twice",
    "idx_malformed_line": r"line 11: 'not an index line' is not 'key<TAB>offset'",
    "zero_length_record": r"record 1 at offset 3252: 0 bytes, too short",
    "nonseq_idx": r"record 0 at offset 48464: its label -1 is not the number of an identity",
    "empty": r"holds no records",
    "multipart": r"record 6 at offset \d+: its label -1.8047e\+09",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_sets_that_cannot_be_trained_on_say_why(shared, name):
    with pytest.raises(InputError, match=UNUSABLE[name]) as caught:
        open_crops(shared / "formats" / "recordio" / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["formats/recordio/std", "faces"])
def test_a_set_written_again_has_the_bytes_that_mxnet_wrote(shared, tmp_path, name):
    crops = open_crops(shared / name)
    assert write_crops(tmp_path, (crops.read(index) for index in range(len(crops)))) == len(crops)
    for file in ("train.rec", "train.idx", "property"):
        assert (tmp_path / file).read_bytes() == (shared / name / file).read_bytes(), file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["property", "train.idx", "train.rec"]


@pytest.mark.parametrize("name", ["multipart", "zero_length_record", "other_encodings", "multilabel"])
def test_frames_have_the_bytes_that_mxnet_wrote(shared, name):
    path = shared / "formats" / "recordio" / name / "train.rec"
    assert b"".join(frame(record) for record in RecordReader(path)) == path.read_bytes()


def identities(*sizes):
    """Crops of identities of these sizes, each payload of its own."""
    return [(JPEG + b"%d-%d" % (label, number), label) for label, size in enumerate(sizes) for number in range(size)]


def test_an_interrupted_set_is_not_there(tmp_path):
    write_crops(tmp_path, identities(2, 1))
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken():
        yield JPEG, 0
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_crops(tmp_path, broken())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    writer = CropWriter(tmp_path / "killed")
    writer.write(JPEG, 0)
    del writer  # as kill -9 leaves it: neither finished nor cleaned up
    with pytest.raises(InputError, match="no such RecordIO file"):
        open_crops(tmp_path / "killed")
    write_crops(tmp_path / "killed", identities(2, 1))
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()} == whole


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    with CropWriter(tmp_path) as first:
        first.write(JPEG, 0)
        with pytest.raises(InputError, match="another process is writing crops there"):
            CropWriter(tmp_path)
        first.write(JPEG, 1)
    assert len(open_crops(tmp_path)) == 2 and not list(tmp_path.glob(".*"))


def test_a_set_is_claimed_by_one_recipe(tmp_path):
    with claimed(tmp_path, "made.json", {"a": 1}) as there:
        assert not there
        with pytest.raises(InputError, match="another process"), claimed(tmp_path, "made.json", {"a": 2}):
            pass
        write_crops(tmp_path, identities(2, 1))
    with claimed(tmp_path, "made.json", {"a": 1}) as there:
        assert there
    with pytest.raises(InputError, match="holds another set"), claimed(tmp_path, "made.json", {"a": 2}):
        pass
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_no_part_and_names_the_file(tmp_path, monkeypatch):
    writer = CropWriter(tmp_path)
    writer.write(JPEG, 0)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    for name in ("_rec", "_idx"):  # closing writes what is buffered, and fails like the rest
        file = getattr(writer, name)
        monkeypatch.setattr(writer, name, Full(file))
    with pytest.raises(OSError, match=r"train\.rec"), writer:
        pass
    assert not list(tmp_path.iterdir())


class Full:
    """A file that cannot be closed for want of space."""

    def __init__(self, file):
        self.file = file

    def close(self):
        self.file.close()
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("labels", [[1], [0, 2], [0, 1, 0], [0, -1]])
def test_labels_must_come_grouped_and_in_order(tmp_path, labels):
    with pytest.raises(ValueError, match="grouped and in ascending order"):
        write_crops(tmp_path, [(JPEG, label) for label in labels])
    assert not list(tmp_path.iterdir())


def test_nothing_and_empty_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="not one crop"):
        write_crops(tmp_path, [])
    with pytest.raises(ValueError, match="empty image"):
        write_crops(tmp_path, [(b"", 0)])
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- properties

magics = st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=9)), max_size=12).map(b"".join)


def write_records(path, records):
    """A .rec of any records with its .idx."""
    at = 0
    lines = []
    with open(path, "wb") as file:
        for key, record in enumerate(records):
            data = frame(record)
            lines.append(f"{key}\t{at}\n")
            file.write(data)
            at += len(data)
    path.with_suffix(".idx").write_text("".join(lines))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def at_once(reader, positions):
    """`peek_all` agrees with `peek`, or leaves the record to it; returns how many it left."""
    heads, lengths = reader.peek_all(positions)
    for position, head, length in zip(positions.tolist(), heads, lengths.tolist(), strict=True):
        if length >= 0:
            expected, whole = reader.peek(int(reader.keys[position]))
            assert length == whole and head.tobytes()[:length] == expected[:28]
    return int((lengths < 0).sum())


@pytest.mark.parametrize("window", [36, 100, 1000, 1 << 20])
def test_many_records_are_looked_at_in_pieces(tmp_path, monkeypatch, window):
    """Whatever the pieces, the order of the .idx and that of the question; damage is left to `peek`."""
    monkeypatch.setattr(recordio, "_WINDOW", window)
    random = np.random.default_rng(window)
    path = tmp_path / "many.rec"
    sizes = random.integers(28, 300, 50)
    write_records(path, [random.integers(0, 255, size, dtype=np.uint8).tobytes() for size in sizes])
    lines = path.with_suffix(".idx").read_text().splitlines(keepends=True)
    for shuffled in (False, True):
        if shuffled:  # keys no longer in the order of the file
            offsets = [line.split("\t")[1] for line in lines]
            random.shuffle(offsets)
            path.with_suffix(".idx").write_text("".join(f"{key}\t{at}" for key, at in enumerate(offsets)))
        with RecordReader(path) as reader:
            in_file = np.argsort(reader.offsets)
            for positions in (in_file, in_file[::3], random.permutation(50), in_file[:0]):
                assert at_once(reader, positions) == 0
            data = bytearray(path.read_bytes())
            data[reader.offsets[7]] ^= 1  # the magic
            data[reader.offsets[9] + 6] ^= 1  # the length
            (tmp_path / "damaged.rec").write_bytes(data)
        (tmp_path / "damaged.idx").write_text(path.with_suffix(".idx").read_text())
        with RecordReader(tmp_path / "damaged.rec") as reader:
            assert np.flatnonzero(reader.peek_all(np.arange(50))[1] < 0).tolist() == [7, 9]


@given(st.lists(magics, max_size=8))
@example([MAGIC * 3, b"", MAGIC + b"x", b"abc" + MAGIC, b"abcd" + MAGIC])
@settings(max_examples=100, deadline=None)
def test_any_records_round_trip(scratch, records):
    path = scratch / "any.rec"
    write_records(path, records)
    with RecordReader(path) as reader:
        assert [reader.read(key) for key in range(len(records))] == records == list(reader)
        for key, record in enumerate(records):
            head, length = reader.peek(key)
            assert length == len(record) and record.startswith(head) and len(head) >= min(28, length)
        at_once(reader, np.arange(len(records)))
        reader.check_index()
        assert reader.unlisted == 0
    assert path.stat().st_size % 4 == 0


@given(magics)
@settings(max_examples=100, deadline=None)
def test_a_frame_never_shows_the_magic_at_an_aligned_place_of_its_payload(record):
    data = frame(record)
    at = 0
    while at < len(data):
        length = struct.unpack_from("<I", data, at + 4)[0] & recordio.MAX_RECORD
        payload = data[at + 8 : at + 8 + length]
        assert all(payload[i : i + 4] != MAGIC for i in range(0, length, 4))
        assert data[at : at + 4] == MAGIC
        at += 8 + length + -length % 4


labels = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5)


@given(labels, st.booleans(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), magics)
def test_headers_round_trip(label, array, id, id2, payload):
    header = RecordHeader(len(label) if array or len(label) > 1 else 0, np.array(label, np.float32), id, id2)
    record = pack(header, payload)
    got, rest = unpack(record)
    assert got.label.tobytes() == header.label.tobytes() and got.label.dtype == np.float32
    assert (got.flag, got.id, got.id2, rest) == (header.flag, id, id2, payload)
    assert math.isclose(struct.unpack_from("<f", record, 4)[0], label[0] if header.flag == 0 else 0.0)


def test_a_label_that_does_not_fit_its_flag_is_refused():
    for flag, label in ((0, [1, 2]), (2, [1]), (1, [])):
        with pytest.raises(ValueError, match="does not fit"):
            pack(RecordHeader(flag, np.array(label, np.float32), 0), b"")
    with pytest.raises(ValueError, match="at most"):
        frame(bytes(recordio.MAX_RECORD + 1))


@given(st.lists(st.lists(magics, min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_any_set_round_trips(scratch, groups):
    items = [(JPEG + payload, label) for label, group in enumerate(groups) for payload in group]
    write_crops(scratch / "set", items)
    crops = open_crops(scratch / "set")
    assert [crops.read(index) for index in range(len(crops))] == items
    assert crops.labels.tolist() == [label for _, label in items]
    assert crops.identities == len(groups) and not crops.notes


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_noticed_or_harmless(scratch, data):
    records = [
        pack(RecordHeader(0, np.array([k], np.float32), k), JPEG + bytes(5 * k) + MAGIC * (k == 3)) for k in range(5)
    ]
    path = scratch / "damaged.rec"
    write_records(path, records)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    reader = RecordReader(path)
    for key, record in enumerate(records):
        try:
            got = reader.read(key)
        except InputError as error:
            assert f"record {key} at offset" in str(error)  # noqa: PT017 - reading may also succeed
            continue
        # Only payload bytes, or how many of the padding belong to it, may differ: no record is ever glued to its
        # neighbour or cut short. What follows the last one is for `check_index`.
        assert abs(len(got) - len(record)) <= 3 or reader._stop(key) == reader.size
    for attempt in (lambda: list(reader), reader.check_index, lambda: open_crops(path)):
        try:
            attempt()
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_a_wrong_length_near_a_cut_names_its_record(tmp_path):
    """Its end lies before the next record's start, and too near the file's end for a record to begin there."""
    path = tmp_path / "cut.rec"
    write_records(path, [pack(RecordHeader(0, np.float32([k]), k), JPEG * 3) for k in range(2)])
    data = bytearray(path.read_bytes())
    data[4] -= 4
    path.write_bytes(data[: len(data) // 2 + 2])
    with pytest.raises(InputError, match="record 0 at offset 0: its length leads to offset"):
        RecordReader(path).read(0)


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.fixture
def std(tmp_path):
    """A copy of a whole set that can be damaged: (path of the .rec, bytes of it)."""
    for file in ("train.rec", "train.idx", "property"):
        shutil.copyfile(DATA / "recordio" / "std" / file, tmp_path / file)
    return tmp_path / "train.rec", bytearray((tmp_path / "train.rec").read_bytes())


def read_all(path):
    crops = open_crops(path)
    return [crops.read(index) for index in range(len(crops))]


def refused(path, message):
    with pytest.raises(InputError, match=message) as caught:
        read_all(path)
    assert "\n" not in str(caught.value) and str(path.parent) in str(caught.value)


@pytest.mark.parametrize(
    ("cflag", "message"),
    [
        (1, "record 20 at offset 28476: part 2 has flag 0, expected 2 or 3"),
        (2, "record 20 at offset 28476: part 1 has flag 2, expected 0 or 1"),
        (3, "record 20 at offset 28476: part 1 has flag 3"),
        (7, "record 20 at offset 28476: part 1 has flag 7"),
    ],
)
def test_flags_out_of_order_are_not_glued(std, cflag, message):
    path, data = std
    length = struct.unpack_from("<I", data, 28480)[0]
    struct.pack_into("<I", data, 28480, cflag << 29 | length)
    path.write_bytes(data)
    refused(path, message)
    with pytest.raises(InputError, match="record number 20 at offset 28476: part"):
        list(RecordReader(path))


@pytest.mark.parametrize("change", [4, -4, 400, -400, 1 << 20, 3788])
def test_a_wrong_length_is_noticed_whatever_it_says(std, change):
    path, data = std
    struct.pack_into("<I", data, 28480, struct.unpack_from("<I", data, 28480)[0] + change)
    path.write_bytes(data)
    refused(path, "record 20 at offset 28476: its length")


def test_nothing_is_allocated_for_a_length(std):
    path, data = std
    struct.pack_into("<I", data, 28480, recordio.MAX_RECORD)
    path.write_bytes(data)
    reader = RecordReader(path)
    tracemalloc.start()
    with pytest.raises(InputError):
        reader.read(20)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("left", [1, 7, 8, 20, 1611])
def test_a_cut_inside_a_record_is_noticed(std, left):
    path, data = std
    path.write_bytes(data[: 28476 + left])
    refused(path, r"record 20 at offset 28476: .*cut off.* \(28 of 49 records start past the end\)")


def test_a_cut_inside_the_last_record_is_noticed(std):
    path, data = std
    for missing in (1, 3, 8, 39):
        path.write_bytes(data[:-missing])
        refused(path, "record 48 at offset 59820: .*cut off")


@pytest.mark.parametrize("garbage", [b"x", b"\0" * 4, b"garbage" * 100, MAGIC, MAGIC + b"\xff\xff\xff\x00"])
def test_bytes_after_the_last_record_are_noticed(std, garbage):
    path, data = std
    path.write_bytes(data + garbage)
    refused(path, rf"{len(garbage)} bytes after the last record \(key 48\) are no record")
    with RecordReader(path) as reader:
        assert len(reader.read(48)) == 32  # the records themselves are sound
        with pytest.raises(InputError, match="record number 49"):
            list(reader)


def test_whole_records_that_the_index_does_not_list_are_told(shared, tmp_path):
    folder = shared / "formats" / "recordio" / "seqrec_noheader"
    shutil.copyfile(folder / "train.rec", tmp_path / "train.rec")
    lines = (folder / "train.idx").read_text().splitlines()
    (tmp_path / "train.idx").write_text("\n".join(lines[:18]))
    crops = open_crops(tmp_path)
    assert len(crops) == 18 and "2 records follow the last one" in crops.notes[0]


def test_an_index_without_lines_does_not_hide_the_records(std):
    path, _ = std
    path.with_suffix(".idx").write_text("")
    refused(path, "59860 bytes, but .*train.idx lists no record")


def edit_index(path, change):
    idx = path.with_suffix(".idx")
    lines = idx.read_text().split("\n")
    change(lines)
    idx.write_bytes("\n".join(lines).encode("latin1"))


ODD_LINES = [
    *("", " ", "x", "\0", "10 13600", "10\t", "\t13600", "10\t13600\t1", "10\t13600 ", "10\t13600\r\r"),
    *("10.0\t13600", "-10\t13600", "+10\t13600", "10\t0x10", "10\t\u00b2"),
    *("10\t9223372036854775807", "10\t99999999999999999999999"),
]


@pytest.mark.parametrize("line", ODD_LINES)
def test_index_lines_of_another_form_are_refused(std, line):
    path, _ = std
    edit_index(path, lambda lines: lines.__setitem__(10, line))
    with pytest.raises(InputError, match=r"train.idx: line 11: "):
        RecordReader(path)


def test_an_index_of_something_else_is_refused(std):
    path, _ = std
    path.with_suffix(".idx").write_bytes(bytes(range(256)) * 20)
    refused(path, "line 1: ")
    path.with_suffix(".idx").write_bytes(b"1" * (3 << 20))
    refused(path, r"line 1: longer than 1048576 bytes; not an \.idx")


@pytest.mark.parametrize("newline", ["\r\n", "\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_do_not_matter(std, newline, last):
    path, _ = std
    idx = path.with_suffix(".idx")
    lines = idx.read_text().split()
    text = newline.join(f"{key}\t{offset}" for key, offset in zip(lines[::2], lines[1::2], strict=True))
    idx.write_bytes((text + (newline if last else "")).encode())
    assert len(open_crops(path)) == 40


def test_lines_across_the_blocks_of_the_parser(tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "_INDEX_BLOCK", 64)
    pairs = [(key * 7 % 1009, 4 * key**3) for key in range(1009)]
    for newline in ("\n", "\r\n"):
        (tmp_path / "i.idx").write_bytes("".join(f"{key}\t{offset}{newline}" for key, offset in pairs).encode())
        keys, offsets = recordio.read_index(tmp_path / "i.idx")
        assert list(zip(keys.tolist(), offsets.tolist(), strict=True)) == sorted(pairs)
    with (tmp_path / "i.idx").open("a") as file:
        file.write("1 2\n")
    with pytest.raises(InputError, match="line 1010: '1 2' is not"):
        recordio.read_index(tmp_path / "i.idx")


def test_keys_that_point_to_the_wrong_record_are_noticed(std):
    path, _ = std

    def swap(lines):
        lines[12], lines[13] = "12\t17880", "13\t16488"

    edit_index(path, swap)
    refused(path, "record 12 at offset 17880: the record found there has id 13")
    edit_index(path, lambda lines: lines.__setitem__(13, "13\t17880"))
    refused(path, r"record 12 at offset 17880: key 13 of .*train.idx points to it too")


@pytest.mark.parametrize(
    ("line", "message"),
    [("10\t13601", "multiple of 4"), ("10\t13604", "starts with 0x"), ("10\t59856", "cut off|starts with")],
)
def test_keys_that_point_to_no_record_are_noticed(std, line, message):
    path, _ = std
    edit_index(path, lambda lines: lines.__setitem__(10, line))
    refused(path, f"record 10 at offset {line[3:]}: .*({message})")


def test_a_missing_key_is_named(std):
    path, _ = std
    edit_index(path, lambda lines: lines.pop(10))
    refused(path, r"record 0 at offset 0: the header announces the keys 0 \.\. 48, but .*train.idx has no key 10")
    with pytest.raises(InputError, match="no record with key 10"):
        RecordReader(path).read(10)


def rewrite(path, changes, ids=None):
    """Write the set again with some records replaced: {key: (labels, payload or None for its own)}."""
    with RecordReader(path) as reader:
        records = [reader.read(key) for key in reader.keys.tolist()]
    for key, (label, payload) in changes.items():
        header, own = unpack(records[key])
        numbers = np.array(label, np.float32).reshape(-1)
        flag = 0 if np.ndim(label) == 0 else len(numbers)
        records[key] = pack(RecordHeader(flag, numbers, header.id), own if payload is None else payload)
    write_records(path, records)


@pytest.mark.parametrize(
    "numbers", [[0, 49], [1, 49], [49, 41], [41, 41], [41.5, 49], [-5, 49], [math.inf, 49], [41, math.nan]]
)
def test_a_header_that_makes_no_sense_is_refused(std, numbers):
    path, _ = std
    rewrite(path, {0: (numbers, None)})
    refused(path, "record 0 at offset 0: the header's numbers")


@pytest.mark.parametrize(("numbers", "message"), [
    ([41, 60], "record 0 at offset 0: the header announces the keys 0 .. 59, but .* has no key 49"),
    ([1000, 1008], "record 0 .*has no key 49"),
    ([40, 49], "record 40 at offset 58048: is not an identity record"),
    ([42, 49], r"record 42 at offset .*: the identity's range \[6, 11\] overlaps another or leaves images"),
    ([2e7, 3e7], "record 0 at offset 0: the header announces 30000000 records, but the .idx lists 49"),
])  # fmt: skip
def test_a_header_that_does_not_fit_the_records_is_refused(std, numbers, message):
    path, _ = std
    rewrite(path, {0: (numbers, None)})
    refused(path, message)


@pytest.mark.parametrize(("numbers", "message"), [
    ([21, 21], "record 45 .*identity 4 has no images"),
    ([21, 2000], r"record 45 .*range \[21, 2000\] leaves the images 1 \.\. 40"),
    ([0, 26], r"record 45 .*range \[0, 26\] leaves"),
    ([26, 21], r"record 45 .*range \[26, 21\] leaves"),
    ([20, 26], r"record 45 .*range \[20, 26\] overlaps"),
    ([22, 26], r"record 45 .*range \[22, 26\] overlaps another or leaves images without"),
    ([21, 26.5], "record 45 .*is not an identity record"),
    ([21], "record 45 .*is not an identity record"),
    (21, "record 45 .*is not an identity record"),
])  # fmt: skip
def test_identity_ranges_must_cover_the_images_once(std, numbers, message):
    path, _ = std
    rewrite(path, {45: (numbers, None)})
    refused(path, message)


def test_images_that_belong_to_nobody_are_noticed_at_both_ends(std):
    path, _ = std
    rewrite(path, {48: ([36, 40], None)})
    refused(path, "leaves images without identity")


def test_a_label_that_contradicts_its_identity_record_is_noticed(std):
    path, _ = std
    rewrite(path, {20: (7, None)})
    refused(path, "record 20 at offset 28476: its label is 7, but its identity record says 3")


def test_images_without_contents_are_noticed(std):
    path, _ = std
    rewrite(path, {20: (3, b"")})
    refused(path, "record 20 at offset 28476: holds no image")


@pytest.mark.parametrize("flag", [1, 2000, 0xFFFFFFFF])
def test_a_header_that_announces_more_labels_than_there_are_bytes(std, flag):
    path, data = std
    struct.pack_into("<I", data, 28484, flag if flag > 1 else 4380)
    path.write_bytes(data)
    refused(path, "record 20 at offset 28476: announces .* labels, but only")


@pytest.mark.parametrize(("value", "message"), [
    (-1, "its label -1 is not the number"), (1.5, "its label 1.5 is not"), (math.nan, "label nan"), (math.inf, "inf"),
    (2**25, "is not the number"),
])  # fmt: skip
def test_labels_of_a_set_without_header(shared, tmp_path, value, message):
    for file in ("train.rec", "train.idx"):
        shutil.copyfile(shared / "formats" / "recordio" / "seqrec_noheader" / file, tmp_path / file)
    rewrite(tmp_path / "train.rec", {19: (value, None)})
    refused(tmp_path / "train.rec", message)


def test_a_set_shuffled_afterwards_takes_the_labels_of_its_images(tmp_path):
    # As InsightFace's shuffle_rec.py leaves it: records under new keys, with their old ids and identity records.
    with RecordReader(DATA / "recordio" / "std" / "train.rec") as reader:
        records = [reader.read(key) for key in range(49)]
    order = [0, *(np.random.default_rng(0).permutation(40) + 1).tolist(), *range(41, 49)]
    write_records(tmp_path / "train.rec", [records[key] for key in order])
    crops = open_crops(tmp_path)
    assert "were read instead" in crops.notes[0] and crops.identities == 8
    for index, key in enumerate(order[1:41]):
        assert crops.read(index) == (unpack(records[key])[1], int(unpack(records[key])[0].label[0]))


def test_more_records_than_float32_can_count(std, monkeypatch):
    path, _ = std
    monkeypatch.setattr(crop_sets, "FLOAT32_EXACT", 45)
    crops = open_crops(path)
    assert (len(crops), crops.identities) == (40, 8) and "rounded" in crops.notes[0]
    assert crops.labels.tolist() == open_crops_exact(path)


def test_large_sets_of_nothing_but_identity_records_are_one_line(std, tmp_path, monkeypatch):
    monkeypatch.setattr(crop_sets, "FLOAT32_EXACT", 8)
    header = pack(RecordHeader(2, [9, 12], 0, 0), b"")
    write_records(
        tmp_path / "train.rec", [header, *[pack(RecordHeader(2, [1, 2], key, 0), b"") for key in range(1, 12)]]
    )
    with pytest.raises(InputError, match=r"train\.rec: holds no images"):
        open_crops(tmp_path)


def open_crops_exact(path):
    with RecordReader(path) as reader:
        return [int(unpack(reader.read(key))[0].label[0]) for key in range(1, 41)]


def test_without_index_the_ids_are_the_keys(shared, tmp_path):
    folder = shared / "formats" / "recordio"
    for name in ("std", "recbuilder", "std_shuffled_physical"):
        shutil.copyfile(folder / name / "train.rec", tmp_path / "train.rec")
        with RecordReader(tmp_path / "train.rec") as bare, RecordReader(folder / name / "train.rec") as indexed:
            assert bare.keys.tolist() == indexed.keys.tolist()
            assert [bare.read(key) for key in range(49)] == [indexed.read(key) for key in range(49)]
        assert open_crops(tmp_path).identities == 8
    shutil.copyfile(folder / "multipart" / "train.rec", tmp_path / "train.rec")
    assert RecordReader(tmp_path / "train.rec").keys.tolist() == list(range(20))


def test_missing_files_are_named(tmp_path):
    for attempt in (lambda: open_crops(tmp_path), lambda: RecordReader(tmp_path / "x.rec")):
        with pytest.raises(InputError, match=str(tmp_path)):
            attempt()
    (tmp_path / "train.rec").mkdir()
    with pytest.raises(InputError):
        open_crops(tmp_path)


# ------------------------------------------------------------------------------------------------------- processes


def _hashes(crops, queue):
    queue.put([hashlib.sha256(crops.read(index)[0]).hexdigest() for index in range(len(crops))])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_set_can_be_read_in_other_processes(start):
    crops = open_crops(DATA / "recordio" / "std")
    expected = [hashlib.sha256(crops.read(index)[0]).hexdigest() for index in range(40)]
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=_hashes, args=(crops, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()


def test_a_pickled_set_opens_its_file_again(std):
    path, data = std
    crops = open_crops(path)
    again: CropSet = pickle.loads(pickle.dumps(crops))
    assert [again.read(index) for index in range(40)] == [crops.read(index) for index in range(40)]
    stored = pickle.dumps(crops)
    path.write_bytes(data[:-40])
    with pytest.raises(InputError, match="changed from 59860 to 59820 bytes"):
        pickle.loads(stored)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(std):
    path, data = std
    crops = open_crops(path)
    with path.open("r+b") as file:
        file.truncate(len(data) // 2)
    with pytest.raises(InputError, match="became shorter while it was read"):
        crops.read(39)


def test_an_index_that_counts_up_is_not_stored(std):
    path, _ = std
    assert RecordReader(path)._keys._stored is None
