"""Different people never share a folder, and one person is not split: sources of every kind through extract.py."""

import gzip
import io
import json
import os
import resource
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from test_extract import check_listing, make_zip, photo, run, tar_bytes, tree

import extract
from formats import archives, webdataset
from formats.names import TakenNames


def people(out):
    """Folder -> number of its photos."""
    counts = {}
    for path in tree(out):
        counts[path.split("/")[0]] = counts.get(path.split("/")[0], 0) + 1
    return counts


CASES = {
    "webdataset": 8,
    "same_name/a/faces same_name/b/faces": 8,
    "labels_from1": 8,
    "face2rec_split_identity": 20,
    "im2rec_chunks": 8,
    "list_file/train_list.txt": 8,
    "webface_nested": 8,
}


@pytest.mark.parametrize("case", CASES)
def test_what_people_really_have(shared, tmp_path, case):
    assert run(tmp_path / "raw", *(shared / "cases" / part for part in case.split())) == 0
    found = people(tmp_path / "raw")
    assert len(found) == CASES[case]
    if "split" not in case and "same" not in case:
        assert set(found.values()) == {4}
    check_listing(tmp_path / "raw")


def test_a_split_archive_is_one_from_any_side(shared, tmp_path, capsys):
    folder = shared / "cases" / "split_tar"
    for number, given in enumerate(([folder], sorted(folder.iterdir()), [folder / "glint360k_00"])):
        assert run(tmp_path / f"raw{number}", *given) == 1
        text = capsys.readouterr()
        assert "3 members" in text.out and "cat " in text.err and "tar -xf - -C FOLDER" in text.err
    assert run(tmp_path / "later", folder / "glint360k_02") == 1
    assert "name the first one" in capsys.readouterr().err


def test_a_colon_is_no_drive(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes([("set/A:B/1.jpg", photo(1)), ("set/C/1.jpg", photo(2))]))
    for _ in range(2):
        assert run(tmp_path / "raw", tmp_path / "a.tar") == 0
        assert sorted(people(tmp_path / "raw").values()) == [1, 1]
        check_listing(tmp_path / "raw")


def test_a_list_whose_photos_have_changed_is_another_one(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for number in range(2):
        (tmp_path / "set" / f"{number}.jpg").write_bytes(photo(number))
    (tmp_path / "set" / "list.txt").write_text("# path label\n0.jpg 0\n1.jpg 1\n")
    assert run(tmp_path / "raw", tmp_path / "set" / "list.txt") == 0
    assert run(tmp_path / "raw", tmp_path / "set" / "list.txt") == 0
    (tmp_path / "set" / "0.jpg").write_bytes(photo(7))
    capsys.readouterr()
    assert run(tmp_path / "raw", tmp_path / "set" / "list.txt") == 1
    assert "list.txt" in capsys.readouterr().err


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "raw" / "p0").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw" / "p1").write_text("a file")
    (tmp_path / "a.tar").write_bytes(tar_bytes([(f"set/p{n}/1.jpg", photo(n)) for n in range(3)]))
    assert run(tmp_path / "raw", tmp_path / "a.tar") == 0
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "raw" / "p1").read_text() == "a file"
    assert {path.parent.name for path in (tmp_path / "raw").glob("*/1.jpg")} == {"p0~2", "p1~2", "p2"}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_parts_are_read_as_one(tmp_path, kind):
    files = {f"P{index % 5}/{index}.jpg": photo(index) for index in range(40)}
    data = tar_bytes(files.items()) if kind == "tar" else make_zip(tmp_path / "s.zip", files).read_bytes()
    for number, name in enumerate(["aa", "ab", "ac"]):
        (tmp_path / f"x.{kind}.{name}").write_bytes(data[number * 9000 : (number + 1) * 9000 if number < 2 else None])
    assert run(tmp_path / "raw", tmp_path / f"x.{kind}.aa") == 0
    assert tree(tmp_path / "raw") == files


# ----------------------------------------------------------------------------------------------------- who is who


