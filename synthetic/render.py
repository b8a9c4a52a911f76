"""From a person and a list of photos to images and their truth: one mesh per photo, one launch per batch.

The head stays where it is and the camera goes around it; the torso turns against the head. A person's head, hair and
beard are one mesh whose bounding tree is built once and refitted per photo (0.2 ms against 10 ms).

A batch is a run of one person's photos: on CUDA all of them (as far as `BATCH` goes) in one launch, on a CPU one after
the other. The arithmetic per photo is the same either way, so the split does not change a byte. Paint, hair, background
and what a camera adds are the host's work, 10 to 17 ms a photo; a GPU is kept busy by one process per core.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import warp as wp

from synthetic import hair, kernels, props, skin
from synthetic.head import LASH, SKIN, load_head
from synthetic.parameters import IRIS_COLOURS, Identity, PhotoParameters
from synthetic.photo import background, develop

BATCH = 64  # photos of 256 px that a GPU renders together, fewer if they are larger: 167 bytes a pixel, 0.7 GB
EYE_DISTANCE = 6.0  # centimetres, for the scale of `PhotoParameters.eye_pixels`
FACE_CENTRE = np.array([0.0, -3.0, -1.0])  # what is put in the image's middle
NECK_PIVOT = np.array([0.0, -11.5, -9.0], np.float32)
# From the mesh's anatomical points to those that photos are annotated with, in centimetres, x outwards: fitted on
# 300 frontal photos of two seeds (the README's figures are of others). Eyes: from the middle of the lids' vertices.
# Nose: the tip at the height of the wings' upper edge, which the detector keeps to where a tip points up or down.
# Mouth: from the ends of the lips' seam.
LANDMARK_OFFSETS = {"eye": (-0.12, 0.11, 0.0), "nose": (0.0, -0.23, 0.0), "mouth": (0.0, 0.12, 0.0)}
IRIS_ANGLE = 0.46  # radians seen from the eyeball's centre: 0.6 cm of iris on MakeHuman's 1.38 cm eyeball


@dataclass
class Truth:
    """Where things are in the image, in pixels as the detector counts them: the first pixel's centre is at 0.5."""

    box: np.ndarray  # [4] xyxy of the face from hairline to chin
    landmarks: np.ndarray  # [5, 2] image-left eye, image-right eye, nose, image-left and image-right mouth corner


