"""The similarity transform against scikit-image, the crop against pixel arithmetic, the choice of the face on LFW."""

import itertools
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.transform import SimilarityTransform

from cropping.align import TEMPLATE, AlignmentError, align_face, box_overlap, choose_face, estimate_similarity, warp


def skimage_matrix(landmarks, template=TEMPLATE):
    """scikit-image's estimate [2, 3]; NaN where it finds none."""
    transform = SimilarityTransform()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        transform.estimate(np.asarray(landmarks, dtype=np.float64), np.asarray(template, dtype=np.float64))
    return transform.params[:2]


def residual(matrix, landmarks, template):
    return np.sum((landmarks @ matrix[:, :2].T + matrix[:, 2] - template) ** 2)


def test_random_points_agree_with_scikit_image():
    rng = np.random.default_rng(0)
    points = rng.uniform(-50, 2000, (300, 5, 2))
    ours = estimate_similarity(points)
    assert ours.shape == (300, 2, 3) and ours.dtype == np.float64
    for landmarks, matrix in zip(points, ours, strict=True):
        np.testing.assert_allclose(matrix, skimage_matrix(landmarks), rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(matrix, estimate_similarity(landmarks))


@settings(deadline=None)
@given(
    landmarks=arrays(np.float64, (5, 2), elements=st.floats(-1e4, 1e4, width=32)),
    template=arrays(np.float64, (5, 2), elements=st.floats(-1e3, 1e3, width=32)),
)
def test_no_scikit_image_estimate_is_nearer(landmarks, template):
    ours = estimate_similarity(landmarks, template)
    theirs = skimage_matrix(landmarks, template)
    if not np.isfinite(ours).all():
        flat = min(np.ptp(landmarks, axis=0).max(), np.ptp(template, axis=0).max())
        assert flat <= 1e-9 * max(1, np.abs(landmarks).max())
        return
    if np.isfinite(theirs).all():
        scale = max(1.0, np.abs(template).max()) ** 2
        assert residual(ours, landmarks, template) <= residual(theirs, landmarks, template) + 1e-6 * scale
    # A rotation and a scale: no shear, no reflection.
    np.testing.assert_allclose(ours[0, 0], ours[1, 1])
    np.testing.assert_allclose(ours[0, 1], -ours[1, 0])


@pytest.mark.parametrize(
    "landmarks",
    [
        pytest.param([[10, 20], [20, 20], [30, 20], [40, 20], [50, 20]], id="horizontal line"),
        pytest.param([[7, 1], [7, 2], [7, 3], [7, 5], [7, 9]], id="vertical line"),
        pytest.param([[1, 1], [2, 2], [3, 3], [4, 4], [9, 9]], id="diagonal line"),
        pytest.param([[5, 5], [5, 5], [5, 5], [5, 5], [6, 5]], id="all equal but one"),
        pytest.param([[30, 40], [30, 40], [50, 60], [30, 40], [50, 60]], id="two places"),
        pytest.param(TEMPLATE[:, ::-1], id="transposed"),
        pytest.param(TEMPLATE * [-1, 1], id="mirror image"),
        pytest.param(TEMPLATE * [1, -1], id="upside-down mirror image"),
        pytest.param(TEMPLATE * -1, id="turned by 180 degrees"),
        pytest.param(TEMPLATE * 1e-6, id="tiny"),
        pytest.param(TEMPLATE * 1e6 + 3e6, id="huge"),
    ],
)
def test_degenerate_points_agree_with_scikit_image(landmarks):
    landmarks = np.asarray(landmarks, dtype=np.float64)
    np.testing.assert_allclose(estimate_similarity(landmarks), skimage_matrix(landmarks), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", [[0, 0], [50, 60], [33.3, 0.1], [1e5 / 3, -7 / 9]])
def test_all_equal_points_have_no_solution(place):
    assert np.isnan(estimate_similarity(np.tile(place, (5, 1)))).all()


def test_equal_points_spoil_no_neighbour_in_a_batch():
    batch = np.stack([TEMPLATE, np.full((5, 2), 33.3), TEMPLATE * 2, np.full((5, 2), np.nan)])
    matrices = estimate_similarity(batch)
    assert np.isfinite(matrices[[0, 2]]).all() and np.isnan(matrices[[1, 3]]).all()


def test_mirror_image_of_a_square_has_scale_zero():
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=np.float64)
    matrix = estimate_similarity(square * [-1, 1], square)
    np.testing.assert_allclose(matrix, [[0, 0, 0.5], [0, 0, 0.5]], atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 2), (5, 3), (10,)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="must both be lists"):
        estimate_similarity(np.zeros(shape))


@settings(deadline=None)
@given(angle=st.floats(-np.pi, np.pi), scale=st.floats(0.01, 100), shift=st.tuples(*[st.floats(-1e3, 1e3)] * 2))
def test_a_moved_template_is_moved_back(angle, scale, shift):
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = TEMPLATE @ turn.T + shift
    matrix = estimate_similarity(moved)
    np.testing.assert_allclose(moved @ matrix[:, :2].T + matrix[:, 2], TEMPLATE, atol=1e-6)


def test_landmarks_on_the_template_cut_out_the_photo_itself():
    photo = np.random.default_rng(1).integers(0, 256, (150, 140, 3), dtype=np.uint8)
    crop = align_face(photo, TEMPLATE)
    assert crop.shape == (112, 112, 3) and crop.dtype == np.uint8
    np.testing.assert_array_equal(crop, photo[:112, :112])
    np.testing.assert_array_equal(align_face(photo, np.add(TEMPLATE, [20, 30])), photo[30:142, 20:132])


