"""What training takes besides one tidy train.rec: the states in which sets of crops are really passed on."""

import hashlib
import json
import pickle
import shutil

import cv2
import numpy as np
import pytest
from helpers.training import finish, folder_set, jpegs, options, start, train_main
from test_extract import tar_bytes

from formats import crop_files, crop_sets, recordio, webdataset
from formats.crop_sets import open_training_set
from formats.parquet import open_table
from formats.recordio import RecordHeader, frame, pack
from utils import InputError

CASES = {  # what is given to --data: identities, crops, and what is said
    "webdataset": (8, 32, ""),
    "webdataset/*.tar": (8, 32, ""),
    "webdataset/000000.tar": (7, 16, "the labels are 7 of the numbers 0 to 7"),
    "labels_from1": (8, 32, "the labels are 8 of the numbers 1 to 8"),
    "face2rec_split_identity": (20, 82, "the identity records do not fit"),
    "im2rec_chunks": (8, 32, ""),
    "im2rec_chunks/train_1.rec": (8, 16, ""),
    "list_file/train_list.txt": (8, 32, ""),
    "list_file": (8, 32, "identities lie 2 folders deep"),
    "webface_nested": (8, 32, "identities lie 2 folders deep"),
    "same_name/a/faces": (4, 12, ""),
}


def check_set(crops, identities, count):
    """The set holds together, whatever it lies in: by its own words and in another process."""
    assert (crops.identities, len(crops), len(crops.identity_names)) == (identities, count, identities)
    assert sorted(set(crops.labels.tolist())) == list(range(identities)) and crops.labels.dtype == np.int64
    again = pickle.loads(pickle.dumps(crops))
    order = np.random.default_rng(0).permutation(count).tolist()
    for index in order:
        data, label = crops.read(index)
        assert data.startswith(b"\xff\xd8") and label == crops.labels[index]
        assert again.read(index) == (data, label)
    assert len({crops.describe(index) for index in order}) == count


@pytest.mark.parametrize("case", CASES)
def test_what_people_really_have(shared, case):
    identities, count, note = CASES[case]
    crops = open_training_set(shared / "cases" / case)
    check_set(crops, identities, count)
    assert note in " ".join(crops.notes) and bool(note) == bool(crops.notes)


def test_the_same_people_whatever_they_lie_in(shared):
    def people(case):
        crops = open_training_set(shared / "cases" / case)
        found = {}
        for index in range(len(crops)):
            data, label = crops.read(index)
            found.setdefault(label, set()).add(hashlib.sha256(data).hexdigest())
        return sorted(map(sorted, found.values()))

    listed = people("list_file/train_list.txt")
    assert people("webdataset") == people("im2rec_chunks") == people("labels_from1") == people("list_file") == listed


def test_train_takes_shards_by_a_pattern(shared, tmp_path):
    line = options(shared / "cases" / "webdataset" / "*.tar", tmp_path / "run", epochs=1, batch_size=8, workers=1)
    assert finish(start(train_main, line, output=tmp_path / "output"))[0] == 0, (tmp_path / "output").read_text()
    assert "32 crops of 8 identities" in (tmp_path / "run" / "log.txt").read_text()
    rows = [f"{label}\t{label}\t4" for label in range(8)]
    assert (tmp_path / "run" / "identities.tsv").read_text().splitlines() == ["label\tidentity\tcrops", *rows]


def test_a_split_archive_says_how_to_join_it(shared):
    with pytest.raises(InputError, match=r"cat .*glint360k_00 .*glint360k_03 \| tar -xf - -C FOLDER"):
        open_training_set(shared / "cases" / "split_tar")


# ------------------------------------------------------------------------------------------------------- RecordIO


def plain_records(path, labels):
    """RecordIO without header or identity records, as im2rec writes it."""
    at, lines = 0, []
    with path.open("wb") as file:
        for key, ((data, _), label) in enumerate(zip(jpegs(len(labels), 1), labels, strict=True)):
            record = frame(pack(RecordHeader(0, np.float32([label]), key), data))
            lines.append(f"{key}\t{at}\n")
            at += len(record)
            file.write(record)
    path.with_suffix(".idx").write_text("".join(lines))


