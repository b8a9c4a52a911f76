"""Challenge 1: the devkit's own files to the byte, and a slow transcription for everything that has no golden file."""

import dataclasses
import json
import threading
import time

import hypothesis
import numpy as np
import pytest
import torch
from helpers import megaface_transcription as slow
from hypothesis import given, settings
from hypothesis import strategies as st

from megaface import protocol, scan, scores, tally, tally_gpu, windows
from megaface.devkit_json import array_text, cmc_text, float_text, integer_arrays, matches_text, printed_floats
from megaface.protocol import identification, subsample
from utils import InputError

GOLDEN = ("basic_100d", "single_image_id", "size_arg_smaller", "ties_200d", "tiny_10d")


def load_golden(shared, case):
    folder = shared / "megaface" / "golden" / case
    ids = json.loads((folder / "probe_ids.json").read_text())
    size = json.loads((folder / "meta.json").read_text())["size_argument"]
    return folder, np.load(folder / "probes.npy"), ids, np.load(folder / "distractors.npy"), size


def use_tiny_blocks(monkeypatch, rows, columns):
    """Make every case need many blocks."""
    monkeypatch.setattr(scan, "CPU_BLOCK", (rows, columns))
    monkeypatch.setattr(tally_gpu, "TABLE_ROWS", 2)
    monkeypatch.setattr(windows, "TABLE_ENTRIES", 1)
    monkeypatch.setattr(protocol, "POSITION_ROWS", 3)


@pytest.fixture(params=["loops", "arrays"])
def both_ways(request, monkeypatch):
    """The compiled loops of a CPU, and the whole-array operations of a GPU, run here."""
    if request.param == "arrays":
        monkeypatch.setattr(tally, "CpuWork", tally_gpu.GpuWork)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("case", GOLDEN)
def test_the_devkits_files_to_the_byte(shared, case, tiny, monkeypatch):
    if tiny:
        use_tiny_blocks(monkeypatch, 40, 33)
    folder, probes, ids, distractors, size = load_golden(shared, case)
    (result,) = identification(probes, ids, distractors, [size])
    assert cmc_text(result).encode() == (folder / "cmc.json").read_bytes()
    assert matches_text(result).encode() == (folder / "matches.json").read_bytes()
    assert f"Rank 1: {result.cmc[0]:f}" in (folder / "stdout.txt").read_text()


@pytest.mark.parametrize("case", ["basic_100d", "ties_200d"])
@pytest.mark.parametrize("exact", ["block_scores", "pair_scores"])
def test_the_devkits_score_matrices_to_the_bit(shared, case, exact):
    folder, probes, _, distractors, _ = load_golden(shared, case)
    sides = [torch.from_numpy(side) for side in (probes, distractors)]
    squares = [torch.from_numpy(scores.survey_rows(side).squares) for side in (probes, distractors)]
    if exact == "block_scores":
        found = scores.block_scores(*sides, *squares)
    else:
        rows, columns = (index.ravel() for index in np.indices((len(probes), len(distractors))))
        found = scores.pair_scores(*sides, torch.from_numpy(rows), torch.from_numpy(columns), *squares)
    data = (folder / "facescrub_megaface.bin").read_bytes()
    assert found.numpy().tobytes() == data[16:]


# ---------------------------------------------------------------------------------------------- transcription


