"""Feature files, packed stores, template and noise lists."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaface import features
from megaface.features import (
    StoreWriter,
    bin_bytes,
    open_store,
    read_feature,
    read_features,
    write_feature,
    write_features,
)
from megaface.lists import PhotoIndex, photo_key, read_noise_list, read_template_list
from utils import InputError

RNG = np.random.default_rng(0)


def header(*numbers):
    return np.array(numbers, "<i4").tobytes()


# ---------------------------------------------------------------------------------------------- .bin files


def test_a_feature_is_a_column_of_float32(tmp_path):
    feature = RNG.standard_normal(7).astype(np.float32)
    write_feature(tmp_path / "x.bin", feature)
    assert (tmp_path / "x.bin").read_bytes() == header(7, 1, 4, 5) + feature.tobytes()
    assert np.array_equal(read_feature(tmp_path / "x.bin"), feature)


def test_matrices_have_the_devkits_layout(shared):
    data = (shared / "megaface" / "golden" / "tiny_10d" / "facescrub_megaface.bin").read_bytes()
    matrix = np.frombuffer(data, "<f4", offset=16).reshape(148, 10)
    assert bin_bytes(matrix) == data


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (header(1, 3, 12, 5) + np.arange(3, dtype="<f4").tobytes(), [0, 1, 2]),
        (header(3, 1, 8, 5) + np.arange(6, dtype="<f4").tobytes(), [0, 2, 4]),
        (header(3, 1, 8, 6) + np.arange(3, dtype="<f8").tobytes(), [0, 1, 2]),
        (header(1, 3, 32, 6) + np.arange(4, dtype="<f8").tobytes(), [0, 1, 2]),
    ],
    ids=["row", "padded column", "float64", "padded row"],
)
def test_other_layouts_of_the_same_format(tmp_path, data, wanted):
    (tmp_path / "x.bin").write_bytes(data)
    assert read_feature(tmp_path / "x.bin").tolist() == wanted
    assert read_features([str(tmp_path / "x.bin")] * 3).tolist() == [wanted] * 3


BROKEN = {
    b"": "empty",
    b"\1\2\3": "truncated, 3 bytes",
    header(3, 1, 4, 5): "truncated, 0 bytes of numbers instead of 12",
    header(3, 1, 4, 5) + bytes(11): "truncated",
    header(3, 1, 4, 5) + bytes(13): "too long",
    header(3, 1, 4, 7) + bytes(12): "type 7",
    header(0, 1, 4, 5): "0 rows",
    header(-3, 1, 4, 5) + bytes(12): "-3 rows",
    header(3, 2, 8, 5) + bytes(24): "3 rows of 2 numbers",
    header(3, 1, 2, 5) + bytes(6): "2 bytes apart",
    header(3, 1, 5, 5) + bytes(15): "5 bytes apart",
    header(2**31 - 1, 1, 4, 5) + bytes(12): "2147483647 rows",
}


@pytest.mark.parametrize("data", BROKEN, ids=BROKEN.values())
def test_damaged_files_are_named(tmp_path, data):
    paths = [str(tmp_path / f"{name}.bin") for name in "abc"]
    for path in paths:
        write_feature(path, np.ones(3))
    Path(paths[1]).write_bytes(data)
    for read in (lambda: read_feature(paths[1]), lambda: read_features(paths)):
        with pytest.raises(InputError) as error:
            read()
        assert str(error.value).startswith(f"{paths[1]}: ") and BROKEN[data] in str(error.value)


@given(st.binary(max_size=64))
def test_no_bytes_confuse_the_reader(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(data)
    try:
        feature = read_feature(path)
    except InputError:
        return
    assert feature.ndim == 1 and len(feature)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_features_that_are_not_finite_are_named(tmp_path, bad):
    paths = [str(tmp_path / f"{number}.bin") for number in range(600)]
    write_features(paths, np.ones((600, 3), np.float32))
    Path(paths[500]).write_bytes(header(3, 1, 8, 6) + np.array([0, bad, 0]).tobytes())
    with pytest.raises(InputError, match=r"500\.bin: holds NaN or inf"):
        read_features(paths)


def test_missing_files_come_first_and_all_are_counted(tmp_path):
    paths = [str(tmp_path / "x" / f"{number}.bin") for number in range(700)]
    matrix = RNG.standard_normal((700, 5)).astype(np.float32)
    write_features(paths, matrix)
    assert np.array_equal(read_features(paths), matrix)
    write_feature(paths[3], np.ones(4))
    Path(paths[600]).unlink()
    Path(paths[699]).unlink()
    with pytest.raises(InputError, match=r"600\.bin: missing \(and 2 more of 700 feature files cannot be used\)"):
        read_features(paths)
    with pytest.raises(InputError, match=r"3\.bin: 4 dimensions instead of 5$"):
        read_features(paths[:600])
    with pytest.raises(InputError, match=r"/0\.bin: missing$"):
        read_features([str(tmp_path / "0.bin")])
    with pytest.raises(InputError, match="Is a directory"):
        read_features([str(tmp_path)])


@pytest.mark.parametrize("slow_file", [-1.0, 1e9], ids=["slow disk", "page cache"])
def test_whole_files_are_read_without_a_second_look(tmp_path, monkeypatch, slow_file):
    """The devkit's header is a column's: rows = dimensions, stride = 4."""
    paths = [str(tmp_path / f"{number}.bin") for number in range(700)]
    matrix = RNG.standard_normal((700, 5)).astype(np.float32)
    write_features(paths, matrix)
    looked_at = []
    monkeypatch.setattr(features, "read_feature", lambda path: looked_at.append(path) or read_feature(path))
    monkeypatch.setattr(features, "SLOW_FILE", slow_file)
    assert np.array_equal(read_features(paths, dimensions=5), matrix)
    assert looked_at == []
    write_feature(paths[-1], np.ones(4))
    with pytest.raises(InputError, match=r"699\.bin: 4 dimensions instead of 5$"):
        read_features(paths, dimensions=5)


def test_progress_counts_files(tmp_path):
    paths = [str(tmp_path / f"{number}.bin") for number in range(600)]
    seen = {"write": [], "read": []}
    write_features(paths, np.ones((600, 3)), seen["write"].append)
    read_features(paths, advance=seen["read"].append)
    assert sum(seen["write"]) == sum(seen["read"]) == 600
    assert len(list(tmp_path.iterdir())) == 600  # nothing temporary stays


# ---------------------------------------------------------------------------------------------- packed store


def fill(folder, names, matrix, settings=None, stop=None, problems=None):
    with StoreWriter(folder, names, matrix.shape[1], settings or {"model": "a"}) as writer:
        started = writer.done
        for row in range(writer.done, len(names) if stop is None else stop):
            problem = {0: problems[row]} if problems and row in problems else None
            writer.append(matrix[row : row + 1], problem)
        return started, writer.finish() if stop is None else None


def test_a_store_is_an_array_and_names(tmp_path):
    names = ["a b/x.jpg", "tab\there", "Renée/é.png", "\udcff.jpg"]
    matrix = RNG.standard_normal((4, 6)).astype(np.float32)
    matrix[1] = np.nan
    _, store = fill(tmp_path / "s", names, matrix, problems={1: "crop: not\ta photo"})
    assert store.names == names and store.problems == {1: "crop: not\ta photo"}
    assert isinstance(store.features, np.memmap) and np.array_equal(store.features, matrix, equal_nan=True)
    assert np.array_equal(np.load(tmp_path / "s" / "features.npy"), matrix, equal_nan=True)
    again, store = fill(tmp_path / "s", names, matrix)
    assert again == 4 and store.problems == {1: "crop: not\ta photo"}
    assert not list((tmp_path / "s").glob("*.partial")) and not (tmp_path / "s" / "progress.json").exists()


def test_an_interrupted_store_goes_on_where_it_stopped(tmp_path):
    names = [str(number) for number in range(50)]
    matrix = RNG.standard_normal((50, 6)).astype(np.float32)
    assert fill(tmp_path, names, matrix, stop=20, problems={3: "gone"})[0] == 0
    with pytest.raises(FileNotFoundError):
        open_store(tmp_path)
    with open(tmp_path / "features.partial", "ab") as file:  # half a row that was never declared safe
        file.write(b"half")
    started, store = fill(tmp_path, names, matrix)
    assert started == 20 and store.problems == {3: "gone"}
    assert np.array_equal(store.features, matrix)


def test_other_names_settings_or_a_cut_file_start_afresh(tmp_path):
    names = [str(number) for number in range(9)]
    matrix = RNG.standard_normal((9, 6)).astype(np.float32)
    for change in ("settings", "names", "dimensions", "cut"):
        fill(tmp_path, names, matrix, stop=5)
        if change == "cut":
            os.truncate(tmp_path / "features.partial", 150)
            started, _ = fill(tmp_path, names, matrix)
        elif change == "settings":
            started, _ = fill(tmp_path, names, matrix, settings={"model": "b"})
        elif change == "names":
            started, _ = fill(tmp_path, names[::-1], matrix)
        else:
            started, _ = fill(tmp_path, names, matrix[:, :3])
        assert started == 0, change
        assert len(open_store(tmp_path).names) == 9
    # A finished store of something else is replaced, not mixed with.
    started, store = fill(tmp_path, names, -matrix, settings={"model": "c"})
    assert started == 0 and np.array_equal(store.features, -matrix)


def test_damage_to_a_finished_store_is_named(tmp_path):
    names = ["a", "b"]
    fill(tmp_path, names, np.ones((2, 3), np.float32))
    (tmp_path / "names.jsonl").write_text('["b", ""]\n["a", ""]\n')
    with pytest.raises(InputError, match=r"names\.jsonl: does not fit"):
        open_store(tmp_path)
    for damaged in ('["b", ""]\n["a"]\n', '["b"'):
        (tmp_path / "names.jsonl").write_text(damaged)
        with pytest.raises(InputError, match=r"names\.jsonl: damaged"):
            open_store(tmp_path)
    np.save(tmp_path / "features.npy", np.ones((2, 4), np.float32))
    with pytest.raises(InputError, match=r"features\.npy: .* does not fit"):
        open_store(tmp_path)
    (tmp_path / "features.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"features\.npy: damaged"):
        open_store(tmp_path)
    (tmp_path / "info.json").write_text("[]")
    with pytest.raises(InputError, match=r"info\.json"):
        open_store(tmp_path)
    assert fill(tmp_path, names, np.ones((2, 3), np.float32))[0] == 0


def spoil(path, change):
    """Replace a JSON file by what `change` makes of it."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


