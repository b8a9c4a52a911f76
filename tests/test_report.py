"""report.py: what stands in results files stands in the report and the card, and nothing else does."""

import hashlib
import html.parser
import json
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

import report
from reporting.card import card
from reporting.curves import training_curves
from reporting.facts import read_run

MODEL, OTHER, DATA = "a" * 64, "b" * 64, "d" * 64


def point(far, tar):
    return {
        "far": far,
        "resolved": tar is not None,
        "tar": tar,
        "tar_interval_95": tar and [tar - 0.1, tar + 0.1],
        "threshold": tar and {"cosine": 0.25, "angle": 75.5},
    }


def verification(name="lfw", sha=DATA, model=MODEL, accuracy=0.9, groups=()):
    entry = {
        "name": name, "sha256": sha, "genuine_pairs": 300, "impostor_pairs": 300, "accuracy_kfold_mean": accuracy,
        "accuracy_best_threshold": 0.91, "eer": 0.1, "tar_at_far": [point(0.01, 0.5), point(1e-6, None)],
        "pairs_without_face": {"genuine": 1, "impostor": 0}, "notes": ["a note"], "groups": list(groups),
        "by_identity": {"accuracy": {"interval_95": [0.88, 0.92]}, "eer": None, "tar_at_far": {}},
    }  # fmt: skip
    return {"model": {"name": "net.pt", "sha256": model}, "sets": [entry]}


def training(embedding=MODEL):
    history = [
        {"epoch": epoch, "loss": 9.0 - epoch, "top1": epoch / 10, "crops_per_second": 10.0, "sets": {"val": DATA},
         "verification": {"val": {"accuracy": 0.5 + epoch / 10, "pairs": 100}}}
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    return {
        "finished": True, "epochs": 3, "best_epoch": 3, "best": history[-1], "last": history[-1], "history": history,
        "embedding_sha256": embedding, "unreadable_crops": [],
        "data": {"name": "faces", "crops": 1000, "identities": 10, "fingerprint": "f" * 64},

    }  # fmt: skip


def rate(value):
    return {
        "errors": 1,
        "pairs": 9,
        "rate": value,
        "interval_95": [0.0, 0.9],
        "by_identity": {"interval_95": [0.1, 0.8]},
    }


GROUP = {
    "column": "hand", "threshold": {"cosine": 0.3}, "threshold_chosen": "given, 60 degrees", "notes": [],
    "groups": [{"name": "left", "fmr": rate(0.125), "fnmr": rate(None)}],
    "largest_fmr_ratio": {"sentence": "left above right"}, "largest_fnmr_ratio": None,
}  # fmt: skip


def put(folder, content, name="results.json", command=("/x/lfw_eval.py", "--lfw", "my data")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    run = {"options": {"lr": 0.1, "network": "mfn"}, "environment": {"command": list(command)}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, words)])
    return report.main()


