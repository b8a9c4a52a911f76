"""Error rates by group, against a plain count and against chance; tables of attributes; two models compared."""

import itertools
import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from helpers.toy_models import write_onnx

import compare
import lfw_eval
from formats.verification_bin import write_bin
from models import build_network
from utils import InputError
from verification import groups
from verification.attributes import as_groups, parse_column, read_attributes
from verification.groups import by_group, choose_threshold
from verification.metrics import evaluate
from verification.report import CHAINED, people_text


def pairs_of(seed, people, shift):
    """Pairs of `people` of two groups; impostor cosines of the second group are higher by `shift`."""
    generator = np.random.default_rng(seed)
    group = np.arange(people) % 2
    everybody = np.array(list(itertools.combinations(range(people), 2)))
    chosen = everybody[generator.permutation(len(everybody))[: 12 * people]]
    sides = np.concatenate([np.repeat(np.arange(people), 6)[:, None].repeat(2, 1), chosen])
    same = sides[:, 0] == sides[:, 1]
    effect = generator.normal(0, 0.05, people)
    cosines = np.where(same, 0.6, 0.0) + effect[sides].sum(axis=1) + generator.normal(0, 0.15, len(same))
    cosines += shift * (~same & (group[sides] == 1).all(axis=1))
    result = evaluate(
        np.clip(cosines, -1, 1), same, np.arange(len(same)) % 10, name="set", far_levels=(0.1, 0.01, 0.001)
    )
    names = np.array(["left", "right"])[group[sides]]
    return result, sides, [tuple(row) for row in names.tolist()]


def test_rates_are_those_of_a_plain_count():
    result, sides, values = pairs_of(1, 60, 0.3)
    found = by_group(result, sides, "hand", values)
    assert found.chosen == "FAR 0.1 over all pairs"
    for group in found.groups:
        inside = [index for index, value in enumerate(values) if value == (group.name, group.name)]
        impostors = [index for index in inside if not result.same[index]]
        genuine = [index for index in inside if result.same[index]]
        assert (group.fmr.pairs, group.fnmr.pairs) == (len(impostors), len(genuine))
        assert group.fmr.errors == sum(result.cosines[index] >= found.threshold for index in impostors)
        assert group.fnmr.errors == sum(result.cosines[index] < found.threshold for index in genuine)
        assert group.fmr.by_person.low <= group.fmr.errors / group.fmr.pairs <= group.fmr.by_person.high
    assert found.across.fmr.pairs == found.pairs_across["left", "right"].pairs
    total = sum(group.fmr.pairs + group.fnmr.pairs for group in [*found.groups, found.across])
    assert total == len(values) and found.unknown == 0
    assert (found.fmr_spread.worst, found.fmr_spread.best) == ("right", "left") and found.fmr_spread.p < 0.01
    json.dumps(found.to_json(), allow_nan=False)
    assert "more than chance" in groups.table(found)


def test_groups_that_do_not_differ_rarely_seem_to():
    alarms = sum(
        by_group(*pairs_of(seed, 40, 0.0)[:2], "hand", pairs_of(seed, 40, 0.0)[2]).fmr_spread.p < 0.05
        for seed in range(20)
    )
    assert alarms <= 4  # of 20 at 5 %: more come once in 400 times


def test_unknown_values_are_left_out_and_one_group_is_none():
    result, sides, values = pairs_of(3, 30, 0.0)
    values[0] = ("", "left")
    assert by_group(result, sides, "hand", values).unknown == 1
    with pytest.raises(InputError, match="tells no groups apart"):
        by_group(result, sides, "hand", [("left", "left")] * len(values))
    with pytest.raises(InputError, match="more than 40"):
        by_group(result, sides, "hand", [(str(index), str(index)) for index in range(len(values))])
    found = by_group(result, None, "hand", values)
    assert found.fmr_spread is None and found.groups[0].fmr.by_person is None and "nobody knows" in found.notes[-1]


def test_groups_of_equal_rates_are_alike():
    result, sides, values = pairs_of(3, 60, 0.0)
    perfect = evaluate(np.where(result.same, 0.9, 0.1), result.same, np.arange(len(sides)) % 5)
    found = by_group(perfect, sides, "hand", values, angle=60.0).to_json()
    assert found["largest_fmr_ratio"]["sentence"] == "False match rate: the same for all groups"


