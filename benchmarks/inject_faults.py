"""A training set with known faults, to measure what finds them: labels exchanged, strangers, people split and merged,
duplicates, people of a test set.

    python benchmarks/inject_faults.py --data faces_large --out noisy10 --exchange 0.1
    python benchmarks/inject_faults.py --data faces_large --out mixed --exchange 0.05 --strangers 0.05 --split 50 \
        --merge 50 --duplicates 0.03 --test-people lfw_crops --test-identities 40

`--out` gets a set in InsightFace's layout, `identities.tsv`, and `truth.tsv`: one row for each crop with its key, the
label it has now, the label it should have (-1: nobody of this set), and which faults it has. The same seed gives the
same bytes; what is there already is kept. Labels are exchanged among the crops drawn, so that every one of them gets
another identity's and every identity keeps its number; strangers are crops of identities that are taken out as a whole
and scattered over the others; a duplicate is a crop again, re-encoded, resized or mirrored, under its own label or
another one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from formats import crop_sets, tables
from options import REQUIRED, option, parse
from utils import InputError

NOBODY = -1


@dataclass
class InjectFaults:
    """What is done to which set."""

    data: Path = option(REQUIRED, "crops to begin with", metavar="PATH")
    out: Path = option(REQUIRED, "folder of the faulty set", metavar="DIR")
    seed: int = option(0, "decides what is done to whom", at_least=0)
    exchange: float = option(0.0, "share of all crops that get another identity's label", at_least=0, below=1)
    strangers: float = option(0.0, "share of all crops that are of nobody in the set", at_least=0, below=0.5)
    split: int = option(0, "identities that are split in two", at_least=0, metavar="N")
    merge: int = option(0, "pairs of identities that become one", at_least=0, metavar="N")
    duplicates: float = option(0.0, "share of all crops that occur once more, changed", at_least=0, below=1)
    test_people: Path | None = option(None, "crops of people of a test set", metavar="PATH")
    test_identities: int = option(40, "how many of them are put in", at_least=1, metavar="N")


@dataclass
class Entry:
    """A crop of the faulty set: where its bytes come from, the label it gets, the one it should have, its faults."""

    source: int
    index: int
    label: int
    truth: int
    faults: list[str]
    change: str = ""  # how a duplicate was changed


def changed(encoded: bytes, how: str) -> bytes:
    """A JPEG of the same picture: encoded again, resized there and back, or mirrored. `ValueError` if it is none."""
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR) if encoded else None
    if image is None:
        raise ValueError("not a picture that can be decoded")
    if how == "resized":
        small = cv2.resize(image, (80, 80), interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_LINEAR)
    elif how == "mirrored":
        image = image[:, ::-1].copy()
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 70 if how == "encoded" else 90])[1].tobytes()


def exchanged(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Labels int64 [n] of which `count` are exchanged, each for another one; the number of each label is the same.

    Raises InputError if that is impossible, because one identity has more than half of the crops that are drawn.
    """
    if count > len(labels):
        raise InputError(f"{count} crops to exchange, but only {len(labels)} whose identity stays")
    drawn = np.sort(random.choice(len(labels), count, replace=False))
    true = labels[drawn]
    if len(drawn) and 2 * np.bincount(true).max() > len(drawn):
        raise InputError(f"{len(drawn)} crops to exchange, most of them of one identity; take a larger share")
    given = random.permutation(true)
    while len(same := np.flatnonzero(given == true)):
        # A place whose exchange helps both sides; there is one, because no label has more than half of them.
        place = same[0]
        partner = random.choice(np.flatnonzero((given != true[place]) & (true != given[place])))
        given[[place, partner]] = given[[partner, place]]
    result = labels.copy()
    result[drawn] = given
    return result