class Page(html.parser.HTMLParser):
    """The text of a page, its tags balanced, and everything that it would load."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.loads, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for key, value in attributes if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


def test_every_figure_with_interval_command_and_hashes(tmp_path, monkeypatch):
    put(tmp_path / "run" / "train", training(), command=("/x/train.py", "--data", "d"))
    put(tmp_path / "run" / "lfw", verification(groups=[GROUP]))
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "run" / "lfw" / "lfw-roc.png")
    (tmp_path / "run" / "lfw" / "lfw-angles.png").write_bytes(b"no picture")
    assert run(monkeypatch, tmp_path / "run", "--out", tmp_path / "r" / "report.html") == 0
    page = Page((tmp_path / "r" / "report.html").read_text())
    for wanted in (
        "90.00 %", "88.00 ... 92.00", "50.00 %, cosine from 0.2500", "40.00 ... 60.00", "12.50 %", "10.00 ... 80.00",
        "left above right", "python lfw_eval.py --lfw 'my data'", "python train.py --data d", MODEL, DATA, "f" * 64,
        "a note", "pairs without a face (counted as wrong)", "3 of 3", "80.00 %", "70.82 ... 87.33", "not a picture",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    assert "1e-06" not in page.text
    assert all(value.startswith(("#", "data:image/")) for value in page.loads)
    assert sum(value.startswith("data:") for value in page.loads) == 1 + 3  # the ROC; loss, top-1, accuracy
    text = (tmp_path / "r" / "MODEL_CARD.md").read_text()
    assert "# Model card: net.pt" in text and f"`{MODEL}`" in text and f"- data lfw: `{DATA}`" in text
    assert "| accuracy over folds | 90.00 % | 88.00 ... 92.00 |" in text
    assert "IJB (`ijb_eval.py`)" in text and "Verification (`lfw_eval.py`)" not in text


def test_two_runs_stand_side_by_side(tmp_path, monkeypatch):
    put(tmp_path / "a" / "run", verification(accuracy=0.9))
    put(tmp_path / "b" / "run", verification(accuracy=0.8, model=OTHER))
    assert run(monkeypatch, tmp_path / "a" / "run", tmp_path / "b" / "run", "--out", tmp_path / "both.html") == 0
    text = (tmp_path / "both.html").read_text()
    assert re.search(r"<th>accuracy over folds</th><td>90.00 %.*?</td><td>80.00 %", text)
    assert "do not compare" not in text and "<th>a/run</th><th>b/run</th>" in text
    assert text.count("a note") == 1
    assert (tmp_path / "MODEL_CARD-a_run.md").exists() and (tmp_path / "MODEL_CARD-b_run.md").exists()
    # The same pairs, but faces were found otherwise.
    otherwise = verification(accuracy=0.8, model=OTHER)
    otherwise["sets"][0]["source"] = {"max_side": 100, "people_by_chains": True}
    put(tmp_path / "b" / "run", otherwise)
    assert run(monkeypatch, tmp_path / "a" / "run", tmp_path / "b" / "run", "--out", tmp_path / "both.html") == 0
    text = (tmp_path / "both.html").read_text()
    assert "Not measured in the same way in all columns" in text and "intervals by person may be too narrow" in text
    put(tmp_path / "b" / "run", verification(sha="e" * 64, model=OTHER))
    assert run(monkeypatch, tmp_path / "a" / "run", tmp_path / "b" / "run", "--out", tmp_path / "both.html") == 0
    assert "do not compare" in (tmp_path / "both.html").read_text()


def test_the_card_refuses_figures_without_the_hash_of_their_data_or_of_another_model(tmp_path):
    put(tmp_path / "train", training())
    put(tmp_path / "good", verification("good"))
    put(tmp_path / "nohash", verification("nohash", sha=None, accuracy=0.7777))
    put(tmp_path / "foreign", verification("foreign", model=OTHER, accuracy=0.6666))
    put(tmp_path / "unknown", verification("unknown", model=None, accuracy=0.5555))
    text = card(read_run(tmp_path, "run"))
    assert "## Verification: good" in text
    for name, accuracy in (("nohash", "77.77"), ("foreign", "66.66"), ("unknown", "55.55")):
        assert f"## Verification: {name}" not in text and accuracy not in text
        assert f"- Verification, {name}: " in text
    assert "no hash of the data" in text and "another model" in text and "nothing says which model" in text


def test_names_are_text_and_never_html(tmp_path, monkeypatch):
    evil = '<script>alert(1)</script>"|`x`\n# heading'
    content = verification(evil)
    content["sets"][0]["notes"] = [evil]
    put(tmp_path / "run", content, command=("/x/lfw_eval.py", evil))
    assert run(monkeypatch, tmp_path / "run", "--out", tmp_path / "r.html", "--title", evil) == 0
    page = Page((tmp_path / "r.html").read_text())
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "<script>" not in text and "\n# heading" not in text


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    put(tmp_path / "run" / "good", verification())
    put(tmp_path / "run" / "cut", json.dumps(verification())[:50])
    put(tmp_path / "run" / "strange", {"hello": 1})
    put(tmp_path / "run" / "old", {"model": {}, "sets": [{"name": "x"}]})
    put(tmp_path / "run" / "cache" / "deep", "never looked at")
    assert run(monkeypatch, tmp_path / "run", "--out", tmp_path / "r.html") == 0
    said = capsys.readouterr().out
    for name in ("cut", "strange", "old"):
        assert f"{name}/results.json" in said
        assert f"{name}/results.json" in Page((tmp_path / "r.html").read_text()).text
    assert "deep" not in said


@pytest.mark.parametrize("words", [["nowhere"], ["empty"], ["bad"], ["good", "good"]])
def test_nothing_to_report_is_an_error(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "bad", "{")
    put(tmp_path / "good", verification())
    assert run(monkeypatch, *(tmp_path / word for word in words), "--out", tmp_path / "r.html") == 1
    assert "error: " in capsys.readouterr().err and not (tmp_path / "r.html").exists()


def test_a_page_is_not_written_over_results(tmp_path, monkeypatch, capsys):
    put(tmp_path / "good", verification())
    path = tmp_path / "good" / "results.json"
    before = path.read_bytes()
    assert run(monkeypatch, tmp_path / "good", "--out", path) == 1
    assert "a name that ends in .html" in capsys.readouterr().err and path.read_bytes() == before


def test_folders_of_one_model_together(tmp_path, monkeypatch):
    put(tmp_path / "train", training())
    put(tmp_path / "lfw", verification())
    words = [tmp_path / "train", tmp_path / "lfw", "--together", "--out", tmp_path / "r.html"]
    assert run(monkeypatch, *words) == 0
    assert [path.name for path in tmp_path.glob("*.md")] == ["MODEL_CARD.md"]
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "## Training: faces" in text and "## Verification: lfw" in text


def megaface(names="1" * 64, noise=None):
    side = {"photos_sha256": DATA, "names_sha256": names}
    rows = [
        {"noise": treatment, "distractors": 10, "rank_1": rate, "rank_10": 1.0}
        for treatment, rate in (("raw", 0.25), ("exclude", 0.5))
        if treatment == "raw" or noise
    ]
    lists = {"noise_lists": {"fs.txt": noise, "mf.txt": "2" * 64} if noise else {}}
    return {"model": {"name": "net.pt", "sha256": MODEL}, "probes": side, "distractors": side, "results": rows} | lists


@pytest.mark.parametrize(
    ("one", "other", "compares"),
    [
        (megaface(noise="3" * 64), megaface(noise="3" * 64), True),
        (megaface(), megaface(noise="3" * 64), True),  # the raw figures of both
        (megaface(noise="3" * 64), megaface(noise="4" * 64), False),
        (megaface(), megaface("5" * 64), False),  # the same photos in another order
    ],
)
def test_megaface_compares_by_the_same_lists(tmp_path, monkeypatch, one, other, compares):
    put(tmp_path / "a", one)
    put(tmp_path / "b", other)
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "a" / "cmc.png")
    assert run(monkeypatch, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "r.html") == 0
    page = Page((tmp_path / "r.html").read_text())
    assert ("Not measured in the same way in all columns" not in page.text) == compares
    assert "Not the same data" not in page.text and sum(value.startswith("data:") for value in page.loads) == 1
    assert ("Challenge 1, noise lists: exclude" in page.text) == any(c["noise_lists"] for c in (one, other))


def test_tinyface_compares_where_faces_were_found_in_one_way(tmp_path, monkeypatch):
    for name, before in (("a", False), ("b", True)):
        photos = {"aligned_before": before, "detector_sha256": None if before else DATA, "without_feature": 0}
        sizes = {"lists": {"l": DATA}, "photos_sha256": DATA, "probes": 9, "matches": 8, "distractors": 7}
        content = {"protocol": "TinyFace", "model": {"name": "net.pt", "sha256": MODEL}, "data": sizes}
        put(tmp_path / name, content | {"photos": photos, "as_printed": {"rank-1": 50.0}})
    assert run(monkeypatch, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "r.html") == 0
    assert "Not measured in the same way in all columns" in (tmp_path / "r.html").read_text()


def test_ijb_tinyface_megaface_stress_audit_and_comparison(tmp_path):
    interval = {"value": 0.5, "interval_95": [0.4, 0.6]}
    model = {"model": {"name": "net.pt", "sha256": MODEL}, "environment": {"command": ["x.py"]}}
    hits = [{"far": 1e-4, "resolved": True, "tar": 0.7, "tar_interval_95_by_identity": [0.6, 0.8]}]
    found = {"N0D1F1": {"as_printed": {"0.0001": 0.71, "auc": 0.9}, "far_not_exceeded": hits}}
    alarms = {"fpir": 0.01, "resolved": True, "tpir": 0.3, "tpir_interval_95": [0.2, 0.4]}
    alarms["tpir_interval_95_by_identity"] = None
    printed = {"top1": 0.45, "mean_tpir": {"0.01": 0.35, "1": 0.6}}
    many = {"G1": {"fpir_not_exceeded": [alarms]}, "of_mated_probes": {"rank_1": interval}, "as_printed": printed}
    lists = {"meta": "IJBC/meta", "sha256": {"pairs.txt": DATA}, "photos_sha256": "c" * 64}
    missing = {"images": 3, "of": 24, "reasons": ["1.jpg: missing"], "lost_templates": 1}
    put(tmp_path / "ijb", model | {"protocol": "IJBC", "data": lists, "missing": missing, "one_to_one": found,
                                   "one_to_many": many})  # fmt: skip
    lists = {"lists": {"lists/probe.txt": DATA}, "photos_sha256": "e" * 64, "probes": 9, "matches": 8, "distractors": 7}
    pictures = {
        "aligned": 5,
        "whole_picture_resized": 4,
        "without_feature": 1,
        "names_without_feature": ["Probe/1.jpg"],
    }
    put(tmp_path / "tiny", model | {"protocol": "TinyFace", "data": lists, "photos": pictures, "rank_1": interval,
                                    "as_printed": {"rank-1": 51.5}, "mean_average_precision": interval})  # fmt: skip
    side = {"photos_sha256": DATA}
    row = {
        "noise": "raw",
        "distractors": 10,
        "rank_1": 0.25,
        "rank_10": 0.75,
        "pairs": 100,
        "verification": [],
        "rank_1_by_identity": {"interval_95": [0.1, 0.4]},
        "rank_10_by_identity": interval,
        "missing_probes": 0,
        "missing_distractors": 4000,
    }
    put(tmp_path / "mega", model | {"probes": side, "distractors": side, "results": [row]})
    levels = [{"level": level, "fnmr": {"value": level / 100, "interval_95": [0, 1]}} for level in (0, 30, 10)]
    put(tmp_path / "stress", {"far": 0.001, "people": {"identities": 5}, "models": [
        {"label": "x", "name": "net.pt", "sha256": MODEL, "factors": {"yaw": {"levels": levels}},
         "groups": {"men": {"fmr": interval, "fnmr": interval}, "women": None}}
    ], "environment": {}})  # fmt: skip
    audit = {"data": {"name": "faces", "crops": 9, "identities": 3, "fingerprint": DATA}, "limits": {}, "against": []}
    put(tmp_path / "audit", model | audit | {"counts": {"wrong person": 4}}, "audit.json")
    row = {"difference": 0.01, "interval_95": [0.0, 0.02], "p_by_identity": 0.04}
    sets = [{"name": "lfw", "sha256": DATA, "accuracy": row, "tar_at_far": [], "notes": [], "sentence": "A is better."}]
    put(tmp_path / "ab", {"kind": "comparison", "a": model, "b": model, "sets": sets}, "comparison.json")
    run = read_run(tmp_path, "all")
    assert not run.unread
    figures = [(source.kind, figure) for source in run.sources for figure in source.figures]
    said = {(kind, figure.label): (figure.value, figure.interval) for kind, figure in figures}
    for key, value in {
        ("IJB", "1:1 TAR at FAR 0.0001, not exceeded"): ("70.00 %", "60.00 ... 80.00"),
        ("IJB", "1:1 TAR at FAR 0.0001, as printed"): ("71.00 %", ""),
        ("IJB", "1:N TPIR at FPIR 0.01, G1"): ("30.00 %", "20.00 ... 40.00"),
        ("IJB", "1:N rank 1, mated probes"): ("50.00 %", "40.00 ... 60.00"),
        ("IJB", "1:N rank 1, all probes, as printed"): ("45.00 %", ""),
        ("IJB", "1:N TPIR at FPIR 0.01, both galleries, as printed"): ("35.00 %", ""),
        ("TinyFace", "rank 1"): ("50.00 %", "40.00 ... 60.00"),
        ("TinyFace", "rank 1, as printed"): ("51.50 %", ""),
        ("TinyFace", "probes + matches + distractors"): ("9 + 8 + 7", ""),
        ("MegaFace", "rank 1, 10 distractors, noise lists: raw"): ("25.00 %", "10.00 ... 40.00"),
        ("Stress", "FNMR, yaw, worst level"): ("30.00 % at 30", "0.00 ... 100.00"),
        ("Stress", "FMR, men"): ("50.00 %", "40.00 ... 60.00"),
        ("Data", "wrong person"): ("4", ""),
        ("Comparison", "accuracy, A - B"): ("+1.00 points (p = 0.04)", "0.00 ... 2.00"),
    }.items():
        assert said[key] == value, key
    text = card(run)
    assert "## Left out" not in text and all(
        f"## {kind}: " in text for kind in ("IJB", "TinyFace", "MegaFace", "Stress")
    )
    for line in (f"- data pairs.txt: `{DATA}`", f"- data photos: `{'c' * 64}`", f"- data probe.txt: `{DATA}`",
                 f"- data photos: `{'e' * 64}`",
                 f"- data probes: `{DATA}`",
                 "- 4,000 distractors have no feature (10 distractors, noise lists: raw)",
                 "- 3 of 24 images have no feature (1.jpg: missing ...), 1 templates have none left",
                 "- 5 photos aligned, 4 resized as a whole",
                 "- 1 photos give no feature and fail (Probe/1.jpg)"):  # fmt: skip
        assert line in text.split("\n"), line


def test_best_epochs_stand_side_by_side_also_where_they_differ(tmp_path, monkeypatch):
    short = training()
    short |= {"epochs": 1, "best_epoch": 1, "history": short["history"][:1]}
    short |= {"best": short["history"][0], "last": short["history"][0]}
    put(tmp_path / "a", training())
    put(tmp_path / "b", short)
    assert run(monkeypatch, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "r.html") == 0
    text = (tmp_path / "r.html").read_text()
    assert "<th>best epoch</th><td>3</td><td>1</td>" in text
    assert re.search(r"<th>accuracy on val, best epoch</th><td>80.00 %.*?</td><td>60.00 %", text)


def test_a_path_or_a_seed_is_no_hash(tmp_path):
    settings = {"stage": "pre_process", "photos": "26 files with the digest aae55878bc58d300"}
    put(tmp_path / "crops", {"settings": settings, "photos": 26, "identities": 6, "stamp": "0" * 32}, "report.json")
    held_out = {"people": 50, "crops": 900, "names": ["a"]}
    put(tmp_path / "split", {"source": "faces", "hold_out": 50, "seed": 0, "held_out": held_out}, "report.json")
    put(tmp_path / "lfw", verification())
    text = card(read_run(tmp_path, "run"))
    assert "- Data, crops in crops: no hash of the data (photos, identities" in text and "aae55878" not in text
    assert "- Data, people held out: no hash of the data" in text
    (tmp_path / "crops" / "faces.tsv").write_text("photo\n")
    (tmp_path / "split" / "pairs.csv").write_text("file1,file2,same\n")
    text = card(read_run(tmp_path, "run"))
    for file in (tmp_path / "crops" / "faces.tsv", tmp_path / "split" / "pairs.csv"):
        assert f"- data {file.name}: `{hashlib.sha256(file.read_bytes()).hexdigest()}`" in text
    assert "| people held out | 50 | - |" in text and "- of faces, seed 0" in text


def test_every_training_is_of_its_own_network(tmp_path):
    """Two trainings below one folder: the figures of the second are none of the first one's network."""
    put(tmp_path / "a", training())
    other = training(OTHER)
    other["best"]["verification"]["val"]["accuracy"] = 0.4321
    put(tmp_path / "b", other)
    run = read_run(tmp_path, "runs")
    assert [source.models[0][1] for source in run.sources] == [MODEL, OTHER]
    text = card(run)
    assert "43.21 %" not in text and "measured on another model (bbbbbbbbbbbb)" in text