def test_labels_with_gaps_are_numbered_anew_and_keep_their_names(tmp_path):
    plain_records(tmp_path / "train.rec", [7, 7, 100, 3, 85_000, 3])
    crops = open_training_set(tmp_path)
    check_set(crops, 4, 6)
    assert crops.labels.tolist() == [1, 1, 2, 0, 3, 0] and crops.identity_names == ["3", "7", "100", "85000"]
    assert crops.describe(2) == f"{tmp_path / 'train.rec'}: record 2 at offset {crops.reader.offsets[2]}"
    # A label that changes afterwards is noticed, also one that is the new number of its identity.
    data = bytearray((tmp_path / "train.rec").read_bytes())
    at = int(crops.reader.offsets[3]) + 8
    data[at : at + 24] = recordio.HEADER.pack(0, 0.0, 3, 0)
    (tmp_path / "train.rec").write_bytes(data)
    with pytest.raises(InputError, match="its label is 0, but its identity record says 3"):
        crops.read(3)


def test_chunks_are_one_set_and_two_sets_are_not(tmp_path):
    plain_records(tmp_path / "train_0.rec", [0, 0, 1])
    plain_records(tmp_path / "train_1.rec", [1, 5, 5])
    crops = open_training_set(tmp_path)
    check_set(crops, 3, 6)
    assert crops.labels.tolist() == [0, 0, 1, 1, 2, 2] and "0 to 2" in " ".join(crops.notes)
    assert "train_1.rec: record 0" in crops.describe(3)
    shutil.move(tmp_path / "train_1.rec", tmp_path / "other.rec")
    shutil.move(tmp_path / "train_1.idx", tmp_path / "other.idx")
    with pytest.raises(InputError, match=r"several sets \(other.rec, train_0.rec\)"):
        open_training_set(tmp_path)


# --------------------------------------------------------------------------------------------------------- folders


def test_what_systems_leave_in_folders_is_passed_over(tmp_path):
    folder_set(tmp_path, identities=3, each=4)
    for name in ("Thumbs.db", "desktop.ini", "person-1/Thumbs.db", "person-1/.DS_Store", "person-2/DESKTOP.INI"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "person-0" / "__MACOSX").mkdir()
    check_set(open_training_set(tmp_path), 3, 12)


def test_names_of_files_are_nothing_that_a_worker_copies(tmp_path):
    names = ["a/1.jpg", "ä/" + "x" * 300, "b/\udcff.png", ""]
    packed = crop_files.PackedNames(names)
    assert list(packed) == names and len(packed) == 4 and not len(crop_files.PackedNames([]))
    with pytest.raises(IndexError):
        packed[-1]
    for name in ("0/a.jpg", "0/b.jpg", "1/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a crop")
    (tmp_path / "train.lst").write_text("0/a.jpg 0\n1/a.jpg 1\n")
    sets = [crop_files.FolderCrops(tmp_path), crop_files.ListCrops(tmp_path / "train.lst")]
    for crops in sets:
        kept = [value for value in vars(crops).values() if isinstance(value, list) and len(value) >= len(crops)]
        assert kept in ([], [crops.identity_names])


def test_splits_are_not_merged_nor_told_apart_in_silence(tmp_path):
    for part in ("train", "val"):
        folder_set(tmp_path / part, identities=3, each=2)
    with pytest.raises(InputError, match="holds train and val; name the one"):
        open_training_set(tmp_path)
    check_set(open_training_set(tmp_path / "train"), 3, 6)


# -------------------------------------------------------------------------------------------------- lists, shards


def test_lists_refuse_what_leads_out_and_what_is_not_there(tmp_path):
    folder_set(tmp_path / "imgs", identities=2, each=2)
    good = [f"imgs/person-{index // 2}/{index}.jpg Ann{index // 2}" for index in range(4)]
    (tmp_path / "list.txt").write_text("\n".join(good))
    crops = open_training_set(tmp_path / "list.txt")
    check_set(crops, 2, 4)
    assert crops.identity_names == ["Ann0", "Ann1"] and "names" in crops.notes[0]
    for line, reason in (("../x.jpg 1", r"line 5: a path with"), ("imgs/gone.jpg 1", "names imgs/gone.jpg")):
        (tmp_path / "list.txt").write_text("\n".join([*good, line]))
        with pytest.raises(InputError, match=reason):
            open_training_set(tmp_path / "list.txt")


