"""What is wrong with a training set? Labels, duplicates, and people of the test sets.

    python audit.py --data data/crops --checkpoint model.onnx --out audit --against lfw lfw.bin FaceScrub_aligned
    python train.py --data data/crops --exclude audit/audit.tsv --relabel --out runs/clean   # without copying crops
    python audit.py apply --data data/crops --audit audit --relabel --out data/clean         # or as a new set

A row for each crop in `audit.tsv` and for each identity or pair of identities in `audit_identities.tsv`, with a score
and a reason: wrong person, stranger, unusable; two labels for one person, one label for two people; the same photo
twice; people of the sets named by --against. Sheets show the worst of each kind; `audit.html` lets a person confirm or
reject findings and saves `decisions.tsv`, which the next run takes by --decisions. Embeddings are kept in
`--out`/embeddings, so that a second audit takes seconds, and a killed one goes on.

The network may be the one that was trained on the very set: train, audit, train again.
"""

import passive_threads  # noqa: F401  # isort: skip

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import config
import retinaface
import utils
from auditing import decisions as decided
from auditing import duplicates, measures, report
from auditing.against import people_of, same_photo
from auditing.centres import Centres, Rows, nearest_other, unit_rows
from auditing.decisions import Decisions, read_decisions
from auditing.duplicates import THUMB, Duplicate, find_duplicates
from auditing.findings import (
    DUPLICATE,
    KEEP,
    MERGE,
    SPLIT,
    STRANGER,
    TEST,
    UNUSABLE,
    WRONG,
    Findings,
    Limits,
    PairFinding,
    compare,
    find_faceless,
    find_merges,
    find_splits,
    judge_crops,
    person_limit,
)
from auditing.measures import LEAST_SCORE, SIGNS, WIDTH, measure, readable, reject_curve
from auditing.space import Placed, choose, whitened
from cropping.faces import embedded_weights
from cropping.photos import decode_crop
from embedding import Embedder, open_embedder
from formats import crop_sets, selection, tables
from formats.embeddings import EmbeddingStore
from options import parse
from processes import Shard
from retinaface import RetinaFace
from utils import InputError
from verification.features import verify
from verification.metrics import curve, operating_point
from verification.sets import open_set

SHEET = 24  # findings of a kind on a sheet
# What decides the measures of a crop, besides the detector's weights.
MEASURED_BY = (measures.__file__, duplicates.__file__, *retinaface.CODE)


def open_detector(options: config.Audit) -> RetinaFace | None:
    """What looks for a face in each crop; None with --no-faces."""
    if not options.faces:
        return None
    return RetinaFace(device=utils.own_device(options.device), score_threshold=LEAST_SCORE)


def embed(
    options: config.Audit, crops: crop_sets.Crops, fingerprint: str, embedder: Embedder
) -> tuple[Any, Any] | None:
    """Features [n, D] and measures [n, WIDTH] of all crops, mapped; computed where they are not there yet.

    None as long as other shards have not computed theirs.
    """
    shard = Shard.parse(options.shard)
    key = {"data": fingerprint, "model": embedder.fingerprint, "measures": [THUMB, *SIGNS], "shifts": options.shifts}
    key["faces"] = embedded_weights() if options.faces else None
    key["code"] = [utils.code_sha256(*MEASURED_BY), utils.versions("opencv-python", "opencv-python-headless")]
    folder = options.out / "embeddings"
    features = EmbeddingStore(folder / "features", key, len(crops), embedder.dim)
    measures = EmbeddingStore(folder / "measures", key, len(crops), WIDTH, "float16")
    mine = shard.index, shard.count
    todo = sorted({*features.missing(*mine), *measures.missing(*mine)})
    detector = open_detector(options) if todo else None
    with utils.progress(sum(len(features.numbers(chunk)) for chunk in todo), "embed", unit="crop") as bar:
        for chunk in todo:
            numbers = features.numbers(chunk)
            rows, signs = _embed_chunk(crops, numbers, embedder, options.shifts, detector)
            measures.save(chunk, signs)
            features.save(chunk, rows)
            bar.update(len(numbers))
    waiting = {*features.missing(), *measures.missing()} if shard.count > 1 else set()
    if waiting:
        print(
            f"shard {shard}: done; {len(waiting)} chunks of other shards are not there yet: run the same command again"
        )
        return None
    return features.values(), measures.values()


