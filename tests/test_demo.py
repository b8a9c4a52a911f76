"""The first look, on the one public-domain portrait that a dependency ships: scikit-image's astronaut."""

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import demo
from models import build_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The astronaut, her mirror image, a face-less photo, and an untrained network."""
    folder = tmp_path_factory.mktemp("demo")
    bgr = skimage.data.astronaut()[..., ::-1]
    cv2.imwrite(str(folder / "astronaut.png"), bgr)
    cv2.imwrite(str(folder / "mirrored.jpg"), bgr[:, ::-1])
    cv2.imwrite(str(folder / "wall.png"), np.full((200, 300, 3), 90, np.uint8))
    (folder / "broken.jpg").write_bytes(b"<html>not a photo</html>")
    torch.manual_seed(0)
    torch.save(build_network("mfn", embedding_size=16).state_dict(), folder / "net.pt")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Run demo.py on files of `folder`; returns exit code, standard output, standard error."""

    def run(*arguments):
        words = [str(folder / word) if (folder / word).exists() else word for word in arguments]
        monkeypatch.setattr("sys.argv", ["demo.py", *words, "--device", "cpu", "--out", str(tmp_path / "out")])
        code = demo.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_one_photo_shows_its_faces_without_a_network(run, tmp_path):
    code, out, _ = run("astronaut.png")
    assert code == 0 and "astronaut.png: 1 face\n" in out
    picture = Image.open(tmp_path / "out" / "astronaut-faces.png")
    assert picture.width >= demo.PHOTO_SIDE
    colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (colours == (0xE6, 0x9F, 0x00)).all(axis=1).sum() > 200  # the box is drawn


def test_photo_without_a_face_is_an_answer(run, tmp_path):
    code, out, _ = run("wall.png")
    assert code == 0 and "wall.png: 0 faces" in out
    assert (tmp_path / "out" / "wall-faces.png").exists()


def test_mirror_image_is_the_same_person(run, tmp_path):
    # The feature adds that of the mirror image, so even an untrained network has to see the same face.
    code, out, _ = run("astronaut.png", "mirrored.jpg", "--checkpoint", "net.pt", "--threshold", "30")
    assert code == 0, out
    assert out.startswith("the same person: angle ")
    assert "threshold 30.0°, confidence unknown" in out
    assert (tmp_path / "out" / "astronaut-mirrored.png").exists()


def test_gallery_names_whom_it_knows(run, folder, tmp_path):
    gallery = tmp_path / "gallery"
    (gallery / "Eileen").mkdir(parents=True)
    (gallery / "Eileen" / "1.png").write_bytes((folder / "astronaut.png").read_bytes())
    (gallery / "Eileen" / "2.png").write_bytes((folder / "wall.png").read_bytes())
    arguments = ("mirrored.jpg", "--gallery", str(gallery), "--checkpoint", "net.pt", "--threshold")
    code, out, err = run(*arguments, "30")
    assert code == 0 and "  1: Eileen (Eileen " in out
    assert "2.png: left out: " in err
    assert (tmp_path / "out" / "mirrored-named.png").exists()
    code, out, _ = run(*arguments, "0.000001")
    assert code == 0 and "  1: nobody of the gallery (Eileen " in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("astronaut.png", "wall.png", "--checkpoint", "net.pt", "--threshold", "30"), "wall.png: no face found"),
        (("astronaut.png", "broken.jpg"), "broken.jpg: not a photo"),
        (("astronaut.png", "missing.jpg"), "missing.jpg: missing"),
        (("astronaut.png", "mirrored.jpg", "--checkpoint", "net.pt"), "no threshold is known"),
        (("astronaut.png", "mirrored.jpg", "wall.png"), "3 photos"),
        (("astronaut.png", "--gallery", "nowhere"), "--gallery nowhere"),
    ],
)
def test_refusals(run, tmp_path, arguments, reason):
    code, _, err = run(*arguments)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and reason in err
    assert not list(tmp_path.glob("out/*.png"))


def test_gallery_person_without_a_face(run, folder, tmp_path):
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    (gallery / "Wall.png").write_bytes((folder / "wall.png").read_bytes())
    code, _, err = run("astronaut.png", "--gallery", str(gallery), "--checkpoint", "net.pt", "--threshold", "30")
    assert code == 1 and "no usable photo of Wall" in err


def test_no_network_says_how_to_get_one(monkeypatch, tmp_path, run):
    monkeypatch.setattr(demo.download, "WEIGHTS", tmp_path)
    monkeypatch.setattr(demo, "DEMO_NETWORK", tmp_path / "embedding.pt")
    code, _, err = run("astronaut.png", "mirrored.jpg")
    assert code == 1 and "make demo" in err and "--checkpoint released" in err
