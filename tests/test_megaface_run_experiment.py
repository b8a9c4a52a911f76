"""The drop-in for the devkit's script: its files and names, its golden results, and errors where it has none."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megaface import run_experiment
from megaface.features import read_feature, write_feature, write_features

ROOT = Path(__file__).resolve().parent.parent
CASES = {"basic_100d": 100, "size_arg_smaller": 100, "single_image_id": 100, "ties_200d": 200, "tiny_10d": 10}


class Lab:
    """A folder with features, lists and results of one experiment."""

    def __init__(self, folder, probes, ids, distractors, size, ending="_net.bin"):
        self.folder, self.size, self.ending = folder, size, ending
        self.probes = [f"{name}/{name}_{number}.png" for number, name in enumerate(ids)]
        self.distractors = [f"{number % 7}/{number}@N00/{number}_0.jpg" for number in range(len(distractors))]
        for side, names, features in (("fs", self.probes, probes), ("mf", self.distractors, distractors)):
            write_features([str(folder / side / f"{name}{ending}") for name in names], features)
        (folder / "lists").mkdir()
        self.probe_list = folder / "lists" / "facescrub_features_list.json"
        self.write_lists(ids)

    def write_lists(self, ids, probes=None, distractors=None, sizes=None, sets=(1,)):
        self.probe_list.write_text(json.dumps({"path": self.probes if probes is None else probes, "id": ids}))
        for size in sizes or [self.size]:
            for number in sets:
                path = self.folder / "lists" / f"megaface_features_list.json_{size}_{number}"
                path.write_text(json.dumps({"path": self.distractors if distractors is None else distractors}))

    def feature(self, side, number):
        names = self.probes if side == "fs" else self.distractors
        return self.folder / side / f"{names[number]}{self.ending}"

    def arguments(self, *more):
        folders = [self.folder / "mf", self.folder / "fs", self.ending, self.folder / "out"]
        lists = ["-p", self.probe_list, "-dlp", self.folder / "lists"]
        sizes = [] if "-s" in more else ["-s", self.size]
        return [str(word) for word in [*folders, *sizes, *lists, "--device", "cpu", *more]]

    def results(self):
        out = self.folder / "out"
        return sorted(path.name for path in out.glob("*.json")) if out.is_dir() else []


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script inside this process: (exit code, standard output, last line of standard error)."""

    def call(arguments):
        monkeypatch.setattr(sys, "argv", ["run_experiment.py", *map(str, arguments)])
        code = run_experiment.main()
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert (code == 0) == (not errors)
        return code, said.out, errors[-1] if errors else ""

    return call


def golden_lab(shared, tmp_path, case):
    folder = shared / "megaface" / "golden" / case
    ids = json.loads((folder / "probe_ids.json").read_text())
    lab = Lab(tmp_path, np.load(folder / "probes.npy"), ids, np.load(folder / "distractors.npy"), CASES[case])
    return folder, lab


@pytest.mark.parametrize("case", CASES)
def test_golden_results_under_the_devkits_names(shared, tmp_path, run, case):
    folder, lab = golden_lab(shared, tmp_path, case)
    code, out, _ = run(lab.arguments("--score-matrices"))
    assert code == 0
    assert json.loads((folder / "meta.json").read_text())["rank1"] in out.splitlines()
    name = f"facescrub_megaface_net_{lab.size}_1"
    assert lab.results() == [f"cmc_{name}.json", f"matches_{name}.json"]
    for kind in ("cmc", "matches"):
        assert (tmp_path / "out" / f"{kind}_{name}.json").read_bytes() == (folder / f"{kind}.json").read_bytes()
    other = tmp_path / "out" / "otherFiles"
    lists = {"facescrub_features_net", f"megaface_features_net_{lab.size}_1"}
    matrices = {"facescrub_facescrub_net.bin", f"{name}.bin"}
    assert {path.name for path in other.iterdir()} == lists | matrices
    content = json.loads((other / "facescrub_features_net").read_text())
    assert content["path"][0] == str(lab.feature("fs", 0)) and len(content["id"]) == len(content["path"])
    for ours, theirs in (("facescrub_facescrub_net", "facescrub_facescrub"), (name, "facescrub_megaface")):
        if (folder / f"{theirs}.bin").is_file():
            assert (other / f"{ours}.bin").read_bytes() == (folder / f"{theirs}.bin").read_bytes()


def test_as_a_script_from_anywhere(shared, tmp_path):
    folder, lab = golden_lab(shared, tmp_path, "tiny_10d")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, str(ROOT / "megaface" / "run_experiment.py"), *lab.arguments("-m", "x/jb_identity.bin")]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Rank 1: 0.792562" in done.stdout
    written = tmp_path / "out" / "matches_facescrub_megaface_net_10_1.json"
    assert written.read_bytes() == (folder / "matches.json").read_bytes()
    assert not list((tmp_path / "out" / "otherFiles").glob("*.bin"))


