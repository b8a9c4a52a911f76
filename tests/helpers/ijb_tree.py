"""IJB-shaped trees: invented lists with features, and one made from photos of LFW with real landmarks."""

import shutil
from pathlib import Path

import numpy as np

from cropping.faces import find_faces
from formats.tables import CROP


def write_lists(folder, prefix, images, templates, medias, landmarks, scores, pairs, galleries, probes):
    """The official files. pairs: rows (template, template, label); galleries: name -> rows (template, subject, image)
    as for `probes`."""
    meta = Path(folder) / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    lines = [f"{i} {t} {m}" for i, t, m in zip(images, templates, medias, strict=True)]
    (meta / f"{prefix}_face_tid_mid.txt").write_text("\n".join(lines) + "\n")
    lines = []
    for image, points, score in zip(images, landmarks, scores, strict=True):
        lines.append(f"{image} {' '.join(f'{value:.3f}' for value in np.ravel(points))} {score:.3f}")
    (meta / f"{prefix}_name_5pts_score.txt").write_text("\n".join(lines) + "\n")
    lines = [" ".join(map(str, row)) for row in pairs]
    (meta / f"{prefix}_template_pair_label.txt").write_text("\n".join(lines) + "\n")
    for name, rows in {**{f"gallery_{name}": rows for name, rows in galleries.items()}, "probe_mixed": probes}.items():
        lines = ["TEMPLATE_ID,SUBJECT_ID,FILENAME", *(",".join(map(str, row)) for row in rows)]
        (meta / f"{prefix}_1N_{name}.csv").write_text("\n".join(lines) + "\n")
    return Path(folder)


def tree_of_lfw(lfw, folder, detector, people=8, photos=4):
    """`people` of LFW's people with at least `photos` photos as IJB-C: two templates each, the first one enrolled, with
    the detector's own landmarks in copies of the photos."""
    whose = sorted(path for path in (lfw / "lfw-deepfunneled").iterdir() if len(list(path.iterdir())) >= photos)[
        :people
    ]
    files = [file for path in whose for file in sorted(path.iterdir())[:photos]]
    rows = [row for row, _ in find_faces(files, detector, workers=1)]
    assert all(row.status == CROP for row in rows)
    loose = folder / "loose_crop"
    loose.mkdir(parents=True)
    images = [f"{number}.jpg" for number in range(1, len(files) + 1)]
    for file, image in zip(files, images, strict=True):
        shutil.copy(file, loose / image)
    subject = np.repeat(np.arange(people), photos)
    template = 10 + 2 * subject + np.arange(len(files)) % 2
    pairs = [
        (a, b, int((a - 10) // 2 == (b - 10) // 2))
        for a in range(10, 10 + 2 * people, 2)
        for b in range(11, 11 + 2 * people, 2)
    ]
    tables = [
        list(zip(template[part], subject[part], np.array(images)[part], strict=True))
        for part in (
            (template % 2 == 0) & (subject % 2 == 0),
            (template % 2 == 0) & (subject % 2 == 1),
            template % 2 == 1,
        )
    ]
    return write_lists(
        folder,
        "ijbc",
        images,
        template,
        np.arange(len(files)),
        [row.landmarks for row in rows],
        [row.score for row in rows],
        pairs,
        {"G1": tables[0], "G2": tables[1]},
        tables[2],
    )
