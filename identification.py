"""How good is a model on my own photos? A folder for each person is all it takes.

    python identification.py --checkpoint runs/NAME/embedding.pt --photos my_people --out results/mine
    python identification.py --checkpoint released --gallery known --probes camera --out results/camera
    python identification.py --photos data/crops --hold-out 50 --out data/split      # before training
    python identification.py --checkpoint runs/N/embedding.pt --photos data/split/held-out --aligned --out results/mine

Verification over all pairs: the threshold for each false accept rate that the photos resolve, with intervals by person,
and how many more people the others would take. Closed set: the CMC, everybody known. Open set: detection and
identification rate at false positive identification rates, over random splits into known people and strangers.

Writes to --out: results.json (every figure, hashes of model and data), photos.tsv, pairs.tsv (the most alike photos of
two people, the most unlike of one: wrong labels are among them), pictures of these, and the curves. Faces and features
are kept in the cache by content: the same command goes on where an interrupted run stopped.

--hold-out sets people aside before training: OUT/train is what train.py (or pre_process.py) reads, OUT/held-out has a
folder for each person whom the network will not have seen, OUT/pairs.csv pairs of them for lfw_eval.py and make_bin.py.
"""

import passive_threads  # noqa: F401  # isort: skip

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

import config
import plotting
import utils
from cropping.align import Rule
from embedding import Embedder, open_embedder
from formats.tables import escape
from options import parse, plain_options
from utils import InputError
from verification import identification
from verification.all_pairs import AllPairs, Side, Summary, people_needed, summarise
from verification.hold_out import split
from verification.lfw import CachedFinder, crop_faces
from verification.metrics import evaluate
from verification.people import People, check_apart, embed_people, in_both
from verification.report import Errors, draw_errors
from verification.sets import VerificationSet, read_crops


@utils.command
def main() -> None:
    """Read the options, hold people out or measure."""
    options = parse(config.Identification, __doc__)
    utils.refuse_training(options.out)
    _check(options)
    if options.hold_out is not None:
        print(_held_out(options))
        return
    device = utils.choose_device(options.device)
    embedder = open_embedder(options, device)
    cache = options.cache or options.out / "cache"
    finder = None
    if not options.aligned:
        finder = CachedFinder(
            cast("Rule", options.rule), options.detector_weights, options.max_side or None, device, cache
        )
    folders = [options.photos] if options.photos else [options.gallery, options.probes]
    sources = [
        embed_people(embedder, folder, cache, finder=finder, workers=options.workers) for folder in folders if folder
    ]
    leaks = in_both(sources[0], sources[1]) if len(sources) > 1 else []
    numbers: dict[str, int] = {}
    sides = [source.side(numbers) for source in sources]
    pairs = AllPairs(sides[0], sides[1] if len(sides) > 1 else None)
    summary = summarise(pairs, options.far, seed=options.seed)
    closed, opened, notes = _identify(sides, options)
    results = {
        "kind": "identification",
        "model": embedder.describe(),
        "data": [_describe(source, options) for source in sources],
        "protocol": {
            "gallery_photos": options.gallery_photos,
            "max_side": None if options.aligned else options.max_side,
            "hold_out": options.hold_out,
        },
        "verification": {
            "genuine_pairs": pairs.genuine,
            "genuine_pairs_without_face": pairs.genuine_lost,
            "impostor_pairs": pairs.impostors,
            "eer": summary.eer,
            "eer_by_identity": summary.eer_by_person.to_json(),
            "tar_at_far": [point.to_json() for point in summary.points],
            "people_needed": [people_needed(far, pairs.people, pairs.impostors) for far in options.far],
        },
        "closed_set": closed,
        "open_set": opened,
        "notes": [note for source in sources for note in source.notes] + leaks + notes,
        "seed": options.seed,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    _write_tables(options.out, sources, summary)
    draw(options.out, pairs, results, embedder.name)
    draw_worst(options, sources, summary, embedder, cache)
    if options.scores is not None:
        write_scores(options.scores, sources, pairs)
    utils.write_json(options.out / "run.json", {"options": plain_options(options), "environment": utils.environment()})
    utils.write_json(options.out / "results.json", results)
    print(table(results))
    print(f"\n{options.out / 'results.json'}; curves, photos.tsv, pairs.tsv and the worst pairs beside it")


def _check(options: config.Identification) -> None:
    if options.photos is None and (options.gallery is None or options.probes is None):
        raise InputError("nothing to look at: give --photos DIR, or --gallery DIR and --probes DIR")
    if options.photos is not None and (options.gallery or options.probes):
        raise InputError("--photos makes its own galleries: give it, or --gallery and --probes, not both")
    if options.hold_out is not None:
        if options.photos is None:
            raise InputError("--hold-out takes people out of --photos")
        return
    if options.checkpoint is None:
        raise InputError("--checkpoint: which model? (Without one, --hold-out N sets people aside before training)")
    if options.gallery is not None and options.probes is not None:
        check_apart(options.gallery, options.probes)
    if options.photos is not None and (options.photos / "train.rec").is_file():
        raise InputError(f"--photos {options.photos}: RecordIO; --hold-out N writes people of it as folders")
    if options.scores is not None and options.scores.suffix not in (".tsv", ".npy"):
        raise InputError(f"--scores {options.scores}: a name ending in .tsv or .npy is expected")
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out}: is a file, not a folder")