@st.composite
def games(draw, largest=24):
    """Probes, identities, distractors and a size, of every kind that could trip rounding or ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dimensions = draw(st.sampled_from([1, 2, 3, 17, 64, 130, 257]))
    n, m = draw(st.integers(3, largest)), draw(st.integers(1, largest))
    ids = [f"id{number}" for number in rng.integers(0, draw(st.integers(1, max(1, n // 2))), n)]
    ids[1] = ids[0]
    kind = draw(st.sampled_from(["random", "unit", "identities", "grid", "halves", "near", "signs", "twelfths"]))
    probes, distractors = (rng.standard_normal((count, dimensions)) for count in (n, m))
    if kind == "identities":
        centres = {name: rng.standard_normal(dimensions) for name in sorted(set(ids))}
        probes = np.stack([centres[name] for name in ids]) + 0.7 * probes
    if kind == "grid":
        probes, distractors = np.round(2 * probes) / 4, np.round(2 * distractors) / 4
    if kind == "twelfths":  # short and coarse: |x|^2 often lies next to the midpoint of two float32 numbers
        probes, distractors = np.round(6 * probes) / 12, np.round(6 * distractors) / 12
    if kind == "halves":
        probes, distractors = probes.astype(np.float16), distractors.astype(np.float16)
    if kind == "near":  # everything within a few roundings of everything else
        probes, distractors = (1 + 1e-7 * side for side in (probes, distractors))
    if kind == "signs":
        probes, distractors = (np.sign(side) / np.sqrt(dimensions) for side in (probes, distractors))
    probes, distractors = probes.astype(np.float64), distractors.astype(np.float64)
    if kind in ("unit", "identities"):
        probes /= np.linalg.norm(probes, axis=1, keepdims=True)
        distractors /= np.linalg.norm(distractors, axis=1, keepdims=True)
    if draw(st.booleans()):  # distractors of very different lengths
        distractors *= 10.0 ** rng.integers(-3, 4, (m, 1))
    if draw(st.booleans()):  # twins among distractors, probes as distractors, twins among probes
        distractors[rng.integers(0, m, m // 2)] = distractors[rng.integers(0, m)]
        distractors[rng.integers(0, m, m // 3)] = probes[rng.integers(0, n)]
        probes[rng.integers(0, n, n // 3)] = probes[rng.integers(0, n)]
    if draw(st.booleans()):
        probes[rng.integers(0, n)] = 0
        distractors[rng.integers(0, m)] = 0
    scale = draw(st.sampled_from([1.0, 1.0, 1e-3, 40.0, 1e13, 1e-18, 1e-22, 3e-38]))
    double = draw(st.booleans())
    sides = [(side * scale).astype(np.float64 if double else np.float32) for side in (probes, distractors)]
    return sides[0], ids, sides[1], draw(st.integers(1, m + 3))


def same_floats(found, wanted):
    return np.array_equal(np.array(found, np.float32), np.array(wanted, np.float32))


def check_against_transcription(probes, ids, distractors, size):
    wanted = slow.identification(probes.astype(np.float32), ids, distractors.astype(np.float32), size)
    (result,) = identification(probes, ids, distractors, [size])
    cmc, matches = json.loads(cmc_text(result)), json.loads(matches_text(result))
    for name, (places, values) in wanted["cmc"].items():
        assert same_floats(cmc[name][0], places), name
        assert same_floats(cmc[name][1], values), name
    for found, entry in zip(matches, wanted["matches"], strict=True):
        assert found["probes"] == entry["probes"]
        assert found["distractors"]["idx"] == entry["distractors"]["idx"]
        assert same_floats(found["distractors"]["score"], entry["distractors"]["score"])
    return result


@pytest.mark.usefixtures("both_ways")
@settings(deadline=None, max_examples=150, suppress_health_check=list(hypothesis.HealthCheck))
@given(game=games())
def test_any_game_is_the_transcriptions(game):
    check_against_transcription(*game)


@pytest.mark.usefixtures("both_ways")
@settings(deadline=None, max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@given(game=games())
def test_any_game_in_tiny_blocks_is_the_transcriptions(game, monkeypatch):
    use_tiny_blocks(monkeypatch, 5, 4)
    check_against_transcription(*game)


@pytest.mark.usefixtures("both_ways")
def test_scores_that_nearly_all_have_to_be_computed_again():
    """Everything lies within rounding of everything else, so whole rows are scored in the devkit's order at once."""
    rng = np.random.default_rng(30)
    probes, distractors = (np.float32(1) + np.float32(1e-6) * rng.random((n, 70), np.float32) for n in (40, 600))
    result = check_against_transcription(probes, [f"id{i % 3}" for i in range(40)], distractors, 600)
    assert result.recomputed > 40 * 600