def _embed_chunk(
    crops: crop_sets.Crops, numbers: range, embedder: Embedder, shifts: bool, detector: RetinaFace | None
) -> tuple[np.ndarray, np.ndarray]:
    """A crop that cannot be decoded has a feature of zeros and measures of NaN."""
    rows, signs = np.zeros((len(numbers), embedder.dim), np.float32), np.full((len(numbers), WIDTH), np.nan, np.float32)
    good, pictures = [], []
    for place, index in enumerate(numbers):
        if (picture := readable(crops, index)) is not None:
            pictures.append(picture)
            good.append(place)
    if good:
        rows[good], signs[good] = measure(embedder, np.stack(pictures), shifts=shifts, detector=detector)
    return rows, signs


def check_usable(crops: crop_sets.Crops, features: np.ndarray, measures: np.ndarray) -> None:
    """Raise `InputError` where nothing can be said of any crop: none can be decoded, or the model is broken."""
    decoded = np.flatnonzero(np.isfinite(measures[:, 0]))
    if not len(decoded):
        try:
            decode_crop(crops.read(0)[0])
            error: Exception | str = "cannot be decoded"
        except (ValueError, OSError, InputError) as found:
            error = found
        raise InputError(
            f"{crops.name}: not one of {len(crops)} crops is usable; the first: {crops.describe(0)}: {error}"
        )
    for start in range(0, len(decoded), 65536):
        norms = np.linalg.norm(features[decoded[start : start + 65536]], axis=1)
        if (norms[np.isfinite(norms)] > 0).any():
            return
    raise InputError(f"{crops.name}: the model gives no direction for any of {len(decoded)} crops; it is broken")


def mark_faceless(found: Findings, face: np.ndarray, centres: Centres, other: np.ndarray, bounds: Limits) -> None:
    """Call crops without a face unusable."""
    for index in np.flatnonzero(find_faceless(face, centres, other, bounds)).tolist():
        if found.kinds[index] != UNUSABLE:
            found.set(index, UNUSABLE, f"no face: the detector gives {face[index]:.2f}", "drop")


def mark_duplicates(
    found: Findings, measures: np.ndarray, own: np.ndarray, nearest: np.ndarray
) -> list[tuple[Duplicate, int]]:
    """Find the same photo twice; of two crops the one that does not show its identity, or fits it less, is dropped.

    Returns each with the crop that goes. A crop without another one of its identity that is near to somebody else by
    its own copy alone is not called wrong.
    """
    read = found.crops.read
    usable = np.flatnonzero(np.isfinite(measures[:, 0]))
    pairs = find_duplicates(
        measures[usable, : THUMB * THUMB],
        lambda place: ((data := read(int(usable[place]))[0]), decode_crop(data)),
    )
    duplicates = []
    for pair in pairs:
        first, second = int(usable[pair.first]), int(usable[pair.second])
        for one, copy in ((first, second), (second, first)):
            if found.kinds[one] == WRONG and nearest[one] == found.labels[copy] and not np.isfinite(own[one]):
                found.kinds[one], found.reasons[one], found.score[one] = KEEP, "", np.nan
        wrong = [found.kinds[index] in (WRONG, STRANGER, UNUSABLE) for index in (first, second)]
        fits = [
            -2.0 if bad else float(np.nan_to_num(own[index], nan=-1))
            for index, bad in zip((first, second), wrong, strict=True)
        ]
        keep, drop = (second, first) if fits[1] > fits[0] else (first, second)
        duplicates.append((Duplicate(first, second, pair.how, pair.correlation), drop))
        other = f" of {found.names[found.labels[keep]]}" if found.labels[first] != found.labels[second] else ""
        if found.kinds[drop] == KEEP:
            found.set(drop, DUPLICATE, f"{pair.how}: {found.crops.describe(keep)}{other}", "drop")
            found.score[drop] = pair.correlation
        else:
            found.reasons[drop] += f"; {pair.how}: {found.crops.describe(keep)}{other}"
    return duplicates


