"""Names that others chose: none leads out of a folder, none is invisible."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "absolute"),
        ("\\\\server\\share", "absolute"),
        ("C:\\x", "absolute"),
        ("a/../../x", "'..'"),
        ("..", "'..'"),
        ("a\\..\\..\\x", "'..'"),
        ("", "without a name"),
        ("./.", "without a name"),
        ("a\0b", "NUL"),
        ("a/" * 3000 + "x", "more than"),
    ],
)
def test_paths_that_lead_out_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        names.relative_path(name)


@given(st.lists(st.sampled_from(["..", ".", "a", "b c", "\u00e9", "/", "\\", "~", "\n", "c:"])).map("".join))
def test_what_passes_stays_below_its_folder(name):
    try:
        path = names.relative_path(name)
    except ValueError:
        return
    assert Path(os.path.normpath(Path("/out") / path)).is_relative_to("/out") and path


@given(st.text(max_size=300))
def test_every_name_becomes_a_safe_one(name):
    safe = names.safe_name(name)
    assert 0 < len(safe.encode()) <= names.MAX_NAME and not safe.startswith(".")
    assert not set(safe) & set("/\\\0\n\t\x7f\x9b")
    assert names.safe_name(safe) == safe


def test_names_that_windows_takes_for_one_are_one():
    taken = names.TakenNames(["bob"])
    for name in ("Bob", "bob.", "bob ", "bob. ."):
        assert names.same_name(taken.free(name)) not in {names.same_name("bob"), names.same_name(name)}
    assert names.same_name(".") != names.same_name("..")


def test_a_terminal_obeys_no_printable_text():
    assert names.printable("a\x1b[31m\n\u009b\\\ud800") == "a\\x1b[31m\\x0a\\x9b\\\\\\ud800"
