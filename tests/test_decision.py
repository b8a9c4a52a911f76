"""The decision rule: where thresholds come from, and what the confidence means."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding import Embedder, Preprocessing
from utils import InputError
from verification.decision import Decision, Normal, find_decision

ANGLES = {"genuine": {"mean": 50.0, "std": 10.0}, "impostor": {"mean": 88.0, "std": 6.0}}
SHA = "ab" * 32
WAY = dataclasses.asdict(Preprocessing())


def model(**metadata):
    runs = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    return Embedder(runs, Preprocessing(), name="net.onnx", sha256=SHA, engine="test", metadata=metadata)


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def entry(cosine, points=()):
    found = [
        {
            "far": far,
            "resolved": at is not None,
            "threshold": None if at is None else {"cosine": at, "angle": 0},
            "far_interval_95": None if at is None else [far / 2, far * 2],
        }
        for far, at in points
    ]
    best = {"cosine": cosine, "angle": 0}
    return {"name": "pairs", "threshold_best": best, "angles": ANGLES, "tar_at_far": found}


def evaluated(*entries, sha256=SHA, way=WAY):
    return {"model": {"sha256": sha256, "preprocessing": way}, "sets": list(entries)}


def trained(cosine, **changes):
    return {"best": {"verification": {"dev": entry(cosine)}}, "embedding_sha256": SHA} | changes


def angle(cosine):
    return pytest.approx(math.degrees(math.acos(cosine)))


def test_threshold_of_an_evaluation(tmp_path):
    results = write(tmp_path / "eval.json", evaluated({**entry(0.5), "threshold_best": None}, entry(0.25)))
    # The set without a threshold is passed over although it comes first and has the same name.
    found = find_decision(model(), tmp_path / "net.pt", results)
    assert found.threshold == angle(0.25) and "best accuracy" in found.source
    assert found.genuine == Normal(50.0, 10.0) and found.impostor == Normal(88.0, 6.0)


POINTS = [(0.1, 0.2), (0.01, 0.3), (0.001, 0.4), (0.0001, None)]


@pytest.mark.parametrize(
    ("points", "far", "cosine", "said"),
    [
        (POINTS, None, 0.4, "at FAR 0.001 (95 % interval 0.0005 to 0.002)"),
        (POINTS[:2], None, 0.3, "at FAR 0.01"),
        (POINTS, 0.01, 0.3, "at FAR 0.01"),
        (POINTS[3:], None, 0.25, "of best accuracy"),
    ],
)
def test_threshold_at_a_false_accept_rate(tmp_path, points, far, cosine, said):
    results = write(tmp_path / "results.json", evaluated(entry(0.25, points)))
    found = find_decision(model(), tmp_path / "net.pt", results, far=far)
    assert found.threshold == angle(cosine) and said in found.source


@pytest.mark.parametrize("far", [0.0001, 0.05])
def test_a_rate_that_was_not_measured_is_refused_with_those_that_were(tmp_path, far):
    results = write(tmp_path / "results.json", evaluated(entry(0.25, POINTS)))
    with pytest.raises(InputError, match=rf"--far {far:g}: .*rates: 0.1, 0.01, 0.001; .* at least {round(1 / far):,}"):
        find_decision(model(), tmp_path / "net.pt", results, far=far)
    with pytest.raises(InputError, match="give one"):
        find_decision(model(), tmp_path / "net.pt", results, threshold=70.0, far=far)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (evaluated(entry(0.5), sha256="cd" * 32), "of the network cdcdcdcdcdcd"),
        (evaluated(entry(0.5), sha256=None), "does not say of which network"),
        (evaluated(entry(0.5), way=WAY | {"mirror": False}), "fed with other mirror"),
        (trained(0.5, embedding_sha256="cd" * 32), "of the network cdcdcdcdcdcd"),
        (trained(0.5, embedding_sha256=None), "does not say of which network"),
    ],
)
def test_figures_of_another_model_are_never_taken(tmp_path, content, reason):
    beside = write(tmp_path / "results.json", content)
    with pytest.raises(InputError, match=rf"no threshold is known for this model .*{reason}"):
        find_decision(model(), tmp_path / "net.pt")
    with pytest.raises(InputError, match=rf"--figures .*{reason}"):
        find_decision(model(), tmp_path / "net.pt", beside)


def test_threshold_of_the_training_run_beside_the_checkpoint(tmp_path):
    write(tmp_path / "results.json", trained(0.0))
    assert find_decision(model(), tmp_path / "embedding.pt").threshold == pytest.approx(90)


def test_threshold_in_the_models_own_metadata_wins_over_files_beside_it(tmp_path):
    write(tmp_path / "results.json", trained(0.0))
    stated = model(threshold={"cosine": 0.5, "data": "lfw"}, figures={"angles": ANGLES})
    found = find_decision(stated, tmp_path / "net.onnx")
    assert found.threshold == pytest.approx(60) and "lfw" in found.source


def test_threshold_in_the_metadata_is_of_the_mirror_image_that_it_names(tmp_path):
    stated = {"threshold": {"cosine": 0.5, "data": "lfw"}}
    for mirror in ("caller", "graph"):
        assert find_decision(model(mirror=mirror, **stated), tmp_path / "net.onnx").threshold == pytest.approx(60)
    with pytest.raises(InputError, match=r"no threshold is known for this model fed in this way .*mirror: none"):
        find_decision(model(mirror="none", **stated), tmp_path / "net.onnx")
    write(tmp_path / "results.json", evaluated(entry(0.0)))
    assert find_decision(model(mirror="none", **stated), tmp_path / "net.onnx").threshold == pytest.approx(90)


def test_metadata_may_hold_several_rates(tmp_path):
    stated = model(
        threshold={"cosine": 0.5, "data": "lfw", "far": 0.001},
        figures={"angles": ANGLES, "tar_at_far": entry(0.1, POINTS)["tar_at_far"]},
    )
    assert find_decision(stated, tmp_path / "net.onnx").threshold == pytest.approx(60)
    assert find_decision(stated, tmp_path / "net.onnx", far=0.1).threshold == angle(0.2)
    with pytest.raises(InputError, match="rates"):
        find_decision(stated, tmp_path / "net.onnx", far=1e-5)


def test_a_file_whose_pairs_resolved_another_rate_than_asked_for_has_a_threshold_all_the_same(tmp_path):
    """As from the results.json of the same pairs: the next higher rate, else the best accuracy."""
    figures = entry(0.3, [(0.1, 0.2), (0.01, 0.4)]) | {"data": "few"}
    decision = find_decision(model(figures=figures), tmp_path / "net.onnx")
    beside = find_decision(model(), tmp_path / "net.onnx", write(tmp_path / "eval.json", evaluated(figures)))
    assert decision.threshold == beside.threshold == angle(0.4)
    assert decision.genuine == beside.genuine and "net.onnx, few" in decision.source
    unresolved = entry(0.3) | {"data": "few"}
    assert find_decision(model(figures=unresolved), tmp_path / "net.onnx").threshold == angle(0.3)
    with pytest.raises(InputError, match="no threshold is known"):
        find_decision(model(figures={"data": "none"}), tmp_path / "net.onnx")


def test_another_programs_results_beside_the_model_are_no_error_of_ours(tmp_path):
    """Nobody named that file: it gives no threshold and the reason, and is in nobody's way who gives one."""
    write(tmp_path / "results.json", {"of": "another program"})
    assert find_decision(model(), tmp_path / "net.onnx", threshold=70.0) == Decision(70.0, "as given")
    with pytest.raises(InputError, match=r"no threshold is known .*results\.json: not a results\.json"):
        find_decision(model(), tmp_path / "net.onnx")


