"""People who do not exist: head geometry, skin, hair, clothes and a ray tracer that photographs them.

The words of this room:

* identity: who somebody is, and all that is fixed for them (`parameters.Identity`); a person is an identity made ready
  for tracing (`render.Person`): mesh, hair, paint.
* photo: what varies from picture to picture (`parameters.PhotoParameters`): pose, light, camera, what is worn. A scene
  is both together. The truth of a picture is where box and landmarks are in it.
* head, canonical: the mesh and its blend shapes (`head`); canonical places are those of the average adult, with the
  middle of the eyes at the origin. Lengths are centimetres, colours linear RGB.
* canvas, paint: skin is painted on a canvas of directions as seen from inside of the head (`skin`).
* ribbon: a strip of hair or beard that grows from a vertex, its root (`hair`). A piece is a mesh that is worn or held.
* uniforms: what the tracer has to know of one photo, in one record (`kernels`).
* factor, level, shot: one thing that is moved, how far, and the photo of everybody in which it is (`factors`,
  `stress_set`).

`head` reads the freely licensed mesh data, `parameters` draws who a person is and how a photo of them varies, `skin`
paints, `hair` grows, `props` makes what is worn or held in front, `render` traces and `photo` does what a camera does
afterwards; `dataset` writes files, `stress_set` those of stress.py. Only synthesize.py and stress.py import this room,
inside of `needed`, so its two extra dependencies stay optional.
"""

import contextlib
from collections.abc import Iterator

from utils import InputError

# By the names of their modules; `anny` is looked for by its package's name.
_PACKAGES = {"warp": "warp-lang", "threadpoolctl": "threadpoolctl", "anny": "anny"}


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Inside, what fails for want of a package (an import of this room) is an `InputError` that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:  # PackageNotFoundError is one, and its name is the package's
        package = _PACKAGES.get(str(error.name), str(error.name))
        if package not in _PACKAGES.values():
            raise
        raise InputError(f"the package {package} is missing: pip install -r requirements-synthetic.txt") from error
