"""Stage 6 on small trees of crops: who takes part, what is missing, noise, restart, report and pictures."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import embedding
import megaface.embed
import megaface_eval
import utils
from embedding import Embedder
from formats.tables import BOX_CROP, CENTRE_CROP, CROP, NO_CROP, FaceRow, table_text
from megaface import curves, run_experiment
from megaface.features import open_store
from megaface.noise import RowView, treat
from megaface.participants import UNKNOWN, open_side
from megaface.protocol import identification
from megaface.report import Outcome, worst_misses
from utils import InputError

PEOPLE, PHOTOS, STRANGERS = 6, 5, 40


class ToyNetwork(nn.Module):
    """Average colours of 4 x 4 fields, without their mean: enough to tell painted people apart."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.crops = 0

    def forward(self, x):
        self.crops += len(x)
        return self.pool(x).flatten(1)


@pytest.fixture
def network(monkeypatch):
    """Let the script use a toy in place of the checkpoint; counts the crops it sees (each twice, mirrored)."""
    toy = ToyNetwork()

    def load(checkpoint, device, *, batch_size=None, **_):
        return Embedder.from_network(toy, "cpu", name=checkpoint, sha256="0" * 64, batch_size=batch_size or 7)

    monkeypatch.setattr(embedding, "load_embedder", load)
    return toy