def look_for_people(
    options: config.Audit,
    found: Findings,
    features: Rows,
    centres: Centres,
    embed_crops: Callable[[np.ndarray], np.ndarray],
) -> tuple[list[dict[str, Any]], dict[str, list[report.Picture]]]:
    """Compare the people of each set of --against with all identities; findings go into `found`.

    `embed_crops`: uint8 RGB crops to rows that compare with `features`.
    """
    summaries, evidence = [], {}
    known_limits: dict[int, tuple[float, int]] = {}
    device = utils.own_device(options.device)
    none = np.full(1, -1, np.int64)
    used: dict[str, Path] = {}
    for path in options.against:
        people, hits, most = 0, 0, 0.0
        left_out: list[str] = []
        for person in people_of(path, embed_crops, options.out / "cache", device, left_out):
            if used.setdefault(person.set_name, path) != path:
                person.set_name = str(path)  # two sets of one name
            people += 1
            size = min(len(person.embeddings), 8)
            if size not in known_limits:
                known_limits[size] = person_limit(features, found.labels, centres, size, options.false_alarms, device)
            limit, _ = known_limits[size]
            label, cosine = nearest_other(person.mean[None], none, centres.centres, device, what="")
            most = max(most, limit)
            if label[0] < 0 or not cosine[0] >= limit:
                continue
            hits += 1
            members = np.flatnonzero(found.labels == label[0])
            near = members[np.argsort(-(unit_rows(features[members]) @ person.mean), kind="stable")][:4]
            pictures = [person.crop(place) for place in range(min(2, len(person.pictures)))]
            own = [crop for index in near.tolist() if (crop := readable(found.crops, index)) is not None]
            twins = [crop for crop in own if any(same_photo(picture, crop) for picture in pictures)]
            same = f"; {len(twins)} of its crops are photos of the set" if twins else ""
            who = f"{person.set_name}: {person.name}"
            finding = PairFinding(
                TEST, int(label[0]), who, float(cosine[0]),
                f"{found.names[label[0]]} is {who} ({cosine[0]:.3f}, limit {limit:.3f}){same}", tuple(near.tolist()),
            )  # fmt: skip
            found.pairs.append(finding)
            evidence[decided.name_of_pair(finding)] = [
                (picture, text) for picture, text in zip(pictures, person.pictures, strict=False)
            ]
        summaries.append(
            {"set": str(path), "people": people, "in_the_training_set": hits, "pictures_left_out": len(left_out)}
        )
        if left_out:
            print(f"{path}: {len(left_out)} pictures show no face or cannot be read; the first: {left_out[0]}")
    return summaries, evidence


def write_tables(
    out: Path, found: Findings, own: np.ndarray, other: np.ndarray, nearest: np.ndarray,
    norms: np.ndarray, signs: np.ndarray,
) -> None:  # fmt: skip
    """audit.tsv and audit_identities.tsv."""

    def crop_rows() -> Any:
        for index in range(len(found.labels)):
            label = int(found.labels[index])
            yield [
                index, found.crops.describe(index), label, found.names[label], found.kinds[index], found.score[index],
                own[index], other[index], found.names[nearest[index]] if nearest[index] >= 0 else None,
                found.action[index], found.to[index], norms[index], *signs[index], found.reasons[index],
            ]  # fmt: skip

    selection.write_table(out / selection.CROPS, selection.CROP_COLUMNS, crop_rows())
    rows = []
    for pair in found.pairs:
        number = pair.second if pair.second.isdecimal() else ""
        name = found.names[int(number)] if number else pair.second
        action = found.pair_actions[decided.name_of_pair(pair)]
        crops = " ".join(map(str, pair.crops))
        rows.append(
            [pair.kind, pair.first, found.names[pair.first], number, name, pair.score, action, crops, pair.reason]
        )
    selection.write_table(out / selection.IDENTITIES, selection.IDENTITY_COLUMNS, rows)


