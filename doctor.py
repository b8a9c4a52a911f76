"""Why is my accuracy wrong? Feed a model in all the usual wrong ways and see which one it likes best.

    python doctor.py --checkpoint model.onnx --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --channels rgb --bin lfw.bin
    python doctor.py --checkpoint runs/NAME/embedding.pt --lfw data/lfw

People report 72 %, 93 % or 97.5 % on LFW for a model that has 99.8 %, because of the order of the channels, the mean
and deviation, the range of the pixels, the crop or the mirror image. This tries them on a few hundred pairs: first
every order of channels with every usual normalisation, then, with the best of these, tighter, looser and shifted
crops, with and without the mirror image. For a training checkpoint it also shows the two mistakes made inside the
model: features taken in training mode, and the head's cosines taken for the embedding. Printed: the accuracy of each,
which ways are as good as the best within chance, what these pairs decide, and what they leave open.
"""

import passive_threads  # noqa: F401  # isort: skip

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

import config
import download
import utils
from config import CROP_SIZE
from embedding import Embedder, Preprocessing, UnstatedError, open_embedder
from models import MEAN, STD
from options import parse, refuse_useless
from training import storage
from utils import InputError
from verification.features import verify
from verification.metrics import VerificationResult, worst_scores
from verification.sets import VerificationSet, open_set

# What networks are fed with: (name, mean, std, pixel range).
NORMALISATIONS = {
    "ImageNet (this repository)": (MEAN, STD, 1.0),
    "-1 to 1 (InsightFace, FaceNet)": ((0.5,) * 3, (0.5,) * 3, 1.0),
    "0 to 1": ((0.0,) * 3, (1.0,) * 3, 1.0),
    "0 to 255": ((0.0,) * 3, (1.0,) * 3, 255.0),
    "ImageNet on 0 to 255": (MEAN, STD, 255.0),
}
# Part of the crop's side that is seen: below 1 tighter, above 1 looser; then shifts in pixels, x and y.
CROPS = {
    "tighter crop (85 %)": (0.85, 0, 0),
    "looser crop (115 %)": (1.15, 0, 0),
    "looser crop (130 %)": (1.3, 0, 0),
    "crop 8 pixels higher": (1.0, 0, -8),
    "crop 8 pixels lower": (1.0, 0, 8),
}
AS_CUT = "crops as they are"
HEAD_IDENTITIES = 10_000  # cosines to so many centres show what the head does; all of two million would take 20 GB
CHANCE = 0.01  # a difference that chance would make less often than this is believed


@dataclass(frozen=True)
class Trial:
    """One way of feeding the model and what came of it."""

    name: str
    result: VerificationResult
    way: Preprocessing | None  # None for a mistake inside the model
    cut: str = AS_CUT  # how the faces are cut

    @property
    def accuracy(self) -> float:
        """Accuracy over the folds."""
        return self.result.accuracy


