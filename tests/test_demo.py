"""The first look, on the one public-domain portrait that a dependency ships: scikit-image's astronaut."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from helpers.toy_models import write_onnx
from PIL import Image

import demo
import plotting
from models import build_network
from retinaface import Detections
from verification.decision import Decision, Normal


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


def test_the_first_folder_of_a_gallery_is_the_person(run, folder, tmp_path):
    """Photos by year in each person's folder: nobody is called 2019."""
    gallery = tmp_path / "gallery"
    for person in ("Ann", "Bea"):
        (gallery / person / "2019").mkdir(parents=True)
        (gallery / person / "2019" / "1.png").write_bytes((folder / "astronaut.png").read_bytes())
    code, out, err = run("mirrored.jpg", "--gallery", str(gallery), "--checkpoint", "net.pt", "--threshold", "30")
    assert code == 0, err
    assert "Ann " in out and "Bea " in out and "2019" not in out


@pytest.mark.parametrize("names", [("Ann.png", "Ann.jpg"), ("Ann.png", "Ann/1.png")])
def test_names_that_would_merge_two_people_are_refused(run, folder, tmp_path, names):
    for name in names:
        (tmp_path / "gallery" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "gallery" / name).write_bytes((folder / "astronaut.png").read_bytes())
    arguments = ("--gallery", str(tmp_path / "gallery"), "--checkpoint", "net.pt", "--threshold", "30")
    code, _, err = run("mirrored.jpg", *arguments)
    assert code == 1 and "'Ann' is the name of" in err


def test_a_name_without_letters_in_the_font_stands_in_the_list(run, folder, tmp_path):
    gallery = tmp_path / "gallery"
    name = "\u738b\u82b3\U0001f600"
    (gallery / name).mkdir(parents=True)
    (gallery / name / "1.png").write_bytes((folder / "astronaut.png").read_bytes())
    arguments = ("--gallery", str(gallery), "--checkpoint", "net.pt", "--threshold", "30")
    code, out, err = run("mirrored.jpg", *arguments)
    assert code == 0, err
    assert f"  1: {name} ({name} " in out


def test_text_of_any_script_is_legible(tmp_path, recwarn):
    assert plotting.legible("Zoë Ångström Ελένη Иван") == "Zoë Ångström Ελένη Иван"
    assert plotting.legible("\u738b\u82b3") == "\\u738b\\u82b3" and plotting.legible("\U0001f98a") == "\\U0001f98a"
    assert plotting.legible("a\x07b") == "a\\x07b"
    arabic = "\u0645\u0631\u064a\u0645"
    assert plotting.legible(arabic, shaped=False).isascii()
    with plotting.drawing(tmp_path / "a", 4, 3) as figure:
        axes = figure.add_subplot()
        plotting.title(axes, "\u738b" * 100, arabic)
    assert not [warning for warning in recwarn if "missing from font" in str(warning.message)]