def test_the_threshold():
    result, _, _ = pairs_of(5, 60, 0.0)
    assert choose_threshold(result, 60.0)[0] == pytest.approx(0.5)
    few = evaluate(result.cosines[::40], result.same[::40], result.fold_of[::40], far_levels=(0.1,))
    assert choose_threshold(few, None) == (few.best_threshold, "most pairs answered correctly, over all groups")


# --- attributes -----------------------------------------------------------------------------------------------------


def test_tables_by_photo_and_by_person(tmp_path):
    first = tmp_path / "truth.tsv"
    first.write_text(
        'identity\tfile\tparameters\nA\tphotos/A/A_1.jpg\t{"years": 31.5, "camera": {"grey": false}, "who": null}\n'
    )
    second = tmp_path / "people.csv"
    second.write_text("name;skin\nA;dark\nB;light\n")
    known = read_attributes([first, second])
    assert known.columns() == ["grey", "skin", "years"]
    photo = tmp_path / "lfw" / "photos" / "A" / "A_1.jpg"
    assert (known.value(photo, "years"), known.value(photo, "skin"), known.value(photo, "tall")) == ("31.5", "dark", "")
    assert known.value(photo.with_name("A_2.jpg"), "skin") == "dark"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column"),
        ("age,sex\n1,f\n", "line 1: no column is called file or identity"),
        ("file,sex\na.jpg\n", "line 2: 1 columns"),
        ("file,sex\na.jpg,f\na.jpg,m\n", "line 3: says something else of a.jpg"),
        ("file\tparameters\na.jpg\t{broken\n", "line 2: parameters are not JSON"),
        (b"file,sex\n\xff,f\n", "not UTF-8"),
    ],
)
def test_damaged_tables_name_the_line(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        read_attributes([path])


def test_numbers_become_ranges():
    ages = [str(age) for age in range(20, 80)]
    assert len(set(as_groups(ages))) == 3
    assert as_groups(["29", "30", "49.9", "50", ""], [30, 50]) == [
        "under 30",
        "30 to 50",
        "30 to 50",
        "50 and more",
        "",
    ]
    assert as_groups(["1", "2", "1"]) == ["1", "2", "1"]
    assert parse_column("age:30,50") == ("age", [30.0, 50.0]) and parse_column("sex") == ("sex", None)
    assert as_groups(["20", "nan", "60"], [30, 50]) == ["under 30", "", "50 and more"]
    assert set(as_groups([*ages, "nan"])) == {*as_groups(ages), ""}
    years = [str(year) for year in range(1980, 2000)]
    assert sorted(set(as_groups(years, [1985, 1990]))) == ["1985 to 1990", "1990 and more", "under 1985"]
    assert len(set(as_groups(years, [1990, 1992, 1994]))) == 4 and len(set(as_groups(years))) == 3
    assert not any("e+" in name for name in as_groups(years))
    for text in ("age:", "age:x", "age:nan"):
        with pytest.raises(InputError, match="borders are numbers"):
            parse_column(text)
    with pytest.raises(InputError, match="is no number"):
        as_groups(["a"], [1.0])
    result, sides, _ = pairs_of(7, 60, 0.0)
    names = as_groups([str(float(value)) for value in sides.T.ravel()], [9.0, 40.0])
    both = list(zip(names[: len(sides)], names[len(sides) :], strict=True))
    assert [group.name for group in by_group(result, sides, "n", both).groups] == ["under 9", "9 to 40", "40 and more"]


# --- the scripts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two models on one folder of crops, by lfw_eval.py."""
    import cv2

    root = tmp_path_factory.mktemp("two")
    generator = np.random.default_rng(0)
    lines = ["file1,file2,same,hand,camera1,camera2"]
    for person in range(12):
        (root / "crops" / f"p{person}").mkdir(parents=True)
        face = generator.integers(0, 255, (14, 14, 3))
        for number in range(3):
            noisy = np.clip(face + generator.normal(0, 60, face.shape), 0, 255).astype(np.uint8)
            cv2.imwrite(str(root / "crops" / f"p{person}" / f"{number}.png"), cv2.resize(noisy, (112, 112)))
        hand = "left" if person % 2 else "right"
        for a, b in itertools.combinations(range(3), 2):
            lines.append(f"p{person}/{a}.png,p{person}/{b}.png,1,{hand},c{a},c{b}")
        for other in range(person):
            lines.append(f"p{person}/0.png,p{other}/1.png,0,{hand},c0,c1")
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    model = write_onnx(root / "m.onnx")
    for name, more in (("a", ["--no-mirror", "--groups", "hand", "camera"]), ("b", ["--mirror"])):
        run(
            lfw_eval, "--checkpoint", model, "--mean", 0.5, "--std", 0.5, *more, "--lfw", root / "crops", "--aligned",
            "--pairs", root / "pairs.csv", "--out", root / name, "--far", 0.1,
        )  # fmt: skip
    return root


def run(script, *words):
    import sys

    before, sys.argv = sys.argv, [script.__name__, *map(str, words)]
    try:
        code = script.main()
    finally:
        sys.argv = before
    return code


def test_groups_of_a_table_are_in_the_report(evaluated):
    (entry,) = json.loads((evaluated / "a" / "results.json").read_text())["sets"]
    hand, camera = entry["groups"]
    assert [group["name"] for group in hand["groups"]] == ["left", "right", groups.ACROSS]
    assert sum(group["fmr"]["pairs"] for group in hand["groups"]) == 66
    assert [group["name"] for group in camera["groups"]] == ["c0", "c1", "c2", groups.ACROSS]
    assert {path.name for path in (evaluated / "a").glob("*groups*")} == {
        f"crops-groups-{column}{suffix}" for column in ("hand", "camera") for suffix in (".png", ".svg")
    }
    assert entry["by_identity"]["accuracy"]["identities"] == 12
    options = json.loads((evaluated / "a" / "run.json").read_text())["options"]
    assert options["groups"] == ["hand", "camera"]


def test_a_column_that_is_not_there_is_named_with_those_that_are(evaluated, tmp_path, capsys):
    words = [
        "--checkpoint",
        evaluated / "m.onnx",
        "--mean",
        0.5,
        "--std",
        0.5,
        "--lfw",
        evaluated / "crops",
        "--aligned",
    ]
    assert run(lfw_eval, *words, "--pairs", evaluated / "pairs.csv", "--out", tmp_path, "--groups", "hant") == 1
    assert "no such column (there are: hand, camera)" in capsys.readouterr().err


def test_two_models_on_the_same_pairs(evaluated, tmp_path, capsys):
    assert run(compare, evaluated / "a", evaluated / "b" / "results.json", "--out", tmp_path, "--far", 0.1) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "comparison.json").read_text())["sets"][0]
    a, b = (json.loads((evaluated / name / "results.json").read_text())["sets"][0] for name in "ab")
    row = found["accuracy"]
    # Of all pairs, as the difference: folds differ in size here, and their mean is another figure.
    assert row["a"] - row["b"] == pytest.approx(row["difference"])
    for side, entry in ((row["a"], a), (row["b"], b)):
        assert side == pytest.approx(entry["by_identity"]["accuracy"]["value"]) != entry["accuracy_kfold_mean"]
    assert row["difference"] * found["pairs"] == pytest.approx(row["only_a_correct"] - row["only_b_correct"])
    assert found["tar_at_far"][0]["a"] == a["tar_at_far"][0]["tar"]
    assert found["sentence"] in said and "pairs of 12 people" in found["sentence"]
    assert run(compare, evaluated / "a", evaluated / "a") == 0
    said = capsys.readouterr().out
    name = json.loads((evaluated / "a" / "results.json").read_text())["model"]["name"]
    assert f"{name} (A) answers" in said and f" and {name} (B) " in said and "no difference is proven" in said