def test_people_of_two_sets_are_kept_apart_and_named(tmp_path, capsys):
    for name in ("lfw", "casia"):
        make_zip(tmp_path / f"{name}.zip", {f"{name}/{who}/1.jpg": photo(len(name) + who) for who in range(3)})
    sources = (tmp_path / "lfw.zip", tmp_path / "casia.zip")
    assert run(tmp_path / "raw", *sources) == 0
    assert people(tmp_path / "raw") == dict.fromkeys(["0", "1", "2", "0~2", "1~2", "2~2"], 1)
    assert "3 identities have the names of others in" in capsys.readouterr().out
    assert run(tmp_path / "raw", *sources) == 0  # and they stay so
    # A run that goes on says the same as one that was never stopped.
    listing = (tmp_path / "raw" / "listing.json").read_bytes()
    state = tmp_path / "raw" / extract._STATE / "sources.json"
    state.write_text(state.read_text().replace('"finished": true', '"finished": false'))
    assert run(tmp_path / "raw", *sources) == 0
    assert (tmp_path / "raw" / "listing.json").read_bytes() == listing
    assert run(tmp_path / "prefix", *sources, options=["--prefix", "lfw", "casia"]) == 0
    assert set(people(tmp_path / "prefix")) == {f"{name}-{who}" for name in ("lfw", "casia") for who in range(3)}
    assert run(tmp_path / "join", *sources, options=["--join"]) == 0
    assert people(tmp_path / "join") == {"0": 2, "1": 2, "2": 2}
    assert run(tmp_path / "bad", *sources, options=["--prefix", "one"]) == 1


def test_numbers_in_folders_of_two_sets_are_two_people_and_of_splits_one(tmp_path):
    files = {"lfw/train/7/1.jpg": photo(1), "lfw/val/7/2.jpg": photo(2), "casia/train/7/1.jpg": photo(3)}
    assert run(tmp_path / "raw", make_zip(tmp_path / "s.zip", files)) == 0
    assert people(tmp_path / "raw") == {"7": 2, "7~2": 1}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("part1.zip", "part2.zip", True),
        ("000000.tar", "000017.tar", True),
        ("faces-01.zip", "faces-12.zip", True),
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", True),
        ("train_0.rec", "train_1.rec", True),
        ("lfw.zip", "casia.zip", False),
        ("set1.zip", "set2.zip", False),
        ("105_classes.zip", "106_classes.zip", False),
        ("faces.zip", "faces.tar", False),
    ],
)
def test_which_files_are_parts_of_one_set(tmp_path, one, other, same):
    for name in (one, other):
        (tmp_path / name).touch()
    assert (archives.set_of(tmp_path / one) == archives.set_of(tmp_path / other)) == same


def test_a_folder_that_was_renamed_is_nobody_elses(tmp_path):
    make_zip(tmp_path / "one.zip", {"Bob/1.jpg": photo(1), "bob/1.jpg": photo(2)})
    make_zip(tmp_path / "two.zip", {"bob~2/1.jpg": photo(3)})
    assert run(tmp_path / "raw", tmp_path / "one.zip") == 0
    assert run(tmp_path / "raw", tmp_path / "two.zip") == 0
    assert tree(tmp_path / "raw") == {"Bob/1.jpg": photo(1), "bob~2/1.jpg": photo(2), "bob~2~2/1.jpg": photo(3)}
    # The same after a kill between the folder and its first photo.
    state = tmp_path / "raw" / extract._STATE
    state.joinpath("0001.tsv").write_bytes(b"")
    entries = json.loads((state / "sources.json").read_text())
    entries[1]["finished"] = False
    (state / "sources.json").write_text(json.dumps(entries))
    (tmp_path / "raw" / "bob~2~2" / "1.jpg").unlink()
    assert run(tmp_path / "raw", tmp_path / "two.zip") == 0
    assert people(tmp_path / "raw") == {"Bob": 1, "bob~2": 1, "bob~2~2": 1}


def test_a_dot_in_a_name_is_no_ending(tmp_path):
    for name, number in (("one.zip", 1), ("two.zip", 2)):
        make_zip(tmp_path / name, {"J. R. Dotted Jr/1.jpg": photo(number)})
    assert run(tmp_path / "raw", tmp_path / "one.zip", tmp_path / "two.zip") == 0
    assert people(tmp_path / "raw") == {"J. R. Dotted Jr": 1, "J. R. Dotted Jr~2": 1}