@pytest.mark.parametrize(
    "change",
    [
        *(
            lambda info, key=key: {k: v for k, v in info.items() if k != key}
            for key in ("rows", "dimensions", "settings")
        ),
        *(lambda info, key=key: info | {key: "x"} for key in ("rows", "dimensions", "settings", "checksums")),
        lambda info: info | {"checksums": info["checksums"][1:]},
        lambda info: info | {"checksums": [1] * len(info["checksums"])},
        lambda info: info | {"rows": -1},
        lambda info: {"format": info["format"]},
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_damaged_words_about_a_store_are_no_traceback(tmp_path, change, finished):
    """Named when the store is read, and a reason to begin anew when it is written."""
    matrix = RNG.standard_normal((300, 3)).astype(np.float32)
    names = [str(number) for number in range(300)]
    fill(tmp_path, names, matrix, stop=None if finished else 290)
    spoil(tmp_path / ("info.json" if finished else "progress.json"), change)
    if finished:
        with pytest.raises(InputError, match=r"(info\.json|names\.jsonl|features\.npy): "):
            open_store(tmp_path)
    _, store = fill(tmp_path, names, matrix)
    assert np.array_equal(store.features, matrix) and np.array_equal(open_store(tmp_path).features, matrix)


@pytest.mark.parametrize(
    "array",
    [
        np.float32(1),
        np.ones(4, np.float32),
        np.ones((2, 3, 1), np.float32),
        np.ones((2, 3)),
        np.ones((0, 3), np.float32),
    ],
)
def test_arrays_of_odd_shapes_are_no_traceback(tmp_path, array):
    fill(tmp_path, ["a", "b"], np.ones((2, 3), np.float32))
    np.save(tmp_path / "features.npy", array)
    with pytest.raises(InputError, match=r"features\.npy: "):
        open_store(tmp_path)
    started, store = fill(tmp_path, ["a", "b"], np.ones((2, 3), np.float32))
    assert started == 0 and store.features.shape == (2, 3)


def flip_a_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "rows of another model"])
@pytest.mark.parametrize("finished", [True, False])
def test_flipped_bits_and_rows_of_others_are_not_given_out(tmp_path, finished, damage):
    """What does not fit its checksum is an error for a reader; a writer asks for those rows again and no others."""
    names = [str(number) for number in range(3 * features.CHUNK + 10)]
    matrix = RNG.standard_normal((len(names), 4)).astype(np.float32)
    stop = None if finished else len(names) - 5
    fill(tmp_path, names, matrix, stop=stop)
    path = tmp_path / ("features.npy" if finished else "features.partial")
    if damage == "flip":
        flip_a_bit(path, path.stat().st_size - 2 - 16 * features.CHUNK)
    else:
        data = bytearray(path.read_bytes())
        data[-16 * features.CHUNK :] = RNG.standard_normal(4 * features.CHUNK).astype("<f4").tobytes()
        path.write_bytes(data)
    if finished:
        with pytest.raises(InputError, match=r"features\.npy: damaged from row \d+ on"):
            open_store(tmp_path)
    with StoreWriter(tmp_path, names, 4, {"model": "a"}) as writer:
        assert 0 < writer.damaged == len(writer.stale) <= 2 * features.CHUNK
        with pytest.raises(ValueError, match="stale"):
            writer.finish()
        stale = list(writer.stale)
        writer.replace({row: matrix[row] for row in stale[::2]})
    with StoreWriter(tmp_path, names, 4, {"model": "a"}) as writer:  # half of them, and killed
        assert set(writer.stale) <= set(stale)
        writer.replace({row: matrix[row] for row in writer.stale})
        writer.append(matrix[writer.done :])
        writer.finish()
    assert np.array_equal(open_store(tmp_path).features, matrix)


