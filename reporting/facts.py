"""What the stages wrote about a run, as figures: each with its interval, its command, and the hashes behind it.

Files are known by what is in them. A file that is none of the known kinds, or is damaged, is named in the report and
never passed over in silence; a figure that a file does not have is left out.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import utils
from utils import InputError, sha256_of
from verification.metrics import binomial_interval
from verification.report import CHAINED
from verification.scores import plain_name

NAMES = ("results.json", "comparison.json", "report.json", "audit.json")
DEPTH = 4  # folders below a run that are looked through
MOST = 200  # results files of one run

_PRINTED = "as printed"


@dataclass(frozen=True)
class Figure:
    """One number: what it is of, its value and 95 % interval as text, and the SHA-256 of the data behind it."""

    label: str
    value: str
    interval: str = ""
    data_sha256: str | None = None


@dataclass
class Source:
    """One results file. kind: the section it belongs to; subject: what was measured on; models: (name, sha256)."""

    path: Path
    kind: str
    subject: str
    command: str
    models: list[tuple[str, str | None]]
    data: list[tuple[str, str | None]]
    figures: list[Figure]
    pictures: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    protocol: str = ""  # what else has to be alike where figures stand side by side

    def __post_init__(self) -> None:
        """TypeError where a file has something else than texts in the place of texts."""
        hashes = [digest for _, digest in [*self.models, *self.data]] + [row.data_sha256 for row in self.figures]
        texts = [name for name, _ in [*self.models, *self.data]] + self.notes + self.texts + [self.subject]
        for value in [*texts, *(digest for digest in hashes if digest is not None)]:
            if not isinstance(value, str):
                raise TypeError(f"{value!r} is no text")


@dataclass
class Run:
    """A folder with everything found in it. history: epochs of a training; options: as run.json has them."""

    label: str
    folder: Path
    sources: list[Source]
    history: list[dict[str, Any]]
    options: dict[str, Any]
    embedding_sha256: str | None
    unread: list[str]


def read_run(folder: Path, label: str) -> Run:
    """Read every results file in a folder and below it; InputError if there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of a run")
    run = Run(label, folder, [], [], {}, None, [])
    for path in _files(folder):
        try:
            content = utils.read_json(path)
            sources = _read(path, content, run) if isinstance(content, dict) else None
        except (ValueError, OSError, KeyError, TypeError, AttributeError, IndexError) as error:
            run.unread.append(f"{path}: damaged, or of another version ({error!r})")
            continue
        if sources is None:
            run.unread.append(f"{path}: of no kind that is known here")
        else:
            run.sources += sources
    if not run.sources:
        raise InputError(f"{folder}: no results in it or below (results.json of any stage)" + _said(run.unread))
    return run


def _said(unread: Sequence[str]) -> str:
    return f"; {unread[0]}" if unread else ""


def _files(folder: Path) -> Iterable[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "cache") * (depth < DEPTH)
        found += [Path(root) / name for name in NAMES if name in names]
    if len(found) > MOST:
        raise InputError(f"{folder}: {len(found)} files of results, more than {MOST}; name the runs one by one")
    return sorted(found)


def _read(path: Path, content: dict[str, Any], run: Run) -> list[Source] | None:
    for fits, read in _KINDS:
        if fits(content):
            return read(path, content, run)
    return None


# --- small things ---------------------------------------------------------------------------------------------------


def percent(value: Any) -> str:
    """A rate as text; "-" for what is not there."""
    return utils.percent(value) if isinstance(value, int | float) else "-"


def span(bounds: Any) -> str:
    """The ends of an interval of a rate, "" if there is none."""
    ends = bounds.get("interval_95") if isinstance(bounds, dict) else bounds
    return f"{100 * ends[0]:.2f} ... {100 * ends[1]:.2f}" if ends else ""


def _command(path: Path, content: dict[str, Any]) -> str:
    """The command that wrote a file: from the file itself, or from the run.json beside it."""
    environment = content.get("environment")
    if not environment:
        beside = _run_json(path)
        environment = beside.get("environment") or (beside.get("environments") or [{}])[-1]
    words = environment.get("command") or []
    return shlex.join(["python", Path(words[0]).name, *map(str, words[1:])]) if words else ""