def shard(path, labels, *, form="cls"):
    entries = []
    for index, ((data, _), label) in enumerate(zip(jpegs(len(labels), 1), labels, strict=True)):
        entries.append((f"{path.stem}/{index:06d}.jpg", data))
        if label is not None:
            text = str(label) if form == "cls" else json.dumps({"label": label})
            entries.append((f"{path.stem}/{index:06d}.{form}", text.encode()))
    path.write_bytes(tar_bytes(entries))


def test_a_photo_is_no_list_and_a_device_no_crop(tmp_path):
    photo = folder_set(tmp_path / "set") / "person-0" / "0.jpg"
    with pytest.raises(InputError, match=r"0.jpg: neither RecordIO, a tar nor a list of images and labels"):
        open_training_set(photo)
    photo.unlink()
    photo.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"0.jpg: a device or a pipe, not a file"):
        open_training_set(tmp_path / "set").read(0)


def test_shards_name_their_crops_and_what_is_wrong(tmp_path):
    shard(tmp_path / "a0.tar", [0, 0, 2])
    shard(tmp_path / "a1.tar", [2, 5, 5], form="json")
    crops = open_training_set(tmp_path)
    check_set(crops, 3, 6)
    assert "numbers 0 to 5" in crops.notes[0] and crops.identity_names == ["0", "2", "5"]
    assert crops.describe(4).startswith(f"{tmp_path / 'a1.tar'}: a1/000001.jpg at offset ")
    shard(tmp_path / "a1.tar", [2, None, 5])
    with pytest.raises(InputError, match=r"a1.tar: has changed since"):
        pickle.loads(pickle.dumps(crops)).read(3)
    with pytest.raises(InputError, match=r"a1.tar: a1/000001.jpg: no label"):
        open_training_set(tmp_path)
    (tmp_path / "a1.tar").write_bytes((tmp_path / "a0.tar").read_bytes()[:6000])
    with pytest.raises(InputError, match=r"a1.tar: .*cut off"):
        open_training_set(tmp_path)


def test_shards_of_two_sets_are_not_one(tmp_path):
    for name in ("casia.tar", "lfw.tar"):
        shard(tmp_path / name, [0, 0, 1])
    with pytest.raises(InputError, match=r"several sets \(casia.tar, lfw.tar\); name one of them"):
        open_training_set(tmp_path)
    (tmp_path / "lfw.tar").unlink()
    folder_set(tmp_path)
    with pytest.raises(InputError, match=r"holds casia.tar beside folders of images \(person-0\)"):
        open_training_set(tmp_path)


def test_a_shard_leaves_nobody_out(tmp_path):
    """A picture of a kind that is not known is told, not passed over; nobody's label is no person."""
    entries = [(f"{index}.jpg", data) for index, (data, _) in enumerate(jpegs(3, 1))]
    entries = [entry for index, entry in enumerate(entries) for entry in (entry, (f"{index}.cls", b"%d" % index))]
    (tmp_path / "a.tar").write_bytes(tar_bytes([*entries, ("9.heic", b"x"), ("9.cls", b"9")]))
    with pytest.raises(InputError, match=r"9.heic: has a label, but is no image"):
        open_training_set(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(tar_bytes([*entries, ("9.jpg", entries[0][1]), ("9.cls", b"-1")]))
    with pytest.raises(InputError, match=r"9.jpg: the label -1, which is nobody's"):
        open_training_set(tmp_path / "a.tar")
    (tmp_path / "list.txt").write_text("a.jpg -1\nb.jpg 0\n")
    with pytest.raises(InputError, match=r"line 1: the label -1, which is nobody's"):
        open_training_set(tmp_path / "list.txt")


def test_a_pattern_that_is_none_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"x\*\*\.tar: "):
        open_training_set(tmp_path / "x**.tar")