def test_rows_made_from_something_else_are_stale(tmp_path):
    names = [str(number) for number in range(700)]
    matrix, origins = RNG.standard_normal((700, 4)).astype(np.float32), np.arange(700)
    for stop in (650, 700):
        with StoreWriter(tmp_path, names, 4, {}, origins) as writer:
            writer.append(matrix[writer.done : stop])
    changed = origins.copy()
    changed[[3, 300, 699]] += 10**9
    with StoreWriter(tmp_path, names, 4, {}, changed) as writer:
        assert (writer.done, writer.stale, writer.damaged) == (700, [3, 300, 699], 0)
        writer.replace({row: -matrix[row] for row in writer.stale}, {300: "gone"})
        store = writer.finish()
    assert np.array_equal(store.features[[3, 300, 699]], -matrix[[3, 300, 699]]) and store.problems == {300: "gone"}
    assert np.array_equal(store.features[4:300], matrix[4:300])
    with StoreWriter(tmp_path, names, 4, {}, changed) as writer:
        assert (writer.done, writer.stale) == (700, [])
    with StoreWriter(tmp_path, names, 4, {}, origins) as writer:
        assert writer.stale == [3, 300, 699]


def test_a_pipe_is_no_feature_file(tmp_path):
    """Nobody writes into it: whoever opens it to read would wait for ever."""
    os.mkfifo(tmp_path / "a.bin")
    for read in (read_feature, lambda path: read_features([str(path)])):
        with pytest.raises(InputError, match="not a file"):
            read(tmp_path / "a.bin")


