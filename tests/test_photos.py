"""Reading photos: every format and mode against Pillow; for every kind of damage a reason and nothing else."""

import inspect
import io
import itertools
import os
import struct
import sys
import warnings
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cropping import photos
from cropping.photos import PhotoError, identity_of, in_order, list_photos, read_photo, read_reduced, reduction
from formats import archives
from utils import InputError


def scene(width=61, height=47, seed=0):
    """A photo-like RGB picture: smooth colours, edges, no flat corner."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    pixels = cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)
    cv2.circle(pixels, (width // 2, height // 2), height // 3, (250, 210, 30), 2)
    pixels[-1, -1] = (200, 10, 90)
    return Image.fromarray(pixels)


def encode(image, name="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def reference(data):
    """What Pillow shows, as BGR."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[:, :, ::-1]


def reason(source, **limits):
    with pytest.raises(PhotoError) as raised:
        read_photo(source, **limits)
    assert "\n" not in raised.value.reason
    return raised.value.reason.split(":")[0]


FORMATS = {
    "jpeg": ("JPEG", {}),
    "jpeg 4:4:4": ("JPEG", {"subsampling": 0, "quality": 100}),
    "jpeg progressive": ("JPEG", {"progressive": True}),
    "jpeg restarts": ("JPEG", {"restart_marker_rows": 1}),
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {}),
    "webp lossless": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}),
    "gif": ("GIF", {}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_decode_as_in_pillow_whatever_the_file_is_called(kind, tmp_path):
    name, options = FORMATS[kind]
    data = encode(scene(), name, **options)
    np.testing.assert_array_equal(read_photo(data), reference(data))
    path = tmp_path / "photo.png.txt"
    path.write_bytes(data)
    bgr = read_photo(path)
    np.testing.assert_array_equal(bgr, reference(data))
    assert bgr.dtype == np.uint8 and bgr.flags.c_contiguous


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_truncated(kind):
    name, options = FORMATS[kind]
    data = encode(scene(), name, **options)
    for at in np.linspace(24, len(data) - 40, 25).astype(int):
        assert reason(data[:at]) == "truncated", at


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"optimize": True, "quality": 40}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_half_a_jpeg_with_an_end_mark_is_truncated(mode, options):
    data = encode(scene(200, 150).convert(mode), "JPEG", **options)
    for at in np.linspace(len(data) * 0.5, len(data) * 0.9, 9).astype(int):
        cut = data[:at].rstrip(b"\xff") + b"\xff\xd9"
        Image.open(io.BytesIO(cut)).load()  # Pillow by itself sees nothing wrong
        assert reason(cut) == "truncated"


def test_progressive_jpeg_without_its_last_scans_is_truncated():
    data = encode(scene(200, 150), "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for at in scans[1:]:
        assert reason(data[:at] + b"\xff\xd9") == "truncated"


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_mid_grey_corner_is_not_damage(mode, progressive):
    image = scene(64, 64).convert(mode)
    image.paste((128,) * len(image.getbands()), (32, 0, 64, 64))
    for size in (64, 61, 57, 50):
        data = encode(image.crop((64 - size, 64 - size, 64, 64)), "JPEG", progressive=progressive)
        bgr = read_photo(data)
        np.testing.assert_array_equal(bgr, reference(data))
        assert (bgr[-1, -1] == 128).all()


def test_a_jpeg_that_lacks_only_its_end_mark_is_whole():
    data = encode(scene(), "JPEG")
    for rest in (data[:-2] + bytes(40), data + b"trailing \xff\xd8\xff\xd9 garbage", data + data):
        np.testing.assert_array_equal(read_photo(rest), reference(data))


def test_a_thumbnail_inside_the_metadata_has_an_end_mark_of_its_own():
    exif = Image.Exif()
    exif[0x010E] = "thumbnail: " + encode(scene(16, 16), "JPEG").decode("latin-1")
    data = encode(scene(), "JPEG", exif=exif.tobytes())
    assert data.count(b"\xff\xd9") >= 1
    np.testing.assert_array_equal(read_photo(data), reference(data))
    assert reason(data[:-300]) == "truncated"


@pytest.mark.parametrize("kind", ["RGBA PNG", "LA PNG", "P PNG", "RGBA WEBP", "RGB PNG", "RGB WEBP"])
def test_a_crop_has_the_same_pixels_in_training_and_evaluation(kind, tmp_path):
    mode, form = kind.split()
    pixels = np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)
    image = Image.fromarray(pixels).resize((112, 112))
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(pixels[..., 0]).resize((112, 112)))
    elif mode == "P":
        image = image.quantize(20)
    buffer = io.BytesIO()
    settings = {"lossless": True} if form == "WEBP" else {}
    image.save(buffer, form, **settings | ({"transparency": 3} if mode == "P" else {}))
    np.testing.assert_array_equal(photos.decode_crop(buffer.getvalue()), photos.read_crop(buffer.getvalue()))


