"""The detector against the original's outputs, and what must not change a photo's result."""

import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import retinaface
import retinaface.detector
from retinaface import RetinaFace
from retinaface.decoding import raw_outputs
from retinaface.engines import TorchEngine
from retinaface.tiles import tiles
from retinaface.weights import load_weights
from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("boxes", "scores", "landmarks")


@pytest.fixture(scope="module")
def original(shared):
    return shared / "retinaface" / "mobilenet0.25_Final.pth"


@pytest.fixture(scope="module")
def detector(original):
    return RetinaFace(original, "cpu")


@pytest.fixture(scope="module")
def couple(shared):
    return cv2.imread(str(shared / "photos" / "couple.jpg"))


@functools.cache
def detector_of_everything():
    return RetinaFace(device="cpu", score_threshold=0.0)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(found, expected):
    """Equal to the last bit."""
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


@pytest.mark.parametrize("layout", ["orig_torch", "tiny_onnxruntime"])
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_raw_outputs_are_the_original_networks(shared, original, layout, engine):
    weights = original if layout == "orig_torch" else None
    if engine == "torch":
        network = TorchEngine(load_weights(weights), torch.device("cpu"))
        answer = lambda photo: raw_outputs(network.run([photo]))  # noqa: E731
    else:
        answer = RetinaFace(weights, "cpu").raw_outputs
    with np.load(shared / "retinaface" / "reference_outputs.npz") as reference:
        for name in ("couple", "img11", "selfie-many-people"):
            found = answer(cv2.imread(str(shared / "retinaface" / f"{name}_320.png")))
            for part, values in (("loc", found.boxes), ("conf", found.scores), ("landms", found.landmarks)):
                expected = reference[f"{name}.jpg_bgr_123|{layout}|{part}"][0]
                assert values.shape == expected.shape and values.dtype == np.float32
                np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)


@pytest.mark.timeout(1200)
def test_faces_of_lfw_are_the_originals(shared, detector):
    """In batches: all 3,825 photos where REQUIRE_RESEARCH_DATA=1 (20 s of a core), otherwise every fifth."""
    with np.load(shared / "retinaface" / "reference_lfw.npz") as reference:
        names, offsets = reference["names"], reference["offsets"]
        expected = {field: reference[field] for field in FIELDS}
    assert len(names) == 3825
    numbers = range(0, len(names), 1 if os.environ.get("REQUIRE_RESEARCH_DATA") == "1" else 5)
    same_count = 0
    for start in range(0, len(numbers), 25):
        chunk = numbers[start : start + 25]
        photos = [cv2.imread(str(shared / "lfw" / "lfw-deepfunneled" / names[index])) for index in chunk]
        for index, found in zip(chunk, detector.detect(photos), strict=True):
            faces = slice(offsets[index], offsets[index + 1])
            boxes = expected["boxes"][faces]
            if len(found) != len(boxes):
                continue
            same_count += 1
            distance = np.abs(found.boxes[:, None] - boxes[None]).max(axis=2)
            match = distance.argmin(axis=0)
            assert sorted(match) == list(range(len(boxes))), names[index]
            assert (distance.min(axis=0) <= 0.5).all(), names[index]
            np.testing.assert_allclose(found.landmarks[match], expected["landmarks"][faces], rtol=0, atol=0.5)
            np.testing.assert_allclose(found.scores[match], expected["scores"][faces], rtol=0, atol=0.005)
            assert (np.diff(found.scores) <= 0).all()
    assert same_count >= 0.999 * len(numbers)


def test_equal_scores_are_resolved_as_in_the_original(shared, detector):
    """Two photos whose two best anchors score the same float32; which one survives moves the box by pixels."""
    with np.load(shared / "retinaface" / "reference_lfw.npz") as reference:
        for name in ("Brian_Grazier/Brian_Grazier_0001.jpg", "Shigeru_Ishiba/Shigeru_Ishiba_0001.jpg"):
            index = list(reference["names"]).index(name)
            expected = reference["boxes"][reference["offsets"][index] : reference["offsets"][index + 1]]
            photo = cv2.imread(str(shared / "lfw" / "lfw-deepfunneled" / name))
            np.testing.assert_allclose(detector.detect([photo])[0].boxes, expected, rtol=0, atol=0.01)