def test_what_is_not_known_of_people_is_not_said(tmp_path, capsys):
    """Two models on a .bin: who is in it follows from the pairs alone. Few people prove nothing."""
    generator = np.random.default_rng(0)
    pictures = [cv2.imencode(".png", generator.integers(0, 256, (112, 112, 3), np.uint8))[1].tobytes()
                for _ in range(48)]  # fmt: skip
    write_bin(tmp_path / "few.bin", pictures, [True, False] * 12)
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        torch.save(build_network("mfn_half", embedding_size=8).state_dict(), tmp_path / f"{name}.pt")
        words = ["--checkpoint", tmp_path / f"{name}.pt", "--bin", tmp_path / "few.bin", "--out", tmp_path / name]
        assert run(lfw_eval, *words, "--folds", 2, "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert "95 % intervals by person (at most 36 people)" in said and CHAINED in said
    assert run(compare, tmp_path / "a", tmp_path / "b") == 0
    said = capsys.readouterr().out
    assert "On 24 pairs of at most 36 people (few)" in said and CHAINED in said
    entry = {"source": {}}
    row = {"a": 0.9, "b": 0.5, "difference": 0.4, "interval_95": [0.2, 0.6], "p_by_identity": 0.01, "identities": 12,
           "only_a_correct": 40, "only_b_correct": 0, "p_mcnemar": 1e-9}  # fmt: skip
    found = {"name": "few", "pairs": 100, "people": people_text(entry, 12), "accuracy": row}
    assert compare.sentence(found, "a", "b").endswith("no difference is proven, 12 people are too few for that.")
    row["identities"] = 30
    assert compare.sentence(found, "a", "b").endswith(": a is better.")
    said = compare.sentence(found | {"people": None}, "a", "b")
    assert said.startswith("On 100 pairs (few)") and "by identity" not in said


def test_another_size_of_the_search_for_faces_is_not_the_models_doing(evaluated, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(evaluated / "b", other)
    results = json.loads((other / "results.json").read_text())
    results["sets"][0]["source"]["max_side"] = 60
    (other / "results.json").write_text(json.dumps(results))
    assert run(compare, evaluated / "a", other) == 0
    assert "the size at which faces are looked for differs" in capsys.readouterr().out


def test_two_files_of_one_name_are_told_apart():
    models = [{"name": name, "sha256": digest * 64} for name, digest in (("e.pt", "a"), ("e.pt", "b"), ("f.pt", "a"))]
    assert compare.distinct(models[0], models[1]) == ("e.pt (aaaaaaaa)", "e.pt (bbbbbbbb)")
    assert compare.distinct(models[0], models[2]) == ("e.pt", "f.pt")


def test_other_pairs_and_changed_scores_are_refused(evaluated, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(evaluated / "b", other, ignore=shutil.ignore_patterns("cache"))
    content = json.loads((other / "results.json").read_text())
    content["sets"][0]["sha256"] = "0" * 64
    (other / "results.json").write_text(json.dumps(content))
    assert run(compare, evaluated / "a", other) == 1
    assert "not the same pairs and photos" in capsys.readouterr().err
    shutil.copyfile(evaluated / "a" / "crops-scores.npz", other / "crops-scores.npz")
    assert run(compare, other, evaluated / "a") == 1
    assert "not the scores that results.json speaks of" in capsys.readouterr().err
    (other / "crops-scores.npz").write_bytes(b"PK\x03\x04 no archive")
    assert run(compare, evaluated / "a", other) == 1
    (other / "crops-scores.npz").unlink()
    assert run(compare, evaluated / "a", other) == 1
    assert "are gone" in capsys.readouterr().err
    for text in ('{"model": null, "sets": []}', "[" * 100_000):
        (other / "results.json").write_text(text)
        assert run(compare, other, other) == 1
        assert "not a results.json of lfw_eval.py" in capsys.readouterr().err
    (other / "results.json").write_text("[]")
    assert run(compare, evaluated / "a", other) == 1
    assert run(compare, evaluated / "a") == 1
    assert "Traceback" not in capsys.readouterr().err


def test_the_p_is_of_the_groups_that_are_named():
    """Few pairs have the highest rate by chance; what is beyond chance is another group's."""

    def rate(errors, pairs, low, high):
        value = errors / pairs
        by = SimpleNamespace(value=value, low=low, high=high)
        return SimpleNamespace(errors=errors, pairs=pairs, by_person=by)

    found = groups._spread(
        [("A", rate(15, 1500, 0.006, 0.017)), ("B", rate(60, 1500, 0.031, 0.051)), ("C", rate(2, 40, 0.0, 0.175))], 0
    )
    assert (found.worst, found.best) == ("B", "A") and found.ratio == pytest.approx(4) and found.p < 0.001