def crowd(count, side=12, width=600, height=400):
    """A photo of many small faces in rows."""
    across = 12
    lefts = np.array([(20 + index % across * 45, 20 + index // across * 60) for index in range(count)], np.float32)
    boxes = np.concatenate([lefts, lefts + side], axis=1)
    faces = Detections(boxes, np.full(count, 0.9, np.float32), np.repeat(boxes[:, None, :2] + side / 2, 5, axis=1))
    return demo.Look(
        Path("crowd.jpg"),
        np.full((height, width, 3), 255, np.uint8),
        faces,
        np.zeros((count, 112, 112, 3), np.uint8),
        "central",
    )


def test_labels_of_a_crowd_do_not_cover_its_faces():
    look = crowd(60)
    bare = np.asarray(demo.draw_faces(look, [""] * 60)).astype(int)
    drawn = np.asarray(demo.draw_faces(look, [str(index + 1) for index in range(60)])).astype(int)
    scale = bare.shape[1] / 600
    assert bare.shape == drawn.shape and 12 * scale >= demo.FACE_SIDE - 1
    changed = (bare != drawn).any(axis=2)
    assert changed.sum() > 60 * 100
    for left, top, right, bottom in (look.faces.boxes * scale).round().astype(int):
        assert not changed[top + 1 : bottom, left + 1 : right].any()


def test_labels_stay_inside_the_picture():
    look = crowd(1)
    look.faces.boxes[:] = [590, 2, 599, 11]
    label = "a name that is much too long for this photo " * 4
    drawn = np.asarray(demo.draw_faces(look, [label]))
    bare = np.asarray(demo.draw_faces(look, [""]))
    rows, columns = np.nonzero((drawn != bare).any(axis=2))
    assert len(rows) and columns.max() < drawn.shape[1]


def test_crops_of_a_pair_stand_at_one_height():
    tall, wide = crowd(1), crowd(1, width=900, height=200)
    for look, value in ((tall, 40), (wide, 80)):
        look.crops[:] = value
    sheet = np.asarray(demo.draw_pair([tall, wide], "same", "detail", "#009E73"))
    tops = [np.flatnonzero((sheet == value).all(axis=2).any(axis=1))[0] for value in (40, 80)]
    assert tops[0] == tops[1]


def test_a_shrunk_photo_says_which_faces_were_not_looked_for(run):
    code, out, _ = run("astronaut.png", "--max-side", "256")
    assert code == 0 and "shrunk to 256 for detection: faces below about 32 pixels were not looked for" in out
    code, out, _ = run("astronaut.png", "--max-side", "0")
    assert code == 0 and "shrunk to" not in out


def test_a_foreign_model_is_fed_as_the_options_say(run, tmp_path):
    path = write_onnx(tmp_path / "foreign.onnx")
    arguments = ("astronaut.png", "mirrored.jpg", "--checkpoint", str(path), "--threshold", "80")
    code, _, err = run(*arguments)
    assert code == 1 and "give --mean and --std" in err
    code, out, _ = run(*arguments, "--mean", "0.5", "--std", "0.5")
    assert code == 0 and "without mirror image" in out


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


def test_a_gallery_without_features_is_no_gallery(run, folder, tmp_path, monkeypatch):
    """Else everybody would be "nobody of the gallery"."""
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "Eileen.png").write_bytes((folder / "astronaut.png").read_bytes())
    monkeypatch.setattr(demo.Embedder, "features", lambda self, crops: np.full((len(crops), 16), np.nan, np.float32))
    code, _, err = run(
        "wall.png", "--gallery", str(tmp_path / "gallery"), "--checkpoint", "net.pt", "--threshold", "30"
    )
    assert code == 1 and "net.pt: gives no finite feature" in err


def test_no_network_says_how_to_get_one(monkeypatch, tmp_path, run):
    monkeypatch.setattr(demo.download, "WEIGHTS", tmp_path)
    monkeypatch.setattr(demo, "DEMO_NETWORK", tmp_path / "embedding.pt")
    code, _, err = run("astronaut.png", "mirrored.jpg")
    assert code == 1 and "make demo" in err and "--checkpoint released" in err


def test_an_answer_against_the_odds_is_said_to_be_unsure():
    """A threshold at a strict false accept rate lies where one person is still the likelier answer, or the reverse."""
    strict = Decision(66.0, "", Normal(45.0, 12.0), Normal(88.0, 6.0))
    assert demo.answer(strict, 60.0)[0] == "the same person"
    verdict, figures = demo.answer(strict, 70.0)
    assert verdict == "not sure: one person or two"
    assert figures == "angle 70.0°, threshold 66.0°; one is likelier, but it is beyond the threshold"
    verdict, figures = demo.answer(strict, 85.0)
    assert verdict == "two different people" and "confidence 99.8%" in figures
    loose = Decision(80.0, "", Normal(45.0, 6.0), Normal(88.0, 12.0))
    verdict, figures = demo.answer(loose, 79.0)
    assert verdict == "not sure: one person or two" and "two are likelier, but it is within" in figures