def test_two_writers_do_not_mix(tmp_path):
    with StoreWriter(tmp_path, ["a"], 3, {}), pytest.raises(InputError, match="another process"):
        StoreWriter(tmp_path, ["a"], 3, {}).__enter__()


def write_slowly(folder, matrix, starts):
    features.COMMIT_SECONDS = 0.02
    with StoreWriter(folder, [str(row) for row in range(len(matrix))], matrix.shape[1], {}) as writer:
        starts.send(writer.done)
        while writer.done < len(matrix):
            writer.append(matrix[writer.done : writer.done + 3])
            time.sleep(0.002)
        writer.finish()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking beside threads
def test_a_store_survives_kill_9_at_any_moment(tmp_path):
    """Kill the writer again and again; what is finished in the end is what a calm run writes."""
    matrix = RNG.standard_normal((600, 5)).astype(np.float32)
    context = multiprocessing.get_context("fork")
    starts, code = [], None
    while code != 0 and len(starts) < 100:
        here, there = context.Pipe()
        process = context.Process(target=write_slowly, args=(tmp_path, matrix, there))
        process.start()
        starts.append(here.recv())
        process.join(timeout=0.05 + 0.01 * len(starts))
        process.kill()
        process.join()
        code = process.exitcode
    assert code == 0 and len(starts) > 1 and max(starts) > 0 and starts == sorted(starts)
    assert np.array_equal(open_store(tmp_path).features, matrix)


# ---------------------------------------------------------------------------------------------- lists


