"""Training data: crops from RecordIO or from folders, in a reproducible order, decoded and augmented by CPU workers.

Decisions and their price:

* A worker turns a whole batch of crops into one uint8 array and augments each crop with OpenCV right after decoding it,
  while its 37 KB are in the cache. Vectorised float32 augmentation of whole batches was measured at 0.9 ms per crop
  on one core against 0.1 ms this way, so on CPU it would be the slower half of loading, and on a GPU the workers
  still outrun any network here. What goes to the device is uint8 [N, 112, 112, 3]; `to_inputs` makes it float there,
  by the code that evaluation and export use.
* Everything random is a pure function of (seed, epoch, index of the crop): a hash, not a generator's state. The number
  of workers, the number of ranks and restarts inside an epoch cannot change what a crop looks like or when it comes.
  The order of an epoch is one permutation of all crops, computed by every rank (8 bytes per crop of memory: the
  present and the next one).
* Batches are full. What is left of an epoch's order after the last full batch (fewer crops than one batch, other ones
  in each epoch) is not seen in that epoch.
"""

import contextlib
import functools
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from config import CROP_SIZE
from cropping import photos
from cropping.photos import decode_crop
from embedding import Preprocessing
from formats.crop_sets import Crops
from networks.catalogue import RELEASED, Feeding
from training.augment import NUMBERS, Augmentation, Augmenter, augment_on_device, pack_colours, uniforms
from training.torch_internals import end_workers, shared_memory
from utils import InputError, image_suffix


