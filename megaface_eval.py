"""Stage 6: MegaFace Challenge 1 for a face model, on the aligned crops of stage 5.

    python megaface_eval.py --checkpoint runs/NAME/embedding.pt
    python megaface_eval.py --checkpoint FILE --probe-list megaface/devkit/templatelists/facescrub_features_list.json \\
        --distractor-list megaface/devkit/templatelists/megaface_features_list.json_1000000_1 --noise exclude
    python megaface_eval.py --checkpoint FILE --write-bin    # also what the devkit's own script reads

Embeddings of probes and distractors are stored packed in OUT/features; a killed run goes on from there, and --shard,
torchrun or Slurm share them among processes. Then (in the last process, if there are several) Challenge 1 runs on the
raw lists and once more with the noise lists applied. OUT gets results.json, the devkit's cmc_*.json and matches_*.json
(with the lists their numbers refer to) for each treatment, CMC and ROC, and a sheet of the worst misses.

The photos of a list may lie in a folder inside of the tree, such as FlickrFinal2; it is found and named. A photo
without a feature is an error. With --allow-missing a missing probe fails in every pair (last rank, lowest score) and a
missing distractor matches nothing but still counts; OUT/missing.tsv names them all. Where more than half of the probes
or of the distractors are missing, no figure is given.
"""

import passive_threads  # noqa: F401  # isort: skip

import contextlib
import glob
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch

import config
import plotting
import utils
from cropping.contents import photos_sha256
from embedding import Embedder, open_embedder
from formats.names import path_parts
from formats.tables import escape
from megaface import curves
from megaface.devkit_json import cmc_text, matches_text
from megaface.embed import embed, embed_share
from megaface.features import Store, write_features
from megaface.lists import NoiseList, TemplateList, read_noise_list, read_template_list
from megaface.noise import RAW, REPLACE, Entrants, treat
from megaface.participants import Side, open_side
from megaface.protocol import Identification, identification
from megaface.report import Outcome, misses_sheet, table
from options import parse
from processes import Shard
from utils import InputError

PROBES, DISTRACTORS = "facescrub", "megaface"  # as the devkit's files are called
LIST_SIZE = re.compile(r"_([0-9]{1,18})_[0-9]+$")  # megaface_features_list.json_SIZE_SET
MOST_MISSING = (
    0.5  # of a side: a missing distractor matches nothing, so the fewer there are the better the figures look
)


@utils.command
def main() -> None:
    """Embed, compare, report."""
    options = parse(config.MegafaceEval, __doc__)
    if options.out is not None:
        utils.refuse_training(options.out)
    _check(options)
    shard = Shard.parse(options.shard)
    device = utils.own_device(options.device)
    noise = _noise_lists(options)
    sides = _open_sides(options)
    embedder = open_embedder(options, device)
    name = _model_name(options.checkpoint)
    out = options.out or Path("results") / f"megaface-{name}"
    _report_missing(out, sides, [side.reasons for side in sides], options.allow_missing)
    with contextlib.ExitStack() as stack:
        if shard.count > 1 and not _is_last(out, sides, embedder, options.workers, shard, stack):
            return
        _evaluate(options, out, name, sides, embedder, noise, device)


def _evaluate(
    options: config.MegafaceEval,
    out: Path,
    name: str,
    sides: tuple[Side, Side],
    embedder: Embedder,
    noise: tuple[str, NoiseList, NoiseList] | None,
    device: torch.device,
) -> None:
    """Embed what no shard has, compare, report."""
    stores = _embed(out, sides, embedder, options.workers)
    _report_missing(out, sides, [store.problems for store in stores], options.allow_missing)
    if options.write_bin:
        _write_devkit(out / "devkit", name, sides, stores, _sizes(options, len(sides[1])))
    outcomes = _compete(options, out, name, sides, stores, noise, device)
    _write_report(options, out, name, embedder, sides, stores, outcomes)
    print(f"{embedder.name}: fed with {embedder.feeding}\n")
    print(table(outcomes, sides, options.far))
    print(f"\n{out / 'results.json'}; curves, misses and the devkit's files beside it")


# ---------------------------------------------------------------------------------------------- what is asked for


def _check(options: config.MegafaceEval) -> None:
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out}: is a file, not a folder")


