"""Challenge 1 on the devkit's feature files: a drop-in for the devkit's own run_experiment.py.

    python megaface/run_experiment.py FEATURES/megaface FEATURES/facescrub _model.bin RESULTS -s 1000000 \\
        -p templatelists/facescrub_features_list.json -dlp templatelists

Same arguments, same files: cmc_*.json and matches_*.json in OUT_ROOT, byte for byte what the devkit writes, and the
lists used in OUT_ROOT/otherFiles. It needs none of the devkit's binaries, a few GB instead of 30, and a minute instead
of half an hour for a million distractors. Where the devkit crashes, hangs or writes garbage there is an error that
names the file, and no results file. With fewer than 100 probes the ROC's impostors are the scores of all probes.

Score matrices are written only when asked for (--score-matrices). --devkit DIR runs the official binaries in DIR, too,
checks what they return and write, and compares their results with this program's.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a script from any folder

import numpy as np
import torch

import utils
from megaface import scores
from megaface.devkit import MODEL, Devkit, compare
from megaface.devkit_json import cmc_text, matches_text
from megaface.features import read_features, write_matrix
from megaface.lists import TemplateList, read_template_list
from megaface.protocol import IMPOSTOR_PROBES, Identification, identification
from megaface.tally import FeatureError, finish_survey, start_survey, worker_threads
from utils import InputError

SIZES = (10, 100, 1000, 10000, 100000, 1000000)
PROBE_LIST = "facescrub_features_list.json"
DISTRACTOR_LIST = "megaface_features_list.json"
MATRIX_ROWS = 64
LENGTH_ERROR = 1e-3  # from which on a feature counts as one that is not of length 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The devkit's command line and a few options more. It has underscores and one-letter options that users' scripts
    rely on, hence argparse instead of a stage in config.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("distractor_feature_path", help="folder of the distractors' features")
    parser.add_argument("probe_feature_path", help="folder of the probes' features")
    parser.add_argument("file_ending", help="what follows a photo's name in its feature's: x.jpg -> x.jpg_model.bin")
    parser.add_argument("out_root", help="folder of the results")
    parser.add_argument("-s", "--sizes", type=int, nargs="+", default=SIZES, help="numbers of distractors")
    parser.add_argument("-m", "--model", help=f"scoring model; this program computes only the devkit's {MODEL}")
    parser.add_argument("-ns", "--num_sets", type=int, default=1, help="sets of distractors, 1 to N (default: 1)")
    parser.add_argument("-d", "--delete_matrices", action="store_true", help="keep no matrices of distractor scores")
    parser.add_argument("-p", "--probe_list", help=f"list of the probes (default: {PROBE_LIST} of the devkit)")
    parser.add_argument("-dlp", "--distractor_list_path", help=f"folder of {DISTRACTOR_LIST}_SIZE_SET (default: same)")
    parser.add_argument("--score-matrices", action="store_true", help="also write the score matrices to otherFiles")
    parser.add_argument("--devkit", type=Path, metavar="DIR", help="run the binaries of this devkit and compare")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cuda, cuda:N or cpu (default: auto)")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Run:
    """One size and set, and its files."""

    experiment: "Experiment"
    size: int
    number: int

    @property
    def name(self) -> str:
        """What the names of its results have in common."""
        experiment = self.experiment
        return f"{experiment.probe_name}_{experiment.distractor_name}_{experiment.algorithm}_{self.size}_{self.number}"

    @property
    def results(self) -> tuple[Path, Path]:
        """cmc_*.json and matches_*.json."""
        out = self.experiment.out
        return out / f"cmc_{self.name}.json", out / f"matches_{self.name}.json"

    @property
    def feature_list(self) -> Path:
        """The list of distractors with the paths of their features."""
        experiment = self.experiment
        name = f"{experiment.distractor_name}_features_{experiment.algorithm}_{self.size}_{self.number}"
        return experiment.other / name

    @property
    def matrix(self) -> Path:
        """The probes' scores against the distractors."""
        return self.experiment.other / f"{self.name}.bin"

    def distractors(self) -> TemplateList:
        """Read the list: the distractors' paths extended to their features, 150 MB a million, so nobody keeps it."""
        return self.experiment.extended(read_template_list(self.distractor_list), self.experiment.distractor_features)

    @property
    def distractor_list(self) -> Path:
        """The list of distractors as the devkit has it."""
        return self.experiment.list_folder / f"{DISTRACTOR_LIST}_{self.size}_{self.number}"