def _run_json(path: Path) -> dict[str, Any]:
    try:
        content = utils.read_json(path.parent / "run.json")
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _model(content: Mapping[str, Any]) -> tuple[str, str | None]:
    model = content.get("model") or {}
    return str(model.get("name", "unknown")), model.get("sha256")


def _pictures(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


# --- kinds of files -------------------------------------------------------------------------------------------------


def _training(path: Path, content: dict[str, Any], run: Run) -> list[Source]:
    recorded = _run_json(path)
    data = content.get("data") or {}
    name = str(data.get("name") or data.get("path") or "training data")
    sha = data.get("fingerprint") or data.get("sha256")
    for row in content["history"]:
        float(row["epoch"]), [float(entry["accuracy"]) for entry in (row.get("verification") or {}).values()]
    if not isinstance(recorded.get("options") or {}, dict):
        raise TypeError(f"{path.with_name('run.json')}: its options are none")
    if not run.history or len(content["history"]) > len(run.history):
        run.history, run.options = content["history"], recorded.get("options") or {}
        run.embedding_sha256 = content.get("embedding_sha256")
    best, last = content["best"], content["last"]
    figures = [
        Figure(
            "epochs",
            f"{last['epoch']} of {content['epochs']}" + ("" if content["finished"] else ", not finished"),
            "",
            sha,
        ),
        Figure("loss, last epoch", f"{last['loss']:.4f}", "", sha),
        Figure("top-1 on the training crops, last epoch", percent(last["top1"]), "", sha),
        Figure("crops per second, last epoch", f"{last['crops_per_second']:.0f}", "", sha),
    ]
    for label in ("crops", "identities"):
        if label in data:
            figures.insert(0, Figure(label, f"{data[label]:,}", "", sha))
    if best.get("verification"):
        figures.append(Figure("best epoch", f"{best['epoch']}", "", sha))
    for set_name, entry in (best.get("verification") or {}).items():
        # By pairs where the file does not say whose they are.
        pairs = entry.get("pairs")
        bounds = binomial_interval(round(entry["accuracy"] * pairs), pairs) if pairs else None
        interval = span((entry.get("by_identity") or {}).get("accuracy") or bounds)
        measured_on = entry.get("sha256") or (best.get("sets") or {}).get(set_name)
        figures.append(Figure(f"accuracy on {set_name}, best epoch", percent(entry["accuracy"]), interval, measured_on))
    skipped = content.get("unreadable_crops") or []
    notes = [f"{len(skipped)} crops could not be read and were replaced"] if skipped else []
    model = ("embedding.pt", content.get("embedding_sha256"))
    return [Source(path, "Training", name, _command(path, content), [model], [(name, sha)], figures, notes=notes)]


def _verification(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    sources = []
    for entry in content["sets"]:
        sha = entry["sha256"]
        by = entry.get("by_identity") or {}
        figures = [
            Figure("pairs of one person + two", f"{entry['genuine_pairs']:,} + {entry['impostor_pairs']:,}", "", sha)
        ]
        over_pairs = by.get("accuracy")
        if entry["accuracy_kfold_mean"] is not None:
            # Where folds differ in size, the interval is not of their mean.
            value = (over_pairs or {}).get("value")
            own = value is None or abs(value - entry["accuracy_kfold_mean"]) < 1e-9
            mean = percent(entry["accuracy_kfold_mean"])
            figures.append(Figure("accuracy over folds", mean, span(over_pairs if own else None), sha))
            if not own:
                figures.append(Figure("accuracy of all pairs", percent(value), span(over_pairs), sha))
        else:
            figures.append(
                Figure(
                    "accuracy at the best threshold",
                    percent(entry["accuracy_best_threshold"]),
                    span(by.get("accuracy")),
                    sha,
                )
            )
        figures.append(Figure("EER", percent(entry["eer"]), span(by.get("eer")), sha))
        for point in entry["tar_at_far"]:
            if point["resolved"]:
                interval = (by.get("tar_at_far") or {}).get(f"{point['far']:g}") or point["tar_interval_95"]
                threshold = f", cosine from {point['threshold']['cosine']:.4f}"
                figures.append(
                    Figure(f"TAR at FAR {point['far']:g}", percent(point["tar"]) + threshold, span(interval), sha)
                )
        lost = sum(entry["pairs_without_face"].values())
        if lost:
            figures.append(Figure("pairs without a face (counted as wrong)", f"{lost:,}", "", sha))
        stem = str((entry.get("scores") or {}).get("file", entry["name"])).removesuffix("-scores.npz")
        pictures = _pictures(path.parent, f"{stem}-roc.png", f"{stem}-angles.png", f"{stem}-errors.png")
        common = (_command(path, content), [_model(content)], [(entry["name"], sha)])
        notes = list(entry["notes"])
        if by and entry.get("source", {}).get("people_by_chains"):
            notes.append(CHAINED)
        sources.append(
            Source(
                path, "Verification", entry["name"], *common, figures, pictures, notes=notes, protocol=_protocol(entry)
            )
        )
        sources += [_group(path, entry, group, stem, common) for group in entry.get("groups") or []]
    return sources


def _protocol(entry: dict[str, Any]) -> str:
    """What of a set's figures is neither its pairs nor the model: how faces were found, how folds were cut."""
    source = entry.get("source", {})
    how = {key: source[key] for key in ("aligned", "face_rule", "detector_sha256", "max_side") if key in source}
    return json.dumps(how | {"folds": len(entry.get("folds") or [])}, sort_keys=True)


def _group(path: Path, entry: dict[str, Any], group: dict[str, Any], stem: str, common: Any) -> Source:
    sha = entry["sha256"]
    cosine = group["threshold"]["cosine"]
    figures = [Figure("threshold", f"cosine {cosine:.4f} ({group['threshold_chosen']})", "", sha)]
    for kind in ("fmr", "fnmr"):
        for row in group["groups"]:
            rate = row[kind]
            if rate["rate"] is not None:
                interval = span(rate["by_identity"] or rate["interval_95"])
                figures.append(Figure(f"{kind.upper()}, {row['name']}", percent(rate["rate"]), interval, sha))
    texts = [group[key]["sentence"] for key in ("largest_fmr_ratio", "largest_fnmr_ratio") if group[key]]
    pictures = _pictures(path.parent, f"{stem}-groups-{plain_name(group['column'])}.png")
    subject = f"{entry['name']} by {group['column']}"
    command, models, data = common
    notes = list(group["notes"])
    return Source(path, "Error rates by group", subject, command, models, data, figures, pictures, notes, texts)


def _identification(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    data = [(source["folder"], source["sha256"]) for source in content["data"]]
    sha = " + ".join(str(digest) for _, digest in data)
    people, photos, lost = (
        " + ".join(f"{source[key]:,}" for source in content["data"])
        for key in ("people", "photos", "photos_without_face")
    )
    checked = content["verification"]
    figures = [
        Figure("people", people, "", sha),
        Figure("photos (without a face)", f"{photos} ({lost})", "", sha),
        Figure(
            "all pairs of one person + two", f"{checked['genuine_pairs']:,} + {checked['impostor_pairs']:,}", "", sha
        ),
        Figure("EER", percent(checked["eer"]), span(checked.get("eer_by_identity")), sha),
    ]
    for point in checked["tar_at_far"]:
        if point["resolved"]:
            said = f"{percent(point['tar'])}, cosine from {point['threshold']['cosine']:.4f}"
            figures.append(Figure(f"TAR at FAR {point['far']:g}", said, span(point["tar_by_identity"]), sha))
    for row in (content["closed_set"] or {}).get("ranks", []):
        figures.append(Figure(f"closed set, rank {row['rank']}", percent(row["rate"]), span(row["by_identity"]), sha))
    for point in (content["open_set"] or {}).get("dir_at_fpir", []):
        if point["resolved"]:
            figures.append(
                Figure(
                    f"open set, DIR at FPIR {point['fpir']:g}", percent(point["dir"]), span(point["by_identity"]), sha
                )
            )
    notes = list(content["notes"])
    needed = [row for row in checked["people_needed"] if row["more_people_to_resolve"]]
    notes += [f"FAR {row['far']:g} takes at least {row['more_people_to_resolve']:,} more people" for row in needed]
    subject = Path(data[-1][0]).name
    pictures = _pictures(path.parent, "scores.png", "cmc.png", "dir.png", "worst.png")
    ways = [{key: source.get(key) for key in ("aligned", "face_rule", "detector_sha256")} for source in content["data"]]
    protocol = json.dumps([ways, content.get("protocol")], sort_keys=True)
    common = (_command(path, content), [_model(content)], data, figures, pictures, notes)
    return [Source(path, "Identification", subject, *common, protocol=protocol)]


def _ijb(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    name = str(content["protocol"])
    data = _files_of(content["data"], "sha256")
    sha = _all_of(data)
    figures = []
    for treatment, found in (content.get("one_to_one") or {}).items():
        if treatment != "N0D1F1":  # the usual one; results.json has all eight
            continue
        for point in found["far_not_exceeded"]:
            if point["resolved"]:
                interval = span(point.get("tar_interval_95_by_identity") or point.get("tar_interval_95"))
                figures.append(
                    Figure(f"1:1 TAR at FAR {point['far']:g}, not exceeded", percent(point["tar"]), interval, sha)
                )
        for far, tar in found["as_printed"].items():
            if far != "auc":
                figures.append(Figure(f"1:1 TAR at FAR {far}, {_PRINTED}", percent(tar), "", sha))
    many = content.get("one_to_many") or {}
    for key, row in many.get("of_mated_probes", {}).items():
        if row:
            figures.append(Figure(f"1:N {key.replace('_', ' ')}, mated probes", percent(row["value"]), span(row), sha))
    for gallery, found in many.items():
        for point in found.get("fpir_not_exceeded", []) if isinstance(found, dict) else []:
            if point["resolved"]:
                interval = span(point["tpir_interval_95_by_identity"] or point["tpir_interval_95"])
                figures.append(
                    Figure(f"1:N TPIR at FPIR {point['fpir']:g}, {gallery}", percent(point["tpir"]), interval, sha)
                )
    printed = many.get("as_printed") or {}
    for key, value in printed.items():
        if key.startswith("top"):
            figures.append(Figure(f"1:N rank {key[3:]}, all probes, {_PRINTED}", percent(value), "", sha))
    for fpir, value in (printed.get("mean_tpir") or {}).items():
        if float(fpir) < 1:
            figures.append(Figure(f"1:N TPIR at FPIR {fpir}, both galleries, {_PRINTED}", percent(value), "", sha))
    notes = []
    missing = content["missing"]
    if missing["images"]:
        first = f" ({missing['reasons'][0]}{' ...' if missing['images'] > 1 else ''})" if missing["reasons"] else ""
        notes = [
            f"{missing['images']} of {missing['of']} images have no feature{first}, "
            f"{missing['lost_templates']} templates have none left"
        ]
    notes.append("as printed: by public code, at the nearest FAR, on either side, and over all probes")
    pictures = _pictures(path.parent, "roc.png")
    return [Source(path, "IJB", name, _command(path, content), [_model(content)], data, figures, pictures, notes)]


def _tinyface(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    sizes, photos = content["data"], content["photos"]
    data = _files_of(sizes, "lists")
    sha = _all_of(data)
    counts = " + ".join(f"{sizes[key]:,}" for key in ("probes", "matches", "distractors"))
    figures = [Figure("probes + matches + distractors", counts, "", sha)]
    for key, row in content.items():
        if key.startswith("rank_") or key == "mean_average_precision":
            figures.append(Figure(key.replace("_", " "), percent(row["value"]), span(row), sha))
    for key, value in content["as_printed"].items():
        figures.append(Figure(f"{key.replace('-', ' ')}, {_PRINTED}", percent(value / 100), "", sha))
    notes = ["as printed: by public code, which puts the later of equal scores first"]
    if "aligned" in photos:
        notes.append(f"{photos['aligned']:,} photos aligned, {photos['whole_picture_resized']:,} resized as a whole")
    if photos["without_feature"]:
        named = photos["names_without_feature"]
        first = f" ({named[0]}{' ...' if photos['without_feature'] > 1 else ''})" if named else ""
        notes.append(f"{photos['without_feature']:,} photos give no feature and fail{first}")
    protocol = json.dumps([photos.get(key) for key in ("aligned_before", "detector_sha256")])
    common = (_command(path, content), [_model(content)], data, figures)
    return [Source(path, "TinyFace", "TinyFace", *common, notes=notes, protocol=protocol)]


def _files_of(data: dict[str, Any], key: str) -> list[tuple[str, str | None]]:
    """What was measured on: the lists under `key`, and the photos where there were any."""
    found: list[tuple[str, str | None]] = [(Path(file).name, digest) for file, digest in data[key].items()]
    return [*found, ("photos", data["photos_sha256"])] if "photos_sha256" in data else found


def _all_of(data: Sequence[tuple[str, str | None]]) -> str | None:
    """One text for several hashes, None unless all are there."""
    digests = [digest for _, digest in data]
    return " + ".join(map(str, digests)) if digests and None not in digests else None


def _megaface(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    data = [(side, content[side].get("photos_sha256")) for side in ("probes", "distractors")]
    sha = _all_of(data)
    # In which order they stand decides who the first distractors are.
    lists = [content[side].get("names_sha256") for side in ("probes", "distractors")]
    noise_lists = list((content.get("noise_lists") or {}).values())
    sources: list[Source] = []
    for noise in dict.fromkeys(row["noise"] for row in content["results"]):
        figures, notes = [], []
        for row in content["results"]:
            if row["noise"] == noise:
                figures += _challenge(row, sha)
                notes += _missing(row)
        pictures = _pictures(path.parent, *([] if sources else ["cmc.png", "roc.png"]), f"misses-{noise}.png")
        subject = "Challenge 1" if noise == "raw" else f"Challenge 1, noise lists: {noise}"
        protocol = json.dumps([lists, [] if noise == "raw" else noise_lists])
        common = (_command(path, content), [_model(content)], data, figures, pictures, notes)
        sources.append(Source(path, "MegaFace", subject, *common, protocol=protocol))
    return sources


def _challenge(row: dict[str, Any], sha: str | None) -> list[Figure]:
    where = _where(row)
    figures = []
    for key in ("rank_1", "rank_10"):
        interval = span(row.get(f"{key}_by_identity"))
        figures.append(Figure(f"{key.replace('_', ' ')}, {where}", percent(row[key]), interval, sha))
    for point in row.get("verification", []):
        if point.get("resolved"):
            figures.append(Figure(f"TAR at FAR {point['far']:g}, {where}", percent(point["rate"]), "", sha))
    return figures


def _missing(row: dict[str, Any]) -> list[str]:
    """Who has no feature. A distractor that is not there is nobody's nearest: the figures are too good."""
    lost = [f"{row[f'missing_{side}']:,} {side}" for side in ("probes", "distractors") if row.get(f"missing_{side}")]
    return [f"{' and '.join(lost)} have no feature ({_where(row)})"] if lost else []


def _where(row: dict[str, Any]) -> str:
    return f"{row['distractors']:,} distractors, noise lists: {row['noise']}"


def _stress(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    sources = []
    people = content["people"]
    # The people are a function of what is said here, the hash of the code included.
    far = float(content["far"])
    sha = hashlib.sha256(json.dumps([people, far], sort_keys=True).encode()).hexdigest()
    subject = f"{people.get('identities')} synthetic people, threshold at FAR {far:g}"
    for model in content["models"]:
        figures = []
        for factor, found in model["factors"].items():
            # Of levels that are equally bad the most severe one.
            worst = max(reversed(found["levels"]), key=lambda level: level["fnmr"]["value"])
            rate = percent(worst["fnmr"]["value"]) + (f" at {worst['level']}" if worst["fnmr"]["value"] else "")
            figures.append(Figure(f"FNMR, {factor}, worst level", rate, span(worst["fnmr"]), sha))
        for group, found in model.get("groups", {}).items():
            for rate in ("fmr", "fnmr") if found is not None else ():
                figures.append(
                    Figure(f"{rate.upper()}, {group}", percent(found[rate]["value"]), span(found[rate]), sha)
                )
        pictures = _pictures(path.parent, "curves.png", "named.png", "detector.png")
        name = (str(model.get("name", model["label"])), model.get("sha256"))
        notes = [] if model.get("threshold_resolved", True) else [f"too few people for FAR {far:g}: nobody is accepted"]
        sources.append(
            Source(path, "Stress", subject, _command(path, content), [name], [(subject, sha)], figures, pictures, notes)
        )
    return sources


def _audit(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    data = content["data"]
    sha = data.get("fingerprint") or data.get("sha256")
    figures = [Figure("crops", f"{data['crops']:,}", "", sha), Figure("identities", f"{data['identities']:,}", "", sha)]
    figures += [Figure(str(kind), f"{count:,}", "", sha) for kind, count in content["counts"].items()]
    figures += [
        Figure(
            f"people of {Path(str(entry.get('set'))).name} in the training set",
            f"{entry['in_the_training_set']} of {entry['people']}",
            "",
            sha,
        )
        for entry in content.get("against") or []
        if "in_the_training_set" in entry
    ]
    name = str(data.get("name", "training data"))
    return [
        Source(path, "Data", f"audit of {name}", _command(path, content), [_model(content)], [(name, sha)], figures)
    ]


def _crops(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    table = path.with_name("faces.tsv")  # what became of each photo
    sha = sha256_of(table) if table.is_file() else None
    figures = [
        Figure(key.replace("_", " "), f"{value:,}", "", sha)
        for key, value in content.items()
        if isinstance(value, int) and not isinstance(value, bool)
    ]
    without = content.get("identities_without_crop") or []
    figures.append(Figure("identities without a crop", f"{len(without):,}", "", sha))
    name = path.parent.name
    return [Source(path, "Data", f"crops in {name}", "", [], [(table.name, sha)], figures)]


def _held_out(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    pairs = path.with_name("pairs.csv")  # the photos of those who were
    sha = sha256_of(pairs) if pairs.is_file() else None
    figures = [Figure("people held out", f"{content['held_out']['people']:,}", "", sha)]
    source = f"of {content['source']}, seed {content['seed']}"
    return [Source(path, "Data", "people held out", "", [], [(pairs.name, sha)], figures, notes=[source])]


def _comparison(path: Path, content: dict[str, Any], _: Run) -> list[Source]:
    models = [_model(content["a"]), _model(content["b"])]
    sources = []
    for found in content["sets"]:
        sha = found["sha256"]
        rows = [("accuracy", found["accuracy"]), *((f"TAR at FAR {row['far']:g}", row) for row in found["tar_at_far"])]
        figures = [
            Figure(
                f"{label}, A - B",
                f"{100 * row['difference']:+.2f} points (p = {row['p_by_identity']:.2g})",
                span(row),
                sha,
            )
            for label, row in rows
        ]
        data = [(found["name"], sha)]
        sources.append(
            Source(path, "Comparison", found["name"], _command(path, content), models, data, figures,
                   notes=list(found["notes"]), texts=[found["sentence"]])
        )  # fmt: skip
    return sources


Reader = Callable[[Path, dict[str, Any], Run], list[Source]]
_KINDS: list[tuple[Callable[[dict[str, Any]], bool], Reader]] = [
    (lambda c: "history" in c and "best" in c, _training),
    (lambda c: c.get("kind") == "identification", _identification),
    (lambda c: c.get("kind") == "comparison", _comparison),
    (lambda c: "one_to_one" in c or "one_to_many" in c, _ijb),
    (lambda c: c.get("protocol") == "TinyFace", _tinyface),
    (lambda c: "probes" in c and "distractors" in c and "results" in c, _megaface),
    (lambda c: "models" in c and "people" in c, _stress),
    (lambda c: "counts" in c and "limits" in c, _audit),
    (lambda c: isinstance(c.get("sets"), list) and "model" in c, _verification),
    (lambda c: "held_out" in c and "hold_out" in c, _held_out),
    (lambda c: isinstance(c.get("settings"), dict) and "photos" in c, _crops),
]
# The order of the sections.
SECTIONS = (
    "Data", "Training", "Verification", "Error rates by group", "Identification", "IJB", "TinyFace", "MegaFace",
    "Stress", "Comparison",
)  # fmt: skip