def _held_out(options: config.Identification) -> str:
    assert options.photos is not None and options.hold_out is not None
    report = split(options.photos, options.out, options.hold_out, options.seed)
    people, held = report["train"]["people"], report["held_out"]["people"]
    return (
        f"{options.out / 'train'}: {people} people to train on\n{options.out / 'held-out'}: {held} people set aside\n"
        f"{options.out / 'pairs.csv'}: {report['pairs']} pairs of them"
    )


def _identify(sides: list[Side], options: config.Identification) -> tuple[Any, Any, list[str]]:
    """The closed-set and open-set figures, None where the people do not suffice, and notes that say why."""
    roles: dict[str, Callable[[np.random.Generator], identification.Roles]]
    if len(sides) == 2:
        gallery, probes = sides
        known = np.isin(probes.labels, gallery.labels)
        present = np.flatnonzero(np.isfinite(gallery.embeddings).all(axis=1))
        every = np.arange(len(probes.labels))
        roles = {
            "closed": lambda _: identification.Roles(present, every[known], known[known]),
            "open": lambda _: identification.Roles(present, every, known),
        }
    else:
        gallery = probes = sides[0]
        count = options.gallery_photos
        roles = {
            "closed": lambda generator: identification.closed_roles(gallery, generator, count),
            "open": lambda generator: identification.open_roles(gallery, generator, count),
        }
    found: dict[str, Any] = {}
    notes = []
    if len(sides) == 2:
        faceless = np.setdiff1d(gallery.labels, gallery.labels[present])
        lost = int(np.isin(probes.labels, faceless).sum())
        if lost:
            notes.append(
                f"{len(faceless)} people have no gallery photo with a face: their {lost} probes can find nobody, and "
                "count as misses"
            )
    for name, choose in roles.items():
        seeds = range(options.splits if len(sides) == 1 else 1)
        try:
            answers = [
                identification.answer(gallery, probes, choose(np.random.default_rng([options.seed, number])))
                for number in seeds
            ]
            if name == "closed":
                found[name] = identification.closed_set(answers, options.seed)
            else:
                found[name] = identification.open_set(answers, options.fpir, options.seed)
        except InputError as error:
            found[name] = None
            notes.append(f"{name} set: {error}")
    return found["closed"], found["open"], notes


def _describe(source: People, options: config.Identification) -> dict[str, Any]:
    reasons: dict[str, int] = {}
    for reason in source.reasons.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "folder": str(source.folder),
        "sha256": source.sha256,
        "people": len(set(source.persons)),
        "photos": len(source.files),
        "photos_without_face": len(source.reasons),
        "reasons": dict(sorted(reasons.items())),
        "aligned": options.aligned,
        "detector_sha256": source.detector or None,
        "face_rule": None if options.aligned else options.rule,
    }


# --- what a person sees ---------------------------------------------------------------------------------------------


def between(interval: dict[str, Any]) -> str:
    """A value with its interval by person."""
    low, high = interval["interval_95"]
    return f"{utils.percent(interval['value'])} [{100 * low:.2f} ... {100 * high:.2f}]"