def plan(options: InjectFaults, labels: np.ndarray, test_labels: np.ndarray | None) -> list[Entry]:
    """What the faulty set holds. Labels may have gaps; `renumber` closes them."""
    random = np.random.default_rng(options.seed)
    count, identities = len(labels), int(labels.max()) + 1
    entries = [Entry(0, index, int(label), int(label), []) for index, label in enumerate(labels)]

    # Strangers: whole identities leave, until their crops are enough; their crops go anywhere.
    wanted, leaving = round(options.strangers * count), []
    for identity in random.permutation(identities):
        if wanted <= 0:
            break
        leaving.append(int(identity))
        wanted -= int((labels == identity).sum())
    staying = np.setdiff1d(np.arange(identities), leaving)
    for entry in entries:
        if entry.truth in set(leaving):
            entry.label, entry.truth = int(random.choice(staying)), NOBODY
            entry.faults.append("stranger")

    own = [entry for entry in entries if not entry.faults]
    given = exchanged(np.array([entry.label for entry in own]), round(options.exchange * count), random)
    for entry, label in zip(own, given.tolist(), strict=True):
        if label != entry.label:
            entry.label = label
            entry.faults.append("exchanged")

    sizes = np.bincount(labels, minlength=identities)
    large = staying[sizes[staying] >= 6]
    drawn = random.permutation(large)
    if len(drawn) < options.split + 2 * options.merge:
        raise InputError(f"{options.data}: {len(drawn)} identities of 6 crops or more are too few for that")
    splits, merges = drawn[: options.split], drawn[options.split : options.split + 2 * options.merge]
    for number, identity in enumerate(splits.tolist()):
        members = [entry for entry in entries if entry.label == identity]
        for position in random.permutation(len(members))[: len(members) // 2]:
            members[position].label = identities + number  # the second half is a label of its own
            members[position].faults.append(f"split {identity}")
    for first, second in merges.reshape(-1, 2).tolist():
        for entry in entries:
            if entry.label == second:
                entry.label = first
                entry.faults.append(f"merged {second}")
            if entry.truth == second:  # there is no other label for that person any more
                entry.truth = first

    if test_labels is not None:
        people = random.permutation(int(test_labels.max()) + 1)[: options.test_identities]
        for number, person in enumerate(people.tolist()):
            label = identities + options.split + number
            for index in np.flatnonzero(test_labels == person).tolist():
                entries.append(Entry(1, index, label, label, [f"test {person}"]))

    copies = random.permutation(count)[: round(options.duplicates * count)]
    for position in copies.tolist():
        entry = entries[position]
        elsewhere = random.random() < 0.3
        label = int(random.choice(staying)) if elsewhere else entry.label
        how = str(random.choice(["encoded", "resized", "mirrored"]))
        faults = [f"duplicate of {position}", how] + (["exchanged"] if elsewhere and label != entry.truth else [])
        entries.append(Entry(0, entry.index, label, entry.truth, faults, how))
    return entries


def write(options: InjectFaults, entries: list[Entry], sources: list[crop_sets.Crops]) -> None:
    """Write the set grouped by label, labels without gaps, and the truth."""
    names = [crops.identity_names for crops in sources]
    used = sorted({entry.label for entry in entries})
    new = {label: number for number, label in enumerate(used)}
    lines = ["key\tlabel\ttruth\tfaults\tsource"]
    with crop_sets.CropWriter(options.out) as writer, utils.progress(len(entries), "write", unit="crop") as bar:
        for entry in sorted(entries, key=lambda entry: (entry.label, entry.source, entry.index)):
            encoded = sources[entry.source].read(entry.index)[0]
            if entry.change:
                try:
                    encoded = changed(encoded, entry.change)
                except ValueError as error:
                    raise InputError(f"{options.data}: crop {entry.index}: {error}") from error
            key = writer.write(encoded, new[entry.label])
            truth = new.get(entry.truth, NOBODY)
            lines.append(f"{key}\t{new[entry.label]}\t{truth}\t{', '.join(entry.faults)}\t{entry.source}/{entry.index}")
            bar.update()
        # Before the block ends, and with it the set is there.
        known = names[0]
        tables.write_identities(
            options.out / "identities.tsv",
            [known[label] if label < len(known) else f"added-{label}" for label in used],
        )
        utils.write_bytes(options.out / "truth.tsv", ("\n".join(lines) + "\n").encode())


def make(options: InjectFaults) -> None:
    """Write the set; does nothing if it is there. Raises InputError if another one is."""
    sources = [crop_sets.open_training_set(options.data)]
    if options.test_people is not None:
        sources.append(crop_sets.open_training_set(options.test_people))
    wanted = {name: value for name, value in vars(options).items() if name not in ("data", "test_people", "out")}
    recipe = wanted | {"sources": [crop_sets.fingerprint(crops) for crops in sources]}
    entries = plan(options, sources[0].labels, sources[1].labels if len(sources) > 1 else None)
    with crop_sets.claimed(options.out, "faults.json", recipe) as there:
        if there:
            return
        write(options, entries, sources)
    counts = {name: sum(name in fault for entry in entries for fault in entry.faults) for name in
              ("exchanged", "stranger", "split", "merged", "duplicate", "test")}  # fmt: skip
    print(f"{options.out}: {len(entries)} crops; " + ", ".join(f"{name} {count}" for name, count in counts.items()))


@utils.command
def main() -> None:
    """See the file's docstring."""
    make(parse(InjectFaults, __doc__))


if __name__ == "__main__":
    sys.exit(main())
