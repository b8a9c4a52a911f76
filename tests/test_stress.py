"""stress.py: figures against counting by hand, pictures and cuts against what they say, and a whole small run."""

import json
import sys

import numpy as np
import pytest
from torch import nn

from cropping.align import TEMPLATE, estimate_similarity
from embedding import Embedder
from verification.stress import GROUPS, Subjects, half_lost

RNG = np.random.default_rng(0)


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def some_subjects(people=60, shots=4, far=0.01):
    """People around centres, further from them with each shot; shot 2 makes sense for some of them alone."""
    centres = RNG.standard_normal((people, 1, 16))
    noise = RNG.standard_normal((people, shots, 16)) * (0.4 + 0.6 * np.arange(shots)[None, :, None])
    noise[:, 0] = 0
    taken = np.ones((people, shots), bool)
    taken[: people // 3, 2] = False
    return Subjects(unit(centres + noise), taken, far, replicates=50)


def test_the_threshold_accepts_no_more_than_the_rate():
    subjects = some_subjects()
    reference = subjects.embeddings[:, 0].astype(float)
    cosines = (reference @ reference.T)[np.triu_indices(60, 1)]
    allowed = int(0.01 * len(cosines))
    assert (cosines >= subjects.threshold + 1e-9).sum() == allowed == 17
    assert not Subjects(subjects.embeddings[:9], subjects.taken[:9], 0.01, replicates=5).resolved


def test_levels_are_what_counting_gives():
    subjects = some_subjects()
    found, error = np.arange(60) % 4 > 0, np.arange(60) / 100
    lost = []
    for shot in (1, 2, 3):
        people = np.flatnonzero(subjects.taken[:, shot])
        result = subjects.level(shot, found, error)
        one = [float(subjects.embeddings[k, shot] @ subjects.embeddings[k, 0]) for k in people]
        others = [
            float(subjects.embeddings[k, shot] @ subjects.embeddings[other, 0]) >= subjects.threshold
            for k in people
            for other in range(60)
            if other != k
        ]
        assert result.pairs == len(people)
        assert result.fnmr.value == pytest.approx(np.mean(np.array(one) < subjects.threshold))
        assert result.fmr.value == pytest.approx(np.mean(others))
        assert result.angle[0] == pytest.approx(np.degrees(np.arccos(one)).mean(), abs=1e-3)
        assert result.angle[1] < result.angle[0] < result.angle[2]
        assert result.fnmr.low <= result.fnmr.value <= result.fnmr.high
        assert result.found == pytest.approx(found[people].mean())
        assert result.landmark_error == pytest.approx(error[people][found[people]].mean())
        lost.append(result.fnmr.value)
    assert lost[0] < min(lost[1:])


def test_an_interval_covers_about_as_often_as_it_says():
    """FNMR intervals of small samples from one large population."""
    rng = np.random.default_rng(5)
    base = unit(rng.standard_normal((4000, 1, 16)))
    moved = unit(base + 0.35 * rng.standard_normal((4000, 1, 16)))
    everybody = np.concatenate([base, moved], axis=1)
    whole = Subjects(everybody[:1500], np.ones((1500, 2), bool), 0.01, replicates=2)
    truth = (whole.genuine(1) < whole.threshold).mean()
    inside = 0
    for start in range(0, 4000, 100):
        part = Subjects(everybody[start : start + 100], np.ones((100, 2), bool), 0.01, replicates=60)
        fnmr = part.level(1, np.ones(100, bool), np.zeros(100)).fnmr
        inside += fnmr.low <= truth <= fnmr.high
    assert inside >= 35  # of 40; an interval of 95 % falls below that once in fifty trials


@pytest.mark.parametrize(
    ("levels", "fnmr", "wanted"),
    [
        ([10, 20, 30], [0.0, 0.25, 0.75], 25),
        ([10, 20, 30], [0.6, 0.9, 1.0], 10),
        ([50, 30, 10], [0.0, 0.4, 0.6], 20),
        ([10, 20], [0.1, 0.49], None),
        ([10, 20, 30], [0.5, 0.2, 0.9], 10),
    ],
)
def test_where_half_of_the_pairs_are_lost(levels, fnmr, wanted):
    assert half_lost(levels, fnmr) == (None if wanted is None else pytest.approx(wanted))


def test_groups_at_one_threshold():
    subjects = some_subjects()
    members = np.arange(60) % 2 == 0
    said = subjects.group(members)
    inside = subjects.embeddings[members, 0].astype(float)
    cosines = (inside @ inside.T)[np.triu_indices(30, 1)]
    assert said["identities"] == 30 and said["pairs"] == 435
    assert said["fmr"]["value"] == pytest.approx((cosines >= subjects.threshold).mean())
    assert subjects.group(np.arange(60) < 4) is None
    # Whoever has no photo but the reference, as women have none with a beard, is no member.
    taken = subjects.taken.copy()
    taken[::4, 1:] = False
    fewer = Subjects(subjects.embeddings, taken, 0.01, replicates=50)
    assert fewer.group(members)["identities"] == 15 and fewer.group(np.arange(60) % 4 == 0) is None
    who = {"gender": 0.9, "years": 40, "melanin": 0.2, "african": 0.7, "asian": 0.2, "caucasian": 0.1}
    assert [name for name, test in GROUPS if test(who)] == ["men", "36 to 55 years", "medium skin", "mostly african"]


# ---------------------------------------------------------------------------------------------- what is moved


@pytest.fixture(scope="module")
def factors():
    pytest.importorskip("warp")
    from synthetic import factors

    return factors


LANDMARKS = TEMPLATE * 1.3 + [20.0, 31.0]


def place_in_crop(factors, name, level, seed=0):
    """Where the true landmarks come to lie in a crop that is cut by the wrong ones."""
    wrong = factors.wrong_landmarks(name, level, LANDMARKS, np.random.default_rng(seed))
    matrix = estimate_similarity(wrong)
    return LANDMARKS @ matrix[:, :2].T + matrix[:, 2]


def test_cuts_move_the_face_by_as_much_as_they_say(factors):
    shift = place_in_crop(factors, "crop shift", 8.0) - TEMPLATE
    np.testing.assert_allclose(np.linalg.norm(shift, axis=1), 8, atol=1e-4)
    assert np.ptp(shift, axis=0).max() < 1e-4
    for level in (0.6, 1.5):
        name = "crop larger" if level > 1 else "crop smaller"
        centred = place_in_crop(factors, name, level) - TEMPLATE.mean(0)
        np.testing.assert_allclose(centred, level * (TEMPLATE - TEMPLATE.mean(0)), atol=1e-4)
    eyes = place_in_crop(factors, "crop rotation", 20.0)[:2]
    flat = TEMPLATE[:2]
    angles = [np.degrees(np.arctan2(*(points[1] - points[0])[::-1])) for points in (eyes, flat)]
    assert abs(angles[0] - angles[1]) == pytest.approx(20, abs=1e-3)


def test_pictures_get_worse_with_each_level(factors):
    rng = np.random.default_rng(1)
    smooth = np.kron(rng.integers(0, 256, (12, 12, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    for name, (factor, change) in factors.PICTURES.items():
        distances = []
        for level in factor.levels:
            made = change(smooth, 1.1, float(level), np.random.default_rng(0))
            assert made.shape == smooth.shape and made.dtype == np.uint8
            distances.append(np.abs(made.astype(float) - smooth).mean())
        assert distances == sorted(distances) and distances[0] > 0, name


def test_every_level_changes_one_person_and_nothing_else(factors):
    """Each scene differs from the reference; what a level does not speak of is the same object or equal."""
    from synthetic.head import load_head
    from synthetic.parameters import draw_identity

    head = load_head()
    scene = factors.reference(draw_identity(1, 3, head), head)
    allowed = {"yaw": {"yaw", "torso_yaw"}, "eyes closed": {"expression"}, "glasses": {"glasses"}, "age": {"years"}}
    for name, (factor, changes) in factors.SCENES.items():
        assert len(changes) == len(factor.levels)
        for change in changes:
            who, photo = change(scene)
            moved = {key for key, value in vars(photo).items() if value != getattr(scene[1], key)}
            if name in allowed:
                assert moved <= allowed[name]
            if name not in ("facial hair", "haircut", "age"):
                assert who == scene[0] and moved, name
            assert photo.seed == scene[1].seed and photo.background == scene[1].background


# ---------------------------------------------------------------------------------------------- a run


class Colours(nn.Module):
    """Average colours of fields."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(6)
        self.crops = 0

    def forward(self, x):
        self.crops += len(x)
        return self.pool(x).flatten(1)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    pytest.importorskip("warp")
    import stress

    network = Colours()

    def opened(options, checkpoint, device):
        return Embedder.from_network(network, "cpu", name=checkpoint, sha256=checkpoint * 8)

    monkeypatch.setattr(stress, "_open", opened)

    def call(*more):
        words = ["stress.py", "--out", tmp_path / "out", "--identities", "5", "--size", "96", "--workers", "0"]
        monkeypatch.setattr(sys, "argv", list(map(str, [*words, "--device", "cpu", *more])))
        code = stress.main()
        return code, capsys.readouterr()

    call.network = network
    return call


def test_a_small_run_and_what_is_damaged_of_it(run, tmp_path):
    """Photographed once; a second model only embeds; a damaged person is photographed anew, to the byte."""
    models = ["--checkpoint", "a.onnx", "--factors", "blur", "crop rotation", "medical mask"]
    code, said = run(*models)
    assert code == 0, said.err
    out = tmp_path / "out"
    report = json.loads((out / "results.json").read_text())
    (model,) = report["models"]
    assert set(model["factors"]) == {"blur", "crop rotation", "medical mask"}
    blur = [level["fnmr"]["value"] for level in model["factors"]["blur"]["levels"]]
    assert len(blur) == 5 and model["factors"]["blur"]["levels"][0]["pairs"] == 5
    assert model["factors"]["crop rotation"]["levels"][0]["detector_found"] is None
    assert {path.name for path in out.glob("*.png")} == {"curves.png", "detector.png", "named.png", "people.png"}
    assert "10 pairs of two people cannot tell" in said.err and "| medical mask" in (out / "stress.md").read_text()
    files = sorted(out.glob("people-*/*.cache"))
    before = [path.read_bytes() for path in files]
    assert len(files) == 5
    data = bytearray(before[2])
    data[-100] ^= 1
    files[2].write_bytes(data)
    files[4].unlink()
    run.network.crops = 0
    code, said = run("--checkpoint", "a.onnx", "b.onnx", *models[2:])
    assert code == 0 and [path.read_bytes() for path in files] == before
    assert run.network.crops == 2 * 5 * 12 + 2  # only the second model's, with mirror images, and its dimension
    labels = [model["label"] for model in json.loads((out / "results.json").read_text())["models"]]
    assert labels == ["a", "b"]


def test_pictures_of_an_earlier_run_do_not_stay(run, tmp_path):
    out = tmp_path / "out"
    assert run("--checkpoint", "_a|b.onnx", "--factors", "blur")[0] == 0
    assert {path.name for path in out.glob("*.png")} == {"curves.png", "detector.png", "people.png"}
    code, said = run("--checkpoint", "_a|b.onnx", "c.onnx", "--factors", "medical mask")
    assert code == 0 and {path.name for path in out.glob("*.png")} == {"named.png", "people.png"}
    assert said.out.splitlines()[-1].endswith(": results.json, stress.md, people.png, named.png")
    assert "| _a\\|b" in (out / "stress.md").read_text()
    assert "_a|b" in (out / "named.svg").read_text()


def test_factors_that_are_none(run):
    code, said = run("--checkpoint", "a.onnx", "--factors", "yaww")
    assert code == 1 and "did you mean 'yaw'?" in said.err
    code, said = run("--checkpoint", "a.onnx", "--labels", "x", "y")
    assert code == 1 and "2 labels for 1 models" in said.err