def test_the_index_of_a_shard_is_kept_until_the_shard_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(crop_files, "_WORTH_KEEPING", 0)
    shard(tmp_path / "a0.tar", [0, "Ann", 2])
    first = open_training_set(tmp_path)
    kept = tmp_path / ".a0.tar.index"
    contents = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(crop_files.ShardCrops, "_index", lambda *_: pytest.fail("indexed again"))
        again = open_training_set(tmp_path)
    assert [again.read(index) for index in range(3)] == [first.read(index) for index in range(3)]
    for damage in (contents[:-40], b"", b"x" * 100, contents.replace(b"shard-index", b"other-index")):
        kept.write_bytes(damage)
        assert open_training_set(tmp_path).identity_names == first.identity_names
    shard(tmp_path / "a0.tar", [1, 1, 2, 2])
    check_set(open_training_set(tmp_path), 2, 4)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip", "x.parquet"])
def test_what_cannot_be_read_in_any_order_says_what_to_do(tmp_path, name):
    starts = {"x.tar.gz": b"\x1f\x8b", "x.zip": b"PK\3\4", "x.parquet": b"PAR1"}
    (tmp_path / name).write_bytes(starts[name] + bytes(600))
    with pytest.raises(InputError, match=f"python extract.py .*{name} --out data/raw"):
        open_training_set(tmp_path / name)


def _table(path, columns):
    """A Parquet file of columns [(name, values)], of which several may have one name."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrays = [pyarrow.array(values) for _, values in columns]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=[name for name, _ in columns]), path)
    return path


def test_parquet_with_a_column_twice_is_one_line(tmp_path):
    path = _table(tmp_path / "x.parquet", [("image", [b"1"]), ("image", [b"2"]), ("label", [0])])
    with pytest.raises(InputError, match=r"x\.parquet: has the column image 2 times"):
        open_table(path)


@pytest.mark.parametrize(
    "labels", [[-1, 0], [float("nan"), 1.0], [None, 1], [-1.0, 1.0], ["-1", "1"], ["nan", "1"], [float("inf"), 1.0]]
)
def test_a_label_that_says_there_is_none_is_no_person(tmp_path, labels):
    path = _table(tmp_path / "x.parquet", [("image", [b"1", b"2"]), ("label", labels)])
    assert [row.label for row in open_table(path).read()] == [None, str(int(float(labels[1])))]


@pytest.mark.parametrize("label", [b"NaN", b"Infinity", b'"nan"', b"-1", b"-1.0", b"null"])
def test_photos_of_a_shard_without_a_label_are_no_person(label):
    with pytest.raises(ValueError, match=r"no label|nobody's"):
        webdataset.label_of({"1.json": b'{"label": ' + label + b"}"})


def test_links_in_a_circle_are_no_folders_of_people(tmp_path):
    picture = cv2.imencode(".jpg", np.zeros((112, 112, 3), np.uint8))[1].tobytes()
    for above, links, back in (("flat", "flat", "."), ("deep/a", "deep/a", ".."), ("far/a", "far/a", "../../far")):
        for person in ("ann", "bob"):
            (tmp_path / above / person).mkdir(parents=True)
            (tmp_path / above / person / "1.jpg").write_bytes(picture)
        for name in ("x", "y"):
            (tmp_path / links / name).symlink_to(back)
    assert open_training_set(tmp_path / "flat").identity_names == ["ann", "bob"]
    for root in ("deep", "far"):
        assert open_training_set(tmp_path / root).identity_names == ["a/ann", "a/bob"]


def test_every_kind_is_a_whole_protocol(shared):
    wanted = {name for name in vars(crop_sets.Crops) if not name.startswith("_")} | set(crop_sets.Crops.__annotations__)
    for case in ("webdataset", "labels_from1", "im2rec_chunks", "list_file", "list_file/train_list.txt"):
        crops = open_training_set(shared / "cases" / case)
        assert all(hasattr(crops, name) for name in wanted)
