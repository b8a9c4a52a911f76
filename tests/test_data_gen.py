"""Order, randomness, decoding and augmentation of training crops."""

import dataclasses
import io
import pickle
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from helpers.training import ROOT, folder_set, jpegs, record_set
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

import data_gen
import models
from cropping import photos
from data_gen import BatchOrder, CropDataset
from formats import crop_sets, tables
from training import augment
from training.augment import Augmentation, Augmenter
from utils import InputError


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return crop_sets.open_training_set(record_set(tmp_path_factory.mktemp("crops")))


@pytest.fixture(scope="module")
def photo():
    """A smooth picture with fine texture, uint8 RGB [112, 112, 3], values well inside 0..255."""
    y, x = np.mgrid[:112, :112]
    waves = [np.sin(x / 9 + 1), np.cos(y / 7), np.sin((x + y) / 11)]
    texture = 8 * np.sin(2.5 * x) * np.sin(2.3 * y)
    return np.stack([128 + 60 * wave + texture for wave in waves], axis=2).astype(np.uint8)


def changed(recipe, photo, count=40, seed=0):
    """`count` crops, all made from one photo by a recipe."""
    out = np.empty((count, 112, 112, 3), np.uint8)
    augmenter = Augmenter(recipe, augment.uniforms(seed, 0, np.arange(count), 64))
    for position in range(count):
        augmenter(position, photo, out[position])
    return out


NONE = Augmentation.named("none")


# --- what there is to train on ---------------------------------------------------------------------------------------


def test_folders_and_records_give_the_same_crops(tmp_path):
    folders = crop_sets.open_training_set(folder_set(tmp_path / "folders", identities=3, each=4))
    records = crop_sets.open_training_set(record_set(tmp_path / "records", identities=3, each=4))
    assert folders.identities == records.identities == 3
    assert folders.labels.tolist() == records.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert sorted(folders.read(i) for i in range(12)) == sorted(records.read(i) for i in range(12))
    assert folders.identity_names == ["person-0", "person-1", "person-2"]
    assert records.identity_names == ["0", "1", "2"]
    assert folders.describe(0).endswith("folders/person-0/0.jpg")


def test_names_beside_a_record_file_survive_tabs_and_backslashes(tmp_path):
    names = ["Ada\tLovelace", "b\\t", "Zoë"]
    crops = crop_sets.open_training_set(record_set(tmp_path, identities=3, each=2))
    tables.write_identities(tmp_path / "identities.tsv", names)
    assert crops.identity_names == names
    tables.write_identities(tmp_path / "identities.tsv", names[:2])  # of another set
    assert crops.identity_names == ["0", "1", "2"]
    (tmp_path / "identities.tsv").write_text("label\tidentity\n0\ta\n2\tb\n")
    with pytest.raises(InputError, match=r"line 3.*label 1"):
        assert crops.identity_names
    (tmp_path / "identities.tsv").write_text("0\ta\n1\tb\n2\tc\n")
    with pytest.raises(InputError, match="not a table of identities"):
        assert crops.identity_names
    # As synthesize.py once wrote it, and somebody's editor without the last line end.
    (tmp_path / "identities.tsv").write_text("label\tidentity\tnumber\n0\ta\t7\n1\tb\t8\n2\tc\t9")
    assert crops.identity_names == ["a", "b", "c"]


def test_folders_that_cannot_be_trained_on(tmp_path):
    folder_set(tmp_path)
    (tmp_path / "person-1" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"person-1/notes.txt: not a crop"):
        crop_sets.open_training_set(tmp_path)
    (tmp_path / "person-1" / "notes.txt").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: identity without a crop"):
        crop_sets.open_training_set(tmp_path)
    (tmp_path / "empty").rmdir()
    (tmp_path / "lost.JPG").write_bytes(b"")
    with pytest.raises(InputError, match=r"lost.JPG: an image in no identity's folder"):
        crop_sets.open_training_set(tmp_path)
    (tmp_path / "lost.JPG").unlink()
    (tmp_path / "faces.tsv").write_text("x")
    (tmp_path / ".hidden").mkdir()
    assert len(crop_sets.open_training_set(tmp_path)) == 12
    with pytest.raises(InputError, match="nothere: no such file or folder"):
        crop_sets.open_training_set(tmp_path / "nothere")
    with pytest.raises(InputError, match="no crops"):
        crop_sets.open_training_set(tmp_path / ".hidden")
    with pytest.raises(InputError, match="one identity only"):
        crop_sets.open_training_set(folder_set(tmp_path / "single", identities=1))