def paint(path, rng, base, noise=60.0):
    crop = np.kron(base + noise * rng.standard_normal((4, 4, 3)), np.ones((28, 28, 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(crop, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Aligned probes and distractors with their tables of faces."""
    folder = tmp_path_factory.mktemp("trees")
    rng = np.random.default_rng(0)
    rows = []
    for person in range(PEOPLE):
        base = 128 + 60 * rng.standard_normal((4, 4, 3))
        for photo in range(PHOTOS):
            file = f"Some Body{person}/Some Body{person}_{10 * person + photo}.png"
            paint(folder / "probes" / file, rng, base)
            rows.append(FaceRow(f"Some Body{person}", file, BOX_CROP if photo == 4 else CROP, faces=1))
    rows.append(FaceRow("Some Body0", "Some Body0/Some Body0_999.jpg", NO_CROP, "missing"))
    (folder / "probes" / "faces.tsv").write_bytes(table_text(rows))
    rows = []
    for stranger in range(STRANGERS):
        file = f"{stranger % 3}/{stranger}@N00/{stranger}_0.png"
        paint(folder / "distractors" / file, rng, 128 + 60 * rng.standard_normal((4, 4, 3)))
        rows.append(FaceRow(f"{stranger}@N00", file, CENTRE_CROP if stranger == 3 else CROP, faces=1))
    (folder / "distractors" / "faces.tsv").write_bytes(table_text(rows))
    (folder / "fs_noise.txt").write_text("# noise\nSome_Body1_12.jpg\nSome_Body4_40.jpg\nNo_Body_1.jpg\n")
    (folder / "mf_noise.txt").write_text("0/0@N00/0_0.jpg\n1/7@N00/7_0.png\n2/39@Nxx/39_0.jpg\n")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, network, trees, tmp_path):
    """Run the script inside this process: (exit code, standard output, standard error)."""

    def call(*more, **paths):
        places = {"facescrub": trees / "probes", "megaface": trees / "distractors", "out": tmp_path / "out", **paths}
        options = [word for name, path in places.items() for word in (f"--{name.replace('_', '-')}", path)]
        arguments = ["megaface_eval.py", "--checkpoint", "run/toy.pt", *options, *more]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        code = megaface_eval.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def noise_options(trees, treatment):
    return [
        "--noise",
        treatment,
        "--facescrub-noises",
        trees / "fs_noise.txt",
        "--megaface-noises",
        trees / "mf_noise.txt",
    ]


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def error_of(err):
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_raw_and_excluded_side_by_side(run, trees, tmp_path):
    code, out, _ = run(*noise_options(trees, "exclude"))
    assert code == 0
    report = results(tmp_path)
    by_name = {(entry["noise"], entry["size"]): entry for entry in report["results"]}
    assert list(by_name) == [("raw", 10), ("raw", 40), ("exclude", 10), ("exclude", 38)]
    raw, clean = by_name["raw", 40], by_name["exclude", 38]
    assert (raw["probes"], raw["distractors"], raw["pairs"]) == (30, 40, 6 * 5 * 4)
    assert (clean["probes"], clean["distractors"], clean["pairs"]) == (28, 38, 4 * 5 * 4 + 2 * 4 * 3)
    assert all((entry["noisy_probes"], entry["noisy_distractors"]) == (2, 2) for entry in (raw, clean))
    sides = report["probes"], report["distractors"]
    assert [(side["detected"], side["fallback_from_box"], side["fallback_from_centre"]) for side in sides] == [
        (24, 6, 0),
        (39, 0, 1),
    ]
    assert sides[0]["annotations_without_photo"] == 1 and "1 annotations without a photo" in out
    assert 0.5 < raw["rank_1"] <= raw["rank_10"] <= 1
    for rank in ("rank_1", "rank_10"):
        low, high = raw[f"{rank}_by_identity"]["interval_95"]
        assert low <= raw[rank] + 1e-6 and raw[rank] <= high + 1e-6 and high - low > 0.05
    assert [point["far"] for point in raw["verification"]] == [1e-6, 1e-5, 1e-4]
    assert not raw["verification"][0]["resolved"] and raw["impostor_scores"] == 30 * 40
    assert re.search(r"40 +raw +30 +120 +2 \+ 2 +0 \+ 0", out) and re.search(r"38 +exclude +28", out)
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    pictures = {"cmc.png", "cmc.svg", "roc.png", "roc.svg", "misses-raw.png", "misses-exclude.png"}
    assert files == pictures | {"results.json"}
    for name in pictures - {"cmc.svg", "roc.svg"}:
        assert np.asarray(Image.open(tmp_path / "out" / name).convert("L")).std() > 5
    svg = (tmp_path / "out" / "cmc.svg").read_text()
    assert "raw, 40 distractors" in svg and "exclude, 38 distractors" in svg


def test_the_devkits_files_are_those_of_the_drop_in(run, trees, tmp_path, monkeypatch):
    assert run("--noise", "raw", "--write-bin", "--sizes", "10", "25")[0] == 0
    devkit = tmp_path / "out" / "devkit"
    lists = devkit / "templatelists"
    arguments = [devkit / "megaface", devkit / "facescrub", "_run-toy.bin", tmp_path / "again", "-s", 10, 25]
    arguments += ["-p", lists / "facescrub_features_list.json", "-dlp", lists, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["run_experiment.py", *map(str, arguments)])
    assert run_experiment.main() == 0
    written = sorted((tmp_path / "again").glob("*.json"))
    assert len(written) == 4
    for path in written:
        assert (tmp_path / "out" / "raw" / path.name).read_bytes() == path.read_bytes()
    names = json.loads((tmp_path / "out" / "raw" / "probes.json").read_text())
    assert names == json.loads((lists / "facescrub_features_list.json").read_text())


def test_noisy_distractors_at_the_end_count_too(run, trees, tmp_path):
    (tmp_path / "noise.txt").write_text("0/39@N00/39_0\n0/9@N00/9_0\n2/5@N00/5_0")  # 39 is the last of the tree
    assert run(*noise_options(trees, "exclude")[:4], "--megaface-noises", tmp_path / "noise.txt")[0] == 0
    counts = {(one["noise"], one["distractors"]): one["noisy_distractors"] for one in results(tmp_path)["results"]}
    assert counts == {("raw", 10): 2, ("raw", 40): 3, ("exclude", 10): 2, ("exclude", 37): 3}


def test_replacement_keeps_all_counts(run, trees, tmp_path):
    assert run(*noise_options(trees, "replace"), "--sizes", "40")[0] == 0
    raw, replaced = results(tmp_path)["results"]
    for key in ("probes", "distractors", "pairs", "impostor_scores", "size"):
        assert raw[key] == replaced[key]
    assert replaced["probes_replaced_by_means"] == 2 and replaced["distractors_that_match_nothing"] == 2
    assert replaced["rank_1"] >= raw["rank_1"]


def test_without_noise_lists_there_is_only_the_raw_result(run, trees, tmp_path):
    code, _, err = run()
    assert code == 0 and "no noise lists" in err
    assert {entry["noise"] for entry in results(tmp_path)["results"]} == {"raw"}
    code, _, err = run("--noise", "exclude")
    assert code == 1 and "megaface/facescrub_noises.txt: No such file" in error_of(err)


def test_noise_lists_that_mean_nobody_are_told(run, trees):
    code, _, err = run(*noise_options(trees, "exclude"))
    assert code == 0 and "none of its" not in err
    (trees / "utf16.txt").write_text("0/0@N00/0_0.jpg\n", encoding="utf-16")
    swapped = ["--facescrub-noises", trees / "mf_noise.txt", "--megaface-noises", trees / "utf16.txt"]
    code, _, err = run("--noise", "exclude", *swapped)
    assert code == 0 and "mf_noise.txt: none of its 3 names is among the probes\n" in err
    assert "utf16.txt: none of its " in err and "names is among the distractors\n" in err


# ---------------------------------------------------------------------------------------------- missing photos


def template_lists(folder, absent=()):
    """Lists of other extensions and with underscores, and some photos that are not there."""
    probes = [f"Some_Body{k}/Some_Body{k}_{10 * k + photo}.jpg" for k in range(PEOPLE) for photo in range(PHOTOS)]
    probes += [f"Some_Body1/Some_Body1_{number}.png" for number in absent]
    ids = [path.split("/")[0] for path in probes]
    (folder / "fs.json").write_text(json.dumps({"path": probes, "id": ids}))
    distractors = [f"{k % 3}/{k}@N00/{k}_0.jpg" for k in reversed(range(STRANGERS))] + ["9/9@N99/9_9.jpg"] * len(absent)
    (folder / "mf.json").write_text(json.dumps({"path": distractors}))
    return folder / "fs.json", folder / "mf.json"


def test_lists_find_photos_by_any_of_their_names(run, tmp_path):
    lists = template_lists(tmp_path)
    assert run("--noise", "raw", "--probe-list", lists[0], "--distractor-list", lists[1])[0] == 0
    report = results(tmp_path)
    assert (report["probes"]["missing"], report["distractors"]["missing"]) == (0, 0)
    assert open_store(tmp_path / "out" / "features" / "megaface").names[0] == "0/39@N00/39_0.jpg"


def test_a_missing_photo_is_an_error_before_any_work(run, network, tmp_path):
    lists = template_lists(tmp_path, absent=[777])
    code, out, err = run("--noise", "raw", "--probe-list", lists[0], "--distractor-list", lists[1])
    assert code == 1 and network.crops == 0 and not out
    assert "2 photos have no feature, first Some_Body1/Some_Body1_777.png" in error_of(err)
    table = (tmp_path / "out" / "missing.tsv").read_text()
    assert table.splitlines()[1:] == [
        "facescrub\tSome_Body1/Some_Body1_777.png\tnot in the tree",
        "megaface\t9/9@N99/9_9.jpg\tnot in the tree",
    ]
    assert not (tmp_path / "out" / "results.json").exists()


def test_missing_photos_may_count_as_failures(run, tmp_path):
    lists = template_lists(tmp_path, absent=[777, 778])
    arguments = ["--noise", "raw", "--probe-list", lists[0], "--distractor-list", lists[1], "--sizes", "42"]
    code, out, _ = run(*arguments, "--allow-missing", "--write-bin")
    assert code == 0 and re.search(r"42 +raw +32 +142 +0 \+ 0 +2 \+ 2", out)
    (entry,) = results(tmp_path)["results"]
    assert (entry["missing_probes"], entry["missing_distractors"], entry["pairs"]) == (2, 2, 5 * 5 * 4 + 7 * 6)
    matches = json.loads(next((tmp_path / "out" / "raw").glob("matches_*.json")).read_text())
    assert matches[30]["distractors"]["idx"] == [] and set(matches[30]["probes"]["rank"]) == {42}
    store = open_store(tmp_path / "out" / "features" / "facescrub")
    assert np.isnan(store.features[30]).all() and store.problems[30] == "not in the tree"
    assert len(list((tmp_path / "out" / "devkit" / "facescrub").rglob("*.bin"))) == 30


def test_a_feature_that_is_gone_leaves_no_file_of_an_earlier_run(run, trees, tmp_path):
    copy = shutil.copytree(trees / "probes", tmp_path / "probes")
    for left in (30, 29):
        assert run("--noise", "raw", "--allow-missing", "--write-bin", facescrub=copy)[0] == 0
        assert len(list((tmp_path / "out" / "devkit" / "facescrub").rglob("*.bin"))) == left
        (copy / "Some Body2" / "Some Body2_20.png").unlink(missing_ok=True)


def test_crops_that_cannot_be_used_are_missing(run, trees, tmp_path):
    """Unreadable, of another size, or black in every network's eyes: noticed while embedding, named, counted."""
    copy = tmp_path / "probes"
    shutil.copytree(trees / "probes", copy)
    broken = [copy / "Some Body2" / f"Some Body2_{number}.png" for number in (20, 21, 22)]
    broken[0].write_bytes(b"no image")
    Image.new("RGB", (96, 112)).save(broken[1])
    broken[2].unlink()
    code, _, err = run("--noise", "raw", facescrub=copy)
    assert code == 1 and "3 photos have no feature" in error_of(err)
    table = (tmp_path / "out" / "missing.tsv").read_text()
    for reason in ("crop: not a photo", "crop: 96x112 instead of 112x112", "crop: missing"):
        assert reason in table
    code, _, _ = run("--noise", "raw", "--allow-missing", facescrub=copy)
    assert code == 0 and results(tmp_path)["probes"]["missing"] == 3


def test_crops_that_were_brought_back_are_embedded(run, network, trees, tmp_path):
    """The same command sees that they are there again, and embeds nothing else."""
    copy = tmp_path / "probes"
    shutil.copytree(trees / "probes", copy)
    lost = [copy / "Some Body2" / f"Some Body2_{number}.png" for number in (20, 21)]
    for path in lost:
        path.unlink()
    assert run("--noise", "raw", facescrub=copy)[0] == 1
    shutil.copy(trees / "probes" / "Some Body2" / lost[0].name, lost[0])
    lost[1].write_bytes(b"no image")
    network.crops = 0
    code, _, err = run("--noise", "raw", facescrub=copy)
    assert code == 1 and "1 photos have no feature, first Some Body2/Some Body2_21.png" in error_of(err)
    assert network.crops == 2 + 2  # the dimension's question, and the crop with its mirror image
    shutil.copy(trees / "probes" / "Some Body2" / lost[1].name, lost[1])
    assert run("--noise", "raw", facescrub=copy)[0] == 0 and not (tmp_path / "out" / "missing.tsv").exists()
    assert run("--noise", "raw", out=tmp_path / "calm")[0] == 0
    stores = [open_store(tmp_path / name / "features" / "facescrub") for name in ("out", "calm")]
    np.testing.assert_allclose(stores[0].features, stores[1].features, atol=1e-6)
    assert not stores[0].problems


def test_crops_made_in_another_way_are_embedded_again(run, network, trees, tmp_path):
    """Crops of another JPEG quality have the same table of faces; the report beside it tells them apart."""
    copy = tmp_path / "probes"
    shutil.copytree(trees / "probes", copy)
    for quality, crops in ((95, 30 + 40), (90, 30), (90, 0)):
        (copy / "report.json").write_text(json.dumps({"settings": {"jpeg_quality": quality}}))
        network.crops = 0
        assert run("--noise", "raw", facescrub=copy)[0] == 0
        assert network.crops == 2 + 2 * crops


def test_an_alignment_that_has_not_finished_is_no_smaller_challenge(run, trees, tmp_path):
    copy = tmp_path / "probes"
    shutil.copytree(trees / "probes", copy)
    (copy / "faces.tsv").unlink()
    (copy / ".parts").mkdir()
    code, _, err = run("--noise", "raw", facescrub=copy)
    assert code == 1 and f"{copy}: stage 5 has not finished here" in error_of(err)


def test_a_table_that_lost_rows_is_no_smaller_challenge(run, trees, tmp_path):
    tree = shutil.copytree(trees / "distractors", tmp_path / "distractors")
    report = {"photos": STRANGERS}
    for text in (json.dumps(report), "[]", "no JSON"):  # the latter two say nothing
        (tree / "report.json").write_text(text)
        assert run(megaface=tree)[0] == 0
    rows = (tree / "faces.tsv").read_text().splitlines(keepends=True)
    (tree / "faces.tsv").write_text("".join(rows[:-10]))
    (tree / "report.json").write_text(json.dumps(report))
    code, _, err = run(megaface=tree)
    assert code == 1 and "faces.tsv: 30 rows, but report.json beside it speaks of 40 photos" in error_of(err)
    (tree / "faces.tsv").unlink()
    code, _, err = run(megaface=tree)
    assert code == 1 and "faces.tsv: 0 rows, but report.json" in error_of(err)


def test_photos_in_a_folder_between_the_tree_and_the_list(run, trees, tmp_path):
    """MegaFace unpacked with its folder FlickrFinal2: found, named, and the same figures."""
    lists = template_lists(tmp_path)
    arguments = ["--noise", "raw", "--probe-list", lists[0], "--distractor-list", lists[1]]
    assert run(*arguments, out=tmp_path / "plain")[0] == 0
    between = tmp_path / "deep" / "a" / "FlickrFinal2"
    for name in ("0", "1", "2"):
        shutil.copytree(trees / "distractors" / name, between / name)
    code, _, err = run(*arguments, megaface=tmp_path / "deep")
    assert code == 0 and "deep: the photos of the list lie in a/FlickrFinal2" in err
    for name in ("cmc_facescrub_megaface_run-toy_40_1.json", "matches_facescrub_megaface_run-toy_40_1.json"):
        assert (tmp_path / "out" / "raw" / name).read_bytes() == (tmp_path / "plain" / "raw" / name).read_bytes()


def test_files_whose_numbers_would_mean_others_do_not_stay(run, tmp_path):
    """A second model in the same folder: the first one's files stay beside the same lists, and go with other lists."""
    raw, ending = tmp_path / "out" / "raw", "facescrub_megaface_run-toy_40_1.json"
    assert run("--noise", "raw")[0] == 0
    others = [raw / f"{kind}_facescrub_megaface_other_7_1.json" for kind in ("cmc", "matches")]
    for path in others:
        path.write_text("{}")
    assert run("--noise", "raw")[0] == 0 and all(path.exists() for path in others)
    lists = template_lists(tmp_path)
    content = json.loads(lists[1].read_text())
    lists[1].write_text(json.dumps({"path": content["path"][::-1]}))
    assert run("--noise", "raw", "--distractor-list", lists[1])[0] == 0
    assert not any(path.exists() for path in others) and (raw / f"matches_{ending}").exists()


def test_no_figure_where_most_distractors_are_missing(run, trees, tmp_path):
    """A missing distractor beats nobody: with nearly all of them missing any model would have rank-1 100 %."""
    lists = template_lists(tmp_path)
    wrong = tmp_path / "wrong"
    shutil.copytree(trees / "distractors" / "1", wrong / "somewhere" / "else")
    arguments = ["--noise", "raw", "--distractor-list", lists[1], "--allow-missing"]
    code, out, err = run(*arguments, megaface=wrong)
    assert code == 1 and not out and "40 of 40 distractors are missing" in error_of(err) and str(wrong) in err
    assert not (tmp_path / "out" / "results.json").exists()


def test_no_figure_of_a_size_whose_distractors_are_missing(run, tmp_path):
    lists = template_lists(tmp_path)
    content = json.loads(lists[1].read_text())
    content["path"] = [f"9/{number}@N99/{number}_9.jpg" for number in range(12)] + content["path"]
    lists[1].write_text(json.dumps(content))
    arguments = ["--noise", "raw", "--distractor-list", lists[1], "--allow-missing", "--sizes", "10", "30", "52"]
    code, out, err = run(*arguments)
    assert code == 0 and "most of the first 10 distractors are missing" in err
    assert [entry["size"] for entry in results(tmp_path)["results"]] == [30, 52]
    code, out, err = run(*arguments[:-2])
    assert code == 1 and not out and "most distractors of every size are missing" in error_of(err)


def test_a_list_that_is_shorter_than_its_name_says(run, tmp_path):
    lists = template_lists(tmp_path)
    named = lists[1].rename(tmp_path / "megaface_features_list.json_1000_1")
    code, _, err = run("--noise", "raw", "--distractor-list", named)
    assert code == 0 and f"{named}: 40 distractors, not 1,000" in err
    assert "name a photo again" not in err


def test_a_photo_that_is_listed_twice_and_a_tree_that_is_both_sides(run, trees, tmp_path):
    path = template_lists(tmp_path)[1]
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"path": content["path"] + content["path"][:2]}))
    code, _, err = run("--noise", "raw", "--distractor-list", path)
    assert code == 0 and f"{path}: 2 entries name a photo again; each counts" in err
    code, _, err = run("--noise", "raw", megaface=trees / "probes")
    assert code == 1 and "is --facescrub, too" in error_of(err)


@pytest.mark.parametrize("evil", ["/etc/evil.jpg", "../../evil.jpg", "a/../../evil.jpg", "C:\\evil.jpg"])
def test_nothing_is_written_outside(run, tmp_path, evil):
    """Names of a list become names of files with --write-bin."""
    evil = evil.replace("/etc", str(tmp_path / "outside"))
    lists = template_lists(tmp_path)
    content = json.loads(lists[1].read_text())
    content["path"][3] = evil
    lists[1].write_text(json.dumps(content))
    code, _, err = run("--noise", "raw", "--distractor-list", lists[1], "--allow-missing", "--write-bin")
    assert code == 1 and repr(evil) in error_of(err)
    assert not list(tmp_path.rglob("*_run-toy.bin")) and not (tmp_path / "outside").exists()


def test_other_crops_under_the_same_names_are_embedded_again(run, network, trees, tmp_path):
    """Of the same sizes, too: nothing but their contents and times of change tells them apart."""
    copy = tmp_path / "probes"
    shutil.copytree(trees / "probes", copy)
    assert run("--noise", "raw", facescrub=copy)[0] == 0
    one, other = (copy / f"Some Body{k}" / f"Some Body{k}_{10 * k}.png" for k in (1, 2))
    data = [path.read_bytes().ljust(60_000, b"\0") for path in (one, other)]
    for path, content in zip((one, other), data, strict=True):
        path.write_bytes(content)
    assert run("--noise", "raw", facescrub=copy)[0] == 0
    for path, content in zip((one, other), data[::-1], strict=True):
        path.write_bytes(content)
    network.crops = 0
    assert run("--noise", "raw", facescrub=copy)[0] == 0
    assert network.crops == 2 + 2 * 2  # the question for the dimension, and two crops with their mirror images
    assert run("--noise", "raw", facescrub=copy, out=tmp_path / "fresh")[0] == 0
    stores = [open_store(tmp_path / name / "features" / "facescrub") for name in ("out", "fresh")]
    np.testing.assert_allclose(stores[0].features, stores[1].features, atol=1e-6)


def test_features_that_were_tampered_with_are_computed_again(run, network, tmp_path):
    assert run("--noise", "raw")[0] == 0
    before = results(tmp_path)["results"]
    path = tmp_path / "out" / "features" / "megaface" / "features.npy"
    array = np.load(path)
    array[5:9] = np.load(tmp_path / "out" / "features" / "facescrub" / "features.npy")[:4]
    np.save(path, array)
    network.crops = 0
    code, _, err = run("--noise", "raw")
    assert code == 0 and "40 stored features are damaged; they are computed again" in err
    assert network.crops == 2 + 2 * 40 and results(tmp_path)["results"] == before


# ---------------------------------------------------------------------------------------------- restart


def test_an_interrupted_run_goes_on_and_gives_the_same(run, network, tmp_path, monkeypatch):
    assert run("--noise", "raw", out=tmp_path / "calm")[0] == 0
    calm = network.crops
    assert run("--noise", "raw", out=tmp_path / "calm")[0] == 0
    assert network.crops == calm + 2  # only the question for the dimension: nothing is embedded twice
    forward, calls = network.forward, []

    def stop_in_the_middle(x):
        calls.append(len(x))
        if len(calls) == 12:
            raise KeyboardInterrupt
        return forward(x)

    monkeypatch.setattr(network, "forward", stop_in_the_middle)
    assert run("--noise", "raw")[0] == 130
    monkeypatch.setattr(network, "forward", forward)
    network.crops = 0
    assert run("--noise", "raw")[0] == 0
    assert 0 < network.crops < calm - 40
    for name in ("cmc_facescrub_megaface_run-toy_40_1.json", "matches_facescrub_megaface_run-toy_40_1.json"):
        assert (tmp_path / "out" / "raw" / name).read_bytes() == (tmp_path / "calm" / "raw" / name).read_bytes()
    for side in ("facescrub", "megaface"):
        stores = [open_store(tmp_path / name / "features" / side).features for name in ("out", "calm")]
        assert np.array_equal(*stores) and np.allclose(np.linalg.norm(stores[0], axis=1), 1, atol=1e-6)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(megaface.embed, "PART", 7)


def written(tmp_path):
    """The features, and the devkit's files."""
    out = tmp_path / "out"
    files = [*out.glob("features/*/*"), *out.glob("raw/*.json")]
    return {path.relative_to(out): path.read_bytes() for path in files if path.name != ".lock"}


def test_shards_give_the_bytes_of_one_run(run, network, tmp_path, monkeypatch, small_parts):
    assert run()[0] == 0
    expected, crops = written(tmp_path), network.crops
    shutil.rmtree(tmp_path / "out")
    network.crops = 0
    embed = megaface_eval.embed_share

    def first_dies(side, *more):
        if side.ids is None and network.crops >= 60:  # after the probes
            raise KeyboardInterrupt
        return embed(side, *more)

    monkeypatch.setattr(megaface_eval, "embed_share", first_dies)
    assert run("--shard", "1/3")[0] == 130 and not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(megaface_eval, "embed_share", embed)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert run()[0] == 0  # what the first has left is nobody's, so the second does it
    assert written(tmp_path) == expected and crops <= network.crops <= crops + 6  # each asks once for its dimension
    assert not list(tmp_path.glob("out/features/*/parts"))


def test_what_another_shard_is_working_on_is_left_to_it(run, network, tmp_path, small_parts):
    part = tmp_path / "out" / "features" / "megaface" / "parts" / "000002"
    with utils.locked(part / ".lock"):
        code, out, _ = run("--shard", "2/2")
    assert code == 0 and "1 parts are with other shards" in out and not (tmp_path / "out" / "results.json").exists()
    with utils.locked(tmp_path / "out" / "features" / ".last"):
        code, out, _ = run("--shard", "2/2")
    assert code == 0 and "another shard compares" in out
    seen = network.crops
    assert run("--shard", "1/2")[0] == 0 and network.crops - seen <= 2 and results(tmp_path)


def test_a_part_that_was_damaged_or_made_from_other_crops_is_computed_again(run, trees, tmp_path, small_parts):
    tree = tmp_path / "distractors"
    shutil.copytree(trees / "distractors", tree)
    assert run(megaface=tree)[0] == 0
    expected = written(tmp_path)
    shutil.rmtree(tmp_path / "out")
    with utils.locked(tmp_path / "out" / "features" / ".last"):
        assert run("--shard", "1/2", megaface=tree)[0] == 0
    parts = tmp_path / "out" / "features" / "megaface" / "parts"
    damage = bytearray((parts / "000001" / "features.npy").read_bytes())
    damage[-1] ^= 1
    (parts / "000001" / "features.npy").write_bytes(damage)
    assert run(megaface=tree)[0] == 0 and written(tmp_path) == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sizes", "41"], "--sizes 41: there are 40 distractors"),
        (["--sizes", "0"], "--sizes 0"),
        (["--far", "2"], "--far 2"),
        (["--sheet", "0"], "--sheet 0"),
        (["--workers", "-1"], "--workers -1"),
        (["--mean", "0.5", "0.5"], "--mean: one number for all channels or three, not 2"),
        (["--facescrub", "nowhere"], "nowhere: no such folder of aligned probes"),
        (["--megaface", "nowhere"], "nowhere: no such folder of aligned distractors"),
        (["--probe-list", "nowhere.json"], "nowhere.json: No such file"),
    ],
)
def test_options_that_make_no_sense(run, network, more, message):
    code, _, err = run("--noise", "raw", *more)
    assert code == 1 and message in error_of(err) and network.crops == 0


