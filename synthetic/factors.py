"""One thing at a time: the factors of stress.py, and what each level of them does to a photo, everything else held.

Every person has a reference photo: frontal, calm, bare, one soft lamp, a plain backdrop, a clean camera. A factor
changes one thing of it. Some change the scene, which is photographed anew (`SCENES`); some change the picture
(`PICTURES`: blur, noise, compression), and some where it is cut (`CUTS`: how exact must an alignment be?), which costs
nothing to speak of. Lengths of pictures and cuts are in pixels of the 112x112 crop, whose eyes are 35.2 pixels apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from cropping.align import TEMPLATE, estimate_similarity
from synthetic.head import HeadModel
from synthetic.parameters import EXPRESSIONS, HAIR_COLOURS, Identity, PhotoParameters, draw_photo, towards
from synthetic.render import head_rotation

EYES_IN_CROP = float(TEMPLATE[1, 0] - TEMPLATE[0, 0])  # pixels between the eyes of a crop
EYE_PIXELS = 50.0  # of a reference photo, for an image of 256 pixels
OLDEST = 85.0  # years; the mesh knows nobody older
# The lamp of a reference photo: degrees to the image's right and up, its light on skin, and even light from all around.
AZIMUTH, ELEVATION, KEY, FILL = 20.0, 30.0, 1.0, 0.4

Level = float | str
Scene = tuple[Identity, PhotoParameters]


@dataclass(frozen=True)
class Factor:
    """One factor: its `levels`, in `unit`, from mild to severe; the levels of a named factor (`unit` "") are names."""

    name: str
    unit: str
    levels: tuple[Level, ...]


def reference(identity: Identity, head: HeadModel) -> Scene:
    """A person as they are, and their reference photo."""
    photo = draw_photo(identity, 0, head, frozenset({"occlusion", "expression", "light"}), "frontal")
    camera = photo.camera | {"exposure": 0.0, "contrast": 1.0, "saturation": 1.0, "balance": [1.0, 1.0, 1.0]}
    camera |= {"vignette": 0.0, "noise": 0.004}
    makeup = photo.makeup | {"lip_amount": 0.0, "shadow_amount": 0.0, "blush_amount": 0.0, "mascara": 0.0}
    straight: dict[str, Any] = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "torso_yaw": 0.0, "torso_pitch": 0.0}
    calm = replace(photo, **straight, gaze=(0.0, 0.0), camera=camera, makeup=makeup, distance=150.0, shift=(0.0, 0.0))
    background = photo.background | {"kind": "gradient", "level": 0.35}
    calm = replace(
        calm, eye_pixels=EYE_PIXELS, background=background, years=identity.who["years"], weight=identity.who["weight"]
    )
    return _lit()((identity, calm))


# ---------------------------------------------------------------------------------------------- scenes


def _turned(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Callable[[Scene], Scene]:
    return lambda scene: (scene[0], replace(scene[1], yaw=yaw, pitch=pitch, roll=roll, torso_yaw=0.6 * yaw))


def _seen_from(elevation: float) -> Callable[[Scene], Scene]:
    """The camera so many degrees higher: to it all turns, the lamp and the light around with the person."""

    def change(scene: Scene) -> Scene:
        identity, photo = scene
        turn = head_rotation(0.0, -elevation, 0.0)
        lights = [light | {"towards": tuple((turn @ np.array(light["towards"])).tolist())} for light in photo.lights]
        slopes = turn @ np.array([photo.ambient[axis] for axis in "xyz"])
        ambient = photo.ambient | {axis: tuple(slope) for axis, slope in zip("xyz", slopes.tolist(), strict=True)}
        return identity, replace(photo, pitch=-elevation, torso_pitch=-elevation, lights=lights, ambient=ambient)

    return change


def _lit(
    azimuth: float = AZIMUTH, elevation: float = ELEVATION, fill: float = FILL, warmth: float = 0.0
) -> Callable[[Scene], Scene]:
    """The lamp of the reference photo, at another place, over another `fill` of even light, or its colour moved from
    white (negative: blue). What stands behind is a wall that this light falls on.
    """

    def change(scene: Scene) -> Scene:
        tint = np.exp(warmth * np.array([0.25, 0.0, -0.4]))
        colour, mean, up, front = (tuple((share * tint).tolist()) for share in (KEY, fill, 0.3 * fill, 0.1 * fill))
        ambient = {"mean": mean, "x": (0.0,) * 3, "y": up, "z": front, "kind": "even"}
        lights = [{"towards": towards(azimuth, elevation), "colour": colour, "spread": 0.3}]
        on_wall = _on_wall(azimuth, elevation, fill) / _on_wall(AZIMUTH, ELEVATION, FILL)
        background = scene[1].background | {"light": tuple((on_wall * tint).tolist())}
        return scene[0], replace(scene[1], lights=lights, ambient=ambient, background=background)

    return change


def _on_wall(azimuth: float, elevation: float, fill: float) -> float:
    """How much light falls on what stands behind and faces the camera."""
    return fill + KEY * max(towards(azimuth, elevation)[2], 0.0)


def _expression(units: dict[str, float]) -> Callable[[Scene], Scene]:
    return lambda scene: (scene[0], replace(scene[1], expression=units))


def _both(unit: str, amount: float = 1.0) -> dict[str, float]:
    return {f"{unit}{side}": amount for side in ("Left", "Right")}


def _aged(years: float) -> Callable[[Scene], Scene]:
    """So many years older: face, wrinkles and grey hair."""

    def change(scene: Scene) -> Scene:
        identity, photo = scene
        now = identity.who["years"]
        then = now + years
        grey = _grey(identity.hair["grey"], now, then)
        hair = identity.hair | {"grey": grey}
        of_beard = identity.beard["grey"] / identity.hair["grey"] if identity.hair["grey"] > 0 else 1.0
        beard = identity.beard | {"grey": min(grey * of_beard, 1.0)}
        wrinkles = float(np.clip(identity.wrinkles + years / 50, 0.02, 1.1))
        older = replace(identity, who=identity.who | {"years": then}, hair=hair, beard=beard, wrinkles=wrinkles)
        return older, replace(photo, years=then)

    return change


def _grey(grey: float, now: float, then: float) -> float:
    """How grey somebody is `then`, by the curve that `parameters` draws from: 22 years from an onset between 38 and 68.

    Who is not grey yet begins in the middle of what is left of that.
    """
    onset = now - 22 * grey if grey > 0 else (max(now, 38.0) + max(now, 68.0)) / 2
    return float(np.clip((then - onset) / 22, grey, 1))


def _worn(**things: Any) -> Callable[[Scene], Scene]:
    return lambda scene: (scene[0], replace(scene[1], **things))


def _glasses(rim: float, tint: float) -> dict[str, Any]:
    look = {"shape": "square", "size": 1.0, "rim": rim, "colour": (0.02, 0.02, 0.02), "gloss": 0.6}
    return {"glasses": look | {"tint": [tint] * 3, "mirror": 0.03, "drop": 0.0}}


def _hat(kind: str) -> dict[str, Any]:
    cloth = {"colour": (0.05, 0.08, 0.2), "second": (0.25, 0.03, 0.03), "height": 0.3, "turn": 0.0}
    return {"hat": {"kind": kind} | cloth}


def _occluder(kind: str, place: str, nearer: float = 0.0) -> dict[str, Any]:
    """A thing at a place, so many centimetres further towards the middle of the face."""
    look = {"side": 1.0, "turn": 25.0 if nearer else 0.0, "colour": (0.35, 0.5, 0.6)}
    return {"occluder": {"kind": kind, "place": place, "jitter": [-nearer, 0.4 * nearer, 0.2 * nearer]} | look}


def _made_up(amount: float) -> Callable[[Scene], Scene]:
    paint = {"lip": (0.35, 0.02, 0.05), "lip_amount": 0.9 * amount, "lip_gloss": 0.5 * amount}
    paint |= {"shadow": (0.08, 0.05, 0.12), "shadow_amount": 0.9 * amount, "mascara": amount}
    paint |= {"blush": (1.0, 0.62, 0.65), "blush_amount": 0.7 * amount}
    return lambda scene: (scene[0], replace(scene[1], makeup=scene[1].makeup | paint))


def _bearded(style: str) -> Callable[[Scene], Scene]:
    def change(scene: Scene) -> Scene:
        identity, photo = scene
        if identity.hair["colour"] in ("dyed", "platinum"):
            colour = list(HAIR_COLOURS["brown"])
        else:
            colour = list(identity.hair["root"])
        shadow = 0.0 if style == "none" else 0.6
        beard = identity.beard | {"style": style, "density": 0.9, "length": 1.0, "shadow": shadow, "colour": colour}
        return replace(identity, beard=beard), photo

    return change


def _cut_hair(style: str) -> Callable[[Scene], Scene]:
    return lambda scene: (replace(scene[0], hair=scene[0].hair | {"style": style}), scene[1])


def _numbered(
    name: str, unit: str, levels: tuple[float, ...], change: Callable[[float], Callable[[Scene], Scene]]
) -> tuple[Factor, list[Callable[[Scene], Scene]]]:
    return Factor(name, unit, levels), [change(level) for level in levels]


def _named(name: str, changes: dict[str, Callable[[Scene], Scene]]) -> tuple[Factor, list[Callable[[Scene], Scene]]]:
    return Factor(name, "", tuple(changes)), list(changes.values())


_UNITS = {
    "jaw left": {"jawLeft": 1.0},
    "lips to the left": {"mouthLeft": 1.0},
    "smile": _both("mouthSmile"),
    "frown": _both("mouthFrown"),
    "pucker": {"mouthPucker": 1.0},
    "stretch": _both("mouthStretch"),
    "upper lip up": _both("mouthUpperUp"),
    "sneer": _both("noseSneer"),
    "cheeks puffed": {"cheekPuff": 1.0},
    "brows down": _both("browDown"),
    "brows up": {"browInnerUp": 1.0, **_both("browOuterUp")},
    "eyes narrow": _both("eyeSquint"),
    "eyes wide": _both("eyeWide"),
}

_SCENES = [
    _numbered("yaw", "degrees", (10, 20, 30, 45, 60, 75, 90), lambda angle: _turned(yaw=angle)),
    _numbered("pitch up", "degrees", (10, 20, 30, 40), lambda angle: _turned(pitch=angle)),
    _numbered("pitch down", "degrees", (10, 20, 30, 40), lambda angle: _turned(pitch=-angle)),
    _numbered("roll", "degrees", (15, 30, 60, 90), lambda angle: _turned(roll=angle)),
    _numbered("camera above", "degrees", (10, 20, 30, 45), _seen_from),
    _numbered("camera below", "degrees", (10, 20, 30, 45), lambda angle: _seen_from(-angle)),
    _numbered("camera distance", "1/m", (1.0, 1.5, 2.0, 2.5), lambda near: _worn(distance=100 / near)),
    _numbered("light from the side", "degrees", (40, 60, 90, 120), lambda angle: _lit(azimuth=angle)),
    _numbered("light from above", "degrees", (45, 60, 75, 85), lambda angle: _lit(elevation=angle)),
    _numbered("light strength", "key / fill", (5, 10, 20, 40), lambda ratio: _lit(fill=KEY / ratio)),
    _numbered("warm light", "steps", (1, 2, 3, 4), lambda warmth: _lit(warmth=warmth)),
    _numbered("cold light", "steps", (1, 2, 3, 4), lambda warmth: _lit(warmth=-warmth)),
    _numbered("mouth open", "share", (0.25, 0.5, 0.75, 1.0), lambda share: _expression({"jawOpen": share})),
    _numbered("eyes closed", "share", (0.25, 0.5, 0.75, 1.0), lambda share: _expression(_both("eyeBlink", share))),
    _named("expression", {name: _expression(units) for name, units in EXPRESSIONS.items() if units}),
    _named("expression unit", {name: _expression(units) for name, units in _UNITS.items()}),
    _numbered("age", "years apart", (5, 10, 20, 30, 40), _aged),
    _named(
        "glasses",
        {"thin rims": _worn(**_glasses(0.08, 0.97)), "thick rims": _worn(**_glasses(0.3, 0.95))}
        | {"sunglasses": _worn(**_glasses(0.2, 0.06))},
    ),
    _named("hat", {kind: _worn(**_hat(kind)) for kind in ("band", "beanie", "cap", "brim")}),
    _named("medical mask", {"mask": _worn(**_occluder("mask", "mouth"))}),
    _numbered(
        "scarf", "cm higher", (4, 7, 9, 11),
        lambda rise: _worn(scarf={"colour": (0.2, 0.05, 0.05), "size": 1.1, "rise": rise - 1.0}),
    ),
    _named(
        "hand",
        {
            "beside the face": _worn(**_occluder("hand", "side")),
            "on the cheek": _worn(**_occluder("hand", "cheek", 3.0)),
            "on the chin": _worn(**_occluder("hand", "chin", 3.0)),
            "before the mouth": _worn(**_occluder("hand", "mouth", 4.5)),
        },
    ),
    _numbered("make-up", "share", (0.33, 0.67, 1.0), _made_up),
    _named("facial hair", {style: _bearded(style) for style in ("none", "stubble", "moustache", "goatee", "full")}),
    _named("haircut", {style: _cut_hair(style) for style in ("bald", "buzz", "side_part", "bob", "long_wavy", "afro")}),
]  # fmt: skip
SCENES: dict[str, tuple[Factor, list[Callable[[Scene], Scene]]]] = {pair[0].name: pair for pair in _SCENES}


def has(factor: str, level: int, identity: Identity) -> bool:
    """Whether a level (its number) of a factor makes sense for a person: a beard for men, no age beyond `OLDEST`."""
    if factor == "age":
        return identity.who["years"] + float(FACTORS["age"].levels[level]) <= OLDEST
    return factor != "facial hair" or identity.who["gender"] > 0.5


# ---------------------------------------------------------------------------------------------- pictures

# Each takes the photo BGR uint8, its pixels for one pixel of the crop, the level and a generator.
Picture = Callable[[np.ndarray, float, float, np.random.Generator], np.ndarray]


def _exposed(bgr: np.ndarray, _: float, stops: float, __: np.random.Generator) -> np.ndarray:
    light = (np.arange(256) / 255) ** 2.2 * 2.0**stops
    return cv2.LUT(bgr, np.round(255 * np.clip(light, 0, 1) ** (1 / 2.2)).astype(np.uint8))


def _blurred(bgr: np.ndarray, ratio: float, sigma: float, _: np.random.Generator) -> np.ndarray:
    return cv2.GaussianBlur(bgr, (0, 0), sigma * ratio)


def _shaken(bgr: np.ndarray, ratio: float, length: float, rng: np.random.Generator) -> np.ndarray:
    """Motion blur of so many pixels in a random direction."""
    reach, angle = length * ratio, rng.uniform(0, np.pi)
    side = 2 * int(np.ceil(reach / 2)) + 3
    kernel = np.zeros((side, side), np.float32)
    for step in np.linspace(-reach / 2, reach / 2, max(2, round(4 * reach))):
        x, y = side // 2 + step * np.cos(angle), side // 2 + step * np.sin(angle)
        kernel[round(y), round(x)] += 1
    return cv2.filter2D(bgr, -1, cv2.GaussianBlur(kernel / kernel.sum(), (3, 3), 0.5), borderType=cv2.BORDER_REPLICATE)


def _noisy(bgr: np.ndarray, _: float, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of so many grey levels in the crop: the photo gets half as much again.

    Of independent values that bilinear interpolation takes at random places (a - b, 1 - a) the deviation is 2/3.
    """
    noise = rng.standard_normal(bgr.shape, dtype=np.float32) * np.float32(1.5 * sigma)
    return np.clip(np.round(bgr + noise), 0, 255).astype(np.uint8)