def sections_of(
    found: Findings, centres: Centres, nearest: np.ndarray, duplicates: Sequence[tuple[Duplicate, int]],
    evidence: dict[str, list[report.Picture]],
) -> list[tuple[str, list[tuple[str, str, list[report.Picture]]]]]:  # fmt: skip
    """Findings of each kind, the worst first, with the pictures that show them: for sheets and the page."""

    def read(index: int) -> np.ndarray:
        return decode_crop(found.crops.read(index)[0])

    def members(label: int, most: int = 3) -> list[int]:
        inside = np.flatnonzero((found.labels == label) & centres.trusted)
        return inside[np.argsort(-np.nan_to_num(centres.own[inside]), kind="stable")][:most].tolist()

    def text(index: int) -> str:
        near = "" if np.isnan(centres.own[index]) else f" {centres.own[index]:.2f}"
        return found.names[found.labels[index]] + near

    sections: list[tuple[str, list[tuple[str, str, list[report.Picture]]]]] = []
    for kind in (WRONG, STRANGER, UNUSABLE):
        inside = [index for index, this in enumerate(found.kinds) if this == kind]
        inside.sort(key=lambda index: -np.nan_to_num(found.score[index], nan=np.inf))  # confirmed ones first
        findings = []
        for index in inside[: report.PER_PAGE + 1]:
            shown = [index, *members(int(found.labels[index]))]
            if kind == WRONG:
                shown += members(int(nearest[index]), 2)
            reason = f"{found.crops.describe(index)} ({found.names[found.labels[index]]}): {found.reasons[index]}"
            to = found.to[index] if found.to[index] is not None else int(nearest[index])
            name = decided.name_of_crop(kind, index, to)
            findings.append((name, reason, report.pictures_of(read, shown, text)))
        sections.append((kind, findings + [findings[-1]] * (len(inside) - len(findings)) if findings else []))
    for kind in (MERGE, SPLIT, TEST):
        findings = []
        for pair in [pair for pair in found.pairs if pair.kind == kind]:
            if kind == MERGE:
                shown = members(pair.first) + members(int(pair.second))
            elif kind == SPLIT:
                shown = [*[index for index in members(pair.first, 6) if index not in pair.crops][:3], *pair.crops[:3]]
            else:
                shown = list(pair.crops[:3])
            name = decided.name_of_pair(pair)
            findings.append((name, pair.reason, evidence.get(name, []) + report.pictures_of(read, shown, text)))
        sections.append((kind, findings))
    # Under two labels first: such a photo teaches that one person is two.
    worst = sorted(
        duplicates, key=lambda one: (found.labels[one[0].first] == found.labels[one[0].second], -one[0].correlation)
    )
    twice: list[tuple[str, str, list[report.Picture]]] = []
    for twins, drop in worst:
        kept = twins.first + twins.second - drop
        pictures = report.pictures_of(read, (kept, drop), text) if len(twice) < report.PER_PAGE else []
        reason = f"{twins.how} ({twins.correlation:.3f}): {found.crops.describe(drop)}"
        twice.append((decided.name_of_duplicate(kept, drop), reason, pictures))
    sections.append((DUPLICATE, twice))
    return sections


def quality(options: config.Audit, embedder: Embedder) -> list[Any]:
    """Does each sign of quality mean anything to this model? Error versus reject on the set of --quality-on."""
    assert options.quality_on is not None
    pairs = open_set(options.quality_on, options.out / "cache", device=utils.choose_device(options.device))
    result = verify(embedder, pairs, cache_dir=options.out / "cache")
    windows = range(0, len(pairs.crops), 512)
    detector = open_detector(options)
    parts = [
        measure(embedder, pairs.crops[start : start + 512], shifts=options.shifts, detector=detector)
        for start in windows
    ]
    features, measures = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    signs = {"norm": np.linalg.norm(features, axis=1)}
    signs |= dict(zip(SIGNS, measures[:, THUMB * THUMB :].T, strict=True))
    genuine = pairs.same & ~pairs.missing_pairs()
    scored = ~np.isnan(result.cosines)
    point = operating_point(curve(result.cosines[scored], result.same[scored]), options.far)
    if point.threshold is None:
        raise InputError(f"--far {options.far:g}: {pairs.name} has too few impostor pairs for that rate")
    accepted = result.cosines[genuine] >= point.threshold
    curves = [
        reject_curve(name, values[pairs.pairs[genuine]].min(axis=1), accepted)
        for name, values in signs.items()
        if np.isfinite(values).all()
    ]
    report.draw_rejects(
        options.out / "quality", curves, f"{pairs.name}, {embedder.name}, threshold at FAR {options.far:g}"
    )
    return [{"sign": curve.sign, "gain": curve.gain, "fnmr": curve.fnmr.tolist()} for curve in curves]