def test_out_that_is_a_file(run, tmp_path):
    (tmp_path / "out").touch()
    code, _, err = run("--noise", "raw")
    assert code == 1 and "is a file, not a folder" in error_of(err)


def test_probes_without_any_pair(run, trees, tmp_path):
    (tmp_path / "fs.json").write_text(json.dumps({"path": ["Some Body0/Some Body0_0"], "id": ["x"]}))
    code, _, err = run("--noise", "raw", "--probe-list", tmp_path / "fs.json")
    assert code == 1 and "fs.json: no identity has two probes" in error_of(err)


def test_a_tree_without_a_table(tmp_path, trees):
    for number in (0, 1):
        Path(tmp_path / "crops" / "A B").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (112, 112)).save(tmp_path / "crops" / "A B" / f"{number}.png")
    side = open_side(tmp_path / "crops", "probes", None, with_ids=True)
    assert (side.ids, side.statuses, side.counts()["origin_unknown"]) == (["A B"] * 2, [UNKNOWN] * 2, 2)


def test_one_model_one_name():
    names = {
        "runs/ms1m/embedding.pt": "ms1m-embedding",
        "released": "released",
        "w600k_r50.onnx": "w600k-r50",
        "../../x/ä b.pt": "x-b",
    }
    assert {path: megaface_eval._model_name(path) for path in names} == names


