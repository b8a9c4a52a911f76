"""A slow transcription of the devkit's arithmetic into plain NumPy: full score matrices, loops, nothing clever.

The tests hold the fast program against it; it shares no line with `megaface/`.
"""

import numpy as np


def score_matrix(left, right):
    """Devkit scores [n, m]: float32 products added in the order of the dimensions, then 2 dot - |p|^2 - |g|^2."""
    left, right = left.astype(np.float32), right.astype(np.float32)
    dot = np.zeros((len(left), len(right)), np.float32)
    for k in range(left.shape[1]):
        dot = dot + left[:, k, None] * right[None, :, k]
    norms = [-squares(x) for x in (left, right)]
    return (dot + dot) + (norms[0][:, None] + norms[1][None, :])


def squares(features):
    """|x|^2 float32 [n]: a float64 sum, four squares at a time, the rest one by one."""
    x = features.astype(np.float64) ** 2
    total, whole = np.zeros(len(x)), x.shape[1] // 4 * 4
    for k in range(0, whole, 4):
        total += ((x[:, k] + x[:, k + 1]) + x[:, k + 2]) + x[:, k + 3]
    for k in range(whole, x.shape[1]):
        total += x[:, k]
    return total.astype(np.float32)


def subsample(values):
    kept, previous = [], np.float32(-1)
    for i, value in enumerate(values):
        if np.float32(value - previous) > 0.01 or i == len(values) - 1:
            kept.append(i)
            previous = value
    return kept


def lehmer(seed=1):
    while True:
        seed = 16807 * seed % (2**31 - 1)
        yield seed


def identification(probes, ids, distractors, size):
    """All results of one size as plain Python values, in the layout of the devkit's two JSON files."""
    m = min(size, len(distractors))
    pp = score_matrix(probes, probes)
    dp = score_matrix(probes, distractors[:m])
    n = len(ids)
    mates = [[a for a in range(n) if a != b and ids[a] == ids[b]] for b in range(n)]
    rank = {(a, b): int((dp[a] > pp[a, b]).sum()) for b in range(n) for a in mates[b]}

    histogram = np.bincount(list(rank.values()), minlength=m + 1).astype(np.float32)
    cmc = np.cumsum(histogram, dtype=np.float32) / np.float32(len(rank))

    matches = []
    for b in range(n):
        best = sorted(range(m), key=lambda j: (-dp[b, j], -j))[:5]
        entry = {"distractors": {"idx": best, "score": [float(dp[b, j]) for j in best]}, "probes": None}
        if mates[b]:
            entry["probes"] = {"idx": mates[b], "rank": [rank[a, b] for a in mates[b]]}
        matches.append(entry)

    genuine = np.array([pp[a, b] for a in range(n) for b in mates[a] if a < b])
    impostors = dp[:100].ravel()
    accepted = np.array([(impostors > g).sum() for g in genuine])
    roc = np.array([(accepted <= k).sum() for k in range(len(impostors) + 1)]).astype(np.float32)
    roc /= np.float32(len(genuine))
    fpr = np.arange(len(impostors) + 1).astype(np.float32) / np.float32(len(impostors))

    traditional = _traditional(pp, dp, ids, m)
    kept = {"cmc": subsample(cmc), "roc": subsample(roc), "traditional_cmc": subsample(traditional)}
    return {
        "cmc": {
            "cmc": [kept["cmc"], [float(cmc[i]) for i in kept["cmc"]]],
            "roc": [[float(fpr[i]) for i in kept["roc"]], [float(roc[i]) for i in kept["roc"]]],
            "traditional_cmc": [kept["traditional_cmc"], [float(traditional[i]) for i in kept["traditional_cmc"]]],
        },
        "matches": matches,
    }


def _traditional(pp, dp, ids, m):
    stream = lehmer()
    names = sorted(set(ids), key=lambda name: name.encode())
    counts = np.zeros(m + len(names), np.float32)
    for _ in range(10):
        gallery = []
        for name in names:
            images = [i for i, other in enumerate(ids) if other == name]
            scaling = 2147483645 // len(images)
            draw = next(x - 1 for x in stream if x - 1 < len(images) * scaling)
            gallery.append(images[draw // scaling])
        mate = {ids[g]: g for g in gallery}
        # Measured on the golden files: the devkit walks identity by identity, in the galleries' order.
        queries = [q for name in names for q in range(len(ids)) if ids[q] == name and q not in gallery]
        for row, q in enumerate(queries):
            g = mate[ids[q]]
            order = sorted(gallery, key=lambda x: (-pp[q, x], -x))
            counts[order.index(g) + int((dp[row] > pp[q, g]).sum())] += 1
    total = counts.sum()
    curve = np.zeros(len(counts), np.float32)
    curve[0] = counts[0] / total
    for i in range(1, len(counts)):
        curve[i] = curve[i - 1] + np.float32(counts[i] / total)
    return curve