def audit(options: config.Audit) -> None:
    """The whole audit."""
    crops = crop_sets.open_training_set(options.data, skip_unreadable=True)
    device = utils.own_device(options.device)
    embedder = open_embedder(options, device)
    fingerprint = crop_sets.fingerprint(crops, skip_unreadable=True)
    decisions = Decisions({})
    if options.decisions is not None:
        decisions = read_decisions(options.decisions, fingerprint[:16], len(crops), crops.identities)
    named = [("--against", path) for path in options.against]
    named += [("--quality-on", options.quality_on)] if options.quality_on is not None else []
    for option, path in named:  # not after hours of embedding
        if not path.exists():
            raise InputError(f"{option} {path}: no such file or folder")
    embedded = embed(options, crops, fingerprint, embedder)
    if embedded is None:
        return
    features, measures = embedded
    check_usable(crops, features, measures)
    found = Findings(crops)
    norms = np.concatenate(
        [np.linalg.norm(features[start : start + 65536], axis=1) for start in range(0, len(features), 65536)]
    )
    rates = options.error_rate, options.false_alarms
    embed_crops: Callable[[np.ndarray], np.ndarray] = embedder.features
    tried: dict[str, int] = {}
    space = None
    if options.space == "auto":
        space, tried = choose(features, found.labels, crops.identities, *rates, device)
    elif options.space == "whitened":
        space = whitened(features, found.labels, crops.identities)
    if space is not None:
        features, embed_crops = Placed(features, space), space.after(embedder.features)
    compared = compare(features, found.labels, crops.identities, *rates, device)
    centres, nearest, other, bounds = compared.centres, compared.nearest, compared.other, compared.bounds
    found.kinds, found.score, found.reasons = judge_crops(found.labels, centres, other, nearest, bounds, found.names)
    mark_faceless(found, measures[:, THUMB * THUMB + SIGNS.index("face")], centres, other, bounds)
    duplicates = mark_duplicates(found, measures, centres.own, nearest) if options.duplicates else []
    found.pairs += find_merges(
        features, found.labels, centres, compared.near_centre, compared.near_cosine, bounds, found.names
    )
    found.pairs += find_splits(features, found.labels, centres, bounds, found.names)
    against, evidence = look_for_people(options, found, features, centres, embed_crops)
    decided.decide(decisions, found, nearest, duplicates)
    curves = quality(options, embedder) if options.quality_on is not None else []
    # From here on files are replaced. The record goes first and comes last, so that without it nothing is an audit.
    (options.out / selection.RECORD).unlink(missing_ok=True)
    if not curves:
        for suffix in (".png", ".svg"):
            (options.out / "quality").with_suffix(suffix).unlink(missing_ok=True)
    write_tables(options.out, found, centres.own, other, nearest, norms, measures[:, THUMB * THUMB :])
    counts = {kind: found.kinds.count(kind) for kind in (WRONG, STRANGER, UNUSABLE)}
    counts[DUPLICATE] = len(duplicates)
    counts |= {kind: sum(pair.kind == kind for pair in found.pairs) for kind in (MERGE, SPLIT, TEST)}
    sections = sections_of(found, centres, nearest, duplicates, evidence)
    for name, findings in sections:
        rows = [(reason, pictures) for _, reason, pictures in findings[:SHEET]]
        title = f"{crops.name}: {name}, {counts[name]:,}" + (
            f", the worst {len(rows)}" if counts[name] > len(rows) else ""
        )
        report.draw_sheet(options.out / f"{name.replace(',', '').replace(' ', '-')}.png", title, rows)
    few = int((np.bincount(found.labels, minlength=crops.identities) < 3).sum())
    summary = (
        f"{len(crops):,} crops of {crops.identities:,} identities, {embedder.name}, error rate "
        f"{options.error_rate:g}; some {bounds.wrong_share:.1%} of the crops do not show their identity. "
    )
    summary += (
        f"{few:,} identities have one or two crops and are judged by other identities alone."
        if bounds.judges
        else "That is more than half: this model cannot tell these identities apart, and no single crop is judged."
    )
    if space is not None:
        summary += " Compared whitened within people."
    summary = " ".join([summary, *bounds.notes()])
    report.write_page(options.out / "audit.html", f"Audit of {crops.name}", summary, counts, sections, fingerprint[:16])
    record = {
        "data": {"name": crops.name, "path": str(options.data), "crops": len(crops), "identities": crops.identities,
                 "fingerprint": fingerprint},
        "model": embedder.describe(),
        "space": {"used": "plain" if space is None else "whitened", "findings_in_a_sample": tried},
        # An infinite limit is one that nothing reaches: too few crops or identities to say anything.
        "limits": {name: None if value == np.inf else value for name, value in vars(bounds).items()},
        "counts": counts,
        "against": against,
        "quality": curves,
        "environment": utils.environment(),
    }  # fmt: skip
    utils.write_json(options.out / selection.RECORD, record)
    print(f"{summary}\n\n{report.summary_table(counts)}")
    for entry in against:
        print(f"{entry['set']}: {entry['in_the_training_set']} of {entry['people']} people are in the training set")
    print(f"\n{options.out / selection.CROPS}; sheets and audit.html beside it")