# ---------------------------------------------------------------------------------------------- treatments


def some_entrants(treatment, seed=0):
    rng = np.random.default_rng(seed)
    probes, distractors = (rng.standard_normal((count, 8)).astype(np.float32) for count in (24, 30))
    probes, distractors = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (probes, distractors))
    absent, noisy_probes = np.arange(24) == 1, np.isin(np.arange(24), [0, 9])
    missing, noisy_distractors = np.arange(30) == 2, np.isin(np.arange(30), [4, 29])
    ids = [f"id{k % 4}" for k in range(24)]
    entrants = treat(
        treatment,
        probes,
        ids,
        distractors,
        absent=absent,
        missing=missing,
        noisy_probes=noisy_probes,
        noisy_distractors=noisy_distractors,
    )
    return entrants, probes, distractors


def identify(entrants, **more):
    marks = {"absent": entrants.absent, "ignored": entrants.ignored, **more}
    return identification(entrants.probes, entrants.ids, entrants.distractors, [10, 30], **marks)


def test_exclusion_is_as_if_they_had_never_been_there():
    entrants, probes, distractors = some_entrants("exclude")
    kept = np.delete(np.arange(24), [0, 9])
    columns = np.delete(np.arange(30), [4, 29])
    assert np.array_equal(entrants.probes, probes[kept]) and np.array_equal(entrants.probe_rows, kept)
    assert isinstance(entrants.distractors, RowView)
    copied = identification(
        probes[kept],
        [f"id{k % 4}" for k in kept],
        distractors[columns],
        [10, 30],
        absent=entrants.absent,
        ignored=entrants.ignored,
    )
    for found, wanted in zip(identify(entrants), copied, strict=True):
        assert np.array_equal(found.ranks, wanted.ranks) and np.array_equal(found.best_index, wanted.best_index)
        assert found.distractors == wanted.distractors