def test_the_devkits_order_decides_the_last_bit_of_a_square():
    """Vectors of 64 twelfths: the sum of their squares depends on the order in which they are added."""
    values = (np.random.default_rng(2).integers(-4, 5, (100_000, 64)) / 12).astype(np.float32)
    found, wanted = scores.survey_rows(values).squares, slow.squares(values)
    one_by_one = np.cumsum(values.astype(np.float64) ** 2, axis=1)[:, -1].astype(np.float32)
    assert (one_by_one != wanted).sum() > 50
    assert np.array_equal(found, wanted)


def random_game(seed, n=130, m=60, dimensions=48, identities=12, noise=1.2):
    rng = np.random.default_rng(seed)
    ids = [f"id{number}" for number in rng.integers(0, identities, n)]
    centres = {name: rng.standard_normal(dimensions) for name in sorted(set(ids))}
    probes = np.stack([centres[name] for name in ids]) + noise * rng.standard_normal((n, dimensions))
    distractors = rng.standard_normal((m, dimensions))
    sides = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (probes, distractors)]
    return sides[0].astype(np.float32), ids, sides[1].astype(np.float32)


@pytest.mark.usefixtures("both_ways")
def test_only_the_first_hundred_probes_are_impostors():
    probes, ids, distractors = random_game(1)
    result = check_against_transcription(probes, ids, distractors, 60)
    assert (len(probes), result.impostor_probes, result.roc.impostors) == (130, 100, 6000)


def test_fewer_than_a_hundred_probes_are_all_impostors():
    probes, ids, distractors = random_game(2, n=40)
    result = check_against_transcription(probes, ids, distractors, 60)
    assert (result.impostor_probes, result.roc.impostors) == (40, 2400)


@pytest.mark.usefixtures("both_ways")
def test_a_crowd_of_thresholds_needs_a_wider_table():
    probes, ids, distractors = random_game(3, n=150, identities=1)
    check_against_transcription(probes, ids, distractors, 60)


