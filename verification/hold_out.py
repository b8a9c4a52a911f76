"""People set aside before training, so that "how good is it on my people?" has an honest answer.

A training set (RecordIO, a folder of crops or a folder of photos: a folder per person) becomes two: `train`, which
train.py or pre_process.py reads, and `held-out`, a folder per person, with `pairs.csv` beside it. Who is held out is
decided by a seed and by the people's names alone. Files of a folder are linked (hard links, no space; copied where the
file system has none); RecordIO is written anew.

`report.json` is written last: a run that was killed is done again and gives the same.
"""

import csv
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import utils
from cropping.photos import Listing, identity_of, list_photos, note_on_depth
from formats.crop_sets import CropSet, CropWriter, fingerprint, open_crops
from formats.names import TakenNames
from formats.tables import write_identities
from utils import InputError

PAIRS = 20  # of one person, and as many of two, for each person held out


def split(source: Path, out: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Hold `count` people with at least two photos out of `source`; returns the report, which is in `out` too.

    Raises InputError if there are too few people, or `out` holds something else.
    """
    if out.resolve() == source.resolve() or out.resolve().is_relative_to(source.resolve()):
        raise InputError(f"--out {out}: lies in {source}, whose people it would join")
    records = (source / "train.rec").is_file() or source.suffix == ".rec"
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    content = open_crops(source) if records else list_photos(source)
    holds = fingerprint(content) if isinstance(content, CropSet) else content.digest
    settings = {"source": str(source), "contents": holds, "hold_out": count, "seed": seed}
    report_path = out / "report.json"
    settings_path = out / "settings.json"
    if out.exists() and any(out.iterdir()) and _recorded(settings_path) != settings:
        raise InputError(f"{out}: holds something else; give another folder, or remove this one")
    utils.write_json(settings_path, settings)
    report_path.unlink(missing_ok=True)
    for part in ("train", "held-out"):  # of a killed run
        shutil.rmtree(out / part, ignore_errors=True)
    report = settings | (
        _split_records(content, out, count, seed)
        if isinstance(content, CropSet)
        else _split_folder(source, content, out, count, seed)
    )
    held = sorted(path.relative_to(out / "held-out").as_posix() for path in (out / "held-out").glob("*/*"))
    report["pairs"] = _write_pairs(out / "pairs.csv", held, seed)
    utils.write_json(report_path, report)
    return report


def _recorded(path: Path) -> Any:
    try:
        return utils.read_json(path)
    except (FileNotFoundError, ValueError):
        return None


def choose(names: Sequence[str], photos: Sequence[int], count: int, seed: int) -> list[int]:
    """Who is held out: indices into `names` of `count` people with at least two photos, ascending.

    By a hash of name and seed, so that a person is held out of a grown set, too.
    """
    able = [index for index, number in enumerate(photos) if number >= 2]
    if len(able) < count or len(names) - count < 2:
        raise InputError(
            f"{count} people cannot be held out of {len(names)}: {len(able)} have two photos or more, and at least "
            "two people have to be left to train on"
        )
    able.sort(key=lambda index: hashlib.sha256(os.fsencode(f"{seed}\0{names[index]}")).digest())
    return sorted(able[:count])


def _split_folder(source: Path, listing: Listing, out: Path, count: int, seed: int) -> dict[str, Any]:
    if note := note_on_depth(listing.files):
        print(f"note: {source}: {note}", file=sys.stderr)
    files: dict[str, list[str]] = {}
    for file in listing.files:
        if identity_of(file):
            files.setdefault(identity_of(file), []).append(file)
    if not files:
        raise InputError(f"{source}: holds photos but no folders of people (expected {source}/PERSON/PHOTO)")
    names = list(files)
    held = {names[index] for index in choose(names, [len(own) for own in files.values()], count, seed)}
    with utils.progress(sum(map(len, files.values())), "hold out", unit="photo") as bar:
        for name, own in files.items():
            part = out / ("held-out" if name in held else "train")
            taken = TakenNames()
            for file in own:
                inside = file.split("/", 1)[1]
                if name in held:  # there a person's photos lie side by side, whatever folders they came from
                    inside = taken.free(inside.replace("/", "__"))
                    taken.add(inside)
                _link(source / file, part / name / inside)
                bar.update()
    return {
        "layout": "folder",
        "train": {
            "people": len(names) - count,
            "photos": sum(len(own) for name, own in files.items() if name not in held),
        },
        "held_out": {"people": count, "photos": sum(len(files[name]) for name in held), "names": sorted(held)},
        "photos_without_person": len(listing.files) - sum(map(len, files.values())),
    }


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        with utils.atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def _split_records(crops: CropSet, out: Path, count: int, seed: int) -> dict[str, Any]:
    names = list(crops.identity_names)
    photos = np.bincount(crops.labels, minlength=crops.identities)
    held = choose(names, photos.tolist(), count, seed)
    folders = _folder_names([names[label] for label in held], held)
    new_label = np.cumsum(~np.isin(np.arange(crops.identities), held)) - 1
    order = np.argsort(crops.labels, kind="stable")
    with CropWriter(out / "train") as writer, utils.progress(len(crops), "hold out", unit="crop") as bar:
        for index in order.tolist():
            data, label = crops.read(index)
            if label in folders:
                suffix = utils.image_suffix(data) or ".jpg"
                utils.write_bytes(out / "held-out" / folders[label] / f"{crops.keys[index]:08d}{suffix}", data)
            else:
                writer.write(data, int(new_label[label]))
            bar.update()
    write_identities(
        out / "train" / "identities.tsv", [name for label, name in enumerate(names) if label not in folders]
    )
    return {
        "layout": "RecordIO",
        "train": {"people": crops.identities - count, "crops": int(len(crops) - photos[held].sum())},
        "held_out": {"people": count, "crops": int(photos[held].sum()), "names": [names[label] for label in held]},
    }


def _folder_names(names: Sequence[str], labels: Sequence[int]) -> dict[int, str]:
    """A folder for each person held out: the name where it can be one and is nobody else's, else one by the label."""
    folders: dict[int, str] = {}
    taken = TakenNames()
    for name, label in zip(names, labels, strict=True):
        plain = not name.startswith(".") and not any(mark in name for mark in "/\\\0") and len(os.fsencode(name)) < 200
        by_label = f"label-{label}"
        wanted = name if name and plain else by_label
        free = taken.free(wanted)
        folders[label] = free if wanted in (free, by_label) else taken.free(by_label)
        taken.add(folders[label])
    return folders


def _write_pairs(path: Path, files: Sequence[str], seed: int) -> int:
    """Random pairs of the held-out people, as many of one person as of two, as a table; returns how many."""
    generator = np.random.default_rng(seed)
    own: dict[str, list[str]] = {}
    for file in files:
        own.setdefault(identity_of(file), []).append(file)
    people, rows = list(own), set()
    for photos in own.values():
        possible = [(first, second) for i, first in enumerate(photos) for second in photos[i + 1 : i + 1 + PAIRS]]
        for at in generator.permutation(len(possible))[:PAIRS]:
            rows.add((*possible[at], 1))
    genuine, tries = len(rows), 0
    while len(rows) < 2 * genuine and len(people) > 1 and tries < 100 * genuine:
        one, other = generator.choice(len(people), 2, replace=False)
        first, second = (own[people[index]] for index in sorted((one, other)))
        rows.add((first[generator.integers(len(first))], second[generator.integers(len(second))], 0))
        tries += 1
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([("file1", "file2", "same"), *sorted(rows)])
    utils.write_bytes(path, buffer.getvalue().encode("utf-8", "surrogateescape"))
    return len(rows)
