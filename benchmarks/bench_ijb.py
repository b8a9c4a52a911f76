"""IJB-C's protocols on invented features of its size: time, memory, and how many times as fast as the plain way.

    pip install "scikit-learn>=1.5,<2"        # the plain way's roc_curve; nothing else here needs it
    python benchmarks/bench_ijb.py            # a few minutes, 2 GB of scratch space, 4 GB of memory
    python benchmarks/bench_ijb.py --scale 0.02

First, in one process, a part of the protocol (--part, a tenth of the images, templates and pairs) both ways. `plain`
is how the public programs do it: for every treatment a loop over templates that looks for its images in the whole list,
one over its media, all pairs in batches of 100,000 with `np.sum(a * b, -1)`, scikit-learn's `roc_curve`; for 1:N a loop
over probes that sorts the gallery. `ours` is the room `ijb`. Both give the same scores, bit by bit; that is checked.
Then the whole protocol our way in a process of its own, whose largest resident memory is reported (features are mapped,
and the pages of theirs that have been read count).

Seconds are wall clock of both ways in turn, once each: the longest part takes minutes.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ijb import one_to_many, one_to_one
from ijb.lists import Lists, Pairs, People
from ijb.templates import TREATMENTS, USUAL, ImageFeatures, pool

IMAGES, TEMPLATES, GALLERIES, PAIRS, GENUINE = 469_375, 23_124, (1_772, 1_759), 15_658_489, 19_557  # IJB-C's


def invent(scale: float, dimensions: int, folder: Path, seed: int = 0):
    """Lists, pairs, galleries, probes of `scale` times IJB-C, and features of subjects with noise, mapped."""
    generator = np.random.default_rng(seed)
    sizes = [int(count * scale) for count in GALLERIES]
    people, templates, images = sum(sizes), int(TEMPLATES * scale), int(IMAGES * scale)
    subject = np.concatenate([np.arange(people), generator.integers(people, size=templates - people)])
    number = np.sort(generator.choice(4 * templates, templates, replace=False))[generator.permutation(templates)]
    template = np.concatenate([np.arange(templates), generator.integers(templates, size=images - templates)])
    generator.shuffle(template)
    media = template * 8 + generator.integers(8, size=images)
    lists = Lists(
        "IJB-C",
        folder,
        "ijbc",
        [],
        number[template],
        media,
        np.zeros((images, 5, 2), np.float32),
        generator.choice(np.array([0.1, 0.7, 0.999], np.float32), images),
    )
    first = generator.integers(people, size=int(PAIRS * scale))
    second = generator.integers(people, templates, size=len(first))
    probes = generator.integers(people, templates, size=int(GENUINE * scale))
    first[: len(probes)], second[: len(probes)] = subject[probes], probes
    order = np.argsort(first, kind="stable")  # the official list goes by galleries
    first, second = first[order], second[order]
    pairs = Pairs(number[first], number[second], subject[first] == subject[second])

    def whose(rows):
        rows = rows[np.argsort(number[rows])]
        return People(number[rows], np.array([f"{who}" for who in subject[rows]]))

    galleries = [whose(np.arange(sizes[0])), whose(np.arange(sizes[0], people))]
    features = []
    centres = generator.standard_normal((people, dimensions), np.float32)
    for name in ("embs", "embs_f"):
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (images, dimensions))
        for start in range(0, images, 8192):
            part = slice(start, start + 8192)
            array[part] = centres[subject[template[part]]]
            array[part] += 3 * generator.standard_normal(array[part].shape, np.float32)
        array.flush()
        features.append(array)
    return lists, pairs, galleries, whose(np.arange(people, templates)), features


def ours(lists, pairs, galleries, probes, features):
    """Everything our way: seconds by part, scores of the usual treatment, TAR of all eight, rank-1 hits."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name):
        nonlocal began
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        began = time.perf_counter()

    templates = pool(ImageFeatures.of_arrays(*features), lists)
    lap("templates")
    scorer, printed, usual = one_to_one.PairScorer(pairs, templates), {}, None
    lap("pairs")
    for treatment in TREATMENTS:
        embeddings = templates.embeddings(treatment)
        scores = scorer.scores(embeddings)
        lap("pairs")
        printed[treatment.name] = one_to_one.verification(scores, scorer.same, treatment).printed
        lap("TAR at FAR")
        if treatment == USUAL:
            usual = np.empty_like(scores)
            usual[scorer.order] = scores
            began = time.perf_counter()
    embeddings = templates.embeddings(USUAL)
    found = [one_to_many.against("", gallery, probes, templates, embeddings, replicates=1) for gallery in galleries]
    lap("1:N")
    return seconds, usual, printed, [gallery.hits[1] for gallery in found]