def test_outside_of_the_photo_is_black():
    crop = align_face(np.full((112, 112, 3), 200, np.uint8), np.add(TEMPLATE, [-56, 0]))
    assert (crop[:, :55] == 0).all() and (crop[:, 57:] == 200).all()


def test_crop_is_bilinear():
    ramp = np.arange(0, 200, dtype=np.uint8)[None, :, None].repeat(200, 0).repeat(3, 2)
    crop = align_face(ramp, np.add(TEMPLATE, [10.5, 10.25]))
    expected = np.arange(112) + 10.5
    assert np.abs(crop[50, :, 0] - expected).max() <= 0.5


def test_other_sizes_show_the_same_face():
    photo = cv2.GaussianBlur(np.random.default_rng(2).integers(0, 256, (300, 300, 3), dtype=np.uint8), (0, 0), 6)
    landmarks = TEMPLATE * 2 + 20
    large = align_face(photo, landmarks, size=224)
    assert large.shape == (224, 224, 3)
    small = align_face(photo, landmarks)
    assert np.abs(large[::2, ::2].astype(int) - small).mean() < 1


@pytest.mark.parametrize("landmarks", [np.full((5, 2), 30.0), np.full((5, 2), np.nan), TEMPLATE * 1e5, TEMPLATE * 1e-5])
def test_landmarks_that_determine_no_crop_are_an_error(landmarks):
    with pytest.raises(AlignmentError, match="do not determine a crop"):
        align_face(np.zeros((50, 50, 3), np.uint8), landmarks)


@pytest.mark.parametrize("shift", [[-200, 0], [0, -200], [60, 0], [0, 60]])
def test_a_crop_that_shows_nothing_of_the_photo_is_an_error(shift):
    with pytest.raises(AlignmentError, match="lies outside of the photo"):
        align_face(np.full((50, 50, 3), 200, np.uint8), np.add(TEMPLATE, shift))


def test_panoramas_wider_than_opencv_can_address():
    panorama = np.zeros((130, 40_000, 3), np.uint8)
    face = np.random.default_rng(3).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    panorama[10:122, 39_000:39_112] = face
    np.testing.assert_array_equal(align_face(panorama, np.add(TEMPLATE, [39_000, 10])), face)
    panorama[:, 20_000:] = 200
    whole = warp(panorama, np.array([[0.0025, 0, 0], [0, 0.0025, 0]]), 112)
    assert (whole[0, :50] == 0).all() and (whole[0, 50:100] == 200).all() and (whole[1:] == 0).all()


def test_overlap_is_intersection_over_union():
    boxes = [[0, 0, 10, 10], [5, 0, 15, 10], [10, 10, 20, 20], [3, 3, 3, 9], [8, 8, 2, 2]]
    np.testing.assert_allclose(box_overlap(boxes, [0, 0, 10, 10]), [1, 1 / 3, 0, 0, 0])
    assert box_overlap([[1, 1, 1, 1]], [1, 1, 1, 1]).tolist() == [0]


BOXES = np.array([[0, 0, 40, 40], [45, 45, 60, 60], [60, 10, 90, 30]], dtype=np.float32)
SCORES = np.array([0.95, 0.92, 0.99], dtype=np.float32)


@pytest.mark.parametrize(("rule", "expected"), [("central", 1), ("largest", 0), ("best_score", 2)])
def test_rules(rule, expected):
    assert choose_face(BOXES, SCORES, (100, 100), rule) == expected


def test_overlap_rule():
    assert choose_face(BOXES, SCORES, (100, 100), "overlap", [30, 30, 62, 62]) == 1
    assert choose_face(BOXES, SCORES, (100, 100), "overlap", [62, 40, 90, 90]) is None
    with pytest.raises(ValueError, match="needs a box"):
        choose_face(BOXES, SCORES, (100, 100), "overlap")


def test_centre_depends_on_the_photo_and_not_on_its_shape_order():
    # Width 200: the centre lies at x = 100, so the third box is nearest.
    assert choose_face(BOXES, SCORES, (200, 40), "central") == 2


def test_ties_go_to_the_higher_score_then_to_the_first():
    twice = np.array([[0, 0, 10, 10]] * 3, dtype=np.float32)
    for rule in ("central", "largest", "overlap"):
        assert choose_face(twice, [0.91, 0.99, 0.99], (50, 50), rule, [0, 0, 10, 10]) == 1


def test_no_faces_and_bad_calls():
    assert choose_face(np.zeros((0, 4)), np.zeros(0), (10, 10)) is None
    with pytest.raises(ValueError, match="unknown rule"):
        choose_face(BOXES, SCORES, (10, 10), "first")
    with pytest.raises(ValueError, match="3 boxes but 2 scores"):
        choose_face(BOXES, SCORES[:2], (10, 10))


def test_central_face_of_every_lfw_photo(shared):
    with np.load(shared / "retinaface" / "reference_lfw.npz") as reference:
        boxes, scores, offsets, central = (reference[key] for key in ("boxes", "scores", "offsets", "central"))
    chosen = [choose_face(boxes[a:b], scores[a:b], (250, 250)) for a, b in itertools.pairwise(offsets)]
    np.testing.assert_array_equal(chosen, central)
