"""The files of a run's state: parts of several processes, written beside training, damaged, late, abandoned."""

import errno
import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from training import reporting, storage
from training.margin import identity_range
from training.storage import CHECKPOINT, HEADS, PREVIOUS, Rows, find_last, open_stored, write_parts
from utils import InputError

IDENTITIES = 11


class Alone:
    """A world whose other processes take their turns before or after this one."""

    def __init__(self, rank, size, others=()):
        self.rank, self.size, self.is_main = rank, size, rank == 0
        self.others = iter(others)  # what the other processes bring to each `gather`

    def meet_to_write(self):
        pass

    def gather(self, value):
        return [value, *next(self.others, [])]

    def largest(self, value):
        return value


def state(step, size=1, rank=0):
    """A checkpoint's content on one rank; each number tells step and identity."""
    first, last = identity_range(IDENTITIES, rank, size)
    rows = torch.arange(first, last)[:, None] * 10.0 + torch.arange(3) + 1000 * step
    return {
        "step": step,
        "model": {"weight": torch.full((4,), float(step))},
        "head": {"centres": rows, "steps": step, "identities": IDENTITIES},
        "optimizer": {"momentum": {"weight": torch.zeros(4)}, "head_momentum": -rows},
    }


def save(folder, step, size, token="aa"):
    """As `size` processes would, rank 0 last."""
    for rank in reversed(range(size)):
        write_parts(folder, state(step, size, rank), Alone(rank, size), token)


def quiet(_):
    raise AssertionError("nothing to say")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_of_parts_is_a_slice_of_the_whole(sizes, data):
    whole = torch.arange(sum(sizes) * 2.0).view(-1, 2)
    parts = list(zip(torch.tensor([0, *sizes]).cumsum(0).tolist(), whole.split(sizes), strict=False))
    rows = Rows(len(whole), parts)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    assert (
        rows.shape == whole.shape and torch.equal(rows[start:stop], whole[start:stop]) and torch.equal(rows[:], whole)
    )


def test_rows_that_are_not_there_are_missed():
    rows = Rows(10, [(2, torch.zeros(3, 4))])
    assert rows[2:5].shape == (3, 4)
    with pytest.raises(ValueError, match="of the identities 4 to 8 only 1 are in the parts"):
        rows[4:8]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_parts_are_put_together_by_any_number_of_processes(tmp_path, size):
    save(tmp_path, 7, size)
    expected = state(7)
    merged = storage.whole(tmp_path / CHECKPOINT)
    assert torch.equal(merged["head"]["centres"], expected["head"]["centres"]) and merged["head"]["steps"] == 7
    assert torch.equal(merged["optimizer"]["head_momentum"], expected["optimizer"]["head_momentum"])
    for now in (1, 2, 4):
        for rank in range(now):
            found = find_last(tmp_path, Alone(rank, now, [[]]), quiet)
            centres = found.content["head"]["centres"]
            first, last = identity_range(IDENTITIES, rank, now)
            assert tuple(centres.shape) == (IDENTITIES, 3)
            assert torch.equal(centres[first:last], expected["head"]["centres"][first:last])
            # Only the parts in which its identities lie were opened.
            overlapping = [
                number
                for number in range(size)
                if max(identity_range(IDENTITIES, number, size)[0], first)
                < min(identity_range(IDENTITIES, number, size)[1], last)
            ]
            assert len(centres.parts) == len(overlapping)


def test_a_process_writes_its_own_rows_and_rank_0_none_of_the_others(tmp_path):
    save(tmp_path, 7, 3)
    main = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert "centres" not in main["head"] and main["optimizer"].keys() == {"momentum"} and len(main["parts"]) == 3
    for rank, name in enumerate(main["parts"]):
        part = torch.load(tmp_path / name, weights_only=True)
        first, last = identity_range(IDENTITIES, rank, 3)
        assert part["head"].keys() == {"centres"} and len(part["head"]["centres"]) == last - first


def test_a_checkpoint_without_its_parts_is_not_written(tmp_path, monkeypatch):
    """As on two machines whose --out is a disk of their own."""
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    write_parts(tmp_path / "there", state(5, 2, 1), Alone(1, 2), "aa")
    with pytest.raises(InputError, match=r"-2-of-2\.pt: .* not here; all machines must share --out"):
        write_parts(tmp_path / "here", state(5, 2, 0), Alone(0, 2), "aa")
    assert not (tmp_path / "here" / CHECKPOINT).exists()