class Experiment:
    """All that the command line asks for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out = Path(options.out_root)
        self.other = self.out / "otherFiles"
        self.distractor_features = _folder(options.distractor_feature_path)
        self.probe_features = _folder(options.probe_feature_path)
        self.ending = options.file_ending
        self.algorithm = self.ending.split(".")[0].strip("_")
        self.devkit = None if options.devkit is None else Devkit.at(options.devkit, _path(options.model))
        if self.devkit is None and options.model is not None and Path(options.model).name != MODEL:
            raise InputError(f"-m {options.model}: only {MODEL} can be computed here; others need --devkit DIR")
        self.probe_list = _path(options.probe_list) or self._default(options.devkit) / PROBE_LIST
        self.list_folder = _path(options.distractor_list_path) or self._default(options.devkit)
        self.probe_name = self.probe_list.name.split("_")[0]
        self.distractor_name = DISTRACTOR_LIST.split("_")[0]
        self.keep_matrices = not options.delete_matrices
        self.write_matrices = options.score_matrices
        if min(options.sizes) < 1:
            raise InputError(f"-s {min(options.sizes)}: a size has to be at least 1")
        if options.num_sets < 1:
            raise InputError(f"-ns {options.num_sets}: has to be at least 1")
        sets = range(1, options.num_sets + 1)
        self.runs = [Run(self, size, number) for number in sets for size in dict.fromkeys(options.sizes)]

    @staticmethod
    def _default(devkit: Path | None) -> Path:
        """Where the template lists are when nobody says it."""
        here = Path(__file__).resolve().parent
        places = [here / "templatelists", here / "devkit" / "templatelists"] if devkit is None else []
        if devkit is not None:
            places = [devkit / "templatelists"]
        for place in places:
            if place.is_dir():
                return place
        raise InputError(f"{places[0]}: no template lists there; say where they are with -p FILE and -dlp DIR")

    def extended(self, photos: TemplateList, features: str) -> TemplateList:
        """A list with the paths of the features in place of those of the photos."""
        paths = [os.path.join(features, path + self.ending) for path in photos.paths]  # noqa: PTH118 - a million
        return TemplateList(paths, photos.ids)

    @cached_property
    def probes(self) -> TemplateList:
        """The probes, their paths extended to their features."""
        photos = read_template_list(self.probe_list, with_ids=True)
        assert photos.ids is not None
        if len(set(photos.ids)) == len(photos):
            raise InputError(f"{self.probe_list}: no identity has two probes, so there is nothing to be found")
        return self.extended(photos, self.probe_features)

    @property
    def probe_feature_list(self) -> Path:
        """The list of probes with the paths of their features."""
        return self.other / f"{self.probe_name}_features_{self.algorithm}"

    @property
    def probe_matrix(self) -> Path:
        """The probes' scores against each other."""
        return self.other / f"{self.probe_name}_{self.probe_name}_{self.algorithm}.bin"


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise InputError(f"{text}: no such folder of features")
    return text


def write_list(path: Path, features: TemplateList) -> None:
    """A list as the devkit's script writes it."""
    content = {"path": features.paths} | ({} if features.ids is None else {"id": features.ids})
    utils.write_text(path, json.dumps(content, sort_keys=True, indent=4))


def load(features: TemplateList, what: str, dimensions: int | None = None) -> np.ndarray:
    """Read the features of a list, float32 [n, d]."""
    with utils.progress(len(features), f"reading {what}", unit="file") as bar:
        return read_features(features.paths, dimensions=dimensions, advance=bar.update)


def warn_of_lengths(features: np.ndarray, what: str) -> None:
    """Say so when features are not of length 1: neither the devkit nor this program makes them so."""
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features))
    least, most = float(lengths.min()), float(lengths.max())
    if most - 1 > LENGTH_ERROR or 1 - least > LENGTH_ERROR:
        print(
            f"the {what}' features have lengths of {least:.3g} to {most:.3g}, not 1. The devkit compares distances and "
            "does not normalise, nor does this program: a model whose similarity is the cosine scores worse like this",
            file=sys.stderr,
        )


def matrix_rows(left: np.ndarray, right: np.ndarray, what: str) -> Iterator[np.ndarray]:
    """The devkit's score matrix [n, m] in blocks of rows, exact to the bit."""
    tensors = torch.from_numpy(left), torch.from_numpy(right)
    with worker_threads(torch.device("cpu")) as pool:
        surveys = [finish_survey(side, "feature", start_survey(side, pool)) for side in (left, right)]
    squares = [torch.from_numpy(survey.squares) for survey in surveys]
    with utils.progress(len(left), f"writing {what}", unit="row") as bar:
        for start in range(0, len(left), MATRIX_ROWS):
            rows = slice(start, start + MATRIX_ROWS)
            yield scores.block_scores(tensors[0][rows], tensors[1], squares[0][rows], squares[1]).numpy()
            bar.update(min(MATRIX_ROWS, len(left) - start))


