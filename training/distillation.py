"""A teacher: another model whose embeddings the network learns, beside the margin loss or without any labels.

The network is asked for the direction of the teacher's embedding, 1 - cosine for each crop; where the teacher has
another number of dimensions a linear map lies between them, which is trained and dropped afterwards. By default the
teacher sees every crop once, as it is and with its mirror image if that is how it is used; its embeddings are kept in a
file that is mapped, float16, 1 KB for each crop of 512 dimensions, and can be shared between runs. So a step costs
nothing. An online teacher sees what the network sees, augmented, in every step, and costs its own forward pass.

Over several processes each computes a part of the file; in a step, each has its share of the mean over the global
batch, so gradients are summed like the network's (see margin.py).
"""

import math
import re
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from config import Train
from embedding import Embedder, load_embedder, normalise, triple
from formats.crop_sets import Crops
from formats.embeddings import EmbeddingStore
from training.distributed import World
from training.finetune import CropEmbedding
from utils import InputError

EMBEDDINGS = "teacher"  # folder in --out


class Teacher(Protocol):
    """What knows the embedding that is wanted of each crop."""

    dim: int

    def prepare(self) -> None:
        """Compute what takes long, before the first step. Collective."""

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """float32 [n, dim] of length 1 on the images' device, NaN where nothing is known.

        `images` uint8 RGB [n, 112, 112, 3], augmented; `indices` int64 [n], the crops' numbers, on the CPU.
        """
        ...


def open_teacher(options: Train, device: torch.device | str) -> Embedder:
    """The model of --teacher, fed as its file or the options say."""
    try:
        return load_embedder(
            options.teacher or "",
            device,
            mean=triple("teacher-mean", options.teacher_mean),
            std=triple("teacher-std", options.teacher_std),
            channels=options.teacher_channels,
        )
    except InputError as error:  # advice speaks of the options that other scripts have
        raise InputError(re.sub(r"--(mean|std|channels)", r"--teacher-\1", str(error))) from error