def table(results: dict[str, Any]) -> str:
    """The figures as text."""
    checked, closed, opened = results["verification"], results["closed_set"], results["open_set"]
    lines = [f"{results['model']['name']}, sha256 {results['model']['sha256']}"]
    for source in results["data"]:
        lines.append(
            f"{source['folder']}: {source['people']} people, {source['photos']} photos, "
            f"{source['photos_without_face']} without a face"
        )
    lines += [
        "",
        f"All pairs: {checked['genuine_pairs']:,} of one person, {checked['impostor_pairs']:,} of two; "
        f"EER {between(checked['eer_by_identity'])}",
        "In brackets: 95 % intervals by person.",
    ]
    needed = {row["far"]: row for row in checked["people_needed"]}
    for point in checked["tar_at_far"]:
        more = needed[point["far"]]
        if not point["resolved"]:
            lines.append(f"  FAR {point['far']:g}: takes {more['more_people_to_resolve']:,} more people, at least")
            continue
        trust, threshold = more["more_people_to_trust"], point["threshold"]
        lines.append(
            f"  FAR {point['far']:g}: cosine {threshold['cosine']:.4f} ({threshold['angle']:.1f}°), "
            f"TAR {between(point['tar_by_identity'])}" + (f"; sure with {trust:,} more people" if trust else "")
        )
    if closed:
        lines += ["", f"Closed set: {closed['probes']} probes, {closed['gallery_people']} people known"]
        lines += [f"  rank {row['rank']}: {between(row['by_identity'])}" for row in closed["ranks"]]
    if opened:
        lines += [
            "",
            f"Open set: {opened['mated_probes']} probes of {opened['gallery_people']} people known, "
            f"{opened['non_mated_probes']} of strangers",
        ]
        for point in opened["dir_at_fpir"]:
            said = between(point["by_identity"]) if point["resolved"] else "not resolved by so few strangers' photos"
            lines.append(f"  DIR at FPIR {point['fpir']:g}: {said}")
    return "\n".join([*lines, *([""] if results["notes"] else []), *results["notes"]])


def _write_tables(out: Path, sources: list[People], summary: Summary) -> None:
    lines = ["photo\tfile\tperson\tside\treason"]
    for side, source in zip(("gallery", "probes") if len(sources) > 1 else ("photos",), sources, strict=True):
        for index, file in enumerate(source.files):
            cells = (
                str(index),
                escape(file),
                escape(source.persons[index]),
                side,
                escape(source.reasons.get(index, "")),
            )
            lines.append("\t".join(cells))
    utils.write_bytes(out / "photos.tsv", ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
    lines = ["kind\tfirst\tsecond\tcosine"]
    for kind, found in (("two_people", summary.nearest_impostors), ("one_person", summary.farthest_genuine)):
        for pair in found:
            names = escape(sources[0].files[pair.first]), escape(sources[-1].files[pair.second])
            lines.append("\t".join([kind, *names, f"{pair.cosine:.6f}"]))
    utils.write_bytes(out / "pairs.tsv", ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))