def compute(
    run: Run, probes: np.ndarray, distractors: np.ndarray, paths: list[str], device: torch.device
) -> Identification:
    """Challenge 1 for one list of distractors, `paths` its files."""
    ids = run.experiment.probes.ids
    assert ids is not None
    try:
        with utils.progress(min(run.size, len(distractors)), "matching", unit="distractor") as bar:
            (result,) = identification(probes, ids, distractors, [run.size], device=device, advance=bar.update)
    except FeatureError as error:
        side = run.experiment.probes.paths if error.side == "probe" else paths
        raise InputError(f"{side[error.row]}: {error.reason}") from error
    except InputError as error:
        raise InputError(f"{run.experiment.probe_feature_list}, {run.feature_list}: {error}") from error
    return result


def run_devkit(run: Run, shape: tuple[int, int], texts: tuple[bytes, bytes]) -> tuple[tuple[bytes, bytes], list[str]]:
    """What the official binaries say of one list (`shape`: probes, distractors), and how that differs from ours."""
    experiment = run.experiment
    assert experiment.devkit is not None
    experiment.devkit.identification(run.feature_list, experiment.probe_feature_list, run.matrix, shape)
    written = tuple(path.with_name(f".{path.name}.devkit") for path in run.results)
    try:
        experiment.devkit.fuse_results(
            run.matrix, experiment.probe_matrix, experiment.probe_feature_list, run.size, *written
        )
        theirs = (written[0].read_bytes(), written[1].read_bytes())
    finally:
        for path in written:
            path.unlink(missing_ok=True)
        if not experiment.keep_matrices:
            run.matrix.unlink(missing_ok=True)
    pairs = zip(run.results, theirs, texts, strict=True)
    return theirs, [said for path, their, our in pairs if (said := compare(path.name, their, our))]


def prepare(experiment: Experiment) -> None:
    """Remove earlier results that this run would replace, so that an error leaves none, and write the lists used."""
    for run in experiment.runs:
        for path in run.results:
            path.unlink(missing_ok=True)
    for run in experiment.runs:
        print(f"Creating feature list of {run.size} photos for set {run.number}")
        write_list(run.feature_list, run.distractors())
    write_list(experiment.probe_feature_list, experiment.probes)


@utils.command
def main() -> int:
    """Compute or run everything, then write all results at once."""
    options = parse()
    experiment = Experiment(options)
    device = utils.choose_device(options.device)
    prepare(experiment)
    probes = load(experiment.probes, "probes")
    warn_of_lengths(probes, "probes")
    if len(probes) < IMPOSTOR_PROBES:
        print(f"{len(probes)} probes, fewer than {IMPOSTOR_PROBES}: the ROC's impostors are the scores of all of them")
    if experiment.devkit is not None:
        print("Running probe to probe comparison")
        lists = experiment.probe_feature_list, experiment.probe_feature_list
        experiment.devkit.identification(*lists, experiment.probe_matrix, (len(probes), len(probes)))
    finished: list[tuple[Path, bytes]] = []
    differences: list[str] = []
    for run in experiment.runs:
        print(f"Running test with size {run.size} images for set {run.number}")
        listed = run.distractors()
        if len(listed) < run.size:
            print(f"{run.distractor_list}: only {len(listed)} distractors, not {run.size}", file=sys.stderr)
        distractors = load(listed, "distractors", probes.shape[1])
        warn_of_lengths(distractors, "distractors")
        result = compute(run, probes, distractors, listed.paths, device)
        texts = (cmc_text(result).encode(), matches_text(result).encode())
        if experiment.devkit is not None:
            texts, found = run_devkit(run, (len(probes), len(distractors)), texts)
            differences += found
        elif experiment.write_matrices and experiment.keep_matrices:
            blocks = matrix_rows(probes, distractors, "distractor scores")
            write_matrix(run.matrix, len(probes), len(distractors), blocks)
        finished += zip(run.results, texts, strict=True)
        counts = len(result.ids), result.distractors, len(result.pairs)
        print("{:,} probes, {:,} distractors, {:,} genuine pairs".format(*counts))
        print(f"Rank 1: {result.cmc[0]:f}", flush=True)
    if experiment.devkit is None and experiment.write_matrices:  # now that all features are known to be usable
        write_matrix(experiment.probe_matrix, len(probes), len(probes), matrix_rows(probes, probes, "probe scores"))
    for path, text in finished:
        utils.write_bytes(path, text)
    if experiment.devkit is not None:
        for difference in differences:
            print(f"error: {difference}", file=sys.stderr)
        if not differences:
            print("the devkit's results are identical to this program's")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
