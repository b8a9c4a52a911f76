"""Golden files of invented data, so that formats, protocols and checkpoints are tested without any research data.

    python tests/data/make.py            # writes all of them again, the same bytes

Everything here is written and counted by plain code of its own, on purpose without the modules that are tested:
formats by `struct` and `pickle`, figures by loops, networks by `torch.nn.functional`. Only Challenge 1's files take
their numbers from the tests' slow transcription of the devkit, and `face.jpg`, a person who does not exist, is
photographed by synthesize.py (`--face`; its pixels depend on the kind of CPU, so it is not made by default).
"""

import argparse
import base64
import hashlib
import json
import pickle
import struct
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DATA = Path(__file__).resolve().parent
sys.path[:0] = [str(DATA.parent), str(DATA.parent.parent)]

MAGIC = 0xCED7230A
GOLDEN_RATIO = 0.6180339887498949


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def crop(person: int, photo: int) -> bytes:
    """A small JPEG of 112x112 pixels: a smooth pattern of the person, shifted a little in each photo."""
    y, x = np.mgrid[:112, :112] / 112
    channels = [
        127 + 100 * np.sin(2 * np.pi * ((1 + (person + 2 * c) % 3) * x + (1 + person % 2) * y) + person + 0.1 * photo)
        for c in range(3)
    ]
    pixels = np.rint(np.stack(channels, -1)).astype(np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 20])[1].tobytes()


# --- RecordIO -----------------------------------------------------------------------------------------------------


def record(payload: bytes, *labels: float, number: int = 0, vector: bool = False) -> bytes:
    """An image record: flag, label, id, id2, perhaps a vector of labels, contents."""
    many = vector or len(labels) > 1
    head = struct.pack("<IfQQ", len(labels) if many else 0, 0.0 if many else labels[0], number, 0)
    return head + (struct.pack(f"<{len(labels)}f", *labels) if many else b"") + payload


def framed(data: bytes) -> bytes:
    """The record as it lies in the file: split wherever the magic number stands at a multiple of four."""
    magic = struct.pack("<I", MAGIC)
    cuts = [at for at in range(0, len(data) - 3, 4) if data[at : at + 4] == magic]
    starts, ends = [0, *(at + 4 for at in cuts)], [*cuts, len(data)]
    parts = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    out = b""
    for number, part in enumerate(parts):
        kind = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
        out += magic + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4)
    return out