def head_rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Head frame to camera frame [3, 3]; camera x right, y up, z towards the viewer; degrees, see `PhotoParameters`."""
    y, p, r = np.radians([yaw, -pitch, roll])
    turn = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    nod = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    lean = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    return lean @ nod @ turn


class Person:
    """An identity made ready for tracing: shape, hair, paint and the ambient occlusion of its vertices."""

    def __init__(self, identity: Identity, renderer: "Renderer", off: frozenset[str]) -> None:
        head = renderer.head
        self.identity = identity
        shifts = head.shifts(np.array(identity.local, np.float32))
        self.local = shifts[0] + shifts[1]
        self.rest = head.shape(identity.who, shifts)
        self.eyes = np.stack([self.rest[eye].mean(0) for eye in head.eye_vertices])
        self.field = hair.RadiusField(head, self.rest)
        ribbons = [hair.grow_hair(identity, head, self.rest, self.field), hair.grow_beard(identity, head, self.rest)]
        self.hair_count = len(ribbons[0].points)
        self.ribbons = hair.join(ribbons)
        kinds = [
            np.full(len(part.faces), kind) for part, kind in zip(ribbons, (kernels.HAIR, kernels.BEARD), strict=True)
        ]
        vertices = len(self.rest)
        self.faces = np.concatenate([head.faces, self.ribbons.faces + vertices]).astype(np.int32)
        self.materials = np.concatenate([head.material, *kinds]).astype(np.int32)
        self.aux = np.concatenate([head.canonical, self.ribbons.tangents]).astype(np.float32)
        self.strand = np.concatenate([renderer.lash_strand, self.ribbons.strand]).astype(np.float32)
        self.paint = skin.paint(identity, off)


class Renderer:
    """The tracer on one device: `Renderer(device).photograph(identity, photos)`."""

    def __init__(self, device: torch.device, batch: int | None = None) -> None:
        self.device = device
        self.warp = str(device) if device.type == "cuda" else "cpu"
        self.batch = batch or (BATCH if device.type == "cuda" else 1)
        kernels.start(self.warp)
        self.head = load_head()
        self.canvas = skin.load_canvas()
        head = self.head

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.base = tensor(head.base)
        self.macro = tensor(head.macro.reshape(len(head.macro), -1))
        self.expression = tensor(head.expression.reshape(len(head.expression), -1))
        self.rings: wp.array = wp.array(head.rings, dtype=wp.int32, device=self.warp)
        self.head_faces: wp.array = wp.array(head.faces.reshape(-1), dtype=wp.int32, device=self.warp)
        below = np.nonzero(head.torso_share > 0)[0]
        self.below = tensor(below)
        self.share = tensor(head.torso_share[below])[None, :, None]
        self.eye_index = [tensor(eye) for eye in head.eye_vertices]
        self.masks: wp.array = wp.array(self.canvas.masks, dtype=wp.uint8, device=self.warp)
        self.lash_strand = _lash_coordinates(head.faces[head.material == LASH], head.canonical)
        place = head.canonical
        skin_vertices = np.unique(head.faces[head.material == SKIN])
        face = (place[:, 2] > -5.5) & (place[:, 1] > -12.5) & (place[:, 1] < 5.5) & (head.torso_share < 0.05)
        face &= np.isin(np.arange(len(place)), skin_vertices) & (np.abs(place[:, 0]) < 7.2)
        self.face_vertices = np.nonzero(face)[0]
        self._kept: tuple[Any, Any, Any, Any] = (None, None, None, None)
        self._tables: dict[int, tuple[wp.array, np.ndarray]] = {}  # uniforms on the host, by number of photos

    # -- geometry ------------------------------------------------------------------------------------------------

    def _pose(self, person: Person, photos: list[PhotoParameters]) -> tuple[torch.Tensor, np.ndarray]:
        """Vertices [M, V, 3] in the head's frame and gaze directions [M, 2, 3]."""
        head, device = self.head, self.device
        who = [{**person.identity.who, "years": photo.years, "weight": photo.weight} for photo in photos]
        weights = np.stack([head.macro_weights(drifted) for drifted in who])
        units = np.array(
            [[photo.expression.get(label, 0.0) for label in head.expression_labels] for photo in photos], np.float32
        )
        units[:, [head.expression_labels.index(f"eyeWide{side}") for side in ("Left", "Right")]] += person.identity.lids
        # Products are taken photo by photo: a matrix product's rounding may depend on how many rows it has.
        rows = []
        fixed = self.base + torch.from_numpy(person.local).to(device)
        for weight, unit in zip(torch.from_numpy(weights).to(device), torch.from_numpy(units).to(device), strict=True):
            shape = fixed + (weight @ self.macro).view(-1, 3)
            middle = (shape[self.eye_index[0]].mean(0) + shape[self.eye_index[1]].mean(0)) / 2
            rows.append(shape - middle + (unit @ self.expression).view(-1, 3))
        vertices = torch.stack(rows)
        gaze = np.stack([self._gaze(photo) for photo in photos])
        for side, index in enumerate(self.eye_index):
            eye = vertices[:, index]
            centre = eye.mean(1, keepdim=True)
            turn = torch.from_numpy(gaze[:, side].astype(np.float32)).to(device)
            # Not as a matrix product, for the same reason.
            vertices[:, index] = centre + (turn[:, None] * (eye - centre)[:, :, None]).sum(-1)
        spin = torch.from_numpy(np.stack([self._torso(photo) for photo in photos]).astype(np.float32)).to(device)
        pivot = torch.from_numpy(NECK_PIVOT).to(device)
        vertices[:, self.below] = _turn(vertices[:, self.below], spin[:, None] * self.share, pivot)
        return vertices, gaze[:, :, :, 2]

    def _gaze(self, photo: PhotoParameters) -> np.ndarray:
        """Rotations [2, 3, 3] of the right and left eyeball."""
        close = np.degrees(np.arctan2(EYE_DISTANCE / 2, photo.distance)) * 0.5
        return np.stack([head_rotation(photo.gaze[0] + turn, photo.gaze[1], 0) for turn in (close, -close)])

    def _torso(self, photo: PhotoParameters) -> np.ndarray:
        """Rotation vector of the torso in the head's frame."""
        relative = head_rotation(photo.yaw, photo.pitch, photo.roll).T @ head_rotation(
            photo.torso_yaw, photo.torso_pitch, 0
        )
        return cv2.Rodrigues(relative)[0][:, 0]

    def _normals(self, points: wp.array, normals: wp.array) -> None:
        """Fill the normals of the head's vertices, which come first in both arrays [M, N] of vec3."""
        shape = (points.shape[0], len(self.head.canonical))
        wp.launch(kernels.vertex_normals, shape, [points, self.head_faces, self.rings, normals], device=self.warp)

    def _ribbons(self, person: Person, photos: list[PhotoParameters], vertices: torch.Tensor) -> torch.Tensor:
        """Ribbon vertices [M, R, 3]: they follow their roots in `vertices` [M, V, 3], and hats press them down."""
        ribbons = person.ribbons
        rest, roots, points = (
            torch.from_numpy(array).to(self.device) for array in (person.rest, ribbons.roots, ribbons.points)
        )
        moved = points + (vertices - rest)[:, roots]
        if person.hair_count:
            for hair_points, photo in zip(moved[:, : person.hair_count], photos, strict=True):
                if photo.hat is not None:
                    pressed = self._under_hat(person, photo, hair_points.cpu().numpy())
                    hair_points.copy_(torch.from_numpy(pressed))
        return moved

    @staticmethod
    def _under_hat(person: Person, photo: PhotoParameters, scalp: np.ndarray) -> np.ndarray:
        """Points [N, 3] of the hair pressed down by the photo's hat, float32."""
        offset = scalp - hair.CENTRE
        radius = np.linalg.norm(offset, axis=1)
        azimuth, elevation = np.arctan2(offset[:, 0], offset[:, 2]), np.arcsin(offset[:, 1] / radius)
        edge = props.hat_edge(photo, np.degrees(azimuth))
        under = np.clip((np.degrees(elevation) - edge + 4) / 8, 0, 1)
        assert photo.hat is not None
        if photo.hat["kind"] == "band":
            under *= np.degrees(elevation) < edge + 16
        direction = offset / radius[:, None]
        pressed = np.minimum(radius, person.field(direction) + 0.25)
        return (hair.CENTRE + direction * (radius + (pressed - radius) * under)[:, None]).astype(np.float32)

    # -- uniforms ------------------------------------------------------------------------------------------------

    def _camera(self, photo: PhotoParameters, size: int) -> dict[str, Any]:
        rotation = head_rotation(photo.yaw, photo.pitch, photo.roll)
        scale = size / 256
        return {
            "rotation": rotation,
            "translation": np.array([0.0, 0.0, -photo.distance]) - rotation @ FACE_CENTRE,
            "focal": photo.eye_pixels * scale * photo.distance / EYE_DISTANCE,
            "centre": (size / 2 + photo.shift[0] * scale, size / 2 + photo.shift[1] * scale),
        }

    @staticmethod
    def project(camera: dict[str, Any], points: np.ndarray) -> np.ndarray:
        """Image positions [N, 2] of points [N, 3] in the head's frame; the first pixel's centre is at (0.5, 0.5)."""
        seen = points @ camera["rotation"].T + camera["translation"]
        x = camera["centre"][0] + camera["focal"] * seen[:, 0] / -seen[:, 2]
        y = camera["centre"][1] - camera["focal"] * seen[:, 1] / -seen[:, 2]
        return np.stack([x, y], -1)

    def _uniforms(self, person: Person, photo: PhotoParameters, camera: dict[str, Any], eyes: np.ndarray,
                  gaze: np.ndarray) -> dict[str, Any]:  # fmt: skip
        identity, makeup, clothes = person.identity, photo.makeup, photo.clothes
        to_head = camera["rotation"].T
        values: dict[str, Any] = {
            "origin": -to_head @ camera["translation"],
            "right": to_head @ [1, 0, 0],
            "up": to_head @ [0, 1, 0],
            "forward": to_head @ [0, 0, -1],
            "focal": camera["focal"],
            "centre_x": camera["centre"][0],
            "centre_y": camera["centre"][1],
            "ambient": photo.ambient["mean"],
        }
        for i in range(3):
            light = photo.lights[i] if i < len(photo.lights) else None
            values[f"light{i}"] = to_head @ np.array(light["towards"] if light else (0.0, 1.0, 0.0))
            values[f"colour{i}"] = light["colour"] if light else (0.0, 0.0, 0.0)
            values[f"spread{i}"] = light["spread"] if light else 0.0
        slope = np.stack([photo.ambient["x"], photo.ambient["y"], photo.ambient["z"]])  # camera axis, colour
        in_head = camera["rotation"].T @ slope
        values |= {"ambient_x": in_head[0], "ambient_y": in_head[1], "ambient_z": in_head[2]}
        inner, outer = IRIS_COLOURS[identity.iris]
        look = identity.hair
        hair_root = np.array(look["root"])
        lens = photo.glasses["tint"] if photo.glasses else (1.0, 1.0, 1.0)
        light_amount = float(np.mean(photo.ambient["mean"])) + sum(float(np.mean(x["colour"])) for x in photo.lights)
        values |= {
            "eye_r": eyes[0], "eye_l": eyes[1], "gaze_r": gaze[0], "gaze_l": gaze[1],
            "iris": IRIS_ANGLE * identity.iris_size,
            "pupil": float(np.clip(0.5 - 0.12 * light_amount, 0.22, 0.5)),
            "iris_inner": inner, "iris_outer": outer, "sclera": (0.62, 0.60, 0.58),
            "eye_seed": float(identity.number % 997) * 1.37,
            "hair_root": hair_root, "hair_tip": look["tip"], "hair_shine": look["shine"] * 0.6,
            "hair_grey": look["grey"], "beard_grey": identity.beard["grey"], "beard": identity.beard["colour"],
            "lash": np.minimum(hair_root * 0.3, 0.02),
            "lash_amount": 0.35 + 0.25 * float(identity.who["gender"] < 0.5) + 0.6 * makeup["mascara"],
            "teeth": np.array([0.66, 0.60, 0.48]) * (0.6 + 0.5 * identity.teeth),
            "lip": makeup["lip"], "lip_amount": makeup["lip_amount"], "lip_gloss": makeup["lip_gloss"],
            "shadow": makeup["shadow"], "shadow_amount": makeup["shadow_amount"],
            "blush": makeup["blush"], "blush_amount": makeup["blush_amount"],
            "shine": photo.skin_shine, "bump": 1.6, "skin_tone": skin.skin_tone(identity),
            "cloth_a": clothes["a"], "cloth_b": clothes["b"], "cloth_pattern": clothes["pattern"],
            "cloth_scale": clothes["scale"], "neckline": clothes["neckline"], "neck_depth": clothes["depth"],
            "neck_width": clothes["width"], "lens": lens,
            "lens_mirror": photo.glasses["mirror"] if photo.glasses else 0.0,
            "seed": photo.seed % (1 << 30),
        }  # fmt: skip
        return values

    # -- tracing -------------------------------------------------------------------------------------------------

    def photograph(self, identity: Identity, photos: list[PhotoParameters], size: int = 256,
                   off: frozenset[str] = frozenset()) -> tuple[list[np.ndarray], list[Truth]]:  # fmt: skip
        """Images (uint8 BGR [size, size, 3]) and truths of a person's photos."""
        person = Person(identity, self, off)
        array = self._identity_arrays(person)
        images: list[np.ndarray] = []
        truths: list[Truth] = []
        meshes = [array["mesh"]]
        together = max(1, min(self.batch, BATCH * 256**2 // size**2))
        for start in range(0, len(photos), together):
            part = photos[start : start + together]
            linear, exposure, found = self._trace(person, part, size, array, meshes)
            truths += found
            images += map(develop, linear, exposure, part)
        return images, truths

    def _settle(self) -> None:
        """Wait for torch before warp reads its tensors: on a GPU they use different streams."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _array(self, values: np.ndarray, dtype: Any) -> wp.array:
        return wp.array(np.ascontiguousarray(values), dtype=dtype, device=self.warp)

    def _identity_arrays(self, person: Person) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            "faces": self._array(person.faces.reshape(-1), wp.int32),
            "materials": self._array(person.materials, wp.int32),
            "aux": self._array(person.aux, wp.vec3),
            "strand": self._array(person.strand, wp.vec3),
            "paint": self._array(person.paint, wp.uint8),
        }
        vertices = np.concatenate([person.rest, person.ribbons.points]).astype(np.float32)
        count = len(person.rest)
        mesh = wp.Mesh(self._array(vertices, wp.vec3), arrays["faces"])
        occlusion = self._array(np.ones(len(vertices), np.float32), float)
        normals = wp.empty((1, count), dtype=wp.vec3, device=self.warp)
        self._normals(mesh.points.reshape((1, -1)), normals)
        wp.launch(
            kernels.occlude, count, [mesh.id, mesh.points, normals[0], count, 9, 7.0, occlusion], device=self.warp
        )
        values = occlusion.numpy()
        values[count:] = person.ribbons.open_sky
        arrays["occlusion"] = self._array(values, float)
        arrays["mesh"] = mesh
        return arrays

    def _trace(self, person: Person, photos: list[PhotoParameters], size: int, arrays: dict[str, Any],
               meshes: list[wp.Mesh]) -> tuple[np.ndarray, np.ndarray, list[Truth]]:  # fmt: skip
        vertices, gaze = self._pose(person, photos)
        shown = vertices.cpu().numpy()
        count, total = len(photos), vertices.shape[1] + len(person.ribbons.points)
        points = torch.empty((count, total, 3), device=self.device)
        points[:, : vertices.shape[1]] = vertices
        points[:, vertices.shape[1] :] = self._ribbons(person, photos, vertices)
        all_normals = torch.empty_like(points)
        all_normals[:, vertices.shape[1] :] = torch.from_numpy(person.ribbons.normals).to(self.device)
        cameras, rows, truths = [], [], []
        extras = [self._props(person, photo, shown[i]) for i, photo in enumerate(photos)]
        for i, photo in enumerate(photos):
            camera = self._camera(photo, size)
            eyes = np.stack([shown[i][eye].mean(0) for eye in self.head.eye_vertices])
            cameras.append(camera)
            rows.append(self._uniforms(person, photo, camera, eyes, gaze[i]))
            truths.append(self._truth(camera, shown[i]))
        self._settle()
        normals: Any = wp.from_torch(all_normals, dtype=wp.vec3)
        places: Any = wp.from_torch(points, dtype=wp.vec3)
        self._normals(places, normals)
        for i in range(count):
            shape: Any = wp.from_torch(points[i], dtype=wp.vec3)
            if i < len(meshes):
                wp.copy(meshes[i].points, shape)
                meshes[i].refit()
            else:
                meshes.append(wp.Mesh(wp.clone(shape), arrays["faces"]))
        uniforms = self._table(rows)
        prop = self._prop_arrays([extra[0] for extra in extras])
        lens_meshes = [self._mesh(extra[1], extra[2]) if extra[1] is not None else None for extra in extras]
        worn = np.array([[extra[0] is not None, extra[1] is not None] for extra in extras])
        scene = kernels.Scene()
        scene.body = self._array(np.array([mesh.id for mesh in meshes[:count]], np.uint64), wp.uint64)
        scene.props, scene.lenses = self._ids(prop["meshes"]), self._ids(lens_meshes)
        scene.flags = self._array(worn.astype(np.int32), wp.int32)
        for name in ("materials", "aux", "strand", "occlusion"):
            setattr(scene, name, arrays[name])
        for name in ("faces", "start", "normals", "colours", "info"):
            setattr(scene, f"prop_{name}", prop[name])
        buffers, (irradiance, albedo, extra_light, half, image), behind = self._buffers(count, size)
        geometry = [scene, arrays["faces"], normals]
        colours = [arrays["paint"], self.masks]
        for i, photo in enumerate(photos):
            behind.numpy()[i] = background(photo, size)
        whole, grid = (count, size, size), (count, (size + 1) // 2, (size + 1) // 2)
        light = [irradiance, albedo, extra_light]
        wp.launch(kernels.trace_grid, grid, [*geometry, uniforms, buffers], device=self.warp)
        wp.launch(kernels.soften, grid, [uniforms, buffers], device=self.warp)
        wp.launch(kernels.trace_rest, whole, [*geometry, uniforms, buffers], device=self.warp)
        wp.launch(kernels.light_up, whole, [scene, *colours, uniforms, buffers, *light], device=self.warp)
        wp.launch(kernels.fill_hair, whole, light, device=self.warp)
        wp.launch(kernels.scatter_light, whole, [irradiance, extra_light, uniforms, 0, half], device=self.warp)
        wp.launch(kernels.scatter_light, whole, [half, extra_light, uniforms, 1, irradiance], device=self.warp)
        wp.launch(
            kernels.compose,
            whole,
            [*geometry, *colours, uniforms, buffers, *light, behind.to(self.warp), 2, image],
            device=self.warp,
        )
        # Every fourth pixel is enough; a GPU sends no more.
        fallen, coverage = irradiance[:, ::2, ::2].numpy(), albedo[:, ::2, ::2].numpy()[..., 3]
        exposure = np.array([_exposure(fallen[i], coverage[i]) for i in range(count)])
        return image.numpy(), exposure, truths

    def _table(self, rows: list[dict[str, Any]]) -> wp.array:
        """The photos' uniforms on the device, filled in place on the host."""
        if len(rows) not in self._tables:
            host = wp.zeros(len(rows), dtype=kernels.Uniforms, device="cpu")
            self._tables[len(rows)] = (host, host.numpy())
        host, view = self._tables[len(rows)]
        for i, row in enumerate(rows):
            for name, value in row.items():
                view[name][i] = value
        return host.to(self.warp)

    def _buffers(self, count: int, size: int) -> tuple[Any, list[wp.array], wp.array]:
        """Per-pixel arrays of a batch, the last of them on the host; kept for the next batch of the same shape."""
        if self._kept[0] != (count, size):

            def empty(dtype: Any) -> wp.array:
                return wp.empty((count, size, size), dtype=dtype, device=self.warp)

            buffers = kernels.Buffers()
            for name in ("normal", "place", "flat", "detail"):
                setattr(buffers, name, empty(wp.vec4))
            buffers.free = empty(wp.vec3)
            half = (size + 1) // 2
            buffers.raw = wp.empty((count, half, half), dtype=wp.vec3, device=self.warp)
            behind = wp.empty((count, size, size), dtype=wp.vec3, device="cpu")
            self._kept = ((count, size), buffers, [*(empty(wp.vec4) for _ in range(4)), empty(wp.vec3)], behind)
        return self._kept[1:]

    def _mesh(self, points: np.ndarray, faces: np.ndarray) -> wp.Mesh:
        return wp.Mesh(self._array(points, wp.vec3), self._array(faces.reshape(-1).astype(np.int32), wp.int32))

    def _ids(self, meshes: list[wp.Mesh | None]) -> wp.array:
        return self._array(np.array([mesh.id if mesh else 0 for mesh in meshes], np.uint64), wp.uint64)

    def _props(self, person: Person, photo: PhotoParameters, vertices: np.ndarray) -> tuple[Any, Any, Any]:
        """What is worn or held (a Piece or None) and the lenses' points and faces (or None)."""
        pieces, lens_points, lens_faces = [], None, None
        if photo.glasses:
            eyes = np.stack([vertices[eye].mean(0) for eye in self.head.eye_vertices])
            frame, lens_points, lens_faces = props.glasses(photo, vertices, eyes)
            pieces.append(frame)
        if photo.hat:
            pieces.append(props.hat_piece(photo, person.field))
        if photo.scarf:
            pieces.append(props.scarf_piece(photo, person.field, np.random.default_rng([photo.seed, 9])))
        if photo.occluder:
            mask = photo.occluder["kind"] == "mask"
            pieces.append(props.mask_piece(photo, person.field) if mask else props.occluder_piece(photo))
        return (props.join(pieces) if pieces else None), lens_points, lens_faces

    def _prop_arrays(self, pieces: list[Any]) -> dict[str, Any]:
        empty = props.piece(np.zeros((3, 3)), np.array([[0, 1, 2]]), (0, 0, 0))
        meshes, faces, normals, colours, info, start = [], [], [], [], [], []
        vertex_start = face_start = 0
        for part in pieces:
            meshes.append(self._mesh(part.points, part.faces) if part else None)
            part = part or empty
            flat = np.cross(part.points[part.faces[:, 1]] - part.points[part.faces[:, 0]],
                            part.points[part.faces[:, 2]] - part.points[part.faces[:, 0]])  # fmt: skip
            summed = np.zeros_like(part.points)
            for k in range(3):
                np.add.at(summed, part.faces[:, k], flat)
            normals.append(summed / np.maximum(np.linalg.norm(summed, axis=1, keepdims=True), 1e-9))
            faces.append(part.faces + vertex_start)
            colours.append(part.colours)
            info.append(part.info)
            start.append(face_start)
            vertex_start += len(part.points)
            face_start += len(part.faces)
        return {
            "meshes": meshes,
            "faces": self._array(np.concatenate(faces).reshape(-1).astype(np.int32), wp.int32),
            "start": self._array(np.array(start, np.int32), wp.int32),
            "normals": self._array(np.concatenate(normals).astype(np.float32), wp.vec3),
            "colours": self._array(np.concatenate(colours).astype(np.float32), wp.vec3),
            "info": self._array(np.concatenate(info).astype(np.float32), wp.vec3),
        }

    def _truth(self, camera: dict[str, Any], vertices: np.ndarray) -> Truth:
        head = self.head
        outwards = np.array([[-1.0, 1, 1], [1, 1, 1]])
        lids = np.stack([vertices[lid].mean(0) for lid in head.lids]) + outwards * LANDMARK_OFFSETS["eye"]
        nose = vertices[head.nose_tip] * [1, 0, 1] + vertices[list(head.nose_wings)].mean(0) * [0, 1, 0]
        mouth = vertices[list(head.corners)] + outwards * LANDMARK_OFFSETS["mouth"]
        points = np.concatenate([lids, nose[None] + LANDMARK_OFFSETS["nose"], mouth])
        landmarks = self.project(camera, points).astype(np.float32)
        # In profile a nose may leave the vertices by half a pixel.
        outline = np.concatenate([self.project(camera, vertices[self.face_vertices]), landmarks])
        return Truth(box=np.concatenate([outline.min(0), outline.max(0)]).astype(np.float32), landmarks=landmarks)


def _exposure(light: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Factors [3] that bring the light falling on skin to a camera's working level, and most of the way to white."""
    on_skin = coverage == 1.0 + kernels.SKIN
    if on_skin.sum() < 15:
        on_skin = coverage > 0
    if not on_skin.any():
        return np.ones(3, np.float32)
    values = light[on_skin][:, :3]
    level = values.mean(1)
    colour = values.mean(0) / max(float(level.mean()), 1e-6)
    balance = np.clip(colour, 0.2, 5.0) ** -0.7
    return (balance * 0.85 / np.clip(0.5 * level.mean() + 0.5 * np.quantile(level, 0.8), 0.02, None)).astype(np.float32)


def _turn(vertices: torch.Tensor, vector: torch.Tensor, pivot: torch.Tensor) -> torch.Tensor:
    """Rotate vertices [M, V, 3] about a pivot by rotation vectors [M, V, 3] (Rodrigues' formula)."""
    angle = vector.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    axis = vector / angle
    arm = vertices - pivot
    sine, cosine = torch.sin(angle), torch.cos(angle)
    along = (axis * arm).sum(-1, keepdim=True)
    return pivot + arm * cosine + torch.linalg.cross(axis, arm) * sine + axis * along * (1 - cosine)


def _lash_coordinates(faces: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(across, along, seed) for the eyelash helper meshes: along grows away from the eye; zeros elsewhere."""
    strand = np.zeros((len(place), 3), np.float32)
    index = np.unique(faces)
    for side in (-1, 1):
        lashes = index[np.sign(place[index, 0]) == side]
        centre = np.array([2.885 * side, 0, 0])
        reach = np.linalg.norm(place[lashes] - centre, axis=1)
        strand[lashes, 0] = np.arctan2(place[lashes, 1], place[lashes, 0] - centre[0]) / np.pi
        strand[lashes, 1] = (reach - reach.min()) / max(np.ptp(reach), 1e-6)
    return strand