def write_scores(path: Path, sources: list[People], pairs: AllPairs) -> None:
    """All cosines: a table, or a .npy of the upper triangle (row by row, NaN without a face) or of the matrix."""
    if path.suffix == ".npy":
        count, other = len(sources[0].files), len(sources[-1].files)
        shape = (count * (count - 1) // 2,) if pairs.own else (count, other)
        with utils.atomic_path(path) as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            array[:] = np.nan
            for scores, _, first, second in pairs.blocks("scores"):
                if pairs.own:
                    array[first * count - first * (first + 1) // 2 + second - first - 1] = scores
                else:
                    array[first, second] = scores
            array.flush()
        return
    with utils.atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(b"first\tsecond\tsame\tcosine\n")
        names = [[escape(name).encode("utf-8", "surrogateescape") for name in source.files] for source in sources]
        for scores, same, first, second in pairs.blocks("scores"):
            rows = zip(first.tolist(), second.tolist(), same.tolist(), scores.tolist(), strict=True)
            file.writelines(
                b"%s\t%s\t%d\t%.9g\n" % (names[0][a], names[-1][b], flag, score) for a, b, flag, score in rows
            )


def draw(out: Path, pairs: AllPairs, results: dict[str, Any], model: str) -> None:
    """Distribution of all cosines, and the curves of closed and open set."""
    impostor, genuine = pairs.histograms()
    with plotting.drawing(out / "scores", 8, 4.5) as figure:
        axes = figure.add_subplot(xlabel="cosine of two embeddings", ylabel="share of the pairs, logarithmic")
        width = len(impostor) // 256
        centres = (np.arange(256) + 0.5) / 128 - 1
        for counts, label, colour in ((genuine, "one person", plotting.BLUE), (impostor, "two people", plotting.RED)):
            shares = counts.reshape(256, width).sum(axis=1) / counts.sum()
            shown = f"{label}, {counts.sum():,} pairs"
            axes.step(centres, np.where(shares > 0, shares, np.nan), where="mid", color=colour, label=shown)
        plotting.log_rate_axis(axes, 10 ** np.floor(np.log10(1 / counts.sum())), axis="y")
        used = centres[(impostor + genuine).reshape(256, width).sum(axis=1) > 0]
        axes.set_xlim(max(used.min() - 0.05, -1), 1)
        for point in results["verification"]["tar_at_far"]:
            if point["resolved"]:
                axes.axvline(point["threshold"]["cosine"], color=plotting.BLACK, linestyle="--", linewidth=0.8)
                axes.annotate(
                    f"{point['far']:g}", (point["threshold"]["cosine"], 1), (2, -10),
                    xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8, rotation=90, va="top",
                )  # fmt: skip
        plotting.title(axes, f"all pairs, {model}", f"EER {utils.percent(results['verification']['eer'])}; lines: FAR")
        figure.legend(loc="outside lower center", ncols=2)
    for name in ("cmc", "dir"):  # of an earlier run, which may have had a set that this one lacks
        for suffix in (".png", ".svg"):
            (out / f"{name}{suffix}").unlink(missing_ok=True)
    if results["closed_set"]:
        closed = results["closed_set"]
        with plotting.drawing(out / "cmc", 7, 4.5) as figure:
            axes = figure.add_subplot(xlabel="rank", ylabel="share of the probes")
            axes.plot(
                np.arange(1, len(closed["cmc"]) + 1), closed["cmc"], marker="." if len(closed["cmc"]) < 30 else ""
            )
            bottom = plotting.rate_floor(closed["cmc"][0])
            axes.set_ylim(bottom, 1 + (1 - bottom) / 50)
            said = f"rank 1: {between(closed['ranks'][0]['by_identity'])}"
            plotting.title(axes, f"closed set, {closed['gallery_people']} people, {model}", said)
    if results["open_set"]:
        opened = results["open_set"]
        with plotting.drawing(out / "dir", 7, 4.5) as figure:
            axes = figure.add_subplot(
                xlabel="false positive identification rate", ylabel="detection and identification rate"
            )
            lowest = 10 ** np.floor(np.log10(1 / max(opened["non_mated_probes"], 10)))
            axes.step(np.maximum(opened["curve"]["fpir"], lowest), opened["curve"]["dir"], where="post")
            plotting.log_rate_axis(axes, lowest)
            resolved = [point for point in opened["dir_at_fpir"] if point["resolved"]]
            for point in resolved:
                low, high = point["by_identity"]["interval_95"]
                axes.plot([point["fpir"]] * 2, [low, high], color=plotting.RED, linewidth=1)
                axes.plot(point["fpir"], point["dir"], "o", color=plotting.RED)
            axes.set_ylim(0, 1.02)
            said = f"{opened['gallery_people']} people known, {opened['non_mated_probes']} probes of strangers"
            plotting.title(axes, f"open set, {model}", said + ("; bars: by person" if resolved else ""))


def draw_worst(
    options: config.Identification, sources: list[People], summary: Summary, embedder: Embedder, cache: Path
) -> None:
    """A sheet of the most alike photos of two people and the most unlike of one."""
    worst = [*summary.nearest_impostors[: options.sheet], *summary.farthest_genuine[: options.sheet]]
    files: dict[Path, int] = {}

    def number(source: People, photo: int) -> int:
        return files.setdefault(source.path(photo), len(files))

    shown = np.array([(number(sources[0], pair.first), number(sources[-1], pair.second)) for pair in worst])
    found = read_crops(list(files)) if options.aligned else crop_faces(
        list(files), rule=cast("Rule", options.rule), weights=options.detector_weights,
        max_side=options.max_side or None, device=embedder.model.device, workers=options.workers, cache_dir=cache,
        name="worst pairs",
    )  # fmt: skip
    same = np.arange(len(worst)) >= len(summary.nearest_impostors[: options.sheet])
    pairs = VerificationSet(
        name=sources[-1].folder.name, crops=found.crops, names=[str(file) for file in files], pairs=shown, same=same,
        folds=np.zeros(len(same), np.int64), sha256=sources[-1].sha256, photos=list(files), faces=found.rows,
    )  # fmt: skip
    result = evaluate(np.array([pair.cosine for pair in worst]), same, pairs.folds, name=pairs.name, far_levels=())
    errors = Errors(0.0, np.flatnonzero(~same), np.flatnonzero(same), np.zeros(0, int))
    draw_errors(
        options.out / "worst.png", pairs, result, errors, embedder.name, most=options.sheet,
        statement="wrong labels are among these", heads=("most alike of two people", "most unlike of one person"),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
