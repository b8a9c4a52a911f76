"""`.bin` sets of every Python and numpy against the expected hashes; hostile and damaged ones refused first of all."""

import hashlib
import io
import json
import pickle
import resource
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import verification_bin
from formats.verification_bin import read_bin, write_bin
from utils import InputError

JPEG = b"\xff\xd8\xff\xe0"


@pytest.fixture
def folder(shared):
    return shared / "formats" / "verification_bin"


@pytest.fixture
def expected(folder):
    return json.loads((folder / "expected.json").read_text())


def load(data, tmp_path):
    path = tmp_path / "set.bin"
    path.write_bytes(data)
    return read_bin(path)


def test_every_sound_file_reads_as_expected(folder, expected):
    names = [n for n, e in expected.items() if e["ok"] and not n.startswith("bad_") and (folder / n).exists()]
    assert len(names) > 20
    for name in names:
        images, same = read_bin(folder / name)
        assert [hashlib.sha256(image).hexdigest() for image in images] == expected[name]["sha256"], name
        assert same.dtype == bool and same.tolist() == [bool(flag) for flag in expected[name]["issame"]], name
        assert all(type(image) is bytes for image in images)


BAD = {
    "bad_count.bin": "7 images for 4 pairs",
    "bad_empty.bin": "holds no pairs",
    "bad_not_a_pair.bin": "EMPTY_DICT",
    "bad_one_not_jpeg.bin": "image 7 (pair 3): 10 bytes that do not begin as an image file does",
    "bad_swapped.bin": "flag 0 is a bytes, not a bool",
    "bad_truncated.bin": "cut off or corrupt",
    "bomb_long.bin": "cut off or corrupt",
    "bomb_reconstruct_shape.bin": "LONG1",
    "evil_eval.bin": "__builtin__.eval",
    "evil_inst_proto0.bin": "INST",
    "evil_os_system.bin": "posix.system; refused, nothing was run",
}


def test_every_bad_file_is_refused_with_its_reason(folder):
    names = [name for name in BAD if (folder / name).exists()]
    assert len(names) >= 6
    for name in names:
        with pytest.raises(InputError) as caught:
            read_bin(folder / name)
        assert name in str(caught.value) and BAD[name] in str(caught.value) and "\n" not in str(caught.value)


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_refused_in_every_protocol(protocol, tmp_path):
    target = tmp_path / "run"
    for value in (
        Call(exec, f"open({str(target)!r}, 'w')"),
        ([JPEG, Call(io.open, str(target), "w")], [True]),
        ([JPEG, JPEG], [Call(np.zeros, 1 << 40)]),
        ([JPEG, Call(np.frombuffer, b"abcd", "u1")], [True]),
        ([JPEG, Call(getattr, 1, "real")], [True]),
    ):
        with pytest.raises(InputError, match=r"refused|occurs in no"):
            load(pickle.dumps(value, protocol), tmp_path)
    assert not target.exists()