def test_company_does_not_change_a_photos_result(shared, original, couple):
    """Batches of equal and of mixed sizes, any order, any number of threads: the same to the last bit."""
    many = RetinaFace(original, "cpu", score_threshold=0.02)
    lfw = sorted((shared / "lfw" / "lfw-deepfunneled").glob("A*/*.jpg"))[:20]
    photos = [cv2.imread(str(file)) for file in lfw]
    photos += [couple[:700, :901], photos[0][:249], photos[1][:, :33], noise(1, 1), noise(10, 900), noise(64, 64)]
    alone = [many.detect([photo])[0] for photo in photos]
    assert sum(len(found) for found in alone) > 60
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            together = RetinaFace(original, "cpu", score_threshold=0.02)
            order = np.random.default_rng(count).permutation(len(photos))
            for index, found in zip(order, together.detect([photos[index] for index in order]), strict=True):
                assert_same(found, alone[index])
    finally:
        torch.set_num_threads(threads)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(
        st.tuples(st.integers(1, 90), st.integers(1, 90), st.integers(0, 3)) | st.just((40, 40, 9)),
        min_size=1,
        max_size=6,
    )
)
def test_any_sizes_share_a_call(sizes):
    """With a threshold of 0 every anchor answers, so nothing can hide."""
    everything = detector_of_everything()
    photos = [noise(*size) for size in sizes]
    for photo, found in zip(photos, everything.detect(photos), strict=True):
        assert_same(found, everything.detect([photo])[0])
        assert len(found) >= 1 and found.boxes.shape == (len(found), 4) and found.landmarks.shape == (len(found), 5, 2)
        assert {getattr(found, field).dtype for field in FIELDS} == {np.dtype(np.float32)}
        assert (np.diff(found.scores) <= 0).all()


def test_both_engines_find_the_same_on_any_size():
    """A GPU runs the PyTorch engine; here it runs on the CPU."""
    detector, other = RetinaFace(device="cpu", score_threshold=0.3), RetinaFace(device="cpu", score_threshold=0.3)
    other._engine = TorchEngine(load_weights(), torch.device("cpu"))
    photos = [noise(*size) for size in ((1, 1), (31, 33), (33, 65), (10, 700), (223, 320), (225, 250), (225, 250))]
    for photo in photos:
        for ours, theirs in zip(detector.raw_outputs(photo), other.raw_outputs(photo), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    for ours, theirs in zip(detector.detect(photos), other.detect(photos), strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=0, atol=1e-2)


def test_photos_of_many_sizes_share_batches_on_a_gpu_without_changing_results(monkeypatch):
    engine = TorchEngine(load_weights(), torch.device("cpu"))
    sizes = [(1, 1), (31, 33), (128, 128), (65, 127), (97, 40), (10, 255), (129, 200), (130, 201), (250, 129)]
    photos = [noise(*size) for size in sizes]
    for photo, cells in zip(photos, engine.run_padded(photos), strict=True):
        np.testing.assert_allclose(cells, engine.run([photo])[0], rtol=0, atol=5e-5)
    shapes = []
    run, padded = engine.run, engine.run_padded
    monkeypatch.setattr(engine, "run", lambda batch: shapes.append((len(batch), "alone")) or run(batch))
    monkeypatch.setattr(engine, "run_padded", lambda batch: shapes.append((len(batch), "padded")) or padded(batch))
    many = RetinaFace(device="cpu", score_threshold=0.3)
    many._engine = engine
    photos += [noise(40, 50)] * 16
    found = many.detect(photos)
    assert sorted(shapes) == [(1, "padded"), (3, "padded"), (5, "padded"), (16, "alone")]
    for photo, together in zip(photos, found, strict=True):
        np.testing.assert_allclose(together.boxes, many.detect([photo])[0].boxes, rtol=0, atol=1e-2)


def test_both_engines_find_the_same_faces(shared, original, couple):
    detector, other = RetinaFace(original, "cpu"), RetinaFace(original, "cpu")
    other._engine = TorchEngine(load_weights(original), torch.device("cpu"))
    lfw = sorted((shared / "lfw" / "lfw-deepfunneled").glob("B*/*.jpg"))[:12]
    photos = [cv2.imread(str(file)) for file in lfw] + [couple[::3, ::3]]
    for ours, theirs in zip(detector.detect(photos), other.detect(photos), strict=True):
        assert len(ours) == len(theirs) >= 1
        for field in FIELDS:
            np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), rtol=0, atol=2e-3)


