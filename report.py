"""Everything that is known about a run, as one HTML file and a model card.

    python report.py runs/NAME --out report.html
    python report.py runs/A runs/B --out compared.html             # side by side
    python report.py runs/NAME results/lfw results/ijb --together --out report.html

Looks in each folder, and below it, for what the stages wrote: crops and audit, training, verification, error rates by
group, identification, IJB, TinyFace, MegaFace, stress, comparisons. Every figure stands with its interval, the command
that made it and the hashes of data and model. The file needs no network, opens from a disk, and prints.

MODEL_CARD.md beside it (one for each run: MODEL_CARD-NAME.md) says the same of the model, and refuses to print a figure
without the hash of the data it was measured on.
"""

import passive_threads  # noqa: F401  # isort: skip

import os
import shlex
import sys
from pathlib import Path

import config
import utils
from options import parse
from reporting.card import card
from reporting.facts import Run, read_run
from reporting.page import page
from verification.scores import distinct_names


@utils.command
def main() -> None:
    """Read the runs, write both files."""
    options = parse(config.Report, __doc__)
    if options.out.suffix.lower() not in (".html", ".htm"):
        raise utils.InputError(f"--out {options.out}: a page of HTML; give a name that ends in .html")
    runs = [read_run(folder, label) for folder, label in zip(options.runs, _labels(options.runs), strict=True)]
    if options.together:
        runs = [joined(runs)]
    title = options.title or "Report on " + " and ".join(run.label for run in runs)
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    stems = [f"MODEL_CARD-{name}" for name in distinct_names([run.label for run in runs])]
    if len(runs) == 1:
        stems = ["MODEL_CARD"]
    cards = {options.out.with_name(f"{stem}.md"): card(run) for stem, run in zip(stems, runs, strict=True)}
    utils.write_text(options.out, page(runs, title, command))
    for path, text in cards.items():
        utils.write_text(path, text)
    for run in runs:
        figures = sum(len(source.figures) for source in run.sources)
        print(f"{run.label}: {figures} figures from {len({source.path for source in run.sources})} files")
        for text in run.unread:
            print(f"  not in the report: {text}")
    print(f"{options.out} ({options.out.stat().st_size / 1e6:.1f} MB), {', '.join(map(str, cards))}")


def _labels(folders: list[Path]) -> list[str]:
    """A name for each run: its folder's own, with as many of those above as it takes to tell all apart."""
    parts = [Path(os.path.realpath(folder)).parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise utils.InputError(f"{folders[0]}: is named twice")


def joined(runs: list[Run]) -> Run:
    """Folders of one model as one run."""
    trained = next((run for run in runs if run.history), runs[0])
    return Run(
        label=trained.label,
        folder=trained.folder,
        sources=[source for run in runs for source in run.sources],
        history=trained.history,
        options=trained.options,
        embedding_sha256=trained.embedding_sha256,
        unread=[text for run in runs for text in run.unread],
    )


if __name__ == "__main__":
    sys.exit(main())
