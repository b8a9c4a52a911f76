"""The decision rule: where thresholds come from, and what the confidence means."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils import InputError
from verification.decision import Decision, Normal, find_decision

ANGLES = {"genuine": {"mean": 50.0, "std": 10.0}, "impostor": {"mean": 88.0, "std": 6.0}}


def model(**metadata):
    return SimpleNamespace(name="net.onnx", metadata=metadata)


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def entry(cosine):
    return {"name": "pairs", "threshold_best": {"cosine": cosine, "angle": 0}, "angles": ANGLES}


def test_threshold_of_an_evaluation(tmp_path):
    results = write(tmp_path / "eval.json", {"sets": [{**entry(0.5), "threshold_best": None}, entry(0.25)]})
    # The set without a threshold is passed over although it comes first and has the same name.
    found = find_decision(model(), tmp_path / "net.pt", results, None)
    assert found.threshold == pytest.approx(math.degrees(math.acos(0.25)))
    assert found.genuine == Normal(50.0, 10.0) and found.impostor == Normal(88.0, 6.0)


def test_threshold_of_the_training_run_beside_the_checkpoint(tmp_path):
    write(tmp_path / "results.json", {"best": {"verification": {"dev": entry(0.0)}}})
    assert find_decision(model(), tmp_path / "embedding.pt", None, None).threshold == pytest.approx(90)


def test_threshold_in_the_models_own_metadata_wins_over_files_beside_it(tmp_path):
    write(tmp_path / "results.json", {"best": {"verification": {"dev": entry(0.0)}}})
    stated = model(threshold={"cosine": 0.5, "data": "lfw"}, figures={"angles": ANGLES})
    found = find_decision(stated, tmp_path / "net.onnx", None, None)
    assert found.threshold == pytest.approx(60) and "lfw" in found.source


def test_given_threshold_keeps_the_measured_distributions(tmp_path):
    write(tmp_path / "results.json", {"best": {"verification": {"dev": entry(0.0)}}})
    found = find_decision(model(), tmp_path / "net.pt", None, 71.0)
    assert found.threshold == 71.0 and found.confidence(40) > 0.9


@pytest.mark.parametrize("text", ["", "[]", '{"best": {}}', '{"sets": [1]}', '{"sets": [{"name": "a"}]}'])
def test_foreign_results_are_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"results\.json: not a results\.json"):
        find_decision(model(), tmp_path / "net.pt", path, None)


def test_no_threshold_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="--figures"):
        find_decision(model(), tmp_path / "net.pt", None, None)
    with pytest.raises(InputError, match="between 0 and 180"):
        find_decision(model(), tmp_path / "net.pt", None, 0.0)


def test_confidence_by_hand():
    rule = Decision(70.0, "", Normal(50.0, 10.0), Normal(90.0, 10.0))
    # Equal deviations: the log odds are linear, 0 in the middle and 40 * 20 / 100 = 8 at the means.
    assert rule.confidence(70.0) == pytest.approx(0.5)
    assert rule.confidence(50.0) == pytest.approx(1 / (1 + math.exp(-8)))
    assert rule.confidence(90.0) == pytest.approx(1 / (1 + math.exp(-8)))
    assert rule.same(70.0) and not rule.same(70.001)


@given(st.floats(0, 180), st.floats(0, 180), st.floats(1, 30), st.floats(1, 30))
def test_the_nearer_the_surer(first, second, genuine, impostor):
    rule = Decision(70.0, "", Normal(50.0, genuine), Normal(90.0, impostor))

    def same(angle):
        confidence = rule.confidence(angle)
        return confidence if rule.same(angle) else 1 - confidence

    near, far = sorted((first, second))
    assert same(near) >= same(far) - 1e-9
    assert 0 <= rule.confidence(first) <= 1


def test_unknown_or_senseless_distributions_give_no_confidence():
    assert Decision(70.0, "").confidence(50) is None
    assert Decision(70.0, "", Normal(90.0, 5.0), Normal(50.0, 5.0)).confidence(60) is None