@dataclasses.dataclass
class Made:
    """A set with any labels, which recordio would refuse to open."""

    labels: np.ndarray
    identities: int
    name: str = "made"

    def __len__(self):
        return len(self.labels)


@pytest.mark.parametrize(
    ("labels", "identities", "message"),
    [
        ([0, 1, 3], 3, "made: labels 0 to 3, but there are 3 identities"),
        ([0, -1, 1], 2, "made: labels -1 to 1"),
        ([0, 2, 2], 4, "made: 2 identities without a crop: 1, 3"),
        ([], 0, "made: no crops"),
    ],
)
def test_wrong_labels_are_found_before_training(labels, identities, message):
    with pytest.raises(InputError, match=message):
        crop_sets.check(Made(np.array(labels, np.int64), identities))


def test_counts_of_the_research_set(shared):
    crops = crop_sets.open_training_set(shared / "faces_large")
    assert (len(crops), crops.identities) == (15_423, 1_308)
    images = CropDataset(crops, NONE, 0)[(0, np.arange(8))].images
    assert images.shape == (8, 112, 112, 3) and images.dtype == torch.uint8


def test_fingerprint_tells_sets_apart(tmp_path, crops):
    same = crop_sets.open_training_set(record_set(tmp_path / "same"))
    other = crop_sets.open_training_set(record_set(tmp_path / "other", seed=1))
    assert crop_sets.fingerprint(crops) == crop_sets.fingerprint(same) != crop_sets.fingerprint(other)


def _folder(root, pictures):
    for index, data in enumerate(pictures):
        path = root / f"{index // 4:04d}" / f"{index % 4}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def _list(root, pictures):
    _folder(root, pictures)
    lines = [f"{index // 4:04d}/{index % 4}.jpg {index // 4}\n" for index in range(len(pictures))]
    (root / "list.txt").write_text("".join(lines))
    return root / "list.txt"