def small_lab(tmp_path, n=30, m=40, dimensions=8, identities=5):
    rng = np.random.default_rng(0)
    ids = [f"id{number % identities}" for number in range(n)]
    sides = [rng.standard_normal((count, dimensions)).astype(np.float32) for count in (n, m)]
    return Lab(tmp_path, sides[0], ids, sides[1], m), ids


def test_sizes_sets_and_names(tmp_path, run):
    lab, ids = small_lab(tmp_path)
    lab.write_lists(ids, sizes=[10, 40], sets=(1, 2, 3))
    lab.probe_list.rename(tmp_path / "lists" / "my_list.json")
    lab.probe_list = tmp_path / "lists" / "my_list.json"
    code, out, _ = run(lab.arguments("-s", "10", "40", "10", "-ns", "3", "-d", "--score-matrices"))
    assert code == 0 and out.count("Rank 1: ") == 6
    wanted = {
        f"{kind}_my_megaface_net_{size}_{k}.json" for kind in ("cmc", "matches") for size in (10, 40) for k in (1, 2, 3)
    }
    assert set(lab.results()) == wanted
    # -d keeps no distractor matrices, as with the devkit
    assert [path.name for path in (tmp_path / "out" / "otherFiles").glob("*.bin")] == ["my_my_net.bin"]
    assert "30 probes, fewer than 100" in out


def test_the_algorithm_is_what_comes_before_the_first_dot(tmp_path, run):
    lab, _ = small_lab(tmp_path)
    for side in ("fs", "mf"):
        for path in sorted((tmp_path / side).rglob("*.bin")):
            path.rename(str(path).replace("_net.bin", "_r100_a.v2.bin"))
    lab.ending = "_r100_a.v2.bin"
    assert run(lab.arguments())[0] == 0
    assert lab.results() == ["cmc_facescrub_megaface_r100_a_40_1.json", "matches_facescrub_megaface_r100_a_40_1.json"]


def nan_in_probe(lab):
    write_feature(lab.feature("fs", 4), np.full(8, np.nan))
    return "fs/.*_4.png_net.bin: holds NaN or inf"


def inf_in_distractor(lab):
    write_feature(lab.feature("mf", 9), np.full(8, np.inf))
    return "9_0.jpg_net.bin: holds NaN or inf"


def missing_distractor(lab):
    lab.feature("mf", 11).unlink()
    return "11_0.jpg_net.bin: missing"


def missing_probe(lab):
    lab.feature("fs", 7).unlink()
    return "_7.png_net.bin: missing"


def empty_file(lab):
    lab.feature("mf", 3).write_bytes(b"")
    return "3_0.jpg_net.bin: empty"


def truncated_file(lab):
    path = lab.feature("fs", 0)
    path.write_bytes(path.read_bytes()[:-4])
    return "_0.png_net.bin: truncated"


def wrong_dimension(lab):
    write_feature(lab.feature("mf", 5), np.ones(7))
    return "5_0.jpg_net.bin: 7 dimensions instead of 8"


def wrong_dimension_of_the_first(lab):
    write_feature(lab.feature("fs", 0), np.ones(7))
    return "fs/.*_0.png_net.bin: 7 dimensions instead of 8$"


def other_dimension_everywhere(lab):
    for number in range(len(lab.distractors)):
        write_feature(lab.feature("mf", number), np.ones(7))
    return "7 dimensions instead of 8 .and 39 more"


def all_single(lab):
    lab.write_lists([str(number) for number in range(len(lab.probes))])
    return "facescrub_features_list.json: no identity has two probes"


def no_distractors(lab):
    lab.write_lists(["a"] * len(lab.probes), distractors=[])
    return "megaface_features_list.json_40_1: the list is empty"


def no_list(lab):
    (lab.folder / "lists" / "megaface_features_list.json_40_1").unlink()
    return "megaface_features_list.json_40_1: No such file"


def no_ids(lab):
    lab.probe_list.write_text(json.dumps({"path": lab.probes}))
    return 'facescrub_features_list.json: "id" must be'


def impossible_path(lab):
    lab.write_lists(["a"] * len(lab.probes), distractors=["5/\0.jpg", *lab.distractors[1:]])
    return "megaface_features_list.json_40_1: .* no name"


def overflow(lab):
    write_feature(lab.feature("mf", 5), np.full(8, 1e19))
    return "5_0.jpg_net.bin: the feature is too large for float32"