def test_replacement_takes_the_mean_of_the_clean():
    entrants, probes, _ = some_entrants("replace")
    mean = probes[[4, 8, 12, 16, 20]].mean(axis=0)  # of id0, without the noisy 0
    assert np.allclose(entrants.probes[0], mean / np.linalg.norm(mean), atol=1e-6)
    clean = [k for k in range(5, 24, 4) if k != 9]  # of id1, without the noisy 9 and the absent 1
    mean = probes[clean].mean(axis=0)
    assert np.allclose(entrants.probes[9], mean / np.linalg.norm(mean), atol=1e-6)
    assert entrants.ignored.tolist() == [k in (2, 4, 29) for k in range(30)] and entrants.replaced == 2
    assert not np.isin([4, 29, 2], identify(entrants)[1].best_index).any()


def test_nobody_left():
    nothing = np.zeros(3, bool)
    everything = ~nothing
    sides = np.eye(3, dtype=np.float32), ["a", "a", "b"], np.eye(3, dtype=np.float32)
    with pytest.raises(InputError, match="identity b: no clean feature"):
        treat(
            "replace",
            *sides,
            absent=nothing,
            missing=nothing,
            noisy_probes=np.array([False, False, True]),
            noisy_distractors=nothing,
        )
    with pytest.raises(InputError, match="all distractors are on the noise list"):
        treat("exclude", *sides, absent=nothing, missing=nothing, noisy_probes=nothing, noisy_distractors=everything)