def test_results_of_two_models_are_never_one_card_for_want_of_a_hash(tmp_path):
    for name, model, accuracy in (("x", MODEL, 0.6543), ("y", OTHER, 0.8765)):
        put(tmp_path / name, verification(name, model=model, accuracy=accuracy))
    put(tmp_path / "old", {key: value for key, value in training().items() if key != "embedding_sha256"})
    text = card(read_run(tmp_path, "run"))
    assert ("65.43 %" in text) != ("87.65 %" in text) and "measured on another model" in text


def test_runs_of_names_that_files_cannot_tell_apart(tmp_path, monkeypatch):
    for name, model in (("a b", MODEL), ("a_b", OTHER)):
        put(tmp_path / name, verification(model=model))
    assert run(monkeypatch, tmp_path / "a b", tmp_path / "a_b", "--out", tmp_path / "r.html") == 0
    cards = [path.read_text() for path in sorted(tmp_path.glob("MODEL_CARD-*.md"))]
    assert len(cards) == 2 and {MODEL in text for text in cards} == {True, False}


def test_all_of_many_trainings_are_drawn(tmp_path, monkeypatch):
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *xy, **how: drawn.append(how) or plot(axes, *xy, **how))
    runs = [read_run(put(tmp_path / f"run{number}", training()), str(number)) for number in range(9)]
    training_curves(runs)
    lines = [(how["label"], how["color"], how["linestyle"]) for how in drawn]
    assert len(lines) == 9 * 3 and len({line[1:] for line in lines}) == 9