def _noise_lists(options: config.MegafaceEval) -> tuple[str, NoiseList, NoiseList] | None:
    """The second treatment with its lists; None when only the raw result is wanted or the lists are not there."""
    paths = options.facescrub_noises, options.megaface_noises
    if options.noise == RAW:
        return None
    if options.noise is None and not any(path.is_file() for path in paths):
        print(f"no noise lists ({paths[0]}, {paths[1]}): the raw result only", file=sys.stderr)
        return None
    return options.noise or REPLACE, read_noise_list(paths[0]), read_noise_list(paths[1])


def _open_sides(options: config.MegafaceEval) -> tuple[Side, Side]:
    if options.facescrub.resolve() == options.megaface.resolve():
        raise InputError(f"--megaface {options.megaface}: is --facescrub, too; nobody may be probe and distractor")
    lists = (
        None if options.probe_list is None else read_template_list(options.probe_list, with_ids=True),
        None if options.distractor_list is None else read_template_list(options.distractor_list),
    )
    probes = open_side(options.facescrub, "probes", lists[0], with_ids=True)
    distractors = open_side(options.megaface, "distractors", lists[1], with_ids=False)
    for side in (probes, distractors):
        if side.below:
            print(f"{side.folder}: the photos of the list lie in {side.below}", file=sys.stderr)
    for path, given in zip((options.probe_list, options.distractor_list), lists, strict=True):
        again = 0 if given is None else len(given) - len(set(given.paths))
        if again:
            print(f"{path}: {again:,} entries name a photo again; each counts", file=sys.stderr)
    named = None if options.distractor_list is None else LIST_SIZE.search(options.distractor_list.name)
    if named and int(named[1]) != len(distractors):
        print(f"{options.distractor_list}: {len(distractors):,} distractors, not {int(named[1]):,}", file=sys.stderr)
    assert probes.ids is not None
    if len(set(probes.ids)) == len(probes):
        raise InputError(f"{options.probe_list or options.facescrub}: no identity has two probes")
    if options.sizes and max(options.sizes) > len(distractors):
        raise InputError(f"--sizes {max(options.sizes)}: there are {len(distractors)} distractors")
    return probes, distractors


def _sizes(options: config.MegafaceEval, distractors: int) -> list[int]:
    """The numbers of distractors, ascending: as asked for, or powers of ten and all."""
    if options.sizes:
        return sorted({min(size, distractors) for size in options.sizes})
    powers = [10**power for power in range(1, 9) if 10**power < distractors]
    return [*powers, distractors]


def _model_name(checkpoint: str) -> str:
    """A name for files, from the checkpoint's and its folder's: runs/ms1m/embedding.pt -> ms1m-embedding."""
    path = Path(checkpoint)
    parts = [path.parent.name, path.stem] if path.suffix else [path.name]
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(part for part in parts if part)).strip("-") or "model"


# ---------------------------------------------------------------------------------------------- features