def test_the_devkits_reading_of_a_rate_is_never_above_the_full_curve():
    entrants, _, _ = some_entrants("raw")
    (result, _) = identify(entrants)
    outcome = Outcome(entrants, result, 0, 0, 0)
    for far in (1e-6, 0.01, 0.1, 0.5):
        point = outcome.at_far(far)
        assert 0 <= point["rate"] - point["as_the_devkit_writes_it"] <= 0.0101


def test_each_pair_of_misses_is_shown_once():
    """Two photos of one person that both miss each other."""
    result = identify(some_entrants("raw", seed=3)[0])[-1]
    misses = worst_misses(result, 100)
    assert len({frozenset((miss.probe, miss.mate)) for miss in misses}) == len(misses) > 3


def test_the_worst_misses_lose_by_most():
    entrants, probes, distractors = some_entrants("raw")
    (_, result) = identify(entrants)
    misses = worst_misses(result, 5)
    assert len(misses) == 5
    lost = [miss.winning_score - miss.score for miss in misses]
    assert lost == sorted(lost, reverse=True) and len({miss.probe for miss in misses}) == 5
    for miss in misses:
        assert entrants.ids[miss.probe] == entrants.ids[miss.mate] and miss.rank > 0
        cosine = probes[miss.probe].astype(float) @ distractors[miss.winner]
        assert 1 + miss.winning_score / 2 == pytest.approx(cosine, abs=1e-6)
    assert worst_misses(result, 1000)[0] == misses[0]