def write_records(folder: Path, records: dict[int, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    at, lines = 0, []
    with open(folder / "train.rec", "wb") as file:
        for key, data in records.items():
            lines.append(f"{key}\t{at}\n")
            at += file.write(framed(data))
    (folder / "train.idx").write_text("".join(lines))


def recordio() -> None:
    """`std`: 40 crops of 8 people in InsightFace's layout. `parts`: records that hold the magic number, labels of any
    number, in image records without a header."""
    people, total = 8, 40
    payloads = [crop(number % people, number // people) for number in range(total)]
    by_person = [[number for number in range(total) if number % people == person] for person in range(people)]
    keys = {number: key for key, number in enumerate((n for one in by_person for n in one), 1)}
    records = {0: record(b"", total + 1, total + 1 + people)}
    for person, numbers in enumerate(by_person):
        for number in numbers:
            records[keys[number]] = record(payloads[number], person, number=keys[number])
    for person, numbers in enumerate(by_person):
        first = keys[numbers[0]]
        records[total + 1 + person] = record(b"", first, first + len(numbers), number=total + 1 + person)
    folder = DATA / "recordio" / "std"
    write_records(folder, records)
    (folder / "property").write_text(f"{people},112,112\n")
    expected = {keys[n]: [n % people, sha256(payloads[n])] for n in range(total)}
    write_json(folder / "expected.json", {str(key): expected[key] for key in sorted(expected)})

    magic = struct.pack("<I", MAGIC)
    split = {
        0: record(b"plain", 3.0),
        1: record(b"four" + magic + b"rest", 0.0, number=1),
        2: record(magic + magic + b"abcd" + magic, 1.0, number=2),
        3: record(b"odd" + magic + b"place", 2.0, number=3),
        4: record(b"id", 5.0, number=MAGIC),
        5: record(b"two labels", 1.5, 2.5, number=5),
        6: record(b"one label as a vector", 7.0, number=6, vector=True),
        7: record(b"", 4.0, number=7),
    }
    folder = DATA / "recordio" / "parts"
    write_records(folder, split)
    labels = {0: [3.0], 1: [0.0], 2: [1.0], 3: [2.0], 4: [5.0], 5: [1.5, 2.5], 6: [7.0], 7: [4.0]}
    payload = {key: data[24 + (4 * len(labels[key]) if key in (5, 6) else 0) :] for key, data in split.items()}
    write_json(folder / "expected.json", {str(key): [labels[key], payload[key].hex()] for key in split})


# --- verification sets --------------------------------------------------------------------------------------------


def verification() -> None:
    """The same two pairs as Python 2, Python 3 and NumPy pickle them; a program and a half file."""
    folder = DATA / "verification"
    folder.mkdir(exist_ok=True)
    images, same = [crop(0, 0), crop(0, 1), crop(1, 0), crop(2, 0)], [True, False]
    arrays = [np.frombuffer(image, np.uint8).reshape(-1, 1) for image in images]
    (folder / "python3.bin").write_bytes(pickle.dumps((images, same), 4))
    (folder / "numpy.bin").write_bytes(pickle.dumps((arrays, np.array(same)), 3))
    # Python 2 has no bytes: its str is BINSTRING (T), or SHORT_BINSTRING (U) below 256.
    python2 = b"\x80\x02(](" + b"".join(b"T" + struct.pack("<i", len(i)) + i for i in images) + b"e](\x88\x89et."
    (folder / "python2.bin").write_bytes(python2)
    (folder / "evil.bin").write_bytes(b"\x80\x02cos\nsystem\n(U\x04true" + b"tR.")
    (folder / "cut.bin").write_bytes(python2[:-700])
    write_json(folder / "expected.json", {"sha256": [sha256(image) for image in images], "same": same})


def lfw() -> None:
    """LFW's own format in three folds, a cosine for each pair, and the figures by trying every threshold."""
    folder = DATA / "lfw"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    folds, each, names = 3, 20, [f"Person_{letter}" for letter in "ABCDEFGHIJKL"]
    lines, drawn, same = [f"{folds}\t{each}"], [], []
    for fold in range(folds):
        mine = names[4 * fold : 4 * fold + 4]
        couples = [(a, b) for a in range(1, 6) for b in range(a + 1, 6)]
        lines += [f"{mine[n % 4]}\t{couples[n // 4 * 2][0]}\t{couples[n // 4 * 2][1]}" for n in range(each)]
        strangers = [(one, other) for one in mine for other in mine if one < other]
        lines += [f"{strangers[n % 6][0]}\t{1 + n // 6}\t{strangers[n % 6][1]}\t{5 - n // 6}" for n in range(each)]
        drawn += [*rng.normal(0.45, 0.15, each), *rng.normal(0.1, 0.15, each)]
        same += [True] * each + [False] * each
    cosines = np.round(drawn, 2)  # with ties
    truth, fold_of = np.array(same), np.repeat(np.arange(folds), 2 * each)
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")
    (folder / "cosines.txt").write_text("".join(f"{cosine:.2f}\n" for cosine in cosines))
    accuracies = []
    values = np.unique(cosines)
    for fold in range(folds):
        others = fold_of != fold
        seen = np.unique(cosines[others]).tolist()
        tries = [seen[0] - 1, *((a + b) / 2 for a, b in pairwise(seen)), seen[-1] + 1]
        right = [int(((cosines[others] >= t) == truth[others]).sum()) for t in tries]
        best = max(t for t, count in zip(tries, right, strict=True) if count == max(right))  # the strictest
        accuracies.append(float(((cosines[~others] >= best) == truth[~others]).mean()))
    tars = {}
    for far in (0.1, 0.05):
        usable = [v for v in values if (cosines[~truth] >= v).sum() <= far * (~truth).sum()]
        tars[str(far)] = float((cosines[truth] >= min(usable)).mean())
    wins = [(g > i) + 0.5 * (g == i) for g in cosines[truth] for i in cosines[~truth]]
    first, last = lines[1].split("\t"), lines[-1].split("\t")
    write_json(folder / "expected.json", {
        "pairs": len(cosines), "folds": folds, "first": first, "last": last,
        "accuracy_of_folds": accuracies, "tar_at_far": tars, "auc": float(np.mean(wins)),
    })  # fmt: skip


# --- Challenge 1 --------------------------------------------------------------------------------------------------


def devkit_text(content: object) -> str:
    """JSON as the devkit's writer prints it: tabs, sorted keys, 16 digits, long arrays an element a line."""

    def number(value: float) -> str:
        text = str(value) if isinstance(value, int) else f"{np.float32(value):#.16g}"
        cut = not isinstance(value, int) and text.endswith("0") and "e" not in text
        return text.rstrip("0") + "0" if cut else text

    def printed(value: object, depth: int) -> str:
        tabs = "\t" * depth
        if value is None:
            return "null"
        if isinstance(value, dict):
            rows = [f'{tabs}\t"{key}" : {printed(value[key], depth + 1)}' for key in sorted(value)]
            return f"\n{tabs}{{\n" + ",\n".join(rows) + f"\n{tabs}}}"
        if not isinstance(value, list):
            return number(value)  # type: ignore[arg-type]
        items = [printed(item, depth + 1) for item in value]
        line = f"[ {', '.join(items)} ]"
        if len(items) < 25 and len(line) < 74 and "\n" not in line:
            return line
        return f"\n{tabs}[\n" + ",\n".join(f"{tabs}\t{item}" for item in items) + f"\n{tabs}]"

    return printed(content, 0) + "\n"


def challenge() -> None:
    """104 probes of 26 people, 40 distractors, features of 6 numbers on a grid: ties everywhere."""
    from helpers.megaface_transcription import identification

    folder = DATA / "megaface"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(2)
    ids = [f"person{number % 26}" for number in range(104)]
    centres = rng.standard_normal((26, 6))
    probes = np.stack([centres[number % 26] for number in range(104)]) + 0.6 * rng.standard_normal((104, 6))
    sides = [np.round(4 * side).astype(np.float32) / 4 for side in (probes, rng.standard_normal((40, 6)))]
    found = identification(sides[0], ids, sides[1], 40)
    np.save(folder / "probes.npy", sides[0].astype(np.float16))  # exact
    np.save(folder / "distractors.npy", sides[1].astype(np.float16))
    write_json(folder / "probe_ids.json", ids)
    (folder / "cmc.json").write_text(devkit_text(found["cmc"]))
    (folder / "matches.json").write_text(devkit_text(found["matches"]))
    (folder / "feature.bin").write_bytes(struct.pack("<4i", 6, 1, 4, 5) + sides[0][0].tobytes())
    (folder / "actors.txt").write_text(
        "name\timage_id\tface_id\turl\tbbox\tsha256\n"
        f"Ann Invented\t1\t11\thttp://example.invalid/a.jpg\t10,20,110,120\t{'0' * 64}\n"
        f"Ann Invented\t2\t12\thttp://example.invalid/b.png?w=6\t0,0,50,50\t{'1' * 64}\n"
        f"Bo O'Made Jr.\t3\t13\thttp://example.invalid/c\t60,40,10,90\t{'2' * 64}\n"
        "Bo O'Made Jr.\t4\t14\thttp://example.invalid/d.jpg\n"
        f"Bo O'Made Jr.\t5\t15\thttp://example.invalid/e.JPG\t__import__('os')\t{'3' * 64}\n"
    )


# --- templates ----------------------------------------------------------------------------------------------------


def ijb() -> None:
    """IJB-C's files for 12 people, and what the field's public code prints of them, by loops."""
    from helpers.ijb_tree import write_lists

    rng = np.random.default_rng(3)
    people, templates = 12, 36  # three templates each; the first one of each is enrolled
    rows = [(10 + t, 100 + media, t // 3) for t in range(templates) for media in (2 * t, 2 * t, 2 * t + 1)]
    rows = [rows[index] for index in rng.permutation(len(rows))]
    images = [f"{number}.jpg" for number in range(1, len(rows) + 1)]
    centres = rng.standard_normal((people, 8))
    features = (np.stack([centres[who] for *_, who in rows]) + 0.8 * rng.standard_normal((len(rows), 8))).round(2)
    mirrored = (features + 0.3 * rng.standard_normal(features.shape)).round(2)
    scores = np.round(rng.uniform(0.6, 1, len(rows)), 3)
    landmarks = np.tile([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]], (len(rows), 1, 1))
    numbers = list(range(10, 10 + templates))
    pairs = [(a, b, int((a - 10) // 3 == (b - 10) // 3)) for a in numbers for b in numbers if a < b]
    table = [(t, 1000 + who, image) for (t, _, who), image in zip(rows, images, strict=True)]
    first = [row for row in table if (row[0] - 10) % 3 == 0]
    galleries = {"G1": [row for row in first if row[1] % 2 == 0], "G2": [row for row in first if row[1] % 2]}
    probes = [row for row in table if (row[0] - 10) % 3]
    folder = DATA / "ijb"
    columns = [list(column) for column in zip(*rows, strict=True)]
    write_lists(folder, "ijbc", images, columns[0], columns[1], landmarks, scores, pairs, galleries, probes)
    np.savez_compressed(folder / "features.npz", embs=features.astype(np.float32), embs_f=mirrored.astype(np.float32))

    # The usual figure: mirror image added, norm kept, times the detector's score.
    sums = (features.astype(np.float32) + mirrored.astype(np.float32)).astype(np.float64) * scores[:, None]
    units = {}
    for template in numbers:
        media: dict[int, list[np.ndarray]] = {}
        for (t, m, _), feature in zip(rows, sums, strict=True):
            if t == template:
                media.setdefault(m, []).append(feature)
        total = sum(np.mean(one, axis=0) for one in media.values())
        units[template] = total / np.linalg.norm(total)
    cosines = np.array([units[a] @ units[b] for a, b, _ in pairs])
    same = np.array([label for *_, label in pairs], bool)
    points = [(0.0, 0.0)]
    for threshold in sorted(set(cosines), reverse=True):
        points.append((float((cosines[~same] >= threshold).mean()), float((cosines[same] >= threshold).mean())))
    # scikit-learn drops the points between two others on a straight line.
    kept = [
        points[k] for k in range(len(points))
        if k in (0, len(points) - 1)
        or any(abs(points[k + 1][s] - 2 * points[k][s] + points[k - 1][s]) > 1e-12 for s in (0, 1))
    ]  # fmt: skip
    tars = {}
    for far in (1e-2, 1e-1):
        nearest = min(abs(x - far) for x, _ in kept)
        tars[str(far)] = max(tar for x, tar in kept if abs(abs(x - far) - nearest) < 1e-12)
    hits, mated = {1: 0, 5: 0}, {row[0]: row[1] for row in probes}
    for rows_of in galleries.values():
        enrolled = {row[0]: row[1] for row in rows_of}
        for template, subject in mated.items():
            if subject in enrolled.values():
                ranked = sorted(enrolled, key=lambda t: -float(units[template] @ units[t]))
                place = [enrolled[t] for t in ranked].index(subject)
                for k in hits:
                    hits[k] += place < k
    write_json(folder / "expected.json", {
        "tar_at_far_as_printed": tars, "top": {str(k): count / len(mated) for k, count in hits.items()},
    })  # fmt: skip


def tinyface() -> None:
    """TinyFace's lists for 10 people and 15 distractors, and the share of probes found, by loops."""
    folder = DATA / "tinyface"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(4)
    lists = {
        "probe": [f"{who}_{k}.jpg" for who in range(1, 11) for k in (2, 4)],
        "gallery_match": [f"{who}_{k}.jpg" for who in range(1, 11) for k in (1, 3)],
        "gallery_distractor": [f"{number}.jpg" for number in range(1, 16)],
    }
    centres = rng.standard_normal((11, 6))
    names = [name for part in lists.values() for name in part]
    drawn = [(centres[int(name.split("_")[0])] if "_" in name else 0) + 0.9 * rng.standard_normal(6) for name in names]
    features = np.round(drawn, 2).astype(np.float32)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    count = len(lists["probe"])
    gallery = names[count:]
    places = []
    for probe, unit in zip(names, units[:count], strict=False):
        ranked = sorted(range(len(gallery)), key=lambda k: -float(units[count + k] @ unit))
        mates = [gallery[k].split("_")[0] == probe.split("_")[0] and "_" in gallery[k] for k in ranked]
        places.append(mates.index(True))
    write_json(folder / "lists.json", lists)
    np.savez_compressed(folder / "features.npz", features=features, names=np.array(names))
    write_json(folder / "expected.json", {f"rank-{k}": 100 * float(np.mean(np.array(places) < k)) for k in (1, 5, 20)})


# --- MS-Celeb-1M --------------------------------------------------------------------------------------------------


def msceleb() -> None:
    """Rows of MS-Celeb-1M's table: good ones, two that want one name, and damaged ones."""

    def row(mid: str, rank: int, face: str, image: bytes) -> list[bytes]:
        box = base64.b64encode(struct.pack("<4f", 0.25, 0.125, 0.75, 0.875))
        url = b'http://example.invalid/?q="quoted"&n=%d' % rank
        return [mid.encode(), b"%d" % rank, url, url, face.encode(), box, base64.b64encode(image)]

    good = [row("m.0aa", 1, "FaceId-0", crop(0, 0)), row("m.0aa", 2, "FaceId-1", crop(0, 1)),
            row("m.0aa", 1, "FaceId-0", crop(0, 2)), row("m.0bb", 7, "FaceId-0", crop(1, 0))]  # fmt: skip
    away = row("../../m.0cc", 1, "FaceId-0", crop(2, 0))
    bad = row("m.0dd", 1, "FaceId-0", b"no image")
    short = row("m.0ee", 1, "FaceId-0", crop(3, 0))[:5]
    development = row("m.0ff", 3, "FaceId-0", crop(4, 0))
    six = [development[0], b'"Some One"@en', *development[2:3], development[4], *development[5:]]
    lines = [*good, away, bad, short, six]
    (DATA / "msceleb.tsv").write_bytes(b"\n".join(b"\t".join(cells) for cells in lines))
    statuses = ["extracted", "extracted", "renamed", "extracted", "refused", "damaged", "damaged", "extracted"]
    images = [sha256(crop(*which)) for which in ((0, 0), (0, 1), (0, 2), (1, 0), (4, 0))]
    write_json(DATA / "msceleb.json", {"statuses": statuses, "sha256": images})


# --- networks -----------------------------------------------------------------------------------------------------


def value(key: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """The index-th tensor of an invented state: numbers from a formula, scaled so that activations stay bounded."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1)
    count = int(np.prod(shape))
    u = np.mod((np.arange(1, count + 1) + 5.0 * index) * GOLDEN_RATIO, 1.0)
    if key.endswith("running_var"):
        x = 0.5 + u
    elif key.endswith(("running_mean", "bias")):
        x = 0.2 * (u - 0.5)
    elif len(shape) > 1:
        x = (u - 0.5) * np.sqrt(12 / np.prod(shape[1:]))
    else:  # scales of batch norms, slopes of PReLUs
        x = 0.4 + 0.4 * u
    return torch.from_numpy(x.astype(np.float32).reshape(shape))


def invented_state(keys: Path) -> dict[str, Tensor]:
    """The state whose keys and shapes stand in a file, a line each."""
    state = {}
    for index, line in enumerate(keys.read_text().splitlines()):
        key, sizes = line.split("\t")
        state[key] = value(key, index, tuple(int(size) for size in sizes.split(",") if size))
    return state


def batch() -> Tensor:
    """What the networks are fed: [2, 3, 112, 112]."""
    return torch.from_numpy(np.random.default_rng(7).standard_normal((2, 3, 112, 112)).astype(np.float32))


BLOCKS = ((64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512))  # channels
SIZE = 8


def _norm_keys(name: str, channels: int, affine: bool = True) -> list[str]:
    names = (["weight", "bias"] if affine else []) + ["running_mean", "running_var"]
    return [f"{name}.{part}\t{channels}" for part in names] + [f"{name}.num_batches_tracked\t"]


def released_keys() -> list[str]:
    """SE-LResNet18E-IR of the released family, in the order of its state_dict."""
    keys = ["conv1.weight\t64,3,3,3", *_norm_keys("bn1", 64), "prelu.weight\t1"]
    for number, (before, channels) in enumerate(BLOCKS):
        name = f"layer{number // 2 + 1}.{number % 2}"
        keys += [*_norm_keys(f"{name}.bn0", before), f"{name}.conv1.weight\t{before},{before},3,3"]
        keys += [*_norm_keys(f"{name}.bn1", before), f"{name}.prelu.weight\t1"]
        keys += [f"{name}.conv2.weight\t{channels},{before},3,3", *_norm_keys(f"{name}.bn2", channels)]
        if number and number % 2 == 0:
            keys += [f"{name}.downsample.0.weight\t{channels},{before},1,1"]
            keys += _norm_keys(f"{name}.downsample.1", channels)
        hidden = channels // 16
        keys += [f"{name}.se.fc.0.weight\t{hidden},{channels}", f"{name}.se.fc.0.bias\t{hidden}"]
        keys += [f"{name}.se.fc.1.weight\t1", f"{name}.se.fc.2.weight\t{channels},{hidden}"]
        keys += [f"{name}.se.fc.2.bias\t{channels}"]
    return [*keys, *_norm_keys("bn2", 512), f"fc.weight\t{SIZE},25088", f"fc.bias\t{SIZE}", *_norm_keys("bn3", SIZE)]


def arcface_keys() -> list[str]:
    """IResNet-18 of InsightFace's arcface_torch."""
    keys = ["conv1.weight\t64,3,3,3", *_norm_keys("bn1", 64), "prelu.weight\t64"]
    for number, (before, channels) in enumerate(BLOCKS):
        name = f"layer{number // 2 + 1}.{number % 2}"
        keys += [*_norm_keys(f"{name}.bn1", before), f"{name}.conv1.weight\t{channels},{before},3,3"]
        keys += [*_norm_keys(f"{name}.bn2", channels), f"{name}.prelu.weight\t{channels}"]
        keys += [f"{name}.conv2.weight\t{channels},{channels},3,3", *_norm_keys(f"{name}.bn3", channels)]
        if number % 2 == 0:
            keys += [f"{name}.downsample.0.weight\t{channels},{before},1,1"]
            keys += _norm_keys(f"{name}.downsample.1", channels)
    fc = [f"fc.weight\t{SIZE},25088", f"fc.bias\t{SIZE}"]
    return [*keys, *_norm_keys("bn2", 512), *fc, *_norm_keys("features", SIZE)]


def adaface_keys() -> list[str]:
    """ir_18 of AdaFace, without the prefix of Lightning."""
    keys = ["input_layer.0.weight\t64,3,3,3", *_norm_keys("input_layer.1", 64), "input_layer.2.weight\t64"]
    keys += [*_norm_keys("output_layer.0", 512), f"output_layer.3.weight\t{SIZE},25088", f"output_layer.3.bias\t{SIZE}"]
    keys += _norm_keys("output_layer.4", SIZE, affine=False)
    for number, (before, channels) in enumerate(BLOCKS):
        name = f"body.{number}"
        if before != channels:
            keys += [f"{name}.shortcut_layer.0.weight\t{channels},{before},1,1"]
            keys += _norm_keys(f"{name}.shortcut_layer.1", channels)
        keys += [*_norm_keys(f"{name}.res_layer.0", before), f"{name}.res_layer.1.weight\t{channels},{before},3,3"]
        keys += [*_norm_keys(f"{name}.res_layer.2", channels), f"{name}.res_layer.3.weight\t{channels}"]
        keys += [f"{name}.res_layer.4.weight\t{channels},{channels},3,3", *_norm_keys(f"{name}.res_layer.5", channels)]
    return keys


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    tensors = [state.get(f"{name}.{part}") for part in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *tensors)  # type: ignore[arg-type]


def released(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """3x3 convolution without padding, one slope a PReLU, the block's PReLU again after the addition."""
    x = F.max_pool2d(F.prelu(_norm(state, "bn1", F.conv2d(x, state["conv1.weight"])), state["prelu.weight"]), 2)
    for number in range(8):
        name, stride = f"layer{number // 2 + 1}.{number % 2}", 2 if number in (2, 4, 6) else 1
        slope = state[f"{name}.prelu.weight"]
        y = F.conv2d(_norm(state, f"{name}.bn0", x), state[f"{name}.conv1.weight"], padding=1)
        y = F.conv2d(F.prelu(_norm(state, f"{name}.bn1", y), slope), state[f"{name}.conv2.weight"], None, stride, 1)
        y = _norm(state, f"{name}.bn2", y)
        fc = {part: state[f"{name}.se.fc.{part}"] for part in ("0.weight", "0.bias", "1.weight", "2.weight", "2.bias")}
        weights = F.prelu(F.linear(y.mean((2, 3)), fc["0.weight"], fc["0.bias"]), fc["1.weight"])
        y = y * torch.sigmoid(F.linear(weights, fc["2.weight"], fc["2.bias"]))[:, :, None, None]
        if f"{name}.downsample.0.weight" in state:
            x = _norm(state, f"{name}.downsample.1", F.conv2d(x, state[f"{name}.downsample.0.weight"], None, stride))
        x = F.prelu(y + x, slope)
    return _norm(state, "bn3", F.linear(_norm(state, "bn2", x).flatten(1), state["fc.weight"], state["fc.bias"]))


def arcface(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Padding at 112, the first block of each stage halves the side, nothing after the addition."""
    x = F.prelu(_norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)), state["prelu.weight"])
    for number in range(8):
        name, stride = f"layer{number // 2 + 1}.{number % 2}", 1 if number % 2 else 2
        y = F.conv2d(_norm(state, f"{name}.bn1", x), state[f"{name}.conv1.weight"], padding=1)
        y = F.prelu(_norm(state, f"{name}.bn2", y), state[f"{name}.prelu.weight"])
        y = _norm(state, f"{name}.bn3", F.conv2d(y, state[f"{name}.conv2.weight"], None, stride, 1))
        if f"{name}.downsample.0.weight" in state:
            x = _norm(state, f"{name}.downsample.1", F.conv2d(x, state[f"{name}.downsample.0.weight"], None, stride))
        x = x + y
    return _norm(state, "features", F.linear(_norm(state, "bn2", x).flatten(1), state["fc.weight"], state["fc.bias"]))


def adaface(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """As arcface; the shortcut of equal channels takes every second pixel. Direction and norm together."""
    x = F.conv2d(x, state["input_layer.0.weight"], padding=1)
    x = F.prelu(_norm(state, "input_layer.1", x), state["input_layer.2.weight"])
    for number in range(8):
        name, stride = f"body.{number}", 1 if number % 2 else 2
        y = F.conv2d(_norm(state, f"{name}.res_layer.0", x), state[f"{name}.res_layer.1.weight"], padding=1)
        y = F.prelu(_norm(state, f"{name}.res_layer.2", y), state[f"{name}.res_layer.3.weight"])
        y = F.conv2d(y, state[f"{name}.res_layer.4.weight"], None, stride, 1)
        if f"{name}.shortcut_layer.0.weight" in state:
            x = F.conv2d(x, state[f"{name}.shortcut_layer.0.weight"], None, stride)
            x = _norm(state, f"{name}.shortcut_layer.1", x)
        else:
            x = x[:, :, ::stride, ::stride]
        x = x + _norm(state, f"{name}.res_layer.5", y)
    x = _norm(state, "output_layer.0", x).flatten(1)
    return _norm(state, "output_layer.4", F.linear(x, state["output_layer.3.weight"], state["output_layer.3.bias"]))


NETWORKS = {"r18": (released_keys, released), "ir18": (arcface_keys, arcface), "adaface_ir_18": (adaface_keys, adaface)}


def networks() -> None:
    """Keys and shapes of three public families, and what the invented weights give for an invented batch."""
    folder = DATA / "networks"
    folder.mkdir(exist_ok=True)
    outputs = {}
    for name, (keys, forward) in NETWORKS.items():
        path = folder / f"keys_{name}.txt"
        path.write_text("\n".join(keys()) + "\n")
        with torch.no_grad():
            outputs[name] = forward(invented_state(path), batch()).double().numpy().round(6).tolist()
    write_json(folder / "outputs.json", outputs)


# --- a face -------------------------------------------------------------------------------------------------------


def face() -> None:
    """A photo of somebody who does not exist, and where the five landmarks truly are."""
    import subprocess

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(DATA.parent.parent / "synthesize.py"), "--identities", "1", "--images", "1"]
        subprocess.run([*command, "--poses", "frontal", "--out", f"{scratch}/people", "--device", "cpu"], check=True)
        head, row = (Path(scratch) / "people" / "truth.tsv").read_text().splitlines()
        truth = dict(zip(head.split("\t"), row.split("\t"), strict=True))
        picture = cv2.imread(str(Path(scratch) / "people" / truth["file"]))
    assert picture is not None, "synthesize.py wrote no photo"
    (DATA / "face.jpg").write_bytes(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes())
    points = ("eye_right", "eye_left", "nose", "mouth_right", "mouth_left")
    write_json(DATA / "face.json", [[float(truth[f"{point}_{axis}"]) for axis in "xy"] for point in points])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--face", action="store_true", help="photograph face.jpg, too")
    arguments = parser.parse_args()
    for make in (recordio, verification, lfw, challenge, ijb, tinyface, msceleb, networks):
        make()
    if arguments.face:
        face()