@pytest.mark.parametrize(
    "spoil",
    [
        nan_in_probe,
        inf_in_distractor,
        missing_distractor,
        missing_probe,
        empty_file,
        truncated_file,
        wrong_dimension,
        wrong_dimension_of_the_first,
        other_dimension_everywhere,
        all_single,
        no_distractors,
        no_list,
        no_ids,
        impossible_path,
        overflow,
    ],
)
def test_where_the_devkit_fails_there_is_an_error_and_no_result(tmp_path, run, spoil):
    lab, _ = small_lab(tmp_path)
    assert run(lab.arguments())[0] == 0 and len(lab.results()) == 2
    message = spoil(lab)
    code, out, error = run(lab.arguments())
    assert code == 1 and "Rank 1" not in out
    assert re.search(message, error), error
    assert lab.results() == []  # not even those of the run before


def test_errors_leave_no_matrix_and_name_the_file(tmp_path, run):
    lab, _ = small_lab(tmp_path)
    write_feature(lab.feature("fs", 4), np.full(8, 1e19))
    code, _, error = run(lab.arguments("--score-matrices"))
    assert code == 1 and "_4.png_net.bin: the feature is too large for float32" in error
    assert not list((tmp_path / "out").rglob("*.bin"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-s", "0"], "-s 0: "),
        (["-ns", "0"], "-ns 0: "),
        (["-m", "jb_LBP.bin"], "only jb_identity.bin can be computed here"),
        (["--device", "cuda:99"], "this machine has"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, run, more, message):
    lab, _ = small_lab(tmp_path)
    code, _, error = run(lab.arguments(*more))
    assert code == 1 and message in error and lab.results() == []


def test_folders_and_lists_that_are_not_there(tmp_path, run):
    lab, _ = small_lab(tmp_path)
    arguments = lab.arguments()
    code, _, error = run([tmp_path / "nowhere", *arguments[1:]])
    assert code == 1 and "nowhere: no such folder of features" in error
    without_lists = arguments[: arguments.index("-p")]
    code, _, error = run(without_lists)
    assert code == 1 and "say where they are with -p FILE and -dlp DIR" in error


def told(lab, monkeypatch, capsys, *more):
    monkeypatch.setattr(sys, "argv", ["run_experiment.py", *lab.arguments(*more)])
    assert run_experiment.main() == 0
    return capsys.readouterr()


def test_counts_and_lists_that_are_too_short_are_told(tmp_path, monkeypatch, capsys):
    lab, _ = small_lab(tmp_path)
    shorter = tmp_path / "lists" / "megaface_features_list.json_1000_1"
    shorter.write_bytes((tmp_path / "lists" / "megaface_features_list.json_40_1").read_bytes())
    said = told(lab, monkeypatch, capsys, "-s", "1000")
    assert "30 probes, 40 distractors, 150 genuine pairs" in said.out
    assert f"{shorter}: only 40 distractors, not 1000" in said.err


def test_features_that_are_not_normalised_are_told(tmp_path, monkeypatch, capsys):
    """The devkit takes distances as they are; the figures stay what it computes."""
    lab, _ = small_lab(tmp_path)
    said = told(lab, monkeypatch, capsys)
    assert "the probes' features have lengths of" in said.err and "the distractors' features" in said.err
    for path in tmp_path.rglob("*.bin"):
        feature = read_feature(path)
        write_feature(path, feature / np.linalg.norm(feature))
    assert "lengths" not in told(lab, monkeypatch, capsys).err


def test_one_distractor_is_enough(tmp_path, run):
    lab, ids = small_lab(tmp_path)
    lab.write_lists(ids, distractors=lab.distractors[:1])
    assert run(lab.arguments())[0] == 0
    matches = json.loads((tmp_path / "out" / "matches_facescrub_megaface_net_40_1.json").read_text())
    assert all(entry["distractors"]["idx"] == [0] for entry in matches)


def test_a_later_error_leaves_no_earlier_result(tmp_path, run):
    lab, ids = small_lab(tmp_path)
    lab.write_lists(ids, sizes=[10], distractors=lab.distractors[:10])
    lab.feature("mf", 30).unlink()
    code, out, _ = run(lab.arguments("-s", "10", "40"))
    assert code == 1 and out.count("Rank 1: ") == 1 and lab.results() == []


# ---------------------------------------------------------------------------------------------- the official binaries

FAKE = """#!{python}
import json, os, signal, struct, sys
tool, behaviour = os.path.basename(sys.argv[0]), open({behaviour!r}).read().split(":")
if behaviour[0] == tool:
    if behaviour[1] == "fail":
        sys.exit(3)
    if behaviour[1] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour[1] == "nothing":
        sys.exit(0)
if tool == "Identification":
    model, word, gallery, probes, out = sys.argv[1:]
    assert os.path.isfile(model) and word == "path"
    n, m = (len(json.load(open(path))["path"]) for path in (probes, gallery))
    with open(out, "wb") as file:
        file.write(struct.pack("<4i", n, m, 4 * m, 5) + bytes(4 * n * m)[behaviour[0] == "short" :])
else:
    distractors, between, probes, size, cmc, matches = sys.argv[1:]
    assert os.path.isfile(distractors) and os.path.isfile(between) and os.path.isfile(probes)
    for name, out in (("cmc", cmc), ("matches", matches)):
        text = open(os.path.join({answers!r}, name + ".json")).read()
        with open(out, "w") as file:
            file.write(text.replace("0.9", "0.8") if behaviour[0] == "differ" else text)
"""


@pytest.fixture
def devkit_lab(shared, tmp_path):
    """A golden case and a devkit whose binaries answer with its golden files."""
    folder, lab = golden_lab(shared, tmp_path, "tiny_10d")
    devkit = tmp_path / "devkit"
    (devkit / "models").mkdir(parents=True)
    (devkit / "models" / "jb_identity.bin").write_bytes(b"model")
    (devkit / "bin").mkdir()
    (devkit / "behaviour").write_text("none")
    for tool in ("Identification", "FuseResults"):
        path = devkit / "bin" / tool
        path.write_text(FAKE.format(python=sys.executable, behaviour=str(devkit / "behaviour"), answers=str(folder)))
        path.chmod(0o755)
    return folder, lab, devkit


def test_the_devkits_binaries_and_a_comparison(devkit_lab, run):
    folder, lab, devkit = devkit_lab
    code, out, _ = run(lab.arguments("--devkit", devkit))
    assert code == 0 and "identical" in out
    assert (lab.folder / "out" / lab.results()[0]).read_bytes() == (folder / "cmc.json").read_bytes()
    other = {path.name for path in (lab.folder / "out" / "otherFiles").glob("*.bin")}
    assert other == {"facescrub_facescrub_net.bin", "facescrub_megaface_net_10_1.bin"}
    assert run(lab.arguments("--devkit", devkit, "-d"))[0] == 0
    other = {path.name for path in (lab.folder / "out" / "otherFiles").glob("*.bin")}
    assert other == {"facescrub_facescrub_net.bin"}


def test_a_different_answer_of_the_devkit_is_kept_and_told(devkit_lab, run):
    folder, lab, devkit = devkit_lab
    (devkit / "behaviour").write_text("differ")
    code, _, error = run(lab.arguments("--devkit", devkit))
    assert code == 1 and "cmc_facescrub_megaface_net_10_1.json differs in line" in error
    assert "0.8123966693878174" in error and "0.9123966693878174" in error
    kept = (lab.folder / "out" / "cmc_facescrub_megaface_net_10_1.json").read_text()
    assert kept == (folder / "cmc.json").read_text().replace("0.9", "0.8")


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("Identification:fail", "Identification: exit code 3"),
        ("FuseResults:fail", "FuseResults: exit code 3"),
        ("Identification:crash", "Identification: killed by SIGSEGV"),
        ("FuseResults:crash", "FuseResults: killed by SIGSEGV"),
        ("Identification:nothing", "was not written"),
        ("FuseResults:nothing", "was not written"),
        ("short", "wrote no matrix of 148 x 148 scores"),
    ],
)
def test_failures_of_the_binaries_are_noticed(devkit_lab, run, behaviour, message):
    _, lab, devkit = devkit_lab
    (devkit / "behaviour").write_text(behaviour)
    code, _, error = run(lab.arguments("--devkit", devkit))
    assert code == 1 and message in error and lab.results() == []


def test_damaged_features_never_reach_the_binaries(devkit_lab, run):
    _, lab, devkit = devkit_lab
    lab.feature("mf", 2).write_bytes(b"")
    code, _, error = run(lab.arguments("--devkit", devkit))
    assert code == 1 and "2_0.jpg_net.bin: empty" in error and lab.results() == []


def test_a_devkit_that_is_none(tmp_path, run):
    lab, _ = small_lab(tmp_path)
    code, _, error = run(lab.arguments("--devkit", tmp_path))
    assert code == 1 and "no such program of the devkit" in error
    (tmp_path / "bin").mkdir()
    for tool in ("Identification", "FuseResults"):
        (tmp_path / "bin" / tool).write_text("#!/nowhere/at/all\n")
        os.chmod(tmp_path / "bin" / tool, 0o755)  # noqa: PTH101
    code, _, error = run(lab.arguments("--devkit", tmp_path))
    assert code == 1 and "models/jb_identity.bin: no such scoring model" in error
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "jb_identity.bin").touch()
    code, _, error = run(lab.arguments("--devkit", tmp_path))
    assert code == 1 and "cannot be started" in error
    assert read_feature(lab.feature("fs", 0)).shape == (8,)