def _records(root, pictures):
    crop_sets.write_crops(root, ((data, index // 4) for index, data in enumerate(pictures)))
    return root


def _shard(root, pictures):
    root.mkdir()
    with tarfile.open(root / "set.tar", "w") as tar:
        for index, data in enumerate(pictures):
            for name, content in ((f"{index:06d}.jpg", data), (f"{index:06d}.cls", b"%d" % (index // 4))):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return root / "set.tar"


@pytest.mark.parametrize("write", [_folder, _list, _records, _shard])
def test_fingerprint_notices_one_other_crop_among_many(tmp_path, write):
    """It reads 256 crops; the others it knows by their sizes."""
    pictures = [data for data, _ in jpegs(10, 4)] * 25
    found = []
    for name, exchanged in (("as it was", None), ("again", None), ("changed", (501, 502))):
        if exchanged:
            first, second = exchanged
            assert -len(pictures[first]) // 4 != -len(pictures[second]) // 4  # else nobody could tell
            pictures[first], pictures[second] = pictures[second], pictures[first]
        crops = crop_sets.open_training_set(write(tmp_path / name, pictures))
        assert len(crops.sizes()) == len(crops) == 1000
        found.append(crop_sets.fingerprint(crops))
    assert found[0] == found[1] != found[2]


# --- order and randomness --------------------------------------------------------------------------------------------


def test_numbers_of_a_crop_do_not_depend_on_its_batch():
    whole = augment.uniforms(3, 5, np.arange(1000), 16)
    assert whole.min() >= 0 and whole.max() < 1
    some = np.array([17, 999, 0])
    assert np.array_equal(augment.uniforms(3, 5, some, 16), whole[some])
    assert np.array_equal(augment.uniforms(3, 5, some, 4), whole[some, :4])
    for other in (augment.uniforms(4, 5, np.arange(1000), 16), augment.uniforms(3, 6, np.arange(1000), 16)):
        assert not np.isin(other, whole).any()
        assert abs(np.corrcoef(other.ravel(), whole.ravel())[0, 1]) < 0.03


def test_numbers_are_uniform_and_independent():
    values = augment.uniforms(-7, 0, np.arange(20_000), 8)
    counts = np.histogram(values, bins=64, range=(0, 1))[0]
    expected = values.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # chi-square, 63 degrees of freedom: p < 1e-5
    correlation = np.corrcoef(values.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.035
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 0.035


def test_large_seeds_epochs_and_indices():
    values = augment.uniforms(2**62, 10**6, np.array([2**40, 2**40 + 1]), 3)
    assert values.shape == (2, 3) and len(np.unique(values)) == 6


def test_an_epoch_is_a_permutation_and_epochs_differ():
    plain = np.random.Generator(np.random.Philox(key=[3, 5])).permutation(1000)
    assert np.array_equal(data_gen.epoch_order(1000, 3, 5), plain)
    order = data_gen.BatchOrder(100, 8, 3)  # the next epoch's order comes from a thread
    for (epoch, indices), step in zip(order.micro_batches(5, 60), range(5, 60), strict=True):
        assert epoch == step // 12 and indices.dtype == np.int64
        assert np.array_equal(indices, order.global_batch(step))
    first, second = data_gen.epoch_order(1000, 0, 0), data_gen.epoch_order(1000, 0, 1)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert (first == second).sum() < 20
    assert np.array_equal(first, data_gen.epoch_order(1000, 0, 0))
    assert not np.array_equal(first, data_gen.epoch_order(1000, 1, 0))


@settings(max_examples=60, deadline=None)
@given(
    world_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    local=st.integers(1, 3),
    extra=st.integers(0, 40),
    start=st.integers(0, 12),
)
def test_ranks_and_accumulation_together_see_what_one_process_sees(world_size, accumulate, local, extra, start):
    batch_size = world_size * accumulate * local
    crops = batch_size + extra
    alone = BatchOrder(crops, batch_size, seed=1)
    stop = start + 3
    expected = [alone.global_batch(step).tolist() for step in range(start, stop)]
    parts = [
        list(BatchOrder(crops, batch_size, 1, rank, world_size, accumulate).micro_batches(start, stop))
        for rank in range(world_size)
    ]
    micro_batches = [np.concatenate([indices for _, indices in step]) for step in zip(*parts, strict=True)]
    found = np.concatenate(micro_batches).reshape(3, batch_size)
    assert found.tolist() == expected
    epochs = {epoch for rank in parts for epoch, _ in rank}
    assert epochs == {step // alone.steps_per_epoch for step in range(start, stop)}


def test_no_crop_comes_twice_in_an_epoch():
    order = BatchOrder(103, 10, seed=0)
    assert order.steps_per_epoch == 10
    seen = np.concatenate([order.global_batch(step) for step in range(10)])
    assert len(set(seen.tolist())) == 100


def test_batch_sizes_that_cannot_be():
    with pytest.raises(
        InputError, match=r"--batch-size 16 must be a multiple of 6 \(3 processes times --accumulate 2\)"
    ):
        BatchOrder(100, 16, 0, 0, 3, 2)
    with pytest.raises(InputError, match="--batch-size 16 is more than the 15 crops"):
        BatchOrder(15, 16, 0)
    with pytest.raises(InputError, match="must be a multiple of 1"):
        BatchOrder(15, 0, 0)


def test_workers_change_nothing_and_a_loader_starts_anywhere(crops):
    dataset = CropDataset(crops, Augmentation.named("strong"), seed=5)
    order = BatchOrder(len(crops), 8, seed=5)

    def load(start, workers):
        return list(data_gen.make_loader(dataset, order, start, 7, workers=workers, pin_memory=False))

    alone = load(0, 0)
    assert len(alone) == 7
    for start, workers in ((0, 2), (4, 1), (4, 0)):
        for one, other in zip(alone[start:], load(start, workers), strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
            assert torch.equal(one.indices, other.indices)
    # The same crop looks different in another epoch.
    first = {int(index): image for index, image in zip(alone[0].indices, alone[0].images, strict=True)}
    again = [(int(i), image) for batch in alone[3:6] for i, image in zip(batch.indices, batch.images, strict=True)]
    repeated = [(first[index], image) for index, image in again if index in first]
    assert repeated and not any(torch.equal(one, other) for one, other in repeated)


@pytest.mark.parametrize(
    ("free", "batch", "encoded", "expected"),
    [
        (24e9, 256, False, (15, 4)),
        (67_108_864, 256, False, (2, 2)),  # what a container has: five batches, one of which is being handed over
        (67_108_864, 64, False, (12, 2)),
        (67_108_864, 512, False, (1, 2)),
        (67_108_864, 256, True, (6, 2)),
    ],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_are_as_many_as_shared_memory_holds(crops, monkeypatch, free, batch, encoded, expected):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free)))
    dataset = CropDataset(crops, Augmentation(), 0, encoded=encoded)
    order = BatchOrder(10_000, batch * 2, 0, 0, 2)
    loader = data_gen.make_loader(dataset, order, 0, 1, workers=15, pin_memory=False)
    assert (loader.num_workers, loader.prefetch_factor) == expected
    assert (expected[0] * expected[1] + 1) * batch * (16_384 if encoded else 37_632) < free
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    if free < 1e9 and batch > 64:
        with pytest.raises(InputError, match=r"/dev/shm: 67 MB free, and two batches .* --shm-size"):
            data_gen.make_loader(dataset, order, 0, 1, workers=1, pin_memory=False)
    assert data_gen.make_loader(dataset, order, 0, 1, workers=0, pin_memory=False).num_workers == 0


def test_a_data_set_can_be_sent_to_a_spawned_worker(crops):
    dataset = pickle.loads(pickle.dumps(CropDataset(crops, NONE, 0)))
    assert torch.equal(dataset[(0, np.arange(3))].images, CropDataset(crops, NONE, 0)[(0, np.arange(3))].images)


# --- decoding --------------------------------------------------------------------------------------------------------


def encoded(array, suffix):
    return cv2.imencode(suffix, array)[1].tobytes()


def test_png_grey_and_colour_order(photo):
    assert np.array_equal(data_gen.decode_crop(encoded(photo[:, :, ::-1], ".png")), photo)
    grey = data_gen.decode_crop(encoded(photo[:, :, 0], ".png"))
    assert np.array_equal(grey, np.repeat(photo[:, :, :1], 3, axis=2))
    jpeg = data_gen.decode_crop(encoded(photo[:, :, ::-1], ".jpg"))
    assert np.abs(jpeg.astype(int) - photo).mean() < 4


def test_crops_that_cannot_be_used(photo):
    jpeg = encoded(photo, ".jpg")
    for data, reason in (
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (jpeg[: len(jpeg) // 2], "jpg image, but damaged or cut short"),
        (jpeg[:-1], "jpg image, but damaged or cut short"),
        (jpeg[:20], "jpg image, but damaged or cut short"),
        (encoded(photo, ".png")[:-40], "png image, but damaged or cut short"),
        (encoded(photo[:100], ".jpg"), "112x100 pixels, not 112x112; align it with pre_process.py"),
    ):
        with pytest.raises(ValueError, match=reason):
            data_gen.decode_crop(data)


@pytest.fixture
def damaged(tmp_path):
    """A set whose crops 2, 3 and the last one cannot be read."""
    items = list(jpegs(3, 4))
    for index in (2, 3, 11):
        items[index] = (items[index][0][:300], items[index][1])
    crop_sets.write_crops(tmp_path, items)
    return crop_sets.open_training_set(tmp_path)


def test_an_unreadable_crop_stops_the_run_and_is_named(damaged):
    batch = CropDataset(damaged, NONE, 0)[(0, np.array([0, 3, 1]))]
    assert (
        "train.rec: record 4 at offset 20060: jpg image, but damaged or cut short" in batch.error
        and "--skip-unreadable" in batch.error
    )


@pytest.mark.parametrize("on_device", [False, True])
def test_an_unreadable_crop_is_replaced_by_the_next_readable_one(damaged, on_device):
    dataset = CropDataset(damaged, NONE, 0, skip_unreadable=True, encoded=on_device)
    batch = dataset[(0, np.array([0, 2, 11, 5]))]
    assert batch.error == ""
    images, labels, skipped = data_gen.to_device(batch, dataset, torch.device("cpu"))
    clean = CropDataset(damaged, NONE, 0)[(0, np.array([0, 4, 0, 5]))]
    assert torch.equal(images, clean.images)
    assert labels.tolist() == clean.labels.tolist() == [0, 1, 0, 1]
    assert sorted([*batch.skipped.int().tolist(), *skipped]) == [2, 3, 11]


def test_a_set_without_one_readable_crop(tmp_path):
    crop_sets.write_crops(tmp_path, [(data[:300], label) for data, label in jpegs(2, 2)])
    dataset = CropDataset(crop_sets.open_training_set(tmp_path), NONE, 0, skip_unreadable=True)
    assert "none of the 4 crops is readable" in dataset[(0, np.array([1]))].error


def test_decoding_on_the_device_gives_the_same_batches(crops):
    recipe = Augmentation.named("published")
    here, there = (CropDataset(crops, recipe, 1, encoded=encoded) for encoded in (False, True))
    request = (2, np.array([5, 1, 20, 7]))
    batch = there[request]
    images, labels, skipped = data_gen.to_device(batch, there, torch.device("cpu"))
    expected = here[request]
    assert torch.equal(labels, expected.labels) and skipped == []
    difference = (images.int() - expected.images.int()).abs()
    assert difference.max() <= 3 and difference.float().mean() < 0.3  # two decoders


def test_a_crop_that_exif_turns_is_turned_wherever_it_is_decoded(tmp_path):
    """OpenCV turns it, nvJPEG and its stand-in do not."""
    items = list(jpegs(2, 2))
    exif = Image.Exif()
    exif[274] = 6
    plain = cv2.imdecode(np.frombuffer(items[1][0], np.uint8), cv2.IMREAD_COLOR_RGB)
    turned = io.BytesIO()
    Image.fromarray(plain).save(turned, "JPEG", quality=95, exif=exif)
    items[1] = (turned.getvalue(), 0)
    crop_sets.write_crops(tmp_path, items)
    dataset = CropDataset(crop_sets.open_training_set(tmp_path), NONE, 0, encoded=True)
    images, labels, skipped = data_gen.to_device(dataset[(0, np.array([0, 1]))], dataset, torch.device("cpu"))
    assert labels.tolist() == [0, 0] and skipped == []
    assert np.abs(np.rot90(plain, -1).astype(int) - images[1].numpy()).mean() < 4
    alone, _, _ = data_gen.to_device(dataset[(0, np.array([1]))], dataset, torch.device("cpu"))  # nothing left to it
    assert torch.equal(alone[0], images[1])
    # Evaluation, on files that anybody made, sees the same pixels; it alone refuses half a JPEG with an end mark.
    grey = encoded(plain[:, :, 0], ".png")
    for crop in (items[0][0], items[1][0], grey):
        for resize in (False, True):
            assert np.array_equal(photos.read_crop(crop, resize=resize), data_gen.decode_crop(crop))
    half = items[0][0][: len(items[0][0]) // 2] + b"\xff\xd9"
    assert data_gen.decode_crop(half).shape == (112, 112, 3)
    with pytest.raises(photos.PhotoError, match="truncated"):
        photos.read_crop(half)
    with pytest.raises(ValueError, match="96x112 instead of 112x112"):
        photos.read_crop(encoded(plain[:, :96], ".png"))


def test_a_set_without_jpeg_is_not_for_a_device_that_decodes(crops, tmp_path):
    data_gen.check_jpeg(crops)
    picture = encoded(np.zeros((112, 112, 3), np.uint8), ".png")
    crop_sets.write_crops(tmp_path, [(picture, label) for label in range(3)])
    with pytest.raises(InputError, match=r"--decode gpu: .* holds no JPEG"):
        data_gen.check_jpeg(crop_sets.open_training_set(tmp_path))


def test_a_damaged_crop_is_named_when_the_device_decodes(damaged):
    dataset = CropDataset(damaged, NONE, 0, encoded=True)
    with pytest.raises(InputError, match="record 3 at offset 19728: jpg image, but damaged"):
        data_gen.to_device(dataset[(0, np.array([0, 2]))], dataset, torch.device("cpu"))


def test_a_damaged_record_is_replaced_when_the_device_decodes(crops, tmp_path):
    """Not the image but the record around it: the RecordIO reader refuses it."""
    for name in ("train.idx", "train.rec"):
        shutil.copyfile(crops.path.with_name(name), tmp_path / name)
    set_of = crop_sets.open_crops(tmp_path)
    payload, _ = set_of.read(3)
    data = bytearray((tmp_path / "train.rec").read_bytes())
    start = data.index(payload)
    data[start - 32 : start] = bytes(32)
    (tmp_path / "train.rec").write_bytes(data)
    request = (0, np.array([0, 3, 1]))
    for encoded in (False, True):
        dataset = CropDataset(set_of, NONE, 0, encoded=encoded)
        assert "train.rec" in dataset[request].error and "--skip-unreadable" in dataset[request].error
        dataset = CropDataset(set_of, NONE, 0, encoded=encoded, skip_unreadable=True)
        batch = dataset[request]
        assert not batch.error
        images, labels, skipped = data_gen.to_device(batch, dataset, torch.device("cpu"))
        assert [*batch.skipped.tolist(), *skipped] == [3]
        assert labels.tolist() == set_of.labels[[0, 4, 1]].tolist()
        assert np.array_equal(images[1].numpy(), data_gen.decode_crop(set_of.read(4)[0]))


def test_a_device_that_cannot_decode_is_found_before_the_first_batch(monkeypatch):
    data_gen.check_decoder(torch.device("cpu"))

    def fail(*_, **__):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(data_gen, "decode_jpeg", fail)
    with pytest.raises(InputError, match=r"--decode gpu: cpu does not decode: .*not compiled with nvJPEG support$"):
        data_gen.check_decoder(torch.device("cpu"))


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_no_augmentation_leaves_crops_alone(photo):
    assert all(np.array_equal(crop, photo) for crop in changed(NONE, photo, 4))


def test_colours_agree_with_torchvision(photo):
    recipe = Augmentation(mirror=0.0, jitter=0.125)
    values = augment.uniforms(0, 0, np.arange(20), 64)
    factors = 1 + 0.125 * (2 * values[:, 1:4] - 1)
    image = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
    for position, crop in enumerate(changed(recipe, photo, 20)):
        brightness, contrast, saturation = factors[position]
        expected = functional.adjust_brightness(image, brightness)
        expected = functional.adjust_contrast(expected, contrast)
        expected = functional.adjust_saturation(expected, saturation)
        difference = np.abs(crop.astype(int) - (expected * 255).permute(1, 2, 0).numpy())
        assert difference.max() < 1.5  # torchvision's luma weights have four digits, its steps are clipped
    assert factors.min() > 0.875 and factors.max() < 1.125 and np.ptp(factors) > 0.2


def test_colours_agree_with_pil(photo):
    """The reference's pipeline works on PIL images."""
    values = augment.uniforms(0, 0, np.arange(5), 64)
    for position, crop in enumerate(changed(Augmentation(mirror=0.0), photo, 5)):
        image = Image.fromarray(photo)
        for adjust, value in zip(
            (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation),
            values[position, 1:4],
            strict=True,
        ):
            image = adjust(image, 1 + 0.125 * (2 * value - 1))
        assert np.abs(crop.astype(int) - np.asarray(image)).max() <= 3  # PIL rounds after each of the three steps


def test_half_of_the_crops_are_mirrored(photo):
    crops = changed(Augmentation(jitter=0.0), photo, 400)
    mirrored = sum(np.array_equal(crop, photo[:, ::-1]) for crop in crops)
    assert mirrored + sum(np.array_equal(crop, photo) for crop in crops) == 400
    assert 150 < mirrored < 250


def test_the_device_augments_as_the_workers_do(photo):
    recipe = Augmentation(jitter=0.3, grey=0.3)
    values = augment.uniforms(2, 0, np.arange(30), 64)
    images = torch.from_numpy(np.repeat(photo[None], 30, axis=0))
    there = augment.augment_on_device(images, augment.pack_colours(recipe, values))
    difference = there.int() - torch.from_numpy(changed(recipe, photo, 30, 2)).int()
    assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.1  # OpenCV has 10-bit factors


def roughness(crop):
    """Energy of the finest details."""
    return np.abs(cv2.Laplacian(crop.astype(np.float32), cv2.CV_32F)).mean()


def test_each_part_of_the_strong_recipe_does_what_it_is_for(photo):
    base = {"mirror": 0.0, "jitter": 0.0}
    grey = changed(Augmentation(**base, grey=1.0), photo, 3)
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()

    soft = changed(Augmentation(**base, low_resolution=1.0), photo)
    blurred = changed(Augmentation(**base, blur=1.0), photo)
    assert np.mean([roughness(crop) for crop in soft]) < 0.7 * roughness(photo)
    assert all(roughness(crop) < roughness(photo) for crop in blurred)

    noise = changed(Augmentation(**base, noise=1.0), photo).astype(int) - photo
    deviations = noise.std(axis=(1, 2, 3))
    assert deviations.min() > 1.5 and deviations.max() < 13 and np.ptp(deviations) > 4
    assert abs(noise.mean()) < 0.5

    jpeg = changed(Augmentation(**base, jpeg=1.0), photo)
    errors = np.abs(jpeg.astype(int) - photo).mean(axis=(1, 2, 3))
    assert errors.min() > 0.3 and errors.max() < 12

    borders = changed(Augmentation(**base, border=1.0), photo)
    kept = (borders == photo).all(axis=3)
    assert kept[:, 50:62, 50:62].all()  # the middle of the face stays
    assert 0.3 < kept.mean() < 0.95
    assert (borders[~kept] == 0).all(axis=1).mean() > 0.5

    erased = ~(changed(Augmentation(**base, erase=1.0), photo) == photo).all(axis=3)
    sides = [(mask.any(axis=1).sum(), mask.any(axis=0).sum()) for mask in erased]
    assert all(15 <= side <= 52 for pair in sides for side in pair)


def blob_positions(recipe):
    """Where a bright blob ends that was at (80, 30) of a black crop, as offsets from the crop's centre, [40, 2]."""
    y, x = np.mgrid[:112, :112]
    blob = 255 * np.exp(-((x - 80) ** 2 + (y - 30) ** 2) / 18)
    crops = changed(recipe, np.repeat(blob[:, :, None], 3, axis=2).astype(np.uint8))[..., 0].astype(float)
    weight = crops.sum(axis=(1, 2))
    return np.stack([(crops * x).sum(axis=(1, 2)) / weight, (crops * y).sum(axis=(1, 2)) / weight], axis=1) - 55.5


def test_geometry_moves_the_picture_as_far_as_it_may(photo):
    still = {"mirror": 0.0, "jitter": 0.0, "geometry": 1.0}
    start = np.array([24.5, -25.5])
    shifts = blob_positions(Augmentation(**still, shift=3.0)) - start
    assert 2 < np.abs(shifts).max() < 3.05 and np.abs(shifts.mean(axis=0)).max() < 1
    turned = blob_positions(Augmentation(**still, rotation=10.0))
    angles = np.degrees(np.arctan2(turned[:, 1], turned[:, 0]) - np.arctan2(start[1], start[0]))
    assert 7 < np.abs(angles).max() < 10.1 and abs(angles.mean()) < 4
    assert np.abs(np.hypot(*turned.T) - np.hypot(*start)).max() < 0.1
    zoomed = np.log(np.hypot(*blob_positions(Augmentation(**still, scale=0.1)).T) / np.hypot(*start))
    assert 0.07 < np.abs(zoomed).max() < 0.102 and abs(zoomed.mean()) < 0.04
    nothing = changed(Augmentation(**still), photo)
    assert np.abs(nothing.astype(int) - photo).max() <= 1
    mirrored = changed(Augmentation(mirror=1.0, jitter=0.0, geometry=1.0), photo)
    assert np.abs(mirrored.astype(int) - photo[:, ::-1]).max() <= 1


def test_black_borders_are_repainted_and_faces_are_not(photo):
    bordered = photo.copy()
    bordered[:20] = 3  # JPEG leaves no perfect black
    crops = changed(Augmentation(mirror=0.0, jitter=0.0, repaint=1.0), bordered)
    assert (crops[:, 20:] == bordered[20:]).all()
    border = crops[:, :20].reshape(len(crops), -1, 3)
    assert (border == border[:, :1]).all() and np.ptp(border[:, 0], axis=0).min() > 100
    untouched = changed(Augmentation(mirror=0.0, jitter=0.0, repaint=1.0), photo, 5)
    assert (untouched == photo).all()


def test_strong_crops_are_reproducible_and_all_different(photo):
    recipe = Augmentation.named("strong")
    crops = changed(recipe, photo, 60)
    assert np.array_equal(crops, changed(recipe, photo, 60))
    assert len({crop.tobytes() for crop in crops}) == 60
    assert not recipe.only_mirror_and_colours and Augmentation.named("published").only_mirror_and_colours
    assert Augmentation.named("published") == Augmentation(mirror=0.5, jitter=0.125)


def test_whatever_the_device_cannot_do_is_left_to_the_host():
    """Every probability of a recipe counts, also one that somebody adds: none may be forgotten in silence."""
    calm = Augmentation.named("none")
    alone = {
        part.name: dataclasses.replace(calm, **{part.name: 0.5}).only_mirror_and_colours
        for part in dataclasses.fields(Augmentation)
    }
    assert {name for name, fits in alone.items() if fits} == {"mirror", "jitter", "grey", "rotation", "scale", "shift"}
    assert calm.only_mirror_and_colours

    @dataclasses.dataclass(frozen=True)
    class More(Augmentation):
        fog: float = 0.0

    assert not More(fog=0.5).only_mirror_and_colours and More().only_mirror_and_colours


def test_normalise_is_torchvisions(photo):
    images = torch.from_numpy(np.stack([photo, photo[:, ::-1]]).copy())
    inputs = data_gen.to_inputs(images)
    expected = functional.normalize(images.permute(0, 3, 1, 2).float() / 255, models.MEAN, models.STD)
    assert inputs.shape == (2, 3, 112, 112) and inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-5)
    plain = data_gen.to_inputs(images, channels_last=False)
    assert plain.is_contiguous() and torch.equal(plain, inputs)
    pictures = data_gen.to_pixels(inputs)
    torch.testing.assert_close(pictures, images.permute(0, 3, 1, 2) / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
def test_smaller_inputs_are_pils(photo, channels_last):
    inputs = data_gen.to_inputs(torch.from_numpy(photo[None].copy()), channels_last=channels_last, side=64)
    assert inputs.shape == (1, 3, 64, 64)
    assert inputs.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    expected = np.asarray(Image.fromarray(photo).resize((64, 64), Image.Resampling.BILINEAR))
    found = 255 * data_gen.to_pixels(inputs)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() < 1  # PIL rounds after each of its two passes


def test_workers_end_with_the_block_even_if_something_still_refers_to_the_batches(tmp_path):
    """A program that ends with such workers never ends: they ignore the SIGTERM that multiprocessing sends them."""
    record_set(tmp_path / "crops", identities=2, each=4)
    code = (
        "import sys, multiprocessing, data_gen\n"
        "from formats import crop_sets\n"
        "from training.augment import Augmentation\n"
        "crops = crop_sets.open_training_set(sys.argv[1])\n"
        "dataset = data_gen.CropDataset(crops, Augmentation.named('none'), 0)\n"
        "order = data_gen.BatchOrder(len(crops), 2, 0)\n"
        "with data_gen.loading(dataset, order, 0, 100, workers=1, pin_memory=False) as batches:\n"
        "    print(len(next(batches).labels), len(multiprocessing.active_children()))\n"
        "print(len(multiprocessing.active_children()))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "crops")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "2 1\n0\n"), done.stderr