def test_names_that_differ_only_beyond_what_a_file_system_keeps(tmp_path):
    names = ["x" * 205 + "a", "x" * 205 + "b", "an\x01n", "an_n", ".ann", "_ann"]
    entries = [(f"{name}/1.jpg", photo(number)) for number, name in enumerate(names)]
    (tmp_path / "s.tar").write_bytes(tar_bytes(entries))
    assert run(tmp_path / "raw", tmp_path / "s.tar") == 0
    assert len(people(tmp_path / "raw")) == len(names)


# ------------------------------------------------------------------------------------------------------ WebDataset


def shard(path, entries):
    path.write_bytes(tar_bytes([(name, data if isinstance(data, bytes) else data.encode()) for name, data in entries]))
    return path


@pytest.mark.parametrize("suffix", ["cls", "json"])
@pytest.mark.parametrize("first", [True, False])
def test_labels_of_shards_in_any_order(tmp_path, suffix, first):
    entries = []
    for index in range(12):
        label = {"cls": f"{index % 3}\n", "json": json.dumps({"width": 8, "identity": index % 3})}[suffix]
        pair = [(f"d/{index:05d}.seg.jpg", photo(index)), (f"d/{index:05d}.{suffix}", label)]
        entries += pair[::-1] if first else pair
    assert run(tmp_path / "raw", shard(tmp_path / "00000.tar", entries)) == 0
    assert people(tmp_path / "raw") == {f"{tmp_path.name}-{label:07d}": 4 for label in range(3)}


def test_shards_name_what_has_no_label_or_two(tmp_path):
    entries = [
        ("1.jpg", photo(1)), ("1.cls", "Ann"),
        ("2.jpg", photo(2)), ("2.json", "{}"),
        ("3.jpg", photo(3)), ("3.cls", "4"), ("3.json", '{"label": 5}'),
        ("4.jpg", photo(4)), ("4.cls", "7"), ("4.json", '{"label": 7.0}'),
        ("5.jpg", photo(5)), ("5.cls", "../../evil"),
    ]  # fmt: skip
    assert run(tmp_path / "raw", shard(tmp_path / "0.tar", entries)) == 1
    rows = {row["member"]: row for row in check_listing(tmp_path / "raw")}
    assert rows["1.jpg"]["path"] == "Ann/1.jpg" and rows["4.jpg"]["path"].endswith("-0000007/4.jpg")
    assert rows["2.jpg"]["reason"].startswith("no label") and rows["3.jpg"]["reason"].startswith("two labels")
    assert rows["5.jpg"]["path"] == "_._.._evil/5.jpg"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("large", [(0,), (0, 1), (1, 2)])
def test_a_shard_may_begin_with_large_photos(tmp_path, pack, large):
    rest = np.random.default_rng(0).bytes(1_500_000)  # behind the picture, and not to be compressed
    entries = []
    for number, name in enumerate(("alice", "bob", "carol")):
        entries += [(f"photos/{number}.jpg", photo(number) + rest * (number in large)), (f"photos/{number}.cls", name)]
    path = shard(tmp_path / "wds-0000.tar", entries)
    path.write_bytes(pack(path.read_bytes()))
    assert run(tmp_path / "raw", path) == 0
    assert people(tmp_path / "raw") == {"alice": 1, "bob": 1, "carol": 1}


def test_a_tar_of_large_photos_is_not_read_to_its_end_to_see_what_it_is():
    asked = []
    data = tar_bytes([(f"A/{number}.jpg", bytes(1 << 20)) for number in range(20)])

    def read(at, count):
        asked.append(at)
        return data[at : at + count]

    assert not webdataset.has_labels(read) and asked == sorted(asked) and asked[-1] < 5 << 20