def plain(lists, pairs, galleries, probes, features):
    """Everything as the public programs do it."""
    from sklearn.metrics import roc_curve

    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name):
        nonlocal began
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        began = time.perf_counter()

    printed, usual = {}, None
    for treatment in TREATMENTS:
        numbers, embeddings = plain_templates(lists, features, treatment, np.unique(lists.templates))
        lap("templates")
        place = np.zeros(numbers.max() + 1, int)
        place[numbers] = np.arange(len(numbers))
        scores = np.concatenate(
            [
                np.sum(
                    embeddings[place[pairs.first[start : start + 100_000]]]
                    * embeddings[place[pairs.second[start : start + 100_000]]],
                    -1,
                )
                for start in range(0, len(pairs.same), 100_000)
            ]
        )
        lap("pairs")
        far, tar, _ = roc_curve(pairs.same, scores)
        far, tar = np.flipud(far), np.flipud(tar)
        printed[treatment.name] = {x: float(tar[np.argmin(abs(far - x))]) for x in one_to_one.FAR_LEVELS}
        lap("TAR at FAR")
        usual = scores if treatment == USUAL else usual
    hits = []
    wanted = plain_templates(lists, features, USUAL, probes.templates)[1]
    for gallery in galleries:
        enrolled = plain_templates(lists, features, USUAL, gallery.templates)[1]
        similarity = wanted @ enrolled.T
        count = 0
        for row, subject in enumerate(probes.subjects):
            if subject in gallery.subjects:
                count += np.argsort(similarity[row])[-1] == np.argwhere(gallery.subjects == subject)[0, 0]
        hits.append(int(count))
    lap("1:N")
    return seconds, usual, printed, hits


def plain_templates(lists, features, treatment, numbers):
    """Templates one by one, as the public programs pool them."""
    x = features[0] + features[1] if treatment.mirror else np.asarray(features[0])
    if treatment.unit:
        x = x / np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]
    if treatment.weighted:
        x = x * lists.scores[:, None]
    result = np.zeros((len(numbers), x.shape[1]))
    for row, number in enumerate(numbers):
        (images,) = np.where(lists.templates == number)
        mine, medias = x[images], lists.medias[images]
        parts = []
        for media in np.unique(medias):
            (same,) = np.where(medias == media)
            parts.append(np.mean(mine[same], axis=0, keepdims=True) if len(same) > 1 else mine[same])
        result[row] = np.sum(np.array(parts), 0)
    return numbers, result / np.sqrt(np.einsum("ij,ij->i", result, result))[:, None]


def whole(scale, dimensions, folder, queue):
    """In a process of its own: our seconds, and the largest resident memory in bytes."""
    protocol = invent(scale, dimensions, folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds, *_ = ours(*protocol)
    queue.put((seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the whole, 1 is IJB-C's")
    parser.add_argument("--part", type=float, default=0.1, help="part of it that both ways do; 0 leaves it out")
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    report: dict[str, Any] = {"scale": options.scale, "part": options.part, "dimensions": options.dimensions}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ours(*invent(0.002, options.dimensions, folder))  # compiles
        if options.part:
            protocol = invent(options.scale * options.part, options.dimensions, folder)
            results = {"ours": ours(*protocol), "plain": plain(*protocol)}
            assert np.array_equal(results["ours"][1], results["plain"][1]), "other scores"
            assert results["ours"][2:] == results["plain"][2:], "other figures"
            for name, (seconds, *_) in results.items():
                print_seconds(f"{name}, {options.part:g} of it", seconds)
                report[name] = seconds
            totals = [sum(results[name][0].values()) for name in ("plain", "ours")]
            report["times_as_fast"] = totals[0] / totals[1]
            print(f"{report['times_as_fast']:.1f} times as fast; all scores equal bit by bit\n")
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=whole, args=(options.scale, options.dimensions, folder, queue))
        process.start()
        seconds, before, peak = queue.get()
        process.join()
        print_seconds("ours, whole", seconds)
        report |= {"whole": seconds, "peak_bytes": peak}
        print(f"largest resident memory {peak / 2**30:.2f} GiB ({before / 2**30:.2f} after inventing the features)")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def print_seconds(title, seconds):
    """One line: the total and its parts."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    print(f"{title}: {sum(seconds.values()):.1f} s ({parts})", flush=True)


if __name__ == "__main__":
    main()