CLAIMS = {
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x",
    "bytearray of 8 GiB": b"\x80\x05\x96" + struct.pack("<Q", 8 << 30) + b"x",
    "string of -1": b"\x80\x02T" + struct.pack("<i", -1) + b"x",
    "text of 4 GiB": b"\x80\x03X" + struct.pack("<I", (1 << 32) - 1) + b"x",
    "memo of 2^32": b"\x80\x03]r" + struct.pack("<I", (1 << 32) - 1) + b"0.",
    "frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"].",
    "long of 2^31": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x",
    "shape of 2^62": (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R"
        b"(K\1(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ftcnumpy\ndtype\nX\2\0\0\0u1K\0K\1\x87R\x89C\1xtb."
    ),
    "many dimensions": (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R"
        b"(K\1(" + b"J\xff\xff\xff\x7f" * 100_000 + b"tcnumpy\ndtype\nX\2\0\0\0u1K\0K\1\x87R\x89C\1xtb."
    ),
    "the same text encoded 50000 times": (
        b"\x80\x02(c_codecs\nencode\nq\0X"
        + struct.pack("<I", 1 << 20)
        + b"a" * (1 << 20)
        + b"q\1X\6\0\0\0latin1q\2"
        + b"h\0h\1h\2\x86R" * 50_000
        + b"t."
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_nothing_is_allocated_for_a_claim(claim, tmp_path):
    data = CLAIMS[claim]
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            load(data, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32 * len(data) + (1 << 20)
    finally:
        tracemalloc.stop()


MALFORMED = [
    *(b"", b"hello", b"\x80", b"\x80\x04", b"\x80\x09].", b"(", b"].", b"\x80\x02h\0.", b"\x80\x02a.", b"\x80\x02t."),
    *(b"\x80\x02R.", b"(I5\n.", b"(I1x\n.", b"(I" + b"9" * 30 + b"\n.", b"(S'abc\n.", b"(Sabc\n.", b"(S'a\\x1'\n."),
    *(b"\x80\x03X\1\0\0\0\xff.", b"\x80\x02K\1K\2b.", b"\x80\x04\x8c\1a\x8c\1b\x93.", b"(cos\nsystem\n."),
    *(b"(c" + b"a" * 100, b"]]\x86.", b"]K\1\x86.", b"\x80\x02]N\x86.", b"(lp0\n0.", b"\x80\x02]q\0h\0a."),
]


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_pickles_are_refused(data, tmp_path):
    with pytest.raises(InputError) as caught:
        load(data, tmp_path)
    assert "set.bin" in str(caught.value) and "\n" not in str(caught.value)


NESTED = {
    "deep": b"N" + b"\x85" * 100_000,
    "each twice": b"N" + b"".join(b"q%ch%c\x86" % (index, index) for index in range(60)),
}


@pytest.mark.parametrize("nested", NESTED)
def test_nested_values_are_refused_without_being_printed(nested, tmp_path):
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR"
    kind = b"cnumpy\ndtype\nX\2\0\0\0u1K\0K\1\x87R"
    for data in (array + b"(K\1" + NESTED[nested] + kind + b"\x89C\1xtb", NESTED[nested] + b"\x8c\1x\x93"):
        with pytest.raises(InputError) as caught:
            load(b"\x80\4" + data + b".", tmp_path)
        assert len(str(caught.value)) < 200 + len(str(tmp_path))


STRUCTURES = [
    *(None, 3, [], ([],), ([], [], []), ([JPEG], [True]), ([JPEG, 5], [True]), ([JPEG] * 2, [2]), ([JPEG] * 2, ["1"])),
    *(([JPEG] * 2, None), ([JPEG] * 2, [None]), (JPEG, [True]), ([JPEG] * 2, True), ([JPEG, "x"], [1])),
]


@pytest.mark.parametrize("value", STRUCTURES)
def test_other_structures_are_refused(value, tmp_path):
    with pytest.raises(InputError):
        load(pickle.dumps(value, 4), tmp_path)


def test_arrays_that_are_no_encoded_images_are_refused(tmp_path):
    for array in (np.zeros((2, 2), np.uint8), np.zeros(4, np.float32), np.zeros(4, np.int64)):
        with pytest.raises(InputError):
            load(pickle.dumps(([JPEG, array], [True]), 4), tmp_path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("as_array", [False, True])
def test_what_pickle_and_numpy_write_here_is_read(protocol, as_array, tmp_path):
    images = [JPEG + bytes(range(256)) * 3, JPEG + b"\n'\"\\", JPEG, JPEG + "é".encode("latin1")]
    made = [np.frombuffer(image, np.uint8).reshape(-1, 1).copy() for image in images] if as_array else images
    for flags in ([True, False], (1, 0), np.array([True, False]), [np.True_, np.False_], np.array([1, 0])):
        got, same = load(pickle.dumps((made, flags), protocol), tmp_path)
        assert got == images and same.tolist() == [True, False]


def test_a_large_set_needs_wide_memo_indices(tmp_path):
    images = [JPEG + struct.pack("<I", index) for index in range(3000)]
    for data in (pickle.dumps((images, [True] * 1500), 2), pickle.dumps((images, [True] * 1500), 3)):
        assert load(data, tmp_path)[0] == images


@given(
    st.lists(st.tuples(st.binary(max_size=60), st.binary(max_size=60), st.booleans()), min_size=1, max_size=12),
)
@settings(max_examples=100, deadline=None)
def test_write_and_read_round_trip(tmp_path_factory, pairs):
    path = tmp_path_factory.getbasetemp() / "round.bin"
    images = [JPEG + image for one, other, _ in pairs for image in (one, other)]
    flags = [same for *_, same in pairs]
    write_bin(path, images, flags)
    got, same = read_bin(path)
    assert got == images and same.tolist() == flags
    assert pickle.loads(path.read_bytes()) == (images, flags)  # what any other loader sees
    first = path.read_bytes()
    write_bin(path, [bytes(bytearray(image)) for image in images], np.array(flags))
    assert path.read_bytes() == first


def test_write_checks_the_counts(tmp_path):
    with pytest.raises(ValueError, match="3 images for 1 pairs"):
        write_bin(tmp_path / "s.bin", [JPEG] * 3, [True])
    assert not (tmp_path / "s.bin").exists()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_read_or_refused(tmp_path_factory, data):
    images = [JPEG + bytes([index]) * 5 for index in range(4)]
    arrays = [np.frombuffer(image, np.uint8) for image in images]
    value = data.draw(st.sampled_from([(images, [True, False]), (arrays, np.array([True, False]))]))
    damaged = bytearray(pickle.dumps(value, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        got, same = read_bin(path)
    except InputError:
        return
    assert len(got) == 2 * len(same) > 0 and all(type(image) is bytes for image in got)


def test_no_numpy_global_is_ever_resolved(folder, monkeypatch):
    # Reading an array must not depend on where this numpy keeps its internals.
    monkeypatch.setattr(verification_bin.np, "_core", None)
    images, _ = read_bin(folder / "np2_ndarray1d_proto5.bin")
    assert len(images) == 8


def test_memory_stays_near_the_size_of_the_file(shared):
    path = shared / "faces" / "dev_pairs.bin"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images, same = read_bin(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert len(images) == 2400 and same.sum() == 600
    assert grown < 4 * path.stat().st_size