def subset(pairs: VerificationSet, most: int) -> VerificationSet:
    """At most `most` pairs of a set, spread evenly over both kinds; ten folds, drawn anew."""
    chosen = []
    for kind in (True, False):
        members = np.flatnonzero(pairs.same == kind)
        take = min(len(members), most // 2)
        chosen.append(members[np.unique(np.linspace(0, len(members) - 1, take).round().astype(int))])
    if min(map(len, chosen)) < 20:
        raise InputError(f"{pairs.name}: {len(chosen[0])} + {len(chosen[1])} pairs are too few to tell anything")
    rows = np.concatenate(chosen)
    folds = np.concatenate([np.arange(len(part)) % 10 for part in chosen])
    images, position = np.unique(pairs.pairs[rows], return_inverse=True)
    missing = {new: pairs.missing[old] for new, old in enumerate(images.tolist()) if old in pairs.missing}
    return dataclasses.replace(
        pairs,
        crops=pairs.crops[images],
        names=[pairs.names[image] for image in images],
        pairs=position.reshape(-1, 2),
        same=pairs.same[rows],
        folds=folds,
        missing=missing,
        photos=None,
        faces=None,
    )


def recrop(pairs: VerificationSet, part: float, dx: float, dy: float) -> VerificationSet:
    """The set as if the faces had been cut `part` times as large, `dx`, `dy` pixels aside.

    Cut out of the crops themselves: what lies beyond their border repeats the border's pixels.
    """
    centre = (CROP_SIZE - 1) / 2
    offset = np.array([centre + dx, centre + dy]) - part * centre
    matrix = np.array([[part, 0, offset[0]], [0, part, offset[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (CROP_SIZE, CROP_SIZE)
    given = (pairs.crops[row] for row in range(len(pairs.crops)))
    crops = [cv2.warpAffine(crop, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE) for crop in given]
    return dataclasses.replace(pairs, crops=np.stack(crops))


# --- mistakes inside the model ----------------------------------------------------------------------------------------


class _InTrainingMode(nn.Module):
    """The network as it behaves when nobody called eval(): batch statistics and dropout."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = [network]  # out of reach of eval()

    def forward(self, crops: Tensor) -> Tensor:
        network = self.inner[0]
        if len(crops) == 1:  # the last of a set; a crop alone has no statistics, nor has one beside itself
            return self(crops.repeat(2, 1, 1, 1))[:1]
        before = {key: value.clone() for key, value in network.state_dict().items()}
        network.train()
        try:
            with torch.random.fork_rng([crops.device] if crops.is_cuda else []):
                torch.manual_seed(0)  # dropout
                return network(crops)
        finally:
            network.eval()
            network.load_state_dict(before)  # batch norm has counted


class _Logits(nn.Module):
    """The head's cosines [N, centres], to the first `HEAD_IDENTITIES` at most, in place of the feature."""

    centres: Tensor

    def __init__(self, network: nn.Module, centres: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("centres", nn.functional.normalize(centres.flatten(0, -2)[:HEAD_IDENTITIES].float()))

    def forward(self, crops: Tensor) -> Tensor:
        return nn.functional.normalize(self.network(crops)) @ self.centres.T


def inner_mistakes(embedder: Embedder, checkpoint: Path) -> Iterator[tuple[str, Embedder]]:
    """Models made from this one by the mistakes that a caller makes inside it; none for ONNX."""
    network = embedder.network
    if network is None:
        return
    device = embedder.model.device
    way = embedder.preprocessing
    yield "training mode", Embedder.from_network(_InTrainingMode(network), device, preprocessing=way)
    content = utils.read_tensors(checkpoint, mmap=True, stand_ins=True)
    if "format" in content:
        head = storage.open_stored(checkpoint).content.get("head")
        stored = head.get("centres") if isinstance(head, dict) else None
        if not (isinstance(stored, storage.Rows) or storage.is_dense(stored)) or stored.dim() not in (2, 3):
            return
        if not stored.shape[0] or stored.shape[-1] != embedder.dim:  # no labels; another network's head
            return
        centres = stored[:]
        logits = _Logits(network, centres).to(device)
        yield "head instead of embedding", Embedder.from_network(logits, device, preprocessing=way)


# --- the examination -------------------------------------------------------------------------------------------------


def examine(embedder: Embedder, checkpoint: Path, pairs: VerificationSet, cache: Path | None) -> list[Trial]:
    """Every trial; the first one is how the model is fed now."""
    now = embedder.preprocessing
    trials = [Trial(f"as it is fed now: {_describe(now)}", verify(embedder, pairs, cache_dir=cache), now)]

    def attempt(
        name: str, candidate: Embedder, data: VerificationSet, way: Preprocessing | None, cut: str = AS_CUT
    ) -> None:
        try:
            trials.append(Trial(name, verify(candidate, data, cache_dir=cache), way, cut))
        except InputError as error:  # a feature that is not finite is an answer too
            print(f"{name}: {error}", file=sys.stderr)

    for channels in ("rgb", "bgr"):
        for name, (mean, std, pixel_range) in NORMALISATIONS.items():
            way = dataclasses.replace(now, channels=channels, mean=mean, std=std, pixel_range=pixel_range)
            if way.channels == now.channels and _same_numbers(way, now):
                continue
            attempt(f"{channels}, {name}", _fed(embedder, way), pairs, way)
    best = max(trials, key=lambda trial: trial.accuracy)
    assert best.way is not None
    prefix = "" if best is trials[0] else f"{best.name}; "
    for name, (part, dx, dy) in CROPS.items():
        attempt(f"{prefix}{name}", _fed(embedder, best.way), recrop(pairs, part, dx, dy), best.way, name)
    if embedder.metadata.get("mirror") != "graph":
        way = dataclasses.replace(best.way, mirror=not best.way.mirror)
        mirror = "with" if way.mirror else "without"
        attempt(f"{prefix}{mirror} mirror image", _fed(embedder, way), pairs, way)
    for name, candidate in inner_mistakes(_fed(embedder, best.way), checkpoint):
        attempt(f"{prefix}{name}", candidate, pairs, None)
    return trials


def _fed(embedder: Embedder, way: Preprocessing) -> Embedder:
    return embedder.with_preprocessing(**dataclasses.asdict(way))


def _same_numbers(way: Preprocessing, other: Preprocessing) -> bool:
    """True when both ways do the same to a pixel, however they are written."""

    def line(some: Preprocessing) -> np.ndarray:
        return np.array([*(some.pixel_range / np.array(some.std)), *(np.array(some.mean) / np.array(some.std))])

    return np.allclose(line(way), line(other), rtol=1e-3, atol=1e-2)


def _describe(way: Preprocessing) -> str:
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (way.mean, way.std))
    mirror = "with" if way.mirror else "without"
    return f"{way.channels}, mean {mean}, std {std} on 0..{way.pixel_range:g}, {mirror} mirror image"


def _right(result: VerificationResult) -> np.ndarray:
    """bool [P]: pairs answered correctly with the threshold of their fold, without folds with the best one."""
    if not result.folds:
        return (worst_scores(result.cosines, result.same) >= result.best_threshold) == result.same
    thresholds = np.array([fold.threshold for fold in result.folds])
    folds = np.searchsorted(np.unique(result.fold_of), result.fold_of)
    return (worst_scores(result.cosines, result.same) >= thresholds[folds]) == result.same


def chance_of(better: VerificationResult, worse: VerificationResult) -> float:
    """Probability that two equally good ways differ this much on these pairs (McNemar's exact test, one-sided)."""
    gained, lost = (int(count.sum()) for count in (_right(better) & ~_right(worse), _right(worse) & ~_right(better)))
    return float(stats.binomtest(gained, gained + lost, 0.5, "greater").pvalue) if gained + lost else 1.0


def as_good(trials: list[Trial]) -> list[Trial]:
    """The ways of feeding that are as good as the best one within chance, the best first."""
    ways = sorted((trial for trial in trials if trial.way is not None), key=lambda trial: -trial.accuracy)
    return [trial for trial in ways if trial is ways[0] or chance_of_best(ways, trial) > CHANCE]


def chance_of_best(trials: Sequence[Trial], trial: Trial) -> float:
    """Probability that the best of equally good ways is that much better than another one (Bonferroni)."""
    ways = [one for one in trials if one.way is not None]
    best = max(ways, key=lambda one: one.accuracy)
    return min(1.0, (len(ways) - 1) * chance_of(best.result, trial.result))


def verdict(trials: list[Trial]) -> str:
    """What to change, what to leave, and what these pairs cannot decide, in a paragraph."""
    now, equal = trials[0], as_good(trials)
    best = equal[0]
    if now in equal:
        text = f"Nothing tried is better than how it is fed now ({now.accuracy:.2%}) by more than chance."
        if len(equal) > 1:
            text += f" That does not make it right: {_undecided(equal)}"
        if now.accuracy < 0.9:
            text += " Look elsewhere: the alignment of the crops, the pairs, the training."
        return text
    chance = 1 / max(chance_of_best(trials, now), 1e-12)
    text = (
        f"Fed now it has {now.accuracy:.2%}; {best.name} gives {best.accuracy:.2%} (by chance once in {chance:,.0f})."
    )
    if len(equal) > 1:
        text += f" But {_undecided(equal)}Decided is: {_options(equal) or 'nothing but that it is fed wrongly now'}."
    change = f"python lfw_eval.py ... {_options([best])}"
    if best.cut != AS_CUT:
        change += f", and cut the faces otherwise ({best.cut})"
    return f"{text} What to do: {change}"


def _undecided(equal: list[Trial]) -> str:
    """Names the ways that chance does not tell apart, and what they do not agree in."""
    open_ = [name for name, values in _answers(equal).items() if len(values) > 1]
    pairs = len(equal[0].result.same)
    listed = "".join(f"\n  {trial.accuracy:8.2%}  {trial.name}" for trial in equal)
    return (
        f"on these {pairs} pairs {len(equal)} ways are as good as the best within chance, so they leave "
        f"{' and '.join(open_)} undecided; more pairs (--most) may decide:{listed}\n"
    )


def _answers(equal: list[Trial]) -> dict[str, set[str]]:
    """What each question about the input is answered with by these ways."""
    answers: dict[str, set[str]] = {
        "the order of the channels": set(),
        "the range of the pixels": set(),
        "mean and deviation": set(),
        "the mirror image": set(),
        "the cut of the faces": set(),
    }
    for trial in equal:
        way = trial.way
        assert way is not None
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (way.mean, way.std))
        texts = (
            f"--channels {way.channels}",
            f"--pixel-range {way.pixel_range:g}",
            f"--mean {mean} --std {std}",
            "--mirror" if way.mirror else "--no-mirror",
            trial.cut,
        )
        for values, text in zip(answers.values(), texts, strict=True):
            values.add(text)
    return answers


def _options(equal: list[Trial]) -> str:
    """The options in which all of these ways agree."""
    return " ".join(
        text
        for name, values in _answers(equal).items()
        if len(values) == 1 and name != "the cut of the faces"
        for text in values
    )


def table(trials: list[Trial]) -> str:
    """All trials, the best first."""
    ordered = sorted(trials, key=lambda trial: -trial.accuracy)
    return "\n".join(f"{'>' if trial is trials[0] else ' '} {trial.accuracy:8.2%}  {trial.name}" for trial in ordered)


def _load(options: config.Doctor, device: torch.device) -> tuple[Embedder, Path]:
    checkpoint = download.checkpoint_path(options.checkpoint)
    options = dataclasses.replace(options, checkpoint=str(checkpoint))
    try:
        return open_embedder(options, device), checkpoint
    except UnstatedError as error:
        if options.mean is not None or options.std is not None:
            raise
        print(f"{error}\ntaken for now: InsightFace's", file=sys.stderr)
    return open_embedder(dataclasses.replace(options, mean=[0.5], std=[0.5]), device), checkpoint


@utils.command
def main() -> None:
    """See the file's docstring."""
    options = parse(config.Doctor, __doc__)
    if (options.lfw is None) == (options.bin is None):
        raise InputError("give either --lfw DIR or --bin FILE")
    refuse_useless(options, [(options.lfw is None, "pairs of the photos in --lfw, which is not given", ("pairs",))])
    device = utils.choose_device(options.device)
    embedder, checkpoint = _load(options, device)
    cache = None if options.out is None else options.out / "cache"
    path = options.lfw or options.bin
    assert path is not None  # one of them is given
    pairs = subset(open_set(path, cache, pairs=options.pairs, device=device), options.most)
    trials = examine(embedder, checkpoint, pairs, cache)
    print(f"{embedder.name} on {len(pairs.same)} pairs of {pairs.name} (> marks how it is fed now)\n")
    print(table(trials))
    print(f"\n{verdict(trials)}")
    if options.out is not None:
        report = {
            "model": embedder.describe(),
            "set": {"name": pairs.name, "sha256": pairs.sha256, "pairs": len(pairs.same)},
            "trials": [{"name": trial.name, "accuracy": trial.accuracy} for trial in trials],
            "verdict": verdict(trials),
        }
        utils.write_json(options.out / "doctor.json", report)


if __name__ == "__main__":
    sys.exit(main())