def test_large_photos_in_tiles_give_the_same_faces(original, couple, monkeypatch):
    low = RetinaFace(original, "cpu", score_threshold=0.02)
    photo = couple[:1201, 300:2001]
    whole = low.detect([photo])[0]
    assert len(whole) > 10
    for limit in (1_000_000, 600_000):
        assert len(tiles(*photo.shape[:2], limit)) > 2
        monkeypatch.setattr(
            retinaface.detector, "tiles", lambda height, width, limit=limit: tiles(height, width, limit)
        )
        cut = low.detect([photo])[0]
        assert len(cut) == len(whole)
        np.testing.assert_array_equal(cut.scores, whole.scores)
        np.testing.assert_allclose(cut.boxes, whole.boxes, rtol=0, atol=2e-3)
        np.testing.assert_allclose(cut.landmarks, whole.landmarks, rtol=0, atol=2e-3)


def test_max_side_shrinks_and_maps_back(shared, original):
    shrinking, plain = RetinaFace(original, "cpu", max_side=800), RetinaFace(original, "cpu")
    photos = [cv2.imread(str(shared / "photos" / name)) for name in ("couple.jpg", "img32.jpg", "img38.jpg")]
    photos.append(photos[0][:800, 700:1500])  # at the limit: as it is
    for photo, found in zip(photos, shrinking.detect(photos), strict=True):
        height, width = photo.shape[:2]
        ratio = min(1, 800 / max(height, width))
        small = photo if ratio == 1 else cv2.resize(photo, (round(width * ratio), round(height * ratio)))
        expected = plain.detect([small])[0]
        assert len(found) == len(expected)
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_allclose(found.boxes, expected.boxes / ratio, rtol=1e-6)
        np.testing.assert_allclose(found.landmarks, expected.landmarks / ratio, rtol=1e-6)
    assert sum(len(found) for found in shrinking.detect(photos)) >= 3
    assert len(shrinking.detect([noise(1, 4000), noise(4000, 1)])) == 2  # the shorter side stays at a pixel


def test_views_read_only_and_reversed_photos_are_photos(detector, couple):
    photo = np.ascontiguousarray(couple[::2, ::2])
    expected = detector.detect([photo])[0]
    backwards = np.ascontiguousarray(photo[::-1, ::-1, ::-1])
    wide = np.zeros((*photo.shape[:2], 5), dtype=np.uint8)
    wide[..., 1:4] = photo
    frozen = photo.copy()
    frozen.flags.writeable = False
    for view in (couple[::2, ::2], backwards[::-1, ::-1, ::-1], wide[..., 1:4], np.asfortranarray(photo), frozen):
        before = view.copy()
        assert_same(detector.detect([view])[0], expected)
        np.testing.assert_array_equal(view, before)
    assert len(expected) >= 2 and all(getattr(expected, field).flags.writeable for field in FIELDS)