def _coarse(bgr: np.ndarray, ratio: float, eyes: float, _: np.random.Generator) -> np.ndarray:
    """As if taken with so many pixels between the eyes, and enlarged."""
    height, width = bgr.shape[:2]
    share = eyes / (EYES_IN_CROP * ratio)
    size = max(2, round(width * share)), max(2, round(height * share))
    return cv2.resize(
        cv2.resize(bgr, size, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_CUBIC
    )


def _compressed(bgr: np.ndarray, _: float, quality: float, __: np.random.Generator) -> np.ndarray:
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded


_PICTURES: list[tuple[Factor, Picture]] = [
    (Factor("under-exposure", "stops", (1, 2, 3, 4, 5)), lambda bgr, r, stops, g: _exposed(bgr, r, -stops, g)),
    (Factor("over-exposure", "stops", (0.5, 1, 1.5, 2, 3)), _exposed),
    (Factor("blur", "pixels (sigma)", (1, 2, 3, 4, 6)), _blurred),
    (Factor("motion blur", "pixels", (4, 8, 12, 16, 24)), _shaken),
    (Factor("noise", "grey levels", (5, 10, 20, 40, 60)), _noisy),
    (Factor("resolution", "pixels between the eyes", (14, 10, 7, 5, 3.5)), _coarse),
    (Factor("JPEG quality", "", (50, 30, 20, 10, 5)), _compressed),
]
PICTURES = {factor.name: (factor, change) for factor, change in _PICTURES}


# ---------------------------------------------------------------------------------------------- cuts


def _shifted(points: np.ndarray, pixels: float, rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return points + pixels * np.array([np.cos(angle), np.sin(angle)])


def _scaled(points: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    centre = TEMPLATE.mean(0)
    return centre + (points - centre) * factor


def _rotated(points: np.ndarray, degrees: float, rng: np.random.Generator) -> np.ndarray:
    a, centre = np.radians(degrees) * rng.choice([-1, 1]), TEMPLATE.mean(0)
    return centre + (points - centre) @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])


# Each moves where the face's landmarks come to lie in the crop.
_CUTS: list[tuple[Factor, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]]] = [
    (Factor("crop shift", "pixels", (1, 2, 4, 6, 8, 12)), _shifted),
    (Factor("crop larger", "times", (1.1, 1.2, 1.35, 1.5)), _scaled),
    (Factor("crop smaller", "times", (0.9, 0.8, 0.7, 0.6)), _scaled),
    (Factor("crop rotation", "degrees", (5, 10, 20, 30, 45)), _rotated),
]
CUTS = {factor.name: (factor, change) for factor, change in _CUTS}

FACTORS: dict[str, Factor] = {name: pair[0] for group in (SCENES, PICTURES, CUTS) for name, pair in group.items()}


def wrong_landmarks(factor: str, level: float, landmarks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Landmarks [5, 2] in the photo that let the face come to lie in the crop as a level of `CUTS` wants it."""
    matrix = estimate_similarity(landmarks)
    wanted = CUTS[factor][1](landmarks @ matrix[:, :2].T + matrix[:, 2], level, rng)
    # What is at `wanted` in the crop has to be where the landmarks are: undo the move on the side of the photo.
    moved = estimate_similarity(landmarks, wanted)
    inverse = np.linalg.inv(np.vstack([moved, [0, 0, 1]]))
    return TEMPLATE @ inverse[:2, :2].T + inverse[:2, 2]