def test_columns_of_one_file_are_called_by_their_models(tmp_path, monkeypatch):
    rates = {"one.onnx": (0.1, 0.2), "two.onnx": (0.3, 0.3)}
    models = [
        {"label": name, "name": name, "sha256": sha, "factors": {"yaw": {"levels": [
            {"level": level, "fnmr": {"value": rate, "interval_95": [0, 1]}}
            for level, rate in enumerate(rates[name], start=1)
        ]}}}
        for name, sha in (("one.onnx", MODEL), ("two.onnx", OTHER))
    ]  # fmt: skip
    stressed = {"far": 0.001, "people": {"identities": 5}, "models": models, "environment": {}}
    put(tmp_path / "st", stressed)
    assert run(monkeypatch, tmp_path / "st", "--out", tmp_path / "r.html") == 0
    page = (tmp_path / "r.html").read_text()
    assert "<th>st, one.onnx</th><th>st, two.onnx</th>" in page
    assert page.count("FNMR, yaw, worst level") == 1 and "20.00 % at 2" in page and "30.00 % at 2" in page
    # At another threshold it is another figure, and a threshold that accepts nobody is said.
    put(tmp_path / "loose", stressed | {"far": 0.1, "models": [models[0] | {"threshold_resolved": False}]})
    assert run(monkeypatch, tmp_path / "st", tmp_path / "loose", "--out", tmp_path / "r.html") == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("FNMR, yaw, worst level") == 2 and "too few people for FAR 0.1: nobody is accepted" in page
    for name in ("x", "y"):
        put(tmp_path / "run" / name / "lfw", verification())
    assert run(monkeypatch, tmp_path / "run", "--out", tmp_path / "r.html") == 0
    assert "<th>run, x/lfw</th><th>run, y/lfw</th>" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["sets"][0].update(sha256=5),
        lambda content: content["sets"][0].update(notes=[1]),
        lambda content: content["model"].update(sha256=[1]),
        lambda content: content.update(training(), history=[1]),
        lambda content: content.update(training(), history=[{"loss": 1.0}]),
        lambda content: content.update(training(), history=[{"epoch": 1, "verification": {"val": 1}}]),
    ],
)
def test_values_of_a_wrong_kind_are_named(tmp_path, monkeypatch, capsys, change):
    content = verification()
    change(content)
    put(tmp_path / "run" / "bad", content)
    put(tmp_path / "run" / "good", verification("good"))
    assert run(monkeypatch, tmp_path / "run", "--out", tmp_path / "r.html") == 0
    assert "bad/results.json: damaged" in capsys.readouterr().out