def test_thresholds(shared, original):
    photo = cv2.imread(str(shared / "photos" / "selfie-many-people.jpg"))
    low = RetinaFace(original, "cpu", score_threshold=0.05).detect([photo])[0]
    assert 0.05 < low.scores.min() < 0.5
    high = RetinaFace(original, "cpu", score_threshold=0.9).detect([photo])[0]
    assert high.scores.min() > 0.9 and len(high) < len(low)
    np.testing.assert_array_equal(high.scores, low.scores[: len(high)])
    assert len(RetinaFace(original, "cpu", score_threshold=1).detect([photo])[0]) == 0
    separate = RetinaFace(original, "cpu", nms_threshold=0).detect([photo])[0]
    assert len(RetinaFace(original, "cpu", nms_threshold=1).detect([photo])[0]) > len(high) >= len(separate) >= 1


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([np.zeros((5, 5, 3), np.float32)], "image 0: float32 [5, 5, 3] instead of BGR uint8"),
        ([np.full((5, 5, 3), np.nan)], "image 0: float64"),
        ([np.zeros((5, 5), np.uint8)], "image 0: uint8 [5, 5]"),
        ([noise(4, 4), np.zeros((5, 5, 4), np.uint8)], "image 1: uint8 [5, 5, 4]"),
        ([noise(4, 4), np.zeros((0, 5, 3), np.uint8)], "image 1: empty"),
        ([noise(4, 4), None], "image 1: a NoneType"),
        (["photo.jpg"], "image 0: a str"),
        (noise(4, 4), "detect takes a list"),
    ],
)
def test_what_is_no_photo_is_named(detector, images, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        detector.detect(images)


@pytest.mark.parametrize(
    "setting",
    [
        {"score_threshold": 1.5},
        {"score_threshold": float("nan")},
        {"nms_threshold": -0.1},
        {"nms_threshold": "0.4"},
        {"max_side": 0},
        {"max_side": 800.0},
        {"max_side": True},
    ],
)
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        RetinaFace(device="cpu", **setting)


def test_devices(original):
    assert RetinaFace(original, torch.device("cpu")).device == torch.device("cpu")
    with pytest.raises(InputError, match="not a device"):
        RetinaFace(original, "gpu")


def test_no_photos_and_no_faces(detector):
    assert detector.detect([]) == []
    nothing = detector.detect([noise(120, 90)])[0]
    assert len(nothing) == 0
    assert [getattr(nothing, field).shape for field in FIELDS] == [(0, 4), (0,), (0, 5, 2)]
    assert {getattr(nothing, field).dtype for field in FIELDS} == {np.dtype(np.float32)}


def test_several_threads_may_share_a_detector(original, couple):
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        detector = RetinaFace(original, "cpu")
        photos = [np.ascontiguousarray(couple[:: 4 + step, :: 4 + step]) for step in range(6)] * 2
        expected = detector.detect(photos)
        results = {}
        threads = [
            threading.Thread(target=lambda number=number: results.update({number: detector.detect(photos)}))
            for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
        for found in results.values():
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)

        # A forked process has none of the threads, and starts its own.
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put([len(found) for found in detector.detect(photos)]))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == [len(found) for found in expected]
    finally:
        torch.set_num_threads(torch_threads)


@pytest.fixture(scope="module")
def fresh_process():
    """What a new process reports after detecting in a photo of 24 megapixels."""
    script = """
import json, resource, sys
import numpy as np, retinaface
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
detector = retinaface.RetinaFace(device="cpu")
detector.detect([np.zeros((64, 64, 3), np.uint8)])
before = used()
found = detector.detect([np.zeros((4000, 6000, 3), np.uint8)])
modules = {name: str(module.__file__) for name, module in sys.modules.items() if "retinaface" in name}
json.dump({"faces": len(found[0]), "megabytes": used() - before, "modules": modules}, sys.stdout)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_memory_is_bounded_for_a_large_photo(fresh_process):
    """Of the megabytes 72 are the photo; uncut it would take the network 1,700."""
    assert fresh_process["faces"] == 0 and fresh_process["megabytes"] < 900


def test_the_wheels_own_module_stays_out(fresh_process):
    """This package is the one that is imported, and nothing of the wheel's module is."""
    assert set(fresh_process["modules"]) > {"retinaface", "retinaface.weights", "retinaface.detector"}
    assert {Path(file).parent for file in fresh_process["modules"].values()} == {ROOT / "retinaface"}