@pytest.mark.usefixtures("both_ways")
def test_probes_without_a_rival_do_not_shift_the_tables_of_others(monkeypatch):
    """Every other identity is so alike that its probes are left out of the tables' work; bins are as many as can be."""
    monkeypatch.setattr(windows, "SCORES_PER_BIN", 1)
    rng = np.random.default_rng(33)
    ids = [f"id{number // 20:02d}" for number in range(400)]
    noise = np.where(np.arange(400) // 20 % 2, 1e-3, 1.5)[:, None]
    probes = np.repeat(rng.standard_normal((20, 2)), 20, axis=0) + noise * rng.standard_normal((400, 2))
    distractors = rng.standard_normal((30000, 2)).astype(np.float32)
    (result,) = identification(probes, ids, distractors, [30000])
    scored = np.sort(slow.score_matrix(probes, distractors), axis=1)
    for a in range(400):
        own = result.pairs[:, 0] == a
        below = np.searchsorted(scored[a], result.scores[own], side="right")
        assert (result.ranks[own] == 30000 - below).all()


@pytest.mark.usefixtures("both_ways")
def test_several_sizes_in_one_pass_are_the_same_as_one_by_one():
    probes, ids, distractors = random_game(4)
    sizes = [60, 3, 17, 100, 17]
    together = identification(probes, ids, distractors, sizes)
    for size, result in zip(sizes, together, strict=True):
        (alone,) = identification(probes, ids, distractors, [size])
        assert (cmc_text(result), matches_text(result)) == (cmc_text(alone), matches_text(alone))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_the_order_of_distractors_changes_nothing_but_their_numbers(seed):
    probes, ids, distractors = random_game(5, n=50)
    order = np.random.default_rng(seed).permutation(len(distractors))
    (plain,), (mixed,) = (identification(probes, ids, side, [60]) for side in (distractors, distractors[order]))
    assert cmc_text(plain) == cmc_text(mixed)
    assert np.array_equal(plain.ranks, mixed.ranks)
    assert np.array_equal(plain.best_score, mixed.best_score)
    assert np.array_equal(plain.best_index, order[mixed.best_index])


@pytest.mark.parametrize("power", [-50, -20, 1, 40])
def test_a_power_of_two_scales_scores_and_nothing_else(power):
    probes, ids, distractors = random_game(6, n=50)
    factor = np.float32(2.0**power)
    (plain,), (scaled,) = (identification(probes * f, ids, distractors * f, [60]) for f in (np.float32(1), factor))
    assert cmc_text(plain) == cmc_text(scaled)
    assert np.array_equal(plain.ranks, scaled.ranks)
    assert np.array_equal(plain.best_score * factor * factor, scaled.best_score)


def test_float64_features_are_rounded_once():
    probes, ids, distractors = random_game(7, n=50)
    finer = np.random.default_rng(0).standard_normal(distractors.shape) * 1e-9
    wide = distractors.astype(np.float64) + finer
    (found,) = identification(probes.astype(np.float64), ids, wide, [60])
    (wanted,) = identification(probes, ids, wide.astype(np.float32), [60])
    assert matches_text(found) == matches_text(wanted)


def test_memory_mapped_distractors(tmp_path):
    probes, ids, distractors = random_game(8, n=50)
    np.save(tmp_path / "distractors.npy", distractors)
    mapped = np.load(tmp_path / "distractors.npy", mmap_mode="r")
    (found,), (wanted,) = (identification(probes, ids, side, [60]) for side in (mapped, distractors))
    assert matches_text(found) == matches_text(wanted)


def test_progress_counts_every_distractor_once():
    probes, ids, distractors = random_game(9, n=20)
    distractors[5:40] = distractors[4]
    seen = []
    identification(probes, ids, distractors, [10, 60], ignored=np.arange(60) % 7 == 0, advance=seen.append)
    assert sum(seen) == 60


# ---------------------------------------------------------------------------------------------- out of competition


@pytest.mark.usefixtures("both_ways")
def test_ignored_distractors_are_as_good_as_far_away():
    probes, ids, distractors = random_game(10)
    ignored = np.zeros(60, bool)
    ignored[[0, 7, 31, 59]] = True
    far = distractors.copy()
    far[ignored] = 50 + np.arange(4)[:, None]
    unreadable = distractors.copy()
    unreadable[ignored] = np.nan
    (found,) = identification(probes, ids, unreadable, [60], ignored=ignored)
    (wanted,) = identification(probes, ids, far, [60])
    assert found.distractors == 60
    assert (cmc_text(found), matches_text(found)) == (cmc_text(wanted), matches_text(wanted))


@pytest.mark.usefixtures("both_ways")
def test_absent_probes_fail_every_comparison():
    probes, ids, distractors = random_game(11, identities=8)
    absent = np.zeros(len(probes), bool)
    absent[[3, 50, 120]] = True
    unreadable = probes.copy()
    unreadable[absent] = np.nan
    (found,) = identification(unreadable, ids, distractors, [60], absent=absent)
    (whole,) = identification(probes, ids, distractors, [60])
    fails = absent[found.pairs].any(axis=1)
    assert fails.any() and np.array_equal(found.pairs, whole.pairs)
    assert (found.ranks[fails] == 60).all() and np.isneginf(found.scores[fails]).all()
    assert np.array_equal(found.ranks[~fails], whole.ranks[~fails])
    assert found.cmc[0] == np.float32(np.mean(np.where(fails, 60, whole.ranks) == 0))
    assert found.roc.impostors == whole.roc.impostors
    assert found.roc.rates[-1] == 1 and found.roc.accepts[-1] == found.roc.impostors
    assert (found.best_index[absent] == -1).all() and (found.best_index[~absent] == whole.best_index[~absent]).all()
    # Impostor scores of absent probes are gone, genuine pairs with them are never accepted.
    present = np.flatnonzero(~absent[:100])
    dp = slow.score_matrix(probes, distractors)[present].ravel()
    genuine = whole.scores[(~fails) & (whole.pairs[:, 0] < whole.pairs[:, 1])]
    total = (whole.pairs[:, 0] < whole.pairs[:, 1]).sum()
    accepted = np.array([(dp > g).sum() for g in genuine])
    for k in (0, 1, 5, 100, 1000):
        below = np.searchsorted(found.roc.accepts, k, side="right")
        rate = found.roc.rates[below - 1] if below else 0
        assert rate == np.float32(np.sum(accepted <= k) / total)
    assert found.traditional_cmc[-1] == pytest.approx(1, abs=1e-5)
    assert found.traditional_cmc[0] <= whole.traditional_cmc[0]
    json.loads(matches_text(found))


@pytest.mark.usefixtures("both_ways")
def test_all_probes_absent():
    probes, ids, distractors = random_game(12, n=20)
    (result,) = identification(probes, ids, distractors, [60], absent=np.ones(20, bool))
    assert (result.ranks == 60).all() and result.cmc[0] == 0 and result.cmc[-1] == 1
    assert result.roc.rate_at(0.5) == 0


# ---------------------------------------------------------------------------------------------- bounds and effort


@settings(deadline=None, max_examples=150, suppress_health_check=list(hypothesis.HealthCheck))
@given(game=games())
def test_half_scores_lie_within_the_bound(game):
    probes, _, distractors, _ = (np.float32(part) if isinstance(part, np.ndarray) else part for part in game)
    surveys = [scores.survey_rows(side) for side in (probes, distractors)]
    sides = [torch.from_numpy(side) for side in (probes, distractors)]
    out = torch.empty(len(probes), len(distractors))
    half = scores.half_scores(*sides, torch.from_numpy(surveys[1].squares), out, torch.empty_like(out))
    found = 2 * half.double().numpy() - surveys[0].squares.astype(np.float64)[:, None]
    exact = slow.score_matrix(probes, distractors)
    bounds = scores.Bounds(surveys[0], exact=False)
    everyone = scores.gallery_class(surveys[1], np.arange(len(distractors)))
    width = bounds.half_width(everyone)[:, None]
    assert (np.abs(found - exact) <= width).all()
    # The narrower window around known thresholds holds for every decision about them.
    thresholds = np.sort(exact[:, : max(1, exact.shape[1] // 2)], axis=1)
    width = bounds.half_width(everyone, thresholds)[:, None, None]
    gap = found[:, :, None] - thresholds.astype(np.float64)[:, None]
    above = exact[:, :, None] > thresholds[:, None]
    assert above[gap > width].all() and not above[gap < -width].any()


def test_the_bound_is_close_to_what_the_devkits_order_can_lose():
    """For unit vectors the windows are some 1e-4 wide: wider ones would be right as well, but slow."""
    probes, _, distractors = random_game(13, dimensions=512)
    surveys = [scores.survey_rows(side) for side in (probes, distractors)]
    everyone = scores.gallery_class(surveys[1], np.arange(len(distractors)))
    near_zero = np.full((len(probes), 1), -2, np.float32)  # thresholds at a right angle
    width = scores.Bounds(surveys[0], exact=False).half_width(everyone, near_zero)
    assert width.min() > 4e-5 and width.max() < 6e-5


def recomputed_share(probes, ids, distractors):
    (result,) = identification(probes, ids, distractors, [len(distractors)])
    return result.recomputed / (len(probes) * len(distractors))


@pytest.mark.usefixtures("both_ways")
def test_little_is_recomputed_when_identities_are_apart():
    probes, ids, distractors = random_game(14, n=200, m=5000, dimensions=256, identities=40, noise=0.7)
    assert recomputed_share(probes, ids, distractors) < 0.01


@pytest.mark.usefixtures("both_ways")
def test_identical_distractors_are_scored_once():
    probes, ids, distractors = random_game(15, n=60, m=4000)
    distractors[:] = probes[7]  # each ties with the mate of a genuine pair
    (result,) = identification(probes, ids, distractors, [4000])
    assert result.recomputed < 5000
    assert (result.best_index == np.arange(3999, 3994, -1)).all()
    check_against_transcription(probes[:20], ids[:20], distractors[:300], 250)


def test_one_huge_distractor_does_not_widen_every_window():
    probes, ids, distractors = random_game(16, n=100, m=3000, dimensions=256, identities=20, noise=0.7)
    distractors[1234] *= 1e6
    assert recomputed_share(probes, ids, distractors) < 0.01


@pytest.mark.usefixtures("both_ways")
def test_quantised_features_need_no_recomputation():
    rng = np.random.default_rng(17)
    probes, distractors = (rng.integers(-2, 3, (count, 32)).astype(np.float32) / 4 for count in (60, 2000))
    (result,) = identification(probes, [f"id{i % 6}" for i in range(60)], distractors, [2000])
    assert result.recomputed == 0
    check_against_transcription(probes[:30], [f"id{i % 6}" for i in range(30)], distractors[:200], 200)


def test_quantum():
    assert scores.quantum(np.array([0.75, -2, 0], np.float32)) == 0.25
    assert scores.quantum(np.zeros(3, np.float32)) == float("inf")
    assert scores.quantum(np.array([1.5e-45], np.float32)) == 2.0**-149
    assert scores.quantum(np.array([1 / 3], np.float32)) == 2.0**-25


def test_products_are_true_float32_whatever_the_caller_prefers():
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        with tally.worker_threads(torch.device("cpu")) as pool:
            assert pool.submit(torch.get_float32_matmul_precision).result() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.get_num_threads() == threads


def test_a_product_in_a_worker_takes_one_thread():
    """BLAS in every worker on all cores: with two workers, products took half as long again."""

    def product():
        left, right = torch.ones(2048, 2048), torch.ones(2048, 2048)
        cpu, others = time.thread_time(), time.process_time()
        left @ right
        return time.process_time() - others, time.thread_time() - cpu

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with tally.worker_threads(torch.device("cpu")) as pool:
            everything, own = pool.submit(product).result()
        found = []
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found == [2]
    finally:
        torch.set_num_threads(threads)
    assert everything < 1.3 * own


def test_two_workers_find_the_same_as_one(monkeypatch):
    probes, ids, distractors = random_game(18)
    monkeypatch.setattr(scan, "CPU_BLOCK", (32, 8))
    texts = []
    threads = torch.get_num_threads()
    for workers in (1, 4):
        torch.set_num_threads(workers)
        try:
            (result,) = identification(probes, ids, distractors, [60])
        finally:
            torch.set_num_threads(threads)
        texts.append((cmc_text(result), matches_text(result)))
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [0]}, "at least 1"),
        ({"sizes": []}, "at least 1"),
        ({"ids": [str(i) for i in range(20)]}, "no identity has two probes"),
        ({"ids": ["a"] * 19}, "20 probes but 19 identities"),
        ({"distractors": np.ones((5, 3), np.float32)}, "3"),
        ({"distractors": np.ones((0, 48), np.float32)}, "no distractors"),
        ({"probes": np.full((20, 48), np.nan, np.float32)}, "probe 0: .* not finite"),
        ({"distractors": np.full((5, 48), np.inf, np.float32)}, "distractor 0: .* not finite"),
        ({"distractors": np.full((5, 48), 1e300)}, "distractor 0: .* too large"),
        ({"distractors": np.full((5, 48), 1.35e18, np.float32)}, "distractor 0: .* too large"),
        ({"probes": np.full((20, 48), -1.35e18, np.float32)}, "probe 0: .* too large"),
    ],
)
def test_what_the_devkit_gets_wrong_is_refused(change, message):
    probes, ids, distractors = random_game(19, n=20)
    game = {"probes": probes, "ids": ids, "distractors": distractors, "sizes": [60], **change}
    with pytest.raises(InputError, match=message):
        identification(game["probes"], game["ids"], game["distractors"], game["sizes"])