class OnlineTeacher:
    """Embeds the augmented crops of each step."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.dim = embedder.dim
        self.network = embedder.network
        if self.network is not None:
            self.network.eval().requires_grad_(False)
        self.trusted = False

    def prepare(self) -> None:
        """Nothing."""

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """See `Teacher`. A network of ours computes in the precision of the caller's autocast, ONNX in its own.

        Raises InputError if it knows not one crop of the first batch: such a model is broken.
        """
        wanted = self._directions(images)
        if not self.trusted and not wanted.isfinite().all(1).any():
            raise InputError(f"--teacher {self.embedder.name}: gives no finite embedding of any crop")
        self.trusted = True
        return wanted

    def _directions(self, images: Tensor) -> Tensor:
        if self.network is None:
            return torch.from_numpy(normalise(self.embedder.features(images.cpu().numpy()))).float().to(images.device)
        with torch.no_grad():
            inputs = self.embedder.preprocessing(images)
            features = self.network(inputs).float()
            if self.embedder.preprocessing.mirror:
                features += self.network(inputs.flip(3)).float()
            length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
            return torch.where(length > 0, features / length, torch.nan)


class StoredTeacher:
    """Knows the embeddings of all crops, computed once."""

    def __init__(self, options: Train, crops: Crops, fingerprint: str, world: World, embedder: Embedder) -> None:
        self.options, self.crops, self.fingerprint, self.world = options, crops, fingerprint, world
        self.embedder, self.dim = embedder, embedder.dim

    def prepare(self) -> None:
        """Compute the embeddings, or go on with it, and check those that are there.

        Raises InputError if the teacher knows not one crop, or, unless unreadable ones are skipped, not all.
        """
        options, world, model = self.options, self.world, self.embedder.fingerprint or ""
        key = {"model": model, "crops": self.fingerprint}
        folder = options.teacher_embeddings or options.out / EMBEDDINGS
        folder = folder / f"{model[:12]}-{self.fingerprint[:12]}"
        store = EmbeddingStore(folder, key, len(self.crops), self.dim, "float16")
        missing = sorted(world.union(set(store.missing(world.rank, world.size))))
        compute = CropEmbedding(self.embedder, self.crops, options.skip_unreadable, self.dim)

        def embed(numbers: range) -> np.ndarray:
            rows = compute(numbers)
            broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(broken) and not options.skip_unreadable:
                name = self.crops.describe(numbers[broken[0]])
                raise InputError(f"{name}: --teacher {self.embedder.name} gives no finite embedding of it")
            return rows

        store.fill(missing[world.rank :: world.size], embed, f"embeddings by {self.embedder.name}")
        world.wait()
        self.values = store.values()
        # A broken row is NaN as a whole, since it was divided by its length.
        own = np.isnan(self.values[world.rank :: world.size, 0]).sum()
        unknown = int(world.sum(torch.tensor(float(own), dtype=torch.float64, device=world.device)))
        if unknown == len(self.crops):
            raise InputError(f"--teacher {self.embedder.name}: gives no finite embedding of any crop")
        if unknown and not options.skip_unreadable:
            raise InputError(
                f"{folder}: holds no embedding of {unknown} of {len(self.crops)} crops, since it was made with "
                "--skip-unreadable; give that, or another --teacher-embeddings"
            )

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """See `Teacher`."""
        rows = torch.from_numpy(np.asarray(self.values[indices.numpy()]))
        return F.normalize(rows.to(images.device, non_blocking=True).float())


class Distillation(nn.Module):
    """The loss on the way to a teacher's embeddings: `weight` times the mean of 1 - cosine over the global batch."""

    def __init__(self, teacher: Teacher, embedding_size: int, weight: float, world: World) -> None:
        super().__init__()
        self.teacher, self.weight, self.world = teacher, weight, world
        self.map: nn.Module = nn.Identity()
        if teacher.dim != embedding_size:
            linear = nn.Linear(embedding_size, teacher.dim, bias=False)
            nn.init.orthogonal_(linear.weight)
            self.map = linear

    def forward(self, features: Tensor, images: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """This rank's share of the loss (its gradient is to be summed over the ranks), the loss, and statistics.

        `features` [n, embedding_size] not normalised. Statistics are those of the margin head, with the teacher's
        embeddings of the batch in place of the centres.
        """
        wanted = self.teacher(images, indices)
        with torch.autocast(features.device.type, enabled=False):
            features = features if features.dtype == torch.float64 else features.float()
            unit = F.normalize(self.map(features))
            known = wanted.isfinite().all(1)
            wanted = torch.where(known[:, None], wanted, 0.0).to(unit.dtype)
            cosine = (unit * wanted).sum(1)
            share = self.weight * ((1 - cosine) * known).sum() / (len(features) * self.world.size)
        with torch.no_grad():
            loss = self.world.sum(share.detach().clone())
            gathered = self._gather(torch.cat([unit, wanted, torch.linalg.vector_norm(features, dim=1)[:, None]], 1))
            unit, wanted, norm = gathered.split([self.teacher.dim, self.teacher.dim, 1], 1)
            cosines = unit @ wanted.T
            target = cosines.diagonal().clone()
            other = cosines.fill_diagonal_(-1.0).amax(1)
            stats = {
                "top1": (target > other).to(target.dtype).mean(),
                "target_angle": target.clamp(-1, 1).acos().rad2deg(),
                "other_angle": other.clamp(-1, 1).acos().rad2deg(),
                "feature_norm": norm[:, 0],
            }
        return share, loss, stats

    def _gather(self, rows: Tensor) -> Tensor:
        if self.world.size == 1:
            return rows
        gathered = rows.new_empty((len(rows) * self.world.size, rows.shape[1]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    def sum_gradients(self) -> None:
        """Sum the map's gradient over the ranks, before a step. Collective."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                self.world.sum(parameter.grad)


class NoHead(nn.Module):
    """In place of the margin head where there are no labels: no centres, and a loss of 0."""

    sampled = True  # no parameter of its own
    margin: tuple[float, ...] = ()

    def __init__(self, embedding_size: int, device: torch.device) -> None:
        super().__init__()
        self.centres = torch.empty(0, embedding_size, device=device)
        self.steps = 0

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """No loss, nothing to watch."""
        return torch.zeros((), device=features.device), {}

    def step(self, lr: float, **_: Any) -> None:
        """Count."""
        self.steps += 1

    def sampled_leaves(self) -> list[Tensor]:
        """None."""
        return []

    def centres_seen(self, crops: int) -> float:
        """More than anybody could guess among: nothing is known of a loss that means nothing."""
        return math.inf

    def cost_of_margin(self, norm: float) -> float:
        """None."""
        return 0.0

    def own_state(self) -> dict[str, Any]:
        """As `MarginHead.own_state`."""
        return {"centres": self.centres.cpu(), "steps": self.steps, "identities": 0}

    def load_full_state(self, state: dict[str, Any]) -> None:
        """As `MarginHead.load_full_state`."""
        if tuple(state["centres"].shape) != tuple(self.centres.shape):
            raise ValueError(f"the head's centres are {tuple(state['centres'].shape)}, not {tuple(self.centres.shape)}")
        self.steps = int(state["steps"])