def apply(options: config.AuditApply) -> None:
    """Write what the audit leaves as a new set."""
    crops = crop_sets.open_training_set(options.data, skip_unreadable=True)
    fingerprint = crop_sets.fingerprint(crops, skip_unreadable=True)
    kept, left = selection.select(crops, fingerprint, options.audit, relabel=options.relabel)
    with crop_sets.claimed(options.out, "apply.json", {"data": fingerprint, "kept": left}) as there:
        if not there:
            write_set(options, kept, len(crops))
    print(f"{options.out}: {len(kept):,} of {len(crops):,} crops, {kept.identities:,} identities; {kept.notes[-1]}")


def write_set(options: config.AuditApply, kept: selection.SelectedCrops, crops: int) -> None:
    """The crops in the order of their labels, and where each of them is from."""
    order = np.argsort(kept.labels, kind="stable").tolist()
    lines = ["key\tlabel\tcrop"]
    with crop_sets.CropWriter(options.out) as writer, utils.progress(len(kept), "write", unit="crop") as bar:
        for index in order:
            payload, label = kept.read(index)
            key = writer.write(payload, label)
            lines.append(f"{key}\t{label}\t{tables.escape(kept.describe(index))}")
            bar.update()
        # Before the block ends, and with it the set is there.
        tables.write_identities(options.out / "identities.tsv", kept.identity_names, np.bincount(kept.labels).tolist())
        text = "\n".join(lines) + "\n"
        utils.write_bytes(options.out / "sources.tsv", text.encode("utf-8", "surrogateescape"))
        write_faces(options, kept, order, crops)


def write_faces(options: config.AuditApply, kept: selection.SelectedCrops, order: Sequence[int], crops: int) -> None:
    """The rows of the crops in `order` from the faces.tsv beside the data, if there is one that speaks of its crops."""
    path = (options.data if options.data.is_dir() else options.data.parent) / "faces.tsv"
    if not path.is_file():
        return
    rows = [row for row in tables.iterate_faces(path) if row.status != tables.NO_CROP]
    if len(rows) != crops:
        print(f"note: {path} has {len(rows):,} rows with a crop, the set {crops:,} crops; it was left behind")
        return
    names = kept.identity_names
    new = (dataclasses.replace(rows[kept.indices[index]], identity=names[kept.labels[index]]) for index in order)
    utils.write_bytes(options.out / "faces.tsv", tables.table_text(new))


@utils.command
def main() -> None:
    """See the file's docstring."""
    if sys.argv[1:2] == ["apply"]:
        apply(parse(config.AuditApply, "Write the crops that an audit leaves as a new set.", sys.argv[2:]))
    else:
        audit(parse(config.Audit, __doc__))


if __name__ == "__main__":
    sys.exit(main())