@pytest.mark.usefixtures("both_ways")
def test_the_largest_features_that_are_not_refused():
    probes, ids, distractors = random_game(21, n=20)
    sides = [side / np.linalg.norm(side, axis=1, keepdims=True) * 9.1e18 for side in (probes, distractors)]
    sides[1][:10] = -sides[0][:10]  # the lowest scores that there are
    result = check_against_transcription(sides[0], ids, sides[1], 60)
    assert np.isfinite(result.best_score).all()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fewer_than_five_distractors_give_a_shorter_list(count):
    probes, ids, distractors = random_game(20, n=30)
    result = check_against_transcription(probes, ids, distractors[:count], 5)
    assert (result.best_index >= 0).sum(axis=1).tolist() == [count] * 30


# ---------------------------------------------------------------------------------------------- curves and text


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60))
def test_subsampling_is_the_devkits_walk(values):
    curve = np.sort(np.array(values, np.float32))
    assert subsample(curve) == slow.subsample(curve)


def test_the_full_roc_is_read_without_interpolation():
    probes, ids, distractors = random_game(21)
    (result,) = identification(probes, ids, distractors, [60])
    dp = slow.score_matrix(probes, distractors)[:100].ravel()
    genuine = result.scores[result.pairs[:, 0] < result.pairs[:, 1]]
    accepted = np.array([(dp > g).sum() for g in genuine])
    for far in (0.0, 1e-6, 1 / 6000, 0.01, 0.3, 1.0):
        assert result.roc.rate_at(far) == np.float32(np.mean(accepted <= round(far * 6000 - 1e-9 * 6000 * far)))
    assert result.rate_at_rank(1) == result.cmc[0] and result.rate_at_rank(10**9) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0"),
        (1.0, "1.0"),
        (-1.5, "-1.50"),  # one zero too many, but so it is
        (np.float32(0.01), "0.009999999776482582"),
        (np.float32(1e-8), "9.999999939225290e-09"),
        (1e-10, "1.000000000000000e-10"),
        (-1.5e20, "-1.500000000000000e+20"),
        (1e15, "1000000000000000."),
        (100.0, "100.0"),
        (np.float32(0.026), "0.02600000053644180"),
    ],
)
def test_numbers_are_printed_as_jsoncpp_does(value, text):
    assert float_text(float(value)) == text