# ---------------------------------------------------------------------------------------------- curves


def test_curves_of_the_devkits_own_files(shared, tmp_path, monkeypatch, capsys):
    files = [shared / "megaface" / "golden" / case / "cmc.json" for case in ("basic_100d", "ties_200d")]
    arguments = [*files, "--labels", "one $", "two", "--title", "A title", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, arguments)])
    assert curves.main() == 0
    for name in ("cmc", "roc"):
        svg = (tmp_path / f"{name}.svg").read_text()
        assert "one $" in svg and "two" in svg and "A title" in svg
        assert Image.open(tmp_path / f"{name}.png").size == (1050, 750)
    assert "rank 1 93.79 %" in (tmp_path / "cmc.svg").read_text()
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, files), "--labels", "one"])
    assert curves.main() == 1 and "1 labels for 2 files" in capsys.readouterr().err


def test_labels_of_any_kind_leave_room_for_the_curves(shared, tmp_path, monkeypatch):
    files = [shared / "megaface" / "golden" / case / "cmc.json" for case in ("basic_100d", "ties_200d", "tiny_10d")]
    arguments = [*files, "--labels", "long " * 50, "_under score", "two\nlines", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, arguments)])
    assert curves.main() == 0
    for name in ("cmc", "roc"):
        svg = (tmp_path / f"{name}.svg").read_text()
        assert all(label in svg for label in ("long long", "_under score", "two lines")) and "long " * 20 not in svg
    # The lines of the legend take their place below the axes, not from them.
    assert [Image.open(tmp_path / f"{name}.png").size for name in ("cmc", "roc")] == [(1050, 780)] * 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"cmc": [[0], [1]]}',
        '{"cmc": [[0], [1]], "roc": [[0], [1, 2]]}',
        '{"cmc": [[], []], "roc": [[], []]}',
        '{"cmc": [[0], ["x"]], "roc": [[0], [1]]}',
        '{"cmc": [[-5], [1]], "roc": [[0], [1]]}',
        '{"cmc": [[0], [1]], "roc": [[-1], [1]]}',
        '{"cmc": [[0], [98.06]], "roc": [[0], [1]]}',
        '{"cmc": [[0, 1], [0.5, 0.4]], "roc": [[0], [1]]}',
        "[" * 100_000,
    ],
)
def test_files_that_hold_no_curves(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "x.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path / "x.json"), "--out", str(tmp_path / "figures")])
    assert curves.main() == 1
    assert f"{tmp_path / 'x.json'}: not a cmc_*.json" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()


def test_full_curves_are_the_results():
    entrants, _, _ = some_entrants("raw")
    (_, result) = identify(entrants)
    full = curves.from_result(result, "x")
    stairs = np.repeat(full.identification[:-1], np.diff(full.ranks))
    assert np.array_equal(stairs, result.cmc[full.ranks[0] - 1 : -1]) or full.ranks[0] == len(result.cmc)
    assert full.false_accepts[-1] == 1 and full.verification[-1] == 1