def test_the_official_lists_and_their_noise(shared):
    folder = shared / "megaface"
    noise = [read_noise_list(folder / f"{name}_noises.txt") for name in ("facescrub", "megaface")]
    assert [len(names) for names in noise] == [605, 707]
    for name in ("facescrub_features_list.json", "facescrub_uncropped_features_list.json"):
        probes = read_template_list(folder / "templatelists" / name, with_ids=True)
        marks = noise[0].marks(probes.paths)
        assert (len(probes), len(set(probes.ids)), marks.sum()) == (3530, 80, 24)
        clean = [identity for identity, mark in zip(probes.ids, marks, strict=True) if not mark]
        pairs = [sum(count * (count - 1) for count in map(ids.count, set(ids))) for ids in (probes.ids, clean)]
        assert pairs == [153634, 151542]
    distractors = read_template_list(folder / "templatelists" / "megaface_features_list.json_10000_1")
    assert (len(distractors), distractors.ids, noise[1].marks(distractors.paths).sum()) == (10000, None, 7)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Adam McKay/Adam McKay_468.jpg", "Adam_McKay/Adam_McKay_468.png"),
        ("Aaron Sample/Aaron Sample_211", "Aaron_Sample/Aaron_Sample_211.JPG"),
        ("J. R. Dotted Jr./J. R. Dotted Jr._220.jpg", "J._R._Dotted_Jr./J._R._Dotted_Jr._220"),
        ("Ren\u00e9e/\u00c9l.png", "Rene\u0301e/E\u0301l.gif"),
        ("./a/x.jpg.png", "a\\x"),
    ],
)
def test_names_of_one_photo(one, other):
    assert photo_key(one) == photo_key(other)


def test_names_of_different_photos():
    names = ["a/x_1.jpg", "a/x_10.jpg", "b/x_1.jpg", "x_1.jpg", "a/x_1.bin", "a/X_1.jpg", "a/.jpg"]
    assert len({photo_key(name) for name in names}) == len(names)


def test_noise_is_found_by_the_end_of_a_path(tmp_path):
    (tmp_path / "n.txt").write_text("\ufeff# a comment\nAdam_McKay_468.png\r\n\n375/37531198@N00/41_0.jpg\n")
    noise = read_noise_list(tmp_path / "n.txt")
    paths = ["Adam McKay/Adam McKay_468", "x/375/37531198@N00/41_0", "37531198@N00/41_0.jpg", "McKay_468.png"]
    assert noise.marks(paths).tolist() == [True, True, False, False]
    (tmp_path / "n.txt").write_text("# nothing\n")
    with pytest.raises(InputError, match=r"n\.txt: holds no names"):
        read_noise_list(tmp_path / "n.txt")


def test_files_are_found_by_any_of_their_names():
    index = PhotoIndex(["Adam McKay/Adam McKay_468.jpg", "b"], "tree")
    assert index.find("Adam_McKay/Adam_McKay_468.png") == "Adam McKay/Adam McKay_468.jpg"
    assert index.find("Adam_McKay_468.png") is None
    index = PhotoIndex(["x/1.jpg", "y/1.jpg", "x/1.png"], "tree")
    assert index.find("y/1.bmp") == "y/1.jpg"
    with pytest.raises(InputError, match=r"tree/x/1\.png: x/1\.jpg has the same name"):
        index.find("x/1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a template list"),
        ('{"path": "x"}', "not a template list"),
        ('{"path": [1]}', "not a template list"),
        ('{"path": [], "id": []}', "empty"),
        ('{"path": ["x"]}', '"id" must be'),
        ('{"path": ["x"], "id": ["a", "b"]}', '"id" must be'),
        ('{"path": ["x"], "id": [null]}', '"id" must be'),
        ("[" * 200_000, "not JSON"),
        ('{"path": ["x\\u0000"], "id": ["a"]}', "NUL"),
        ('{"path": ["x\\ud800"], "id": ["a"]}', "half a character, '.ud800'"),
        ('{"path": ["x"], "id": ["\\udfff"]}', "half a character"),
    ],
)
def test_lists_that_are_none(tmp_path, content, message):
    (tmp_path / "list").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_template_list(tmp_path / "list", with_ids=True)
    assert str(tmp_path / "list") in str(error.value)


def test_numbers_are_identities_too(tmp_path):
    (tmp_path / "list").write_text(json.dumps({"path": ["x", "y"], "id": [7, "b"]}))
    assert read_template_list(tmp_path / "list", with_ids=True).ids == ["7", "b"]