def _report_missing(out: Path, sides: tuple[Side, Side], reasons: list[dict[int, str]], allow: bool) -> None:
    """Name every photo without a feature in OUT/missing.tsv; `InputError` unless that is allowed."""
    missing = [
        (what, side.names[row], reason)
        for what, side, found in zip((PROBES, DISTRACTORS), sides, reasons, strict=True)
        for row, reason in sorted(found.items())
    ]
    path = out / "missing.tsv"
    if not missing:
        path.unlink(missing_ok=True)
        return
    lines = ["side\tname\treason", *("\t".join(map(escape, row)) for row in missing)]
    utils.write_bytes(path, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
    first, name, reason = missing[0]
    said = f"{len(missing)} photos have no feature, first {name} ({first}): {reason}; all are named in {path}"
    for what, side, found in zip(("probes", "distractors"), sides, reasons, strict=True):
        if len(found) > MOST_MISSING * len(side):
            shares = f"{len(found):,} of {len(side):,} {what} are missing in {side.folder}"
            raise InputError(f"{said}; {shares}: no figure of the rest would mean anything. Is it the right folder?")
    if not allow:
        raise InputError(f"{said}; --allow-missing counts them as failures")
    print(said, file=sys.stderr)


def _embed(out: Path, sides: tuple[Side, Side], embedder: Embedder, workers: int | None) -> tuple[Store, Store]:
    workers = utils.worker_count(workers)
    probes, distractors = (
        embed(side, out / "features" / name, embedder, what, workers)
        for side, name, what in zip(sides, (PROBES, DISTRACTORS), ("probes", "distractors"), strict=True)
    )
    return probes, distractors


def _is_last(
    out: Path,
    sides: tuple[Side, Side],
    embedder: Embedder,
    workers: int | None,
    shard: Shard,
    stack: contextlib.ExitStack,
) -> bool:
    """Embed a shard's share; whether it is the one that goes on, which `stack` then keeps to itself."""
    left = sum(
        embed_share(side, out / "features" / name, embedder, what, utils.worker_count(workers), shard)
        for side, name, what in zip(sides, (PROBES, DISTRACTORS), ("probes", "distractors"), strict=True)
    )
    if left:
        print(f"shard {shard} is done; {left} parts are with other shards, the last of which compares")
        return False
    try:
        stack.enter_context(utils.locked(out / "features" / ".last", "another shard compares"))
    except utils.Busy as busy:
        print(f"shard {shard} is done; {busy}")
        return False
    return True


def _write_devkit(
    folder: Path, name: str, sides: tuple[Side, Side], stores: tuple[Store, Store], sizes: list[int]
) -> None:
    """Features and lists as the devkit's script reads them; missing features have no file, as with any other tool."""
    for side in sides:
        for photo in side.names:
            try:
                path_parts(photo)
            except ValueError as error:
                raise InputError(f"--write-bin: {photo!r} of {side.folder} or its list is {error}") from None
    for side, store, what in zip(sides, stores, (PROBES, DISTRACTORS), strict=True):
        rows = [row for row in range(len(side)) if row not in store.problems]
        for row in store.problems:  # that of an earlier run, when there was a feature
            (folder / what / f"{side.names[row]}_{name}.bin").unlink(missing_ok=True)
        with utils.progress(len(rows), f"writing {what} .bin", unit="file") as bar:
            for start in range(0, len(rows), 1 << 16):
                part = rows[start : start + (1 << 16)]
                paths = [str(folder / what / f"{side.names[row]}_{name}.bin") for row in part]
                write_features(paths, np.asarray(store.features[part]), bar.update)
    lists = folder / "templatelists"
    utils.write_bytes(lists / f"{PROBES}_features_list.json", _as_json(TemplateList(sides[0].names, sides[0].ids)))
    for size in sizes:
        content = TemplateList(sides[1].names[:size], None)
        utils.write_bytes(lists / f"{DISTRACTORS}_features_list.json_{size}_1", _as_json(content))
    command = ["python", "megaface/run_experiment.py", folder / DISTRACTORS, folder / PROBES, f"_{name}.bin"]
    command += [folder / "results", "-s", *sizes, "-p", lists / f"{PROBES}_features_list.json", "-dlp", lists]
    print(shlex.join(map(str, command)))


def _as_json(content: TemplateList) -> bytes:
    texts = {"path": content.paths} | ({} if content.ids is None else {"id": content.ids})
    return json.dumps(texts, indent=1).encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------- the challenge


def _compete(
    options: config.MegafaceEval,
    out: Path,
    name: str,
    sides: tuple[Side, Side],
    stores: tuple[Store, Store],
    noise: tuple[str, NoiseList, NoiseList] | None,
    device: torch.device,
) -> list[Outcome]:
    """Challenge 1 under each treatment; writes the devkit's files of each."""
    probes, distractors = sides
    features = np.asarray(stores[0].features), stores[1].features
    nobody = np.zeros(len(probes), bool), np.zeros(len(distractors), bool)
    marks = nobody if noise is None else (noise[1].marks(probes.names), noise[2].marks(distractors.names))
    if noise is not None:
        for listed, mark, path, what in (
            (noise[1], marks[0], options.facescrub_noises, "probes"),
            (noise[2], marks[1], options.megaface_noises, "distractors"),
        ):
            if not mark.any():  # the other side's list, or names in another form: a cleaned result that is the raw one
                print(f"{path}: none of its {len(listed):,} names is among the {what}", file=sys.stderr)
    gone = [np.isin(np.arange(len(store.names)), list(store.problems)) for store in stores]
    assert probes.ids is not None
    outcomes = []
    for treatment in (RAW,) if noise is None else (RAW, noise[0]):
        entrants = treat(
            treatment,
            features[0],
            probes.ids,
            features[1],
            absent=gone[0],
            missing=gone[1],
            noisy_probes=marks[0],
            noisy_distractors=marks[1],
        )
        sizes = _sizes(options, len(distractors))
        results = []
        for result in _identify(entrants, sizes, device):
            used = entrants.distractor_rows[: result.distractors]
            if gone[1][used].sum() > MOST_MISSING * len(used):
                said = f"most of the first {len(used):,} distractors are missing"
                print(f"{said}: no figure of the rest would mean anything", file=sys.stderr)
                continue
            results.append(result)
            passed = np.append(entrants.distractor_rows, len(distractors))[result.distractors]
            noisy = int(marks[0].sum()), int(marks[1][:passed].sum())
            outcomes.append(Outcome(entrants, result, *noisy, int(gone[1][used].sum())))
        _write_results(out / treatment, name, entrants, results, sides)
    if not outcomes:
        raise InputError(f"{options.megaface}: most distractors of every size are missing")
    return outcomes


def _identify(entrants: Entrants, sizes: list[int], device: torch.device) -> list[Identification]:
    count = len(entrants.distractors)
    sizes = list(dict.fromkeys(min(size, count) for size in sizes))
    with utils.progress(sizes[-1], f"matching ({entrants.treatment})", unit="distractor") as bar:
        return identification(
            entrants.probes,
            entrants.ids,
            cast("np.ndarray", entrants.distractors),  # a `RowView` does all that is asked of it
            sizes,
            absent=entrants.absent,
            ignored=entrants.ignored,
            device=device,
            advance=bar.update,
        )


def _write_results(
    folder: Path, name: str, entrants: Entrants, results: list[Identification], sides: tuple[Side, Side]
) -> None:
    """The devkit's two files for each size, and the lists that their numbers refer to."""
    lists = {
        folder / "probes.json": _as_json(
            TemplateList([sides[0].names[row] for row in entrants.probe_rows], entrants.ids)
        ),
        folder / "distractors.json": _as_json(
            TemplateList([sides[1].names[row] for row in entrants.distractor_rows], None)
        ),
    }
    kept = all(path.is_file() and path.read_bytes() == text for path, text in lists.items())
    # Of this model's earlier run; where the lists are others now, of every model's: their numbers would mean others.
    names = glob.escape(name) if kept else "*"
    for kind in ("cmc", "matches"):
        for path in folder.glob(f"{kind}_{PROBES}_{DISTRACTORS}_{names}_*_1.json"):
            path.unlink()
    for result in results:
        ending = f"{PROBES}_{DISTRACTORS}_{name}_{result.size}_1.json"
        utils.write_text(folder / f"cmc_{ending}", cmc_text(result))
        utils.write_text(folder / f"matches_{ending}", matches_text(result))
    for path, text in lists.items():
        utils.write_bytes(path, text)


# ---------------------------------------------------------------------------------------------- the report


def _write_report(
    options: config.MegafaceEval,
    out: Path,
    name: str,
    embedder: Embedder,
    sides: tuple[Side, Side],
    stores: tuple[Store, Store],
    outcomes: list[Outcome],
) -> None:
    largest = {outcome.entrants.treatment: outcome for outcome in outcomes}  # sizes ascend
    drawn = [curves.from_result(outcome.result, outcome.name) for outcome in largest.values()]
    curves.draw(out, drawn, f"MegaFace Challenge 1, {name}")
    for stale in out.glob("misses-*.png"):  # of a treatment that an earlier run had
        stale.unlink()
    for treatment, outcome in largest.items():
        sheet = misses_sheet(outcome, *sides, name, options.sheet)
        plotting.save_png(out / f"misses-{treatment}.png", sheet)
    report = {
        "model": embedder.describe(),
        "probes": _describe_side(sides[0], stores[0], options.probe_list, out),
        "distractors": _describe_side(sides[1], stores[1], options.distractor_list, out),
        "noise_lists": {
            str(path): utils.sha256_of(path)
            for path in (options.facescrub_noises, options.megaface_noises)
            if len(largest) > 1
        },
        "results": [outcome.to_json(options.far) for outcome in outcomes],
        "environment": utils.environment(),
    }
    utils.write_json(out / "results.json", report)


def _describe_side(side: Side, store: Store, template: Path | None, out: Path) -> dict[str, object]:
    names = [name for name in side.files if name is not None]
    return {
        "folder": str(side.folder),
        "list": None if template is None else str(template),
        "photos_sha256": photos_sha256([side.folder / name for name in names], names, out / "hashes"),
        "names_sha256": hashlib.sha256("\0".join(side.names).encode("utf-8", "surrogateescape")).hexdigest(),
        "count": len(side),
        **side.counts(),
        "missing": len(store.problems),
        "annotations_without_photo": side.annotations_only,
    }


if __name__ == "__main__":
    sys.exit(main())