def test_parts_that_no_checkpoint_names_are_deleted(tmp_path):
    def parts():
        return {path.name.split("-")[0].lstrip("0") for path in (tmp_path / HEADS).iterdir()}

    save(tmp_path, 1, 2)
    storage._link(tmp_path / CHECKPOINT, tmp_path / storage.BEST)
    for step in (2, 3, 4):
        save(tmp_path, step, 2)
    assert parts() == {"1", "3", "4"}  # of the best, the one before and the last
    assert storage.whole(tmp_path / storage.BEST)["step"] == 1 and storage.whole(tmp_path / PREVIOUS)["step"] == 3
    # Killed before rank 0 wrote the checkpoint: the one before counts, and the next start clears up.
    write_parts(tmp_path, state(9, 2, 1), Alone(1, 2), "aa")
    assert find_last(tmp_path, Alone(0, 1), quiet).content["step"] == 4 and "9" in parts()
    save(tmp_path, 5, 2, token="bb")
    assert parts() == {"1", "4", "5"}
    # Parts of a later step of the same start are being written at this moment.
    write_parts(tmp_path, state(7, 2, 1), Alone(1, 2), "bb")
    save(tmp_path, 6, 2, token="bb")
    assert parts() == {"1", "5", "6", "7"}


def test_a_state_is_never_made_of_two(tmp_path):
    """The same step, reached a second time with other numbers of processes or other options, has files of its own."""
    save(tmp_path, 3, 2)
    storage._link(tmp_path / CHECKPOINT, tmp_path / storage.BEST)
    before = storage.whole(tmp_path / storage.BEST)["head"]["centres"]
    for rank in (1, 0):
        changed = state(3, 2, rank)
        changed["head"]["centres"] = changed["head"]["centres"] + 0.5
        write_parts(tmp_path, changed, Alone(rank, 2), "bb")
    assert torch.equal(storage.whole(tmp_path / storage.BEST)["head"]["centres"], before)
    assert torch.equal(storage.whole(tmp_path / CHECKPOINT)["head"]["centres"], before + 0.5)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_part_is_named_and_the_checkpoint_before_is_taken(tmp_path, harm):
    save(tmp_path, 1, 2)
    save(tmp_path, 2, 2)
    [part] = (tmp_path / HEADS).glob("*2-aa-2-of-2.pt")
    data = bytearray(part.read_bytes())
    place = data.find(torch.load(part)["head"]["centres"].numpy().tobytes())
    data[place] ^= 1
    if harm == "remove":
        part.unlink()
    else:
        part.write_bytes(data if harm == "flip" else data[: len(data) // 2])
    said = []
    found = find_last(tmp_path, Alone(0, 1), said.append)
    assert found.content["step"] == 1 and found.path.name == PREVIOUS
    assert len(said) == 1 and part.name in said[0] and said[0].endswith(f"going back to {PREVIOUS}")
    # Who needs none of it is not concerned, but goes back with the others.
    view = (None, f"{part}: damaged", False)
    said = []
    others = [[view], [(1, "", False)]]
    assert find_last(tmp_path, Alone(0, 2, others), said.append).content["step"] == 1 and len(said) == 1


def test_parts_lie_in_the_runs_folder(tmp_path):
    save(tmp_path / "run", 1, 2)
    content = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    for name in ("../other.pt", "heads/../../other.pt", "/etc/passwd", "heads/x.pt\n"):
        torch.save(content | {"parts": [name]}, tmp_path / "run" / CHECKPOINT)
        with pytest.raises(InputError, match="as a part, which is not one"):
            open_stored(tmp_path / "run" / CHECKPOINT)
    torch.save(content | {"parts": []}, tmp_path / "run" / CHECKPOINT)
    with pytest.raises(InputError, match="its parts do not fit together"):
        open_stored(tmp_path / "run" / CHECKPOINT)


def test_a_file_that_another_node_sees_late_is_waited_for(tmp_path):
    """Network file systems show what another machine wrote after some seconds."""
    save(tmp_path, 4, 2)
    late = [[(None, "", False)], [(None, f"{tmp_path}/x {storage._MISSING}", False)], [(4, "", False)]]
    assert find_last(tmp_path, Alone(0, 2, late), quiet).content["step"] == 4
    never = [[(None, "", False)]] * 9
    with pytest.raises(InputError, match="not all processes see the same checkpoint; the nodes must share this folder"):
        find_last(tmp_path, Alone(0, 2, never), quiet, patience=0.1)
    older = [[(3, "", False)]] * 9
    with pytest.raises(InputError, match="not all processes see the same checkpoint"):
        find_last(tmp_path, Alone(0, 2, older), quiet, patience=0.1)


def test_nothing_yet(tmp_path):
    assert find_last(tmp_path, Alone(0, 1), quiet) is None
    assert find_last(tmp_path, Alone(0, 2, [[(None, "", False)]] * 2), quiet) is None


def test_the_writer_writes_beside_and_one_after_the_other(tmp_path, monkeypatch):
    gate, begun, order = threading.Event(), threading.Event(), []
    write = utils.save_checkpoint

    def slow(path, content):
        begun.set()
        assert gate.wait(30)
        order.append(content["step"])
        write(path, content)

    monkeypatch.setattr(utils, "save_checkpoint", slow)
    writer = storage.Writer(tmp_path, SimpleNamespace(size=1, shared=lambda value: value))
    writer.submit(state(1))
    assert begun.wait(30) and not (tmp_path / CHECKPOINT).exists()  # and this thread goes on
    gate.set()
    writer.submit(state(2))
    writer.wait()
    assert order == [1, 2]
    assert torch.load(tmp_path / CHECKPOINT)["step"] == 2 and torch.load(tmp_path / PREVIOUS)["step"] == 1


def test_what_goes_wrong_in_writing_is_raised_in_training(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    writer = storage.Writer(tmp_path, SimpleNamespace(size=1, shared=lambda value: value))
    writer.submit(state(1))
    writer.wait()
    monkeypatch.setattr(utils, "save_checkpoint", full)
    writer.submit(state(2))
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    with pytest.raises(OSError, match="No space left"):
        writer.check()
    writer.close()
    assert torch.load(tmp_path / CHECKPOINT)["step"] == 1


def test_verification_is_recalled_for_this_very_epoch_alone(tmp_path):
    sets = [SimpleNamespace(name="lfw", sha256="abc")]
    run = SimpleNamespace(options=SimpleNamespace(out=tmp_path, val_every=2, epochs=9), sets=sets)
    report = {"epoch": 2, "step": 8, "loss": 1.25, "seconds": 3.7, "sets": {}, "verification": {}}

    def recalled(written):
        (tmp_path / storage.RESULTS).write_text(written)
        past = SimpleNamespace(history=[{"epoch": 1}, dict(report)])
        return reporting.recall(run, past), past.history[-1]

    measured = report | {"sets": {"lfw": "abc"}, "verification": {"lfw": {"accuracy": 0.9}}}
    assert recalled(json.dumps({"last": measured})) == (True, measured)
    assert recalled(json.dumps({"last": measured | {"seconds": 3.8}})) == (False, report)
    # Of other sets than those of now, or not measured although it is due.
    assert recalled(json.dumps({"last": measured | {"sets": {"lfw": "other"}}})) == (False, report)
    unmeasured = measured | {"verification": {}}
    assert recalled(json.dumps({"last": unmeasured})) == (False, report)
    run.options.val_every = 3
    assert recalled(json.dumps({"last": unmeasured})) == (True, unmeasured)
    for damaged in ("", "{}", '{"last": 3}', '{"last": {"verification": 1}}'):
        assert recalled(damaged) == (False, report)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda part: part["head"].update(centres=part["head"]["centres"][:1]), "centres is not 4 rows"),
        (lambda part: part["head"].update(centres=part["head"]["centres"][:, :2]), "centres is not alike in all"),
        (lambda part: part["head"].update(centres=part["head"]["centres"].double()), "centres is not alike in all"),
        (lambda part: part["head"].update(centres=3), "centres is not 4 rows"),
        (lambda part: part["optimizer"].update(head_momentum="x"), "head_momentum is not 4 rows"),
        (lambda part: part.update(head=[]), "its parts do not fit together"),
    ],
)
def test_parts_that_do_not_fit_together_are_one_line(tmp_path, change, said):
    """As parts of another run do not that were copied into the folder."""
    save(tmp_path, 1, 3)
    name = utils.load_checkpoint(tmp_path / CHECKPOINT)["parts"][1]
    part = utils.load_checkpoint(tmp_path / name)
    change(part)
    torch.save(part, tmp_path / name)
    with pytest.raises(InputError, match=f"its parts do not fit together .*{said}|{said}"):
        open_stored(tmp_path / CHECKPOINT)


def test_a_number_of_identities_that_is_none_is_one_line(tmp_path):
    save(tmp_path, 1, 2)
    content = utils.load_checkpoint(tmp_path / CHECKPOINT)
    content["head"]["identities"] = float("inf")
    torch.save(content, tmp_path / CHECKPOINT)
    with pytest.raises(InputError, match="its parts do not fit together"):
        open_stored(tmp_path / CHECKPOINT)
