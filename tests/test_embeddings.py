"""The store of embeddings: chunks, restarts after a kill, damage, and embeddings of something else."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from formats import embeddings
from formats.embeddings import CHECKSUMS, CHUNK, EMBEDDINGS, KEY, EmbeddingStore
from utils import InputError

WHAT = {"model": "abc", "crops": "def"}


def rows_of(numbers, dim=3):
    """What a model would say of these crops."""
    return np.sin(np.asarray(numbers)[:, None] + np.arange(dim)).astype(np.float32)


def filled(folder, rows=700, **changes):
    store = EmbeddingStore(folder, WHAT, rows, 3, **changes)
    store.fill(store.missing(), rows_of, "embedding")
    return store


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3 * CHUNK), st.sampled_from(["float32", "float16"]), st.integers(1, 4))
def test_any_number_of_processes_fill_it(tmp_path_factory, rows, dtype, count):
    folder = tmp_path_factory.mktemp("store")
    stores = [EmbeddingStore(folder, WHAT, rows, 3, dtype) for _ in range(count)]
    seen = []
    for index, store in enumerate(stores):
        missing = store.missing(index, count)
        seen += missing
        store.fill(missing, rows_of, "embedding")
    assert sorted(seen) == list(range(-(-rows // CHUNK)))
    values = stores[0].values()
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, rows_of(range(rows)).astype(dtype))
    np.testing.assert_array_equal(np.load(folder / EMBEDDINGS), values)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 0


def test_what_is_there_is_not_computed_again(tmp_path):
    filled(tmp_path)
    again = EmbeddingStore(tmp_path, WHAT, 700, 3)
    assert again.missing() == []
    half = EmbeddingStore(tmp_path / "half", WHAT, 700, 3)
    half.fill([1], rows_of, "embedding")
    with pytest.raises(InputError, match="2 of 3 chunks of embeddings are not computed"):
        half.values()


@pytest.mark.parametrize("name", [EMBEDDINGS, CHECKSUMS])
def test_damage_is_found_and_made_good(tmp_path, name):
    store = filled(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[-3 if name == EMBEDDINGS else 9] ^= 16
    path.write_bytes(data)
    assert EmbeddingStore(tmp_path, WHAT, 700, 3).missing() == [2 if name == EMBEDDINGS else 1]
    for damaged in (data[:-5], b"", b"nonsense" * 100):
        path.write_bytes(damaged)
        store = filled(tmp_path)
        np.testing.assert_array_equal(store.values(), rows_of(range(700)))
    path.unlink()
    np.testing.assert_array_equal(filled(tmp_path).values(), rows_of(range(700)))


def test_embeddings_of_something_else_are_left_alone(tmp_path):
    filled(tmp_path)
    before = (tmp_path / EMBEDDINGS).read_bytes()
    with pytest.raises(InputError, match=r"something else \(model was abc and is now xyz\); give another folder"):
        EmbeddingStore(tmp_path, WHAT | {"model": "xyz"}, 700, 3)
    with pytest.raises(InputError, match="rows was 700 and is now 701"):
        EmbeddingStore(tmp_path, WHAT, 701, 3)
    assert (tmp_path / EMBEDDINGS).read_bytes() == before
    (tmp_path / KEY).write_text("{")
    with pytest.raises(InputError, match=f"{KEY}: not a record of embeddings"):
        EmbeddingStore(tmp_path, WHAT, 700, 3)
    (tmp_path / KEY).unlink()
    with pytest.raises(InputError, match="exists, but no record of what it is"):
        EmbeddingStore(tmp_path, WHAT, 700, 3)


@pytest.mark.parametrize("writer", ["write_json", "write_bytes", "atomic_path"])
@pytest.mark.parametrize("before", [True, False])
def test_a_store_whose_beginning_broke_off_is_begun_again(tmp_path, monkeypatch, writer, before):
    """As a full disk or a kill between two of its files leaves it."""
    whole = getattr(utils, writer)

    def broken(path, *rest):
        if writer == "atomic_path" and path.name != EMBEDDINGS:  # the others use it, too
            return whole(path)
        if not before and writer == "atomic_path":
            with whole(path) as temporary:
                temporary.write_bytes(b"half")
        elif not before:
            whole(path, *rest)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(embeddings.utils, writer, broken)
        with pytest.raises(OSError, match="No space"):
            EmbeddingStore(tmp_path, WHAT, 700, 3)
    np.testing.assert_array_equal(filled(tmp_path).values(), rows_of(range(700)))


def slowly(folder):
    store = EmbeddingStore(folder, WHAT, 40 * CHUNK, 3)

    def embed(numbers):
        time.sleep(0.02)
        return rows_of(numbers)

    store.fill(store.missing(), embed, "embedding")


def test_a_killed_run_goes_on(tmp_path):
    context = multiprocessing.get_context("fork")
    left = [40]
    for done in (3, 9):
        process = context.Process(target=slowly, args=(tmp_path,))
        process.start()
        while not (tmp_path / CHECKSUMS).exists() or np.count_nonzero(np.fromfile(tmp_path / CHECKSUMS, "<u8")) < done:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        left.append(len(EmbeddingStore(tmp_path, WHAT, 40 * CHUNK, 3).missing()))
        assert left[-1] <= 40 - done
    assert left[2] < left[1] < 40
    slowly(tmp_path)
    store = EmbeddingStore(tmp_path, WHAT, 40 * CHUNK, 3)
    assert store.missing() == []
    np.testing.assert_array_equal(store.values(), rows_of(range(40 * CHUNK)))