@given(st.lists(st.floats(width=32, allow_nan=False) | st.floats(-12, 12, width=32), max_size=40))
@settings(max_examples=300, deadline=None)
def test_scores_are_printed_as_single_numbers_are(values):
    assert printed_floats(np.array(values, np.float32)) == [float_text(value) for value in values]


@given(st.lists(st.lists(st.integers(0, 2**40), max_size=60), max_size=8))
@settings(max_examples=200, deadline=None)
def test_arrays_of_integers_are_printed_as_single_arrays_are(lists):
    bounds = np.cumsum([0] + [len(some) for some in lists])
    values = np.array([value for some in lists for value in some], np.int64)
    wanted = [array_text([str(value) for value in some], 3 * "\t") for some in lists]
    assert list(integer_arrays(values, bounds)) == wanted


def test_long_arrays_go_over_several_lines():
    assert array_text([], "\t") == "[]"
    assert array_text(["1"] * 23, "\t").startswith("[ 1, 1")
    assert array_text(["1"] * 24, "\t").startswith("\n\t[\n\t\t1,\n")
    assert array_text([""] * 25, "\t").startswith("\n\t[\n\t\t,\n")
    assert array_text(["x" * 69], "\t") == f"[ {'x' * 69} ]"  # 73 characters
    assert array_text(["x" * 70], "\t") == f"\n\t[\n\t\t{'x' * 70}\n\t]"


def test_galleries_are_drawn_as_libstdc_draws():
    groups = [np.arange(9), np.arange(9, 20), np.array([20])]
    drawn = protocol.draw_galleries(groups)
    stream = slow.lehmer()
    wanted = []
    for _ in range(10):
        gallery = []
        for members in groups:
            scaling = 2147483645 // len(members)
            value = next(x - 1 for x in stream if x - 1 < len(members) * scaling)
            gallery.append(members[value // scaling])
        wanted.append(gallery)
    assert [list(gallery) for gallery in drawn] == wanted


def test_results_can_be_replaced_field_by_field():
    probes, ids, distractors = random_game(22, n=20)
    (result,) = identification(probes, ids, distractors, [60])
    assert dataclasses.replace(result, size=7).size == 7