def test_lfw_decodes_as_opencv_does(shared):
    files = sorted((shared / "lfw" / "lfw-deepfunneled").glob("A*/*.jpg"))[:40]
    for file in files:
        np.testing.assert_array_equal(read_photo(file), cv2.imread(str(file)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "WEBP" else {}
    data = encode(scene(), name, exif=exif.tobytes(), **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(read_photo(data), np.asarray(upright)[:, :, ::-1])
    np.testing.assert_array_equal(read_photo(data, orient=False), reference(data))


@pytest.mark.parametrize(("factor", "size"), [(1, (203, 155)), (2, (102, 78)), (4, (51, 39)), (8, (26, 20))])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_is_decoded_at_its_own_smaller_scales(factor, size, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    asked = []

    def choose(size_wh):
        asked.append(size_wh)
        return factor

    picture = scene(203, 155)
    upright, turned = (
        read_reduced(encode(picture, "JPEG", quality=95, **options, **more), choose) for more in ({}, {"exif": exif})
    )
    assert asked == [(203, 155)] * 2
    assert upright.bgr.shape[1::-1] == size and upright[1:] == (factor, 203, 155)
    np.testing.assert_array_equal(turned.bgr, np.rot90(upright.bgr, -1))
    assert turned[1:] == (factor, 155, 203)
    # libjpeg's reduction is near to averages of blocks, and lies where they lie.
    whole = np.asarray(picture)[: 155 // 8 * 8, : 203 // 8 * 8, ::-1]
    blocks = whole.reshape(whole.shape[0] // factor, factor, whole.shape[1] // factor, factor, 3).mean(axis=(1, 3))
    off = [
        np.abs(blocks[1:-1, 1:-1] - upright.bgr[1 + y : len(blocks) - 1 + y, 1 : blocks.shape[1] - 1]).mean()
        for y in (0, 1, -1)
    ]
    assert off[0] < 6 and off[0] < min(off[1:]) / 2


def test_what_has_no_smaller_scale_comes_whole():
    for data in (encode(scene(203, 155)), encode(scene(203, 155).convert("CMYK"), "JPEG")):
        found = read_reduced(data, lambda size_wh: 8)
        np.testing.assert_array_equal(found.bgr, read_photo(data))
        assert found[1:] == (1, 203, 155)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_half_a_jpeg_is_truncated_at_any_scale(factor):
    data = encode(scene(203, 155), "JPEG")
    for cut in (data[: len(data) // 2], data[: len(data) // 2] + data[-2:]):
        with pytest.raises(PhotoError, match="truncated"):
            read_reduced(cut, lambda size_wh: factor)


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 900))
def test_a_photo_is_reduced_as_far_as_its_longer_side_allows(width, height, side):
    factor = reduction((width, height), side)
    longer = max(width, height)
    assert factor == 1 or longer / factor >= side
    assert factor == 8 or longer / (2 * factor) < side
    if factor > 1 and side >= 8:  # what `read_reduced` makes of the picture's size
        assert -(-longer // -(-longer // factor)) == factor


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_meaningless_orientation_is_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = encode(scene(), "JPEG", exif=exif.tobytes())
    np.testing.assert_array_equal(read_photo(data), reference(data))


def test_broken_metadata_does_not_spoil_the_photo():
    data = encode(scene(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    np.testing.assert_array_equal(read_photo(data), reference(data))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palette(mode):
    data = encode(scene().convert(mode))
    np.testing.assert_array_equal(read_photo(data), reference(data))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(mode):
    image = scene().convert(mode)
    image.putalpha(Image.fromarray(np.tile(np.uint8([[0, 128, 255] * 21])[:, :61], (47, 1))))
    bgr = read_photo(encode(image))
    plain = np.asarray(image.convert("RGBA"))[:, :, 2::-1].astype(float)
    assert (bgr[:, 0::3] == 255).all()
    np.testing.assert_allclose(bgr[:, 1::3], 255 + (plain[:, 1::3] - 255) * 128 / 255, atol=1)
    np.testing.assert_array_equal(bgr[:, 2::3], plain[:, 2::3])


def test_transparent_palette_colour_is_white():
    image = scene().convert("P")
    data = encode(image, transparency=image.getpixel((0, 0)))
    bgr = read_photo(data)
    assert (bgr[0, 0] == 255).all()
    np.testing.assert_array_equal(bgr[-1, -1], reference(data)[-1, -1])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_grey_keeps_the_upper_eight(suffix):
    deep = np.random.default_rng(0).integers(0, 65536, (40, 50), dtype=np.uint16)
    bgr = read_photo(cv2.imencode(suffix, deep)[1].tobytes())
    np.testing.assert_allclose(bgr, (deep >> 8)[:, :, None].repeat(3, 2), atol=0)


def test_sixteen_bit_colour():
    deep = np.random.default_rng(0).integers(0, 65536, (40, 50, 3), dtype=np.uint16)
    np.testing.assert_allclose(read_photo(cv2.imencode(".png", deep)[1].tobytes()), deep >> 8, atol=1)


def test_cmyk_jpeg():
    image = scene().convert("CMYK")
    data = encode(image, "JPEG", quality=95)
    np.testing.assert_array_equal(read_photo(data), reference(data))


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(name):
    frames = [scene(seed=seed) for seed in range(3)]
    options = {"lossless": True} if name == "WEBP" else {}
    data = encode(frames[0], name, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read_photo(data), reference(data))


def test_float_pixels_are_refused():
    assert reason(encode(Image.fromarray(np.zeros((40, 40), np.float32)), "TIFF")) == "unreadable"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not a photo"),
        (b"\xef\xbb\xbf\r\n  <?xml version='1.0'?><svg/>", "not a photo"),
        (b'{"error": "not found"}', "not a photo"),
        (b"just a text", "not a photo"),
        (bytes(5000), "unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a photo"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unreadable"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"GIF89a", "truncated"),
        (b"PK\x03\x04 an archive", "not a photo"),
    ],
)
def test_files_that_are_no_photos(data, expected):
    assert reason(data) == expected


def test_files_that_cannot_be_opened(tmp_path):
    assert reason(tmp_path / "nothing.jpg") == "missing"
    assert reason(tmp_path) == "unreadable"
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert reason(tmp_path / "link.jpg") == "missing"


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_decompression_bomb_is_refused_by_its_header():
    for side in (10_001, 13_000, 100_000):
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert reason(data) == "too large"


def test_limits():
    data = encode(scene(61, 47))
    assert reason(data, min_side=48) == "too small"
    assert reason(data, max_pixels=61 * 47 - 1) == "too large"
    assert read_photo(data, min_side=47, max_pixels=61 * 47).shape == (47, 61, 3)


SAMPLES = [encode(scene(24, 20), name, **options) for name, options in FORMATS.values()]


@settings(max_examples=150, deadline=None)
@given(
    data=st.one_of(st.binary(max_size=300), st.sampled_from(SAMPLES)),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 3000),
)
def test_damage_gives_a_photo_or_a_reason_and_nothing_else(data, edits, cut):
    damaged = bytearray(data[: len(data) - cut] if cut < len(data) else data)
    for at, value in edits:
        if damaged:
            damaged[at % len(damaged)] = value
    try:
        bgr = read_photo(bytes(damaged))
    except PhotoError:
        return
    assert bgr.dtype == np.uint8 and bgr.ndim == 3 and bgr.shape[2] == 3 and bgr.size


def make_tree(root, files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())


def test_listing_is_ordered_by_identity_and_leaves_companions_out(tmp_path):
    files = ["b/2.jpg", "b/10.jpg", "b c/1", "a/x/deep.png", "a/y.gif", "é/1.jpg", "loose.jpg", "A/1.JPG"]
    make_tree(tmp_path, [*files, "a/y.gif.json", "list.tsv", ".hidden.jpg", ".git/1.jpg", "b/.DS_Store", "a/Thumbs.db"])
    listing = list_photos(tmp_path)
    assert listing.files == [
        "loose.jpg", "A/1.JPG", "a/x/deep.png", "a/y.gif", "b/10.jpg", "b/2.jpg", "b c/1", "é/1.jpg",
    ]  # fmt: skip
    assert listing.companions == {".db": 1, ".json": 1, ".tsv": 1}
    assert identity_of("a/x/deep.png") == "a" and identity_of("loose.jpg") == ""
    assert all(in_order(shuffled) == listing.files for shuffled in itertools.islice(itertools.permutations(files), 99))


def test_listing_digest_notices_names_and_sizes(tmp_path):
    make_tree(tmp_path, ["a/1.jpg", "a/2.jpg"])
    digest = list_photos(tmp_path).digest
    os.utime(tmp_path / "a" / "1.jpg", (0, 0))
    assert list_photos(tmp_path).digest == digest
    (tmp_path / "a" / "1.jpg").write_bytes(b"another size")
    changed = list_photos(tmp_path).digest
    (tmp_path / "a" / "2.jpg").rename(tmp_path / "a" / "3.jpg")
    assert len({digest, changed, list_photos(tmp_path).digest}) == 3


def test_listing_follows_links_but_not_in_circles(tmp_path):
    make_tree(tmp_path / "elsewhere", ["p/1.jpg"])
    photos = tmp_path / "photos"
    make_tree(photos, ["q/1.jpg"])
    (photos / "p").symlink_to(tmp_path / "elsewhere" / "p")
    (photos / "q" / "circle").symlink_to(photos)
    (photos / "q" / "broken.jpg").symlink_to(photos / "nowhere")
    (photos / "q" / "itself.jpg").symlink_to("itself.jpg")
    os.mkfifo(photos / "q" / "pipe.jpg")
    assert list_photos(photos).files == ["p/1.jpg", "q/1.jpg", "q/broken.jpg", "q/itself.jpg"]


def test_a_folder_that_several_links_lead_to_is_listed_once(tmp_path):
    make_tree(tmp_path / "store", ["deep/1.jpg", "2.jpg"])
    photos = tmp_path / "photos"
    make_tree(photos, ["z/1.jpg"])
    for name, target in (("a", photos / "z"), ("c", tmp_path / "store"), ("b", tmp_path / "store" / "deep")):
        (photos / name).symlink_to(target)
    # A folder's own path goes before links, and the first name before the others.
    assert list_photos(photos).files == ["b/1.jpg", "c/2.jpg", "z/1.jpg"]
    folder = photos
    for _ in range(14):  # 2 ** 14 paths
        folder = folder / "more"
        folder.mkdir()
        for name in ("left", "right"):
            (folder / name).symlink_to(folder / "more")
    make_tree(folder, ["more/4.jpg"])
    files = list_photos(photos).files
    assert files == ["b/1.jpg", "c/2.jpg", f"{'more/' * 15}4.jpg", "z/1.jpg"]


@pytest.mark.parametrize("size", range(12, 24))
def test_the_beginning_of_a_webp_is_no_crop(size):
    with pytest.raises(ValueError, match=r"."):
        photos.decode_crop(b"RIFF\xd6T\0\0WEBPVP8X\n\0\0\0\x10\0\0\0"[:size])


def test_listing_keeps_names_that_are_not_utf8(tmp_path):
    (tmp_path / "a").mkdir()
    with open(os.fsencode(tmp_path) + b"/a/caf\xe9.jpg", "wb"):
        pass
    assert list_photos(tmp_path).files == ["a/caf\udce9.jpg"]


def test_folders_may_lie_deeper_than_python_recurses(tmp_path):
    deepest = tmp_path / "A" / "/".join("d" * 200)
    deepest.mkdir(parents=True)
    (deepest / "1.jpg").write_bytes(b"x")
    expected = (deepest / "1.jpg").relative_to(tmp_path).as_posix()
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        found = list_photos(tmp_path).files
        members = [name for name, *_ in archives._walk(tmp_path)]
    finally:
        sys.setrecursionlimit(before)
    assert found == members == [expected]


def test_listing_of_nothing_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        list_photos(tmp_path / "none")
    make_tree(tmp_path, ["a/readme.txt"])
    with pytest.raises(InputError, match="no photos"):
        list_photos(tmp_path)


# What a photo may cost


def heic(image, **options):
    pytest.importorskip("pillow_heif").register_heif_opener()
    return encode(image, "HEIF", quality=95, **options)


def test_heic_of_phones():
    image = scene(120, 90)
    data = heic(image)
    assert np.abs(read_photo(data).astype(int) - np.asarray(image)[..., ::-1]).mean() < 12
    for cut in (30, len(data) // 2, len(data) - 10):
        assert reason(data[:cut]) in ("truncated", "unreadable")


def test_heic_is_turned_once_however_it_says_so():
    image = scene(120, 90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_photo(heic(image, exif=exif.tobytes()))
    assert turned.shape == (120, 90, 3)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))[..., ::-1]
    assert np.abs(turned.astype(int) - expected).mean() < 12


@pytest.mark.parametrize("name", ["JPEG2000", "WEBP", "GIF", "PNG", "TIFF"])
def test_few_bytes_are_no_large_photo(name):
    buffer = io.BytesIO()
    options = {"compression": "tiff_lzw"} if name == "TIFF" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new("L" if name in ("GIF", "PNG", "TIFF") else "RGB", (3000, 3000), 99).save(buffer, name, **options)
    data = buffer.getvalue()
    if 500 * len(data) < 3000 * 3000:
        assert reason(data) == "too large"
    assert read_photo(data + bytes(20_000)).shape == (3000, 3000, 3)  # a density, not a size


def test_other_formats_than_jpeg_have_a_lower_limit(monkeypatch):
    monkeypatch.setattr(photos, "MAX_PIXELS_OTHERS", 60 * 47)
    assert read_photo(encode(scene(61, 47), "JPEG")).shape == (47, 61, 3)
    assert reason(encode(scene(61, 47), "PNG")) == "too large"


@pytest.mark.parametrize("scans", [95, 2000])
def test_hundreds_of_scans_are_refused_before_they_are_decoded(scans, monkeypatch):
    whole = encode(Image.new("RGB", (64, 64), (90, 30, 200)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    bomb = whole[:-2] + whole[last:-2] * scans + b"\xff\xd9"
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    assert reason(bomb) == "unreadable"
    monkeypatch.setattr(photos, "MAX_SCANS", 10_000)
    monkeypatch.setattr(photos, "_MAX_SCANNED", 64 * 64 * 20)  # as many on a larger picture
    assert reason(bomb) == "unreadable"


def test_sixteen_bits_take_no_eight_bytes_a_pixel():
    import tracemalloc

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 1 << 16, (1000, 1000), np.uint16)).save(buffer, "PNG")
    tracemalloc.start()
    read_photo(buffer.getvalue())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
