"""stress.py: figures against counting by hand, pictures and cuts against what they say, and a whole small run."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from torch import nn

import config
import utils
from cropping.align import TEMPLATE, align_face, estimate_similarity
from embedding import Embedder
from utils import InputError
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


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_model_that_tells_nobody_apart_is_not_called_perfect(noise):
    """Equal cosines are accepted together or not at all."""
    rng = np.random.default_rng(0)
    same = np.tile(unit(rng.standard_normal(16)), (60, 2, 1)) + noise * rng.standard_normal((60, 2, 16))
    subjects = Subjects(unit(same), np.ones((60, 2), bool), 0.01, replicates=20)
    assert subjects.threshold > 1 and (subjects.thresholds > 1).all()
    result = subjects.level(1, np.ones(60, bool), np.zeros(60))
    assert result.fnmr.value == 1 and result.fmr.value == 0
    signs = unit(np.sign(rng.standard_normal((200, 2, 12))))
    few = Subjects(signs, np.ones((200, 2), bool), 0.01, replicates=20)
    assert 0 < (few.cosines >= few.threshold).mean() <= 0.01
    drawn = few.weights[few.first] * few.weights[few.second]
    accepted = ((few.cosines[:, None] >= few.thresholds) * drawn).sum(0) / drawn.sum(0)
    assert (accepted <= 0.01 + 1e-9).all()


def test_groups_are_compared_on_photos_of_everybody():
    """Everybody loses the same photos; that only some have others, none of them lost, makes no difference."""
    centres = unit(RNG.standard_normal((40, 1, 16)))
    embeddings = np.repeat(centres, 6, axis=1)
    embeddings[:, 1:3] *= -1
    taken = np.ones((40, 6), bool)
    men = np.arange(40) < 20
    taken[~men, 4:] = False
    subjects = Subjects(embeddings, taken, 0.01, replicates=20)
    assert [subjects.group(who)["fnmr"]["value"] for who in (men, ~men)] == pytest.approx([2 / 3, 2 / 3])


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
    seen = {"pitch", "torso_pitch", "lights", "ambient"}  # from another height: the lamp stays with the person
    allowed |= {"camera above": seen, "camera below": seen}
    for name, (factor, changes) in factors.SCENES.items():
        assert len(changes) == len(factor.levels)
        for change in changes:
            who, photo = change(scene)
            moved = {key for key, value in vars(photo).items() if value != getattr(scene[1], key)}
            if name in allowed:
                assert moved <= allowed[name]
            if name not in ("facial hair", "haircut", "age"):
                assert who == scene[0] and moved, name
            assert photo.seed == scene[1].seed
            # A wall that the lamp falls on.
            assert photo.background == scene[1].background | {"light": photo.background["light"]}
            assert "light" in name or photo.background == scene[1].background


def test_light_moves_in_one_respect(factors):
    """Place, strength and colour of the lamp each with the others as in the reference photo."""
    from synthetic.head import load_head
    from synthetic.parameters import draw_identity
    from synthetic.render import head_rotation

    head = load_head()
    scene = factors.reference(draw_identity(1, 3, head), head)

    def lamp(photo):
        (light,) = photo.lights
        x, y, z = light["towards"]
        key, fill = np.array(light["colour"]), np.array(photo.ambient["mean"])
        slopes = np.array([photo.ambient[axis] for axis in "xyz"])
        where = np.degrees([np.arctan2(x, z), np.arcsin(y)])
        return {
            "azimuth": where[0], "elevation": where[1], "spread": light["spread"], "ratio": key[1] / fill[1],
            "tint": (key / key[1]).tolist(), "evenly": (fill / fill[1] - key / key[1]).tolist(),
            "slopes": (slopes / fill).round(9).ravel().tolist(),
        }  # fmt: skip

    usual = lamp(scene[1])
    assert usual["azimuth"] == pytest.approx(20) and usual["elevation"] == pytest.approx(30)
    moving = {"light from the side": "azimuth", "light from above": "elevation", "light strength": "ratio"}
    for name, what in (moving | {"warm light": "tint", "cold light": "tint"}).items():
        factor, changes = factors.SCENES[name]
        for level, change in zip(factor.levels, changes, strict=True):
            now = lamp(change(scene)[1])
            for key, value in usual.items():
                if key != what:
                    assert now[key] == pytest.approx(value), (name, key)
            assert what == "tint" or now[what] == pytest.approx(level)
    # Seen from above or below, lamp and head turn together.
    for name in ("camera above", "camera below"):
        for change in factors.SCENES[name][1]:
            photo = change(scene)[1]
            turn = head_rotation(photo.yaw, photo.pitch, photo.roll).T
            assert turn @ photo.lights[0]["towards"] == pytest.approx(np.array(scene[1].lights[0]["towards"]))
            for axis in range(3):
                slopes = np.array([photo.ambient["xyz"[k]] for k in range(3)])
                assert (turn @ slopes)[axis] == pytest.approx(np.array(scene[1].ambient["xyz"[axis]]), abs=1e-9)


def test_age_is_as_many_years_as_it_says_and_greys_as_people_do(factors):
    from synthetic.head import load_head
    from synthetic.parameters import draw_identity

    head = load_head()
    factor, changes = factors.SCENES["age"]
    reached = 0
    for number in range(60):
        scene = factors.reference(draw_identity(1, number, head), head)
        now, grey = scene[0].who["years"], scene[0].hair["grey"]
        for level, (years, change) in enumerate(zip(factor.levels, changes, strict=True)):
            if not factors.has("age", level, scene[0]):
                assert now + years > factors.OLDEST
                continue
            older, photo = change(scene)
            assert older.who["years"] == photo.years == now + years
            assert older.hair["grey"] >= grey and older.hair["grey"] - grey <= years / 22 + 1e-9
            assert older.hair["grey"] == 0 or older.who["years"] > 38
            assert (older.beard["grey"] > 0) == (older.hair["grey"] > 0)
            grey, reached = older.hair["grey"], reached + 1
    assert reached > 200


def test_a_person_is_moved_in_one_direction_at_all_levels(factors):
    """Shifted or shaken another way at each level, a curve would go up and down."""
    from synthetic.stress_set import generator_of

    angles = []
    for number in range(30):
        who = SimpleNamespace(number=number)
        moved = []
        for level in (2.0, 8.0):
            shift = factors.wrong_landmarks("crop shift", level, LANDMARKS, generator_of("crop shift", who))
            moved.append((LANDMARKS - shift).mean(0))
        directions = [np.degrees(np.arctan2(*move[::-1])) for move in moved]
        assert directions[0] == pytest.approx(directions[1], abs=0.01)
        angles.append(directions[0])
    assert np.histogram(angles, bins=4, range=(-180, 180))[0].min() > 0
    assert generator_of("noise", who).random() != generator_of("motion blur", who).random()


def test_noise_is_of_so_many_levels_in_the_crop(factors):
    grey = np.full((256, 256, 3), 128, np.uint8)
    for ratio in (1.05, 2.8):
        landmarks = (TEMPLATE - TEMPLATE.mean(0)) * ratio + 128
        wide = cv2.resize(grey, (round(256 * ratio),) * 2)
        landmarks = landmarks * 1.0 + (len(wide) - 256) / 2
        for level in (5, 20):
            noisy = factors.PICTURES["noise"][1](wide, ratio, float(level), np.random.default_rng(0))
            assert align_face(noisy, landmarks).std() == pytest.approx(level, rel=0.06)


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


def test_two_runs_do_not_mix_their_results(run, tmp_path):
    """Whoever comes second, while the first writes, says so and leaves everything as it is."""
    out = tmp_path / "out"
    assert run("--checkpoint", "a.onnx", "--factors", "blur")[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with utils.locked(out / ".report.lock", leave=False):
        code, said = run("--checkpoint", "b.onnx", "--factors", "blur")
    assert code != 0 and "another run is writing its results there" in said.err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert run("--checkpoint", "b.onnx", "--factors", "blur")[0] == 0
    assert json.loads((out / "results.json").read_text())["models"][0]["label"] == "b"


def test_models_of_one_name_are_told_apart_by_their_folders():
    pytest.importorskip("warp")
    import stress

    def labels(*checkpoints, **more):
        return stress._labels(config.Stress(checkpoint=list(checkpoints), out=None, **more))

    assert labels("runs/a/embedding.pt", "b.onnx") == ["embedding", "b"]
    assert labels("runs/a/embedding.pt", "runs/b/embedding.pt") == ["a/embedding", "b/embedding"]
    assert labels("embedding.pt", "b/embedding.pt") == ["embedding", "b/embedding"]
    assert labels("x/a/embedding.pt", "y/a/embedding.pt") == ["a/embedding (1)", "a/embedding (2)"]
    assert labels("a.pt", "a.onnx", labels=["one", "two"]) == ["one", "two"]


def test_what_is_said_of_factors_that_fall_and_of_those_that_lose_nothing():
    pytest.importorskip("warp")
    import stress

    def levels(*rates):
        return [SimpleNamespace(fnmr=SimpleNamespace(value=rate)) for rate in rates]

    def said(name, *rates):
        return stress._said(name, {name: levels(*rates)})

    assert said("yaw", 0.6, *[1.0] * 6) == "at most 10 degrees"
    assert said("resolution", 0.6, 1, 1, 1, 1) == "at least 14 pixels between the eyes"
    assert said("JPEG quality", 0, 0, 0.2, 0.8, 1) == "15"
    assert said("blur", 0, 0, 0, 0, 0.1) == "beyond 6 pixels (sigma) (10 % there)"
    assert said("glasses", 0, 0, 0) == "none; nothing is lost"
    assert said("glasses", 0, 0.2, 0.2) == "none; most at thick rims, sunglasses (20 %)"


def test_a_beard_for_nobody(run, tmp_path):
    """Among five women nobody can have one."""
    code, said = run("--checkpoint", "a.onnx", "--factors", "facial hair", "roll", "--seed", "127")
    assert code == 0 and "note: facial hair: none of these people can have that" in said.err
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["models"][0]["factors"]) == ["roll"]


def test_a_missing_package_is_one_line(monkeypatch):
    import synthetic

    with pytest.raises(InputError, match="the package anny is missing"), synthetic.needed():
        raise PackageNotFoundError("anny")
    with pytest.raises(InputError, match="the package warp-lang is missing"), synthetic.needed():
        raise ModuleNotFoundError("no warp", name="warp")
    with pytest.raises(ModuleNotFoundError), synthetic.needed():
        raise ModuleNotFoundError("no other", name="other")


def test_factors_that_are_none(run):
    code, said = run("--checkpoint", "a.onnx", "--factors", "yaww")
    assert code == 1 and "did you mean 'yaw'?" in said.err
    code, said = run("--checkpoint", "a.onnx", "--labels", "x", "y")
    assert code == 1 and "2 labels for 1 models" in said.err
