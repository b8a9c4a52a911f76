"""Lists of pairs of every kind, the photos they name, and what their errors say."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import InputError
from verification import lfw
from verification.pairs import check_name, connected, cut_folds, find_files, open_lists, read_pair_list


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def spelled(pairs) -> list[tuple[str, str, bool]]:
    """The pairs as (first, second, same)."""
    return [
        (pairs.names[first], pairs.names[second], bool(same))
        for (first, second), same in zip(pairs.pairs, pairs.same, strict=True)
    ]


FILES = [("a/1.jpg", "a/2.jpg", True), ("a/1.jpg", "b/1.jpg", False), ("b/1.jpg", "b/2.jpg", True)]
LFW = [("A/A_0001", "A/A_0002", True), ("A/A_0001", "B/B_0001", False), ("B/B_0001", "B/B_0003", True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/1.jpg a/2.jpg 1\na/1.jpg b/1.jpg 0\nb/1.jpg b/2.jpg 1\n", FILES),
        ("1 a/1.jpg a/2.jpg\n-1 a/1.jpg b/1.jpg\n+1 b/1.jpg b/2.jpg", FILES),
        ("\ufeffa/1.jpg\ta/2.jpg\tTrue\r\na/1.jpg\tb/1.jpg\tFalse\r\n\r\nb/1.jpg\tb/2.jpg\tsame\r\n", FILES),
        ("./a/1.jpg,a\\2.jpg,1.0\na/1.jpg,b/1.jpg,0.0\nb/1.jpg,b/2.jpg,1.0\n", FILES),
        ("a/1.jpg 1\na/2.jpg 1\na/1.jpg 0\nb/1.jpg 0\nb/1.jpg 7\nb/2.jpg 7\n", FILES),
        ("a/1.jpg,a/2.jpg,same\na/1.jpg,b/1.jpg,different\nb/1.jpg,b/2.jpg,same\n", FILES),
        ("file1,file2,same\na/1.jpg,a/2.jpg,1\na/1.jpg,b/1.jpg,0\nb/1.jpg,b/2.jpg,1\n", FILES),
        ("label;Path_1;Path_2\n1;a/1.jpg;a/2.jpg\n0;a/1.jpg;b/1.jpg\n1;b/1.jpg;b/2.jpg\n", FILES),
        ("id1\tid2\tp1\tp2\n7\t7\ta/1.jpg\ta/2.jpg\n7\t8\ta/1.jpg\tb/1.jpg\n8\t8\tb/1.jpg\tb/2.jpg\n", FILES),
        ("A\t1\t2\nA\t1\tB\t1\nB\t1\t3\n", LFW),
        ("A 1 2\nA 0001 B 1\nB 1 3\n", LFW),
        ("1\t2\t1\nA\t1\t2\nA\t1\tB\t1\nB\t1\t3\n", LFW),
        ("name,imagenum1,imagenum2,\nA,1,2,\nA,1,B,1\nB,1,3,\n", LFW),
    ],
)
def test_every_kind_of_list(tmp_path, text, expected):
    assert spelled(read_pair_list(write(tmp_path / "list", text))) == expected


def test_lfw_own_file_as_the_strict_reader_reads_it(shared, tmp_path):
    path = shared / "lfw" / "pairs.txt"
    strict, found = lfw.read_pairs(path), read_pair_list(path)
    assert found.numbered == strict.photos and found.lines == strict.lines
    for name in ("pairs", "same", "folds"):
        assert np.array_equal(getattr(found, name), getattr(strict, name))
    # The same lines without the head: folds cut for each kind are LFW's own.
    text = path.read_text().partition("\n")[2]
    assert text.count("\n") == 1800
    headless = read_pair_list(write(tmp_path / "headless.txt", text), folds=3)
    assert np.array_equal(headless.folds, strict.folds) and headless.numbered == strict.photos


def test_unequal_halves_are_said(tmp_path):
    found = read_pair_list(write(tmp_path / "p.txt", "1\t2\nA\t1\t2\nA\t1\t3\nA\t1\t4\nA\t1\tB\t1\n"))
    assert found.same.tolist() == [True, True, True, False]
    assert "fold 1 has 3 pairs of one identity, line 1 says 2" in found.notes[0]


def test_groups_and_folds_of_a_table(tmp_path):
    text = (
        "fold,p1,p2,label,id1,id2,att1,att2,vgg16,g1,g2,camera\n"
        "2,asian_females/n9/1.jpg,asian_females/n9/2.jpg,1,0,0,asian_females,asian_females,0.8,F,F,left\n"
        "10,asian_females/n9/1.jpg,white_males/n2/1.jpg,0,0,5,asian_females,white_males,0.1,F,M,right\n"
    )
    found = read_pair_list(write(tmp_path / "bfw.csv", text))
    assert found.folds.tolist() == [0, 1] and found.identities == ["0", "0", "5"]
    assert found.columns["g"] == [("F", "F"), ("F", "M")]
    assert found.columns["att"][1] == ("asian_females", "white_males")
    assert found.columns["camera"] == [("left", "left"), ("right", "right")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no pairs"),
        ("\n \n", "holds no pairs"),
        ("file1,file2,same\n", "holds no pairs"),
        (b"a.jpg b.jpg \xff\n", "not UTF-8"),
        ("a.jpg a.jpg 1\n", "line 1: pairs a photo with itself"),
        ("a.jpg b.jpg 1\nb.jpg a.jpg 0\n", "line 2: .* otherwise in line 1"),
        ("a.jpg b.jpg 1\na.jpg b.jpg\n", "line 2: two files and a flag"),
        ("a.jpg b.jpg 1\na.jpg c.jpg 2\n", "line 2: two files and a flag"),
        ("a.jpg 1\nb.jpg 0\n", "line 2: flag 0, but that of the line before is 1"),
        ("a.jpg 1\nb.jpg 1\nc.jpg 1\n", "3 lines; .* two lines"),
        ("10 300\nA\t1\t2\n", "1 pairs; line 1 promises 10 folds of 300 . 300"),
        ("2 0\nA\t1\t2\n", "line 1: .* is 0"),
        ("file1,file2\na.jpg,b.jpg\n", "line 1: no column says who is who"),
        ("file1,file2,same,same\na.jpg,b.jpg,1,1\n", "line 1: two columns are called 'same'"),
        ("file1,file2,same\na.jpg,b.jpg\n", "line 2: 2 columns, the first line names 3"),
        ("file1,file2,same\na.jpg,b.jpg,maybe\n", "line 2: 'maybe' says neither"),
        ("file1,file2,same,id1,id2\na.jpg,b.jpg,1,x,y\n", "line 2: the flag says one person, the identities do not"),
        ("file1,file2,id1,id2\na.jpg,b.jpg,x,y\na.jpg,c.jpg,z,y\n", "line 3: a.jpg is another identity than in line 2"),
        ('file1,file2,same\n"a.jpg,b.jpg,1\n', "line 2: "),
        ("A\t1\t2\nA\t1\n", "line 2: neither"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, message):
    path = write(tmp_path / "list.csv", text)
    with pytest.raises(InputError, match=message) as caught:
        read_pair_list(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "C:\\x.jpg", "..\\x.jpg", "a//b.jpg", "a/.", "a/", "", "x\0.jpg"],
)
def test_no_name_leads_outside(tmp_path, name):
    with pytest.raises(InputError, match="not the name of a photo below"):
        check_name(name, "here")
    if name and "\0" not in name:
        for text in (
            f"{name} b.jpg 1\n",
            f"b.jpg,{name},1\n",
            f"file1,file2,same\nb.jpg,{name},1\n",
            f"{name} 1\nb.jpg 1\n",
        ):
            with pytest.raises(InputError):
                read_pair_list(write(tmp_path / "list", text))


@settings(max_examples=300)
@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(
            st.lists(
                st.sampled_from(["a.jpg", "b/c.jpg", "0", "1", "-1", "A", "2", "file1", "file2", "same", ""]),
                max_size=5,
            ),
            max_size=6,
        ).map(lambda rows: "\n".join(",".join(row) for row in rows)),
    )
)
def test_any_text_is_a_list_or_an_error(tmp_path_factory, text):
    path = write(tmp_path_factory.getbasetemp() / "fuzz", text.encode("utf-8", "surrogatepass"))
    try:
        found = read_pair_list(path)
    except InputError:
        return
    assert len(found.pairs) == len(found.same) == len(found.folds) > 0
    assert all(check_name(name, "") == name for name in found.names)
    assert found.pairs.max() == len(found.names) - 1 and (found.pairs[:, 0] != found.pairs[:, 1]).all()


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(2, 12))
def test_folds_are_cut_evenly(same, folds):
    flags = np.array(same)
    found = cut_folds(flags, folds)
    for kind in (flags, ~flags):
        if kind.any():
            sizes = np.bincount(found[kind])
            assert len(sizes) == min(folds, kind.sum()) and sizes.max() - sizes.min() <= 1
            assert (np.diff(found[kind]) >= 0).all()


# --- photos and people ----------------------------------------------------------------------------------------------


def test_photos_below_other_folders_under_other_suffixes(tmp_path):
    touch(tmp_path, "aligned images/a_1.PNG", "aligned images/a_2.jpg", "aligned images/b_1.jpg", "readme.txt")
    path = write(tmp_path / "list.txt", "a_1.jpg 1\na_2.jpg 1\na_1.jpg 0\nb_1.jpg 0\n")
    files = find_files(tmp_path, read_pair_list(path), path)
    assert [file.name for file in files] == ["a_1.PNG", "a_2.jpg", "b_1.jpg"]
    touch(tmp_path, "images/a_1.jpg", "images/a_2.jpg", "images/b_1.jpg")
    with pytest.raises(InputError, match="more than once"):
        find_files(tmp_path, read_pair_list(path), path)


def test_flat_names_of_photos_that_lie_in_folders_of_their_people(tmp_path):
    touch(tmp_path, "Al_Gore/Al_Gore_0001.jpg", "Al_Gore/Al_Gore_0002.jpg")
    path = write(tmp_path / "list.txt", "Al_Gore_0001.jpg Al_Gore_0002.jpg 1\n")
    assert len(find_files(tmp_path, read_pair_list(path), path)) == 2


def test_missing_photos_are_listed(tmp_path):
    touch(tmp_path, "a.jpg")
    path = write(tmp_path / "list.txt", "a.jpg b.jpg 1\na.jpg c.jpg 0\n")
    with pytest.raises(InputError, match=r"names 2 photos that are not in .*\n  b.jpg .line 1.\n  c.jpg .line 2."):
        find_files(tmp_path, read_pair_list(path), path)


def test_lists_of_groups_become_one_set(tmp_path):
    """RFW: one list and one folder of people for each group; the same name in two groups is two people."""
    for group in ("African", "Asian"):
        touch(
            tmp_path,
            *(f"data/{group}/m.{person}/m.{person}_000{n}.jpg" for person in (f"{group}1", "x") for n in (1, 2)),
        )
    paths = []
    for group in ("African", "Asian"):
        (tmp_path / "txts" / group).mkdir(parents=True)
        text = f"m.{group}1\t1\t2\nm.{group}1\t1\tm.x\t1\nm.x\t1\t2\n"
        paths.append(write(tmp_path / "txts" / group / f"{group}_pairs.txt", text))
    found = open_lists(tmp_path, paths, folds=2)
    assert len(found.files) == 8 and all(file.is_file() for file in found.files)
    assert found.same.tolist() == [True, False, True] * 2
    assert [first for first, _ in found.columns["list"]] == ["African"] * 3 + ["Asian"] * 3
    assert len(set(found.identities)) == 4
    assert ((found.identities[found.pairs[:, 0]] == found.identities[found.pairs[:, 1]]) == found.same).all()


def test_lists_that_count_people_on_their_own(tmp_path):
    """Person 1 of a list is person 1 of another only where both name a photo of theirs."""
    touch(tmp_path, *(f"{name}.jpg" for name in "abcdefg"))
    first = write(tmp_path / "A.csv", "file1,file2,id1,id2\na.jpg,b.jpg,1,1\na.jpg,c.jpg,1,2\n")
    second = write(tmp_path / "B.csv", "file1,file2,id1,id2\nd.jpg,e.jpg,1,1\nd.jpg,f.jpg,1,2\nc.jpg,g.jpg,3,3\n")
    found = open_lists(tmp_path, [first, second])
    who = {file.stem: number for file, number in zip(found.files, found.identities.tolist(), strict=True)}
    assert who["a"] == who["b"] and who["d"] == who["e"] and who["c"] == who["g"]
    assert len({who["a"], who["c"], who["d"], who["f"]}) == 4


def test_nobody_is_no_identity(tmp_path):
    path = write(tmp_path / "list.csv", "file1,file2,id1,id2\na.jpg,b.jpg,,\n")
    with pytest.raises(InputError, match="line 2: an identity is empty"):
        read_pair_list(path)


def test_the_whole_name_comes_before_the_name_without_its_end(tmp_path):
    touch(tmp_path, "a/img.jpg", "a/img.0001.jpg", "a/other.jpg")
    path = write(tmp_path / "list.txt", "a/img.0001 a/other 1\n")
    assert [file.name for file in find_files(tmp_path, read_pair_list(path), path)] == ["img.0001.jpg", "other.jpg"]


def test_people_by_folders_or_by_chains(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "c/1.jpg")
    by_folder = write(tmp_path / "folders.txt", "a/1.jpg a/2.jpg 1\na/1.jpg b/1.jpg 0\nb/1.jpg c/1.jpg 0\n")
    assert open_lists(tmp_path, [by_folder]).identities.tolist() == [0, 0, 1, 2]
    by_chain = write(tmp_path / "chains.txt", "a/1.jpg b/1.jpg 1\nb/1.jpg a/2.jpg 1\na/1.jpg c/1.jpg 0\n")
    numbers = open_lists(tmp_path, [by_chain]).identities
    assert len(set(numbers[:3])) == 1 and numbers[3] != numbers[0]
    torn = write(tmp_path / "torn.txt", "a/1.jpg b/1.jpg 1\nb/1.jpg a/2.jpg 1\na/1.jpg a/2.jpg 0\n")
    assert "contradicts itself" in open_lists(tmp_path, [torn]).notes[0]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=20))
def test_chains_are_the_finest_partition(rows):
    rows = [row for row in rows if row[0] != row[1]]
    pairs = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
    same = np.array([row[2] for row in rows], dtype=bool)
    numbers, notes = connected(10, pairs, same)
    slow = list(range(10))
    for _, (first, second, flag) in itertools.product(range(10), rows):
        if flag:
            slow[first] = slow[second] = min(slow[first], slow[second])
    assert all((numbers[i] == numbers[j]) == (slow[i] == slow[j]) for i in range(10) for j in range(10))
    assert bool(notes) == any(not flag and slow[first] == slow[second] for first, second, flag in rows)