@pytest.mark.parametrize("moments", [{"mean": 50.0, "std": 10**400}, {"mean": 1e300, "std": 5.0}])
def test_senseless_angles_are_named(tmp_path, moments):
    senseless = entry(0.5) | {"angles": ANGLES | {"genuine": moments}}
    with pytest.raises(InputError, match=r"eval\.json: not a results\.json"):
        find_decision(model(), tmp_path / "net.pt", write(tmp_path / "eval.json", evaluated(senseless)))


def test_given_threshold_keeps_the_measured_distributions(tmp_path):
    write(tmp_path / "results.json", trained(0.0))
    found = find_decision(model(), tmp_path / "net.pt", None, 71.0)
    assert found.threshold == 71.0 and found.confidence(40) > 0.9 and found.source == "as given"


NOT_A_NUMBER = json.dumps(evaluated(entry(float("nan"))))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"best": {}}',
        '{"sets": [1]}',
        '{"sets": [{"name": "a"}]}',
        NOT_A_NUMBER,
        NOT_A_NUMBER.replace("NaN", "Infinity"),
        NOT_A_NUMBER.replace("NaN", "7"),
        NOT_A_NUMBER.replace("NaN", "true"),
        NOT_A_NUMBER.replace("NaN", '"0.5"'),
        b"\xff".decode("latin1"),
    ],
)
def test_foreign_results_are_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=r"results\.json: not a results\.json"):
        find_decision(model(), tmp_path / "net.pt", path)


@pytest.mark.parametrize("threshold", [{"cosine": float("nan")}, {"cosine": 2}, {"cosine": 0.5, "far": "often"}])
def test_senseless_thresholds_in_metadata_are_named(tmp_path, threshold):
    with pytest.raises(InputError, match=r"net\.onnx: the threshold in its metadata"):
        find_decision(model(threshold=threshold), tmp_path / "net.onnx")


def test_no_threshold_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="--figures"):
        find_decision(model(), tmp_path / "net.pt")
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
    # Copies of one photo have angles that differ by nothing but rounding, and less.
    assert Decision(70.0, "", Normal(0.0, 1e-200), Normal(90.0, 5.0)).confidence(60) == pytest.approx(0, abs=1e-9)