def epoch_order(crops: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch sees its crops: a permutation of range(crops), int32 where that is enough."""
    order = np.arange(crops, dtype=np.int32 if crops < 1 << 31 else np.int64)
    np.random.Generator(np.random.Philox(key=[seed, epoch])).shuffle(order)
    return order


class _Ahead:
    """A result that is worked out in a thread before it is asked for. The thread holds nobody up at the end."""

    def __init__(self, work: Callable[[], np.ndarray]) -> None:
        self._found: list[np.ndarray] = []
        self._thread = threading.Thread(target=lambda: self._found.append(work()), daemon=True)
        self._thread.start()

    def result(self) -> np.ndarray:
        """What it is, when it is there."""
        self._thread.join()
        return self._found[0]


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchOrder:
    """Which crops the optimiser's step number `step` sees on this rank: a pure function, so any step can be resumed at.

    The global batch of a step is a slice of the epoch's order; it is cut into `accumulate` micro-batches and each of
    these into one part per rank, so ranks and accumulation together see exactly what one process would.
    """

    crops: int
    batch_size: int  # crops per optimiser step over all ranks
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulate
        if self.batch_size < 1 or self.batch_size % parts:
            raise InputError(
                f"--batch-size {self.batch_size} must be a multiple of {parts} ({self.world_size} processes times "
                f"--accumulate {self.accumulate})"
            )
        if self.batch_size > self.crops:
            raise InputError(f"--batch-size {self.batch_size} is more than the {self.crops} crops of the training set")

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return self.crops // self.batch_size

    def global_batch(self, step: int) -> np.ndarray:
        """Indices of all crops of a step over all ranks, int64 [batch_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.crops, self.seed, epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size].astype(np.int64)

    def micro_batches(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, indices int64 [local size]) of this rank from step `start` up to, not including, step `stop`.

        The next epoch's order is worked out while the present one is used: of 42 million crops it takes seconds, for
        which all processes would stand still.
        """
        micro = self.batch_size // self.accumulate
        local = micro // self.world_size
        current, order = -1, np.empty(0, np.int32)
        ahead: _Ahead | None = None
        for step in range(start, stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current:
                order = epoch_order(self.crops, self.seed, epoch) if ahead is None else ahead.result()
                current, ahead = epoch, None
                if (epoch + 1) * self.steps_per_epoch < stop:
                    ahead = _Ahead(functools.partial(epoch_order, self.crops, self.seed, epoch + 1))
            for part in range(self.accumulate):
                first = position * self.batch_size + part * micro + self.rank * local
                yield epoch, order[first : first + local].astype(np.int64)


class Batch(NamedTuple):
    """What a worker hands over. Plain tensors, so that it goes through shared memory and can be pinned."""

    images: Tensor  # uint8 RGB [n, 112, 112, 3], augmented; or, still encoded, uint8 [bytes of all crops]
    labels: Tensor  # int64 [n]
    indices: Tensor  # int64 [n] positions in the training set
    sizes: Tensor  # int64 [n] bytes of each encoded crop; [0] when the images are decoded
    colours: Tensor  # float32 [n, 11] what is to be changed of encoded crops; [0] when they are decoded
    skipped: Tensor  # int64 [k] unreadable crops that were replaced by the next readable one
    error: str  # not empty: the run must stop with this message


_NOTHING = torch.empty(0)

PREFETCH = 4  # batches that a worker makes ahead
SHARED_MEMORY = "/dev/shm"  # through which workers hand batches over
ENCODED_CROP = 16_384  # bytes of an encoded crop, rather too many


def _empty_images(count: int) -> Tensor:
    """uint8 [count, 112, 112, 3]; in a worker of a loader, in the shared memory that the batch will be sent through.

    As torch's own collate function does it: filling private memory first would cost a copy of the batch.
    """
    shape = (count, CROP_SIZE, CROP_SIZE, 3)
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(shared_memory(math.prod(shape))).view(shape)


class CropDataset(torch.utils.data.Dataset):
    """Maps (epoch, indices) to a `Batch`, decoded and augmented. An unreadable crop stops the run or is replaced.

    With `skip_unreadable` an unreadable crop's place is taken by the next readable one of the set with its own label,
    and its index is reported in `Batch.skipped`; the shape of batches and the order of all others stay as they are.
    With `encoded` the crops are only read, for a device that decodes.
    """

    def __init__(
        self, crops: Crops, recipe: Augmentation, seed: int, *, skip_unreadable: bool = False, encoded: bool = False
    ) -> None:
        self.crops = crops
        self.recipe = recipe
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch:
        epoch, indices = request
        values = uniforms(self.seed, epoch, indices, NUMBERS)
        skipped: list[int] = []
        try:
            if self.encoded:
                return self._encoded(indices, values)
            images = _empty_images(len(indices))
            rgb = images.numpy()
            labels = np.empty(len(indices), np.int64)
            change = Augmenter(self.recipe, values)
            for position, index in enumerate(indices.tolist()):
                crop, labels[position] = self.readable(index, skipped)
                change(position, crop, rgb[position])
        except InputError as error:
            return Batch(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, str(error))
        unread = torch.tensor(skipped, dtype=torch.int64)
        return Batch(images, torch.from_numpy(labels), torch.from_numpy(indices), _NOTHING, _NOTHING, unread, "")

    def _encoded(self, indices: np.ndarray, values: np.ndarray) -> Batch:
        crops = [self._read(index) for index in indices.tolist()]
        joined = bytearray(b"".join(crop for crop, _ in crops))
        images = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        labels = torch.tensor([label for _, label in crops])
        sizes = torch.tensor([len(crop) for crop, _ in crops])
        colours = pack_colours(self.recipe, values)
        return Batch(images, labels, torch.from_numpy(indices), sizes, colours, _NOTHING, "")

    def _read(self, index: int) -> tuple[bytes, int]:
        """The encoded crop and its label; no bytes for one that is left to the CPU.

        Those are crops that cannot be read and are to be replaced, and those that EXIF turns, as OpenCV does and
        nvJPEG does not.
        """
        try:
            encoded, label = self.crops.read(index)
            turned = b"Exif\0\0" in encoded[:64] and photos.orientation(encoded) != 1
            return b"" if turned else encoded, label
        except (ValueError, OSError, InputError):
            self.readable(index, [])  # raises, unless such crops are replaced
            return b"", int(self.crops.labels[index])

    def readable(self, index: int, skipped: list[int]) -> tuple[np.ndarray, int]:
        """Crop `index` as RGB uint8 [112, 112, 3], and its label; or the next readable one, noting in `skipped` why.

        Raises `InputError` naming the crop when it cannot be read and must not be replaced.
        """
        total = len(self.crops)
        for candidate in range(index, index + total):
            try:
                encoded, label = self.crops.read(candidate % total)
                return decode_crop(encoded), label
            except (ValueError, OSError, InputError) as error:
                if not self.skip_unreadable:
                    reason = (
                        str(error) if isinstance(error, InputError) else f"{self.crops.describe(candidate)}: {error}"
                    )
                    raise InputError(f"{reason} (--skip-unreadable replaces such crops and counts them)") from error
                skipped.append(candidate % total)
        raise InputError(f"{self.crops.name}: none of the {total} crops is readable")


def check_decoder(device: torch.device) -> None:
    """Raise `InputError` if a device cannot decode JPEG: `to_device` would decode every batch on the CPU instead."""
    _, encoded = cv2.imencode(".jpg", np.full((CROP_SIZE, CROP_SIZE, 3), 127, np.uint8))
    try:
        _decode_on(device, [torch.from_numpy(encoded)])
    except RuntimeError as error:
        raise InputError(f"--decode gpu: {device} does not decode: {str(error).splitlines()[0]}") from error


def check_jpeg(crops: Crops) -> None:
    """Raise `InputError` for crops that are no JPEG, by a sample: `to_device` would decode every batch on the CPU."""
    kinds = set()
    for index in np.linspace(0, len(crops) - 1, 16).astype(np.int64).tolist():
        with contextlib.suppress(InputError, OSError):  # for `CropDataset` to complain of
            kinds.add(image_suffix(crops.read(index)[0]))
    if kinds and ".jpg" not in kinds:
        raise InputError(f"--decode gpu: {crops.name} holds no JPEG, and nothing else is decoded there")


def decode_jpeg(encoded: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """JPEGs, flat uint8 tensors in main memory, as RGB uint8 [3, height, width] on the device."""
    from torchvision.io import ImageReadMode, decode_jpeg  # two seconds that only --decode gpu should pay

    return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _decode_on(device: torch.device, encoded: list[Tensor]) -> list[Tensor]:
    """What `decode_jpeg` gives, ready for the present stream.

    nvJPEG writes at once, whatever is in the queue of the stream it is called in (pytorch/vision pull request 9606).
    But memory that the host has given back may still be read by kernels in the queue, as training never waits for
    them. So pictures are put into memory of a stream with nothing in its queue, which gets it back when the present
    stream has read it.
    """
    if device.type == "cpu":
        return decode_jpeg(encoded, device)
    present, decoding = torch.cuda.current_stream(device), _decoding_stream(device)
    with torch.cuda.stream(decoding):
        decoded = decode_jpeg(encoded, device)
    present.wait_stream(decoding)
    for image in decoded:
        image.record_stream(present)
    return decoded


def to_device(batch: Batch, dataset: CropDataset, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Augmented images uint8 [n, 112, 112, 3] and labels [n] on the device, and crops that had to be replaced for it.

    Encoded crops are decoded and augmented there (nvJPEG on a GPU). nvJPEG does not say which crop of a batch it cannot
    decode, and takes only JPEG: such a batch is decoded once more on the CPU, which names the crop or replaces it.
    """
    labels = batch.labels.to(device, non_blocking=True)
    if not dataset.encoded:
        return batch.images.to(device, non_blocking=True), labels, []
    skipped: list[int] = []
    try:
        sizes = batch.sizes.tolist()
        if 0 in sizes:
            raise RuntimeError("a crop for the CPU")
        parts = list(batch.images.split(sizes))
        decoded = _decode_on(device, parts)
        if any(image.shape != (3, CROP_SIZE, CROP_SIZE) for image in decoded):
            raise RuntimeError("not all of the size of a crop")
        images = torch.stack(decoded).permute(0, 2, 3, 1)
    except RuntimeError:
        pairs = [dataset.readable(index, skipped) for index in batch.indices.tolist()]
        images = torch.from_numpy(np.stack([crop for crop, _ in pairs])).to(device)
        labels = torch.tensor([label for _, label in pairs], device=device)
    return augment_on_device(images, batch.colours.to(device, non_blocking=True)), labels, skipped


class _Requests(torch.utils.data.Sampler):
    """The loader's sampler: requests of (epoch, indices) from one step to another."""

    def __init__(self, order: BatchOrder, start: int, stop: int) -> None:
        self.order, self.start, self.stop = order, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.order.accumulate

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return self.order.micro_batches(self.start, self.stop)


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    # A signal to the whole process group is for the trainer, which writes a checkpoint first; workers end with it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch


def workers_that_fit(dataset: CropDataset, order: BatchOrder, workers: int) -> tuple[int, int]:
    """How many of `workers` processes, and how many batches ahead each, there is shared memory for.

    A container has 64 MB of it unless it was started with more, and 15 workers want ten times as much. Raises
    `InputError` when not even one batch can be made while another is handed over.
    """
    if not workers:
        return 0, 0
    crop = ENCODED_CROP if dataset.encoded else CROP_SIZE * CROP_SIZE * 3
    size = order.batch_size // order.accumulate // order.world_size * crop
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # not a Linux that we know; torch will say what it lacks
        return workers, PREFETCH
    room = int(0.9 * free) // size // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1  # one is being handed over
    if room < 1:
        raise InputError(
            f"{SHARED_MEMORY}: {free / 1e6:.0f} MB free, and two batches for each process take {2 * size / 1e6:.0f}; "
            "start the container with more (docker run --shm-size=8g, or --ipc=host), or take --workers 0"
        )
    # Two each rather than more workers that wait for one another.
    workers = min(workers, max(1, room // 2))
    return workers, min(PREFETCH, room // workers)


def make_loader(
    dataset: CropDataset, order: BatchOrder, start: int, stop: int, *, workers: int, pin_memory: bool
) -> torch.utils.data.DataLoader:
    """One loader over all micro-batches from step `start` to `stop`, across epochs, so that workers never drain
    between them.

    `workers` processes decode ahead, fewer where `workers_that_fit` says so; 0 decodes in the caller. Iterating raises
    nothing for a bad crop: look at `Batch.error`.
    """
    workers, ahead = workers_that_fit(dataset, order, workers)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=_Requests(order, start, stop),
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        prefetch_factor=ahead or None,
        # A forked worker is a child of the trainer and ends when that is killed; one from a fork server never notices.
        multiprocessing_context="fork" if workers else None,
    )


@contextlib.contextmanager
def loading(
    dataset: CropDataset, order: BatchOrder, start: int, stop: int, *, workers: int, pin_memory: bool
) -> Iterator[Iterator[Batch]]:
    """The batches of `make_loader`; its workers have ended when the block is left, however that happens.

    Without this they end when nothing refers to the iterator any more. If something still does at the end of the
    program, multiprocessing sends the workers SIGTERM, which they ignore, and waits for them for ever.
    """
    batches = iter(make_loader(dataset, order, start, stop, workers=workers, pin_memory=pin_memory))
    try:
        yield batches
    finally:
        if workers:
            end_workers(batches)


def to_inputs(
    images: Tensor, feeding: Feeding = RELEASED, *, channels_last: bool = True, side: int = CROP_SIZE
) -> Tensor:
    """uint8 RGB [N, 112, 112, 3] to a network's input float32 [N, 3, side, side], in memory as asked for.

    Convolutions take the layout of their input: one in channels-last would give the whole network that layout.
    """
    inputs = Preprocessing.of(feeding)(images)
    if side != CROP_SIZE:
        inputs = functional.interpolate(inputs, (side, side), mode="bilinear", antialias=True)
    return inputs if channels_last else inputs.contiguous()


def to_pixels(inputs: Tensor, feeding: Feeding = RELEASED) -> Tensor:
    """A network's input [N, 3, 112, 112] as RGB pictures with values in [0, 1], for people to look at."""
    shift, scale = Preprocessing.of(feeding).constants(inputs.device)
    pictures = ((inputs.permute(0, 2, 3, 1) / scale + shift) / 255).clamp(0, 1).permute(0, 3, 1, 2)
    return pictures.flip(1) if feeding.channels == "bgr" else pictures