def test_what_belongs_to_one_key_is_bounded(tmp_path, capsys):
    large = photo(1) + bytes(700 << 10)
    entries = [("1.jpg", photo(1)), ("1.cls", "Ann"), ("2.a.jpg", large), ("2.b.jpg", large), ("2.cls", "Bob")]
    assert run(tmp_path / "raw", shard(tmp_path / "s.tar", entries), options=["--max-file-mb", "1"]) == 1
    assert "more than 1048576 bytes of the key '2'" in capsys.readouterr().err
    assert people(tmp_path / "raw") == {"Ann": 1}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_there_may_be_more_sources_than_open_files(tmp_path, kind):
    sources = []
    for number in range(50):
        path = tmp_path / f"{number:04d}.{kind}"
        entries = {f"A/{number}.jpg": photo(number)}
        sources.append(shard(path, entries.items()) if kind == "tar" else make_zip(path, entries))
    command = ["sh", "-c", 'ulimit -n 40 && exec "$@"', "sh", sys.executable, extract.__file__, *map(str, sources)]
    for _ in range(2):
        done = subprocess.run([*command, "--out", str(tmp_path / "raw")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert people(tmp_path / "raw") == {"A": 50}


def test_json_that_says_nothing_of_people_makes_no_shard(tmp_path):
    entries = [("A/1.jpg", photo(1)), ("A/1.json", '{"width": 8}'), ("A/2.jpg", photo(2))]
    assert run(tmp_path / "raw", shard(tmp_path / "s.tar", entries)) == 0
    assert people(tmp_path / "raw") == {"A": 2}


def test_index_of_a_tar_agrees_with_the_library(tmp_path):
    files = [(f"{'long ' * 30}{index}/{index}.jpg", photo(index)) for index in range(9)] + [("k/1.cls", b"1")]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
            for name, data in files:
                info = tarfile.TarInfo(name[-90:] if form == tarfile.USTAR_FORMAT else name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        data = stream.getvalue()
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            expected = [(info.name, info.offset_data, info.size) for info in archive]
        found = [(entry.name, entry.offset, entry.size) for entry in webdataset.index(data)]
        assert found == expected
        for cut in (100, 700, len(data) // 2):
            with pytest.raises(ValueError, match=r"cut off|no tar header"):
                list(webdataset.index(data[:cut]))


# ---------------------------------------------------------------------------------------------- lists and Parquet


def test_lists_with_other_separators_and_paths_that_lead_out(tmp_path, capsys):
    (tmp_path / "set" / "im gs").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "set" / "im gs" / f"{number}.jpg").write_bytes(photo(number))
    (tmp_path / "evil.jpg").write_bytes(photo(9))
    lines = [
        "# path label",
        "im gs/0.jpg 0",
        "im gs/1.jpg\t0",
        "im gs\\2.jpg,1",
        "",
        "../evil.jpg 1",
        "gone.jpg 1",
        "x",
    ]
    (tmp_path / "set" / "list.txt").write_text("\r\n".join(lines))
    assert run(tmp_path / "raw", tmp_path / "set" / "list.txt") == 1
    rows = check_listing(tmp_path / "raw")
    assert [row["status"] for row in rows] == [
        "skipped", "extracted", "extracted", "extracted", "skipped", "damaged", "damaged", "damaged",
    ]  # fmt: skip
    assert rows[5]["reason"] == "a path with '..'" and "No such file" in rows[6]["reason"]
    assert people(tmp_path / "raw") == {"set-0000000": 2, "set-0000001": 1}


def test_parquet_of_the_hub(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": photo(index), "path": f"{index}.jpg"} for index in range(6)] + [{"bytes": None, "path": "x"}]
    table = pa.table({"image": images, "label": [0, 0, 1, 1, 2, None, 1]})
    info = {"info": {"features": {"label": {"names": ["Ann", "Bob"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=2)
    assert run(tmp_path / "raw", tmp_path / "train-00000-of-00001.parquet") == 1
    assert people(tmp_path / "raw") == {"Ann": 2, "Bob": 2, f"{tmp_path.name}-0000002": 1}
    assert [row["reason"] for row in check_listing(tmp_path / "raw")][5:] == ["no label", "no image"]
    data = (tmp_path / "train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    assert run(tmp_path / "cut", tmp_path / "cut.parquet") == 1


# ------------------------------------------------------------------------------------------------- state and disk


def damaged_states(out):
    """Ways in which what extract.py keeps can be damaged."""
    state = out / extract._STATE
    journal, sources, folders = state / "0000.tsv", state / "sources.json", state / "folders.tsv"
    rows = journal.read_bytes().splitlines(keepends=True)
    entries = json.loads(sources.read_text())
    yield "a row leads out", lambda: journal.write_bytes(b"".join(rows).replace(b"Ann/1.jpg", b"../../evil.jpg"))
    yield "a row is lost", lambda: journal.write_bytes(b"".join(rows[:1] + rows[2:]))
    yield "the last row is lost", lambda: journal.write_bytes(b"".join(rows[:-1]))
    yield "rows are swapped", lambda: journal.write_bytes(b"".join(rows[::-1]))
    yield "a byte is another", lambda: journal.write_bytes(b"".join(rows).replace(b"extracted", b"extracteD", 1))
    yield "not text", lambda: journal.write_bytes(b"\xff\xfe\0" * 30 + b"\n")
    yield "no journal", journal.unlink
    yield "no JSON", lambda: sources.write_text("{")
    yield "empty", lambda: sources.write_text("")
    yield "another shape", lambda: sources.write_text('{"path": 1}')
    yield "no keys", lambda: sources.write_text('[{"path": "x"}]')
    yield "a journal elsewhere", lambda: sources.write_text(json.dumps([entries[0] | {"journal": "../../x.tsv"}]))
    yield "another type", lambda: sources.write_text(json.dumps([entries[0] | {"rows": "4"}]))
    yield "deep", lambda: sources.write_text("[" * 100_000)
    yield "no sources", sources.unlink
    yield "folders leads out", lambda: folders.write_bytes(folders.read_bytes().replace(b"Ann\t", b"../Ann\t"))
    yield "no folders", folders.unlink
    yield "a folder is lost", lambda: folders.write_bytes(folders.read_bytes().splitlines(keepends=True)[0])
    yield "folders of nothing", lambda: folders.write_bytes(b"x\n")


def test_damaged_state_is_one_line_and_writes_nothing(tmp_path, capsys):
    source = make_zip(tmp_path / "s.zip", {"Ann/1.jpg": photo(1), "Ann/2.jpg": photo(2), "Bob/1.jpg": photo(3)})
    ways = 19
    for number in range(ways):
        out = tmp_path / str(number) / "deep" / "raw"
        assert run(out, source) == 0
        name, damage = list(damaged_states(out))[number]
        damage()
        (out / "Ann" / "1.jpg").unlink()  # would be written again
        before = sorted(path for path in (tmp_path / str(number)).rglob("*") if path.name != "lock")
        capsys.readouterr()
        assert run(out, source) == 1, name
        text = capsys.readouterr().err
        assert "remove" in text and "start again" in text and text.count("\n") == 1, (name, text)
        after = sorted(path for path in (tmp_path / str(number)).rglob("*") if path.name != "lock")
        assert set(after) <= set(before) | {out / extract._STATE / "folders.tsv"}, name


def test_a_full_disk_tears_no_row(tmp_path, capsys):
    # Limits on the size of a file meet the journal's writes as a full disk does: a part is written, then nothing.
    files = {f"P{index % 3}/{'long name ' * 6}{index}.jpg": photo(0)[:300] for index in range(12)}
    source = make_zip(tmp_path / "s.zip", files)
    whole = tmp_path / "whole"
    assert run(whole, source) == 0
    expected = tree(whole)
    size = (whole / extract._STATE / "0000.tsv").stat().st_size
    for limit in range(400, size, 211):
        out = tmp_path / f"raw{limit}"
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            os._exit(run(out, source))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert run(out, source) == 0
        assert tree(out) == expected
        check_listing(out)


# --------------------------------------------------------------------------------------------------------- many


def test_many_files_of_one_name_take_steady_time():
    taken = TakenNames()
    compared = []
    names = type(
        "Counted", (set,), {"__contains__": lambda self, name: compared.append(name) or set.__contains__(self, name)}
    )
    taken._names = names()
    for _ in range(3000):
        taken.add(taken.free("face.jpg"))
    assert len(compared) < 3 * 3000


def test_the_directory_of_a_zip_takes_no_memory(tmp_path):
    import tracemalloc

    make_zip(tmp_path / "s.zip", {f"P{index % 7}/{index:06d}.txt": b"" for index in range(5_000)})
    tracemalloc.start()
    source = archives.open_source(tmp_path / "s.zip", archives.Limits(1 << 20, 200.0))
    assert sum(1 for _ in source.members()) == source.total == 5_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20  # a list of the members has 3 MB
