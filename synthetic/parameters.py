"""Who a synthetic person is, and how one photo of them differs from the next.

`draw_identity` fixes what belongs to a person: shape, skin, iris, brows, lips, hair, facial hair. `draw_photo` varies
what belongs to a picture: pose, expression, age drift, camera, light, background, what is worn or held, make-up and
what the camera does. The rule that keeps labels honest: nothing that `draw_photo` draws may depend on the identity
except through what a person would do (a beard is not drawn on a photo, glasses are), so colour, light and background
tell nothing of who it is.

A person may have several looks (`draw_look`), as photos of many years show one: another haircut, another beard, other
years; between them only the face says who it is.

Random numbers: one generator from (seed, identity), one from (seed, identity, image), one from (seed, identity, look).
An image is thus the same whatever else is drawn, in whatever order, on however many machines.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from synthetic.head import HeadModel

ABLATIONS = ("texture", "hair", "light", "expression", "occlusion")

HAIR_STYLES = (
    "bald",
    "buzz",
    "crop",
    "horseshoe",
    "side_part",
    "slick_back",
    "quiff",
    "curly_short",
    "afro",
    "fringe",
    "bob",
    "long_straight",
    "long_wavy",
    "long_curly",
    "bangs_long",
    "ponytail",
    "bun",
    "dreads",
)
# Relative frequency of each style for women and men; rough figures, chosen so that no style is rare.
STYLE_WEIGHTS = {
    "female": (0.2, 0.3, 1, 0, 1, 0.7, 0.3, 1.2, 1, 1.2, 2, 3, 3, 2.5, 2, 2.5, 2, 0.6),
    "male": (2, 2.5, 3.5, 1.6, 3, 2, 2.2, 2.2, 1.2, 2, 0.4, 0.6, 0.6, 0.5, 0.1, 0.4, 0.4, 0.6),
}
BEARDS = ("none", "stubble", "moustache", "goatee", "circle", "short_boxed", "full", "sideburns")

# Linear RGB of hair at the root for pigment from black to blond, and red.
HAIR_COLOURS = {
    "black": (0.010, 0.008, 0.007),
    "dark_brown": (0.030, 0.018, 0.011),
    "brown": (0.075, 0.040, 0.020),
    "light_brown": (0.16, 0.092, 0.048),
    "dark_blond": (0.26, 0.165, 0.085),
    "blond": (0.44, 0.31, 0.165),
    "platinum": (0.62, 0.54, 0.40),
    "red": (0.23, 0.062, 0.018),
    "auburn": (0.11, 0.033, 0.015),
    "dyed": (0.30, 0.05, 0.25),
}
IRIS_COLOURS = {  # inner ring, outer ring
    "dark_brown": ((0.075, 0.035, 0.016), (0.035, 0.017, 0.009)),
    "brown": ((0.18, 0.085, 0.03), (0.08, 0.038, 0.017)),
    "amber": ((0.30, 0.16, 0.045), (0.16, 0.085, 0.03)),
    "hazel": ((0.24, 0.15, 0.05), (0.09, 0.11, 0.05)),
    "green": ((0.19, 0.20, 0.08), (0.08, 0.14, 0.085)),
    "grey": ((0.22, 0.25, 0.26), (0.12, 0.15, 0.17)),
    "blue": ((0.20, 0.30, 0.38), (0.075, 0.15, 0.26)),
}


@dataclass
class Identity:
    """What is fixed for a person. Lengths in centimetres, colours linear RGB in [0, 1], the rest in [0, 1] or named."""

    number: int
    seed: int
    who: dict[str, float]
    local: list[float]
    melanin: float
    haemoglobin: float
    freckles: float
    moles: int
    blotches: float
    tan: float
    wrinkles: float
    under_eye: float
    lip_colour: float
    iris: str
    iris_size: float
    lids: float  # how wide the eyes are open at rest, in units of the expression eyeWide
    teeth: float
    brow: dict[str, float]
    hair: dict[str, Any]
    beard: dict[str, Any]
    marks: int = field(default=0)

    def record(self) -> dict[str, Any]:
        """Plain values for the table of truth."""
        return dict(vars(self))


@dataclass
class PhotoParameters:
    """What varies from photo to photo. Angles in degrees, lengths in centimetres, colours linear RGB."""

    image: int
    seed: int
    yaw: float  # positive: the person's face turns to the image's right
    pitch: float  # positive: looks up
    roll: float  # positive: the head leans anti-clockwise in the image
    torso_yaw: float
    torso_pitch: float
    distance: float
    eye_pixels: float  # distance between the eyes in a frontal view, for an image of 256 pixels
    shift: tuple[float, float]
    years: float
    weight: float
    expression: dict[str, float]
    gaze: tuple[float, float]
    lights: list[dict[str, Any]]
    ambient: dict[str, Any]
    background: dict[str, Any]
    glasses: dict[str, Any] | None
    hat: dict[str, Any] | None
    scarf: dict[str, Any] | None
    occluder: dict[str, Any] | None
    makeup: dict[str, Any]
    clothes: dict[str, Any]
    skin_shine: float
    camera: dict[str, Any]
    look: dict[str, Any] | None = None  # what a further look of the person changes: number, years, hair, beard

    def record(self) -> dict[str, Any]:
        """Plain values for the table of truth."""
        return dict(vars(self))


def identity_generator(seed: int, identity: int) -> np.random.Generator:
    """The generator of everything that is fixed for identity number `identity`."""
    return np.random.default_rng([seed, identity])


def photo_generator(seed: int, identity: int, image: int) -> np.random.Generator:
    """The generator of one photo."""
    return np.random.default_rng([seed, identity, image + 1])


def look_generator(seed: int, identity: int, look: int) -> np.random.Generator:
    """The generator of a person's further look, from 1."""
    return np.random.default_rng([seed, identity, look, 1 << 22])


def _choice(rng: np.random.Generator, names: tuple[str, ...] | list[str], weights: Any = None) -> str:
    p = None if weights is None else np.asarray(weights, float) / np.sum(weights)
    return str(names[int(rng.choice(len(names), p=p))])


def _colour(rng: np.random.Generator, saturation: float, low: float, high: float) -> tuple[float, float, float]:
    """A random linear colour of the given saturation and a log-uniform brightness."""
    hue = rng.uniform(0, 6)
    ramp = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    value = np.exp(rng.uniform(np.log(low), np.log(high)))
    red, green, blue = (float(c) for c in value * (1 - saturation + saturation * ramp))
    return red, green, blue


# Local changes whose full range deforms a face beyond what people look like, and the share of it that is used.
GENTLE = {
    "head-trans": 0.0,
    "neck-trans": 0.25,
    "mouth-trans-out": 0.06,
    "nose-trans-out": 0.06,
    "head-angle": 0.15,
    "head-age": 0.4,
    "eye-trans": 0.6,
    "eye-scale": 0.55,
    "eye-push": 0.6,
    "eye-height": 0.6,
    "eye-corner": 0.75,
    "eye-bag": 0.7,
    "nose-compression": 0.6,
    "nose-septumangle": 0.7,
    "chin-height": 0.75,
    "chin-jaw-drop": 0.7,
    "chin-prognathism": 0.7,
    "forehead-nubian": 0.6,
    "ear-shape-triangle": 0.5,
    "neck-double": 0.6,
    "measure-neck": 0.5,
    "mouth-trans-forward": 0.6,
    "ear-wing": 0.8,
    "mouth-scale": 0.6,
    "mouth-lowerlip": 0.65,
    "mouth-upperlip": 0.65,
    "nose-scale": 0.65,
    "nose-volume": 0.8,
    "head-scale-depth": 0.8,
    "head-scale": 0.37,
    "nose-trans-up": 0.5,
    "nose-base": 0.5,
    "nose-point-up": 0.55,
    "nose-hump": 0.6,
    "mouth-trans-up": 0.5,
    "mouth-angles": 0.55,
    "head-fat": 0.7,
}


# Changes that move nose, mouth or chin against the eyes: faces differ less in them than MakeHuman allows, and more in
# eyes, brows, cheeks and outline, which tell more of who somebody is. (A network trained on real photos tells synthetic
# people apart with an AUC of 0.911 where everything varied alike gave 0.898, and the landmarks' error stays the same.)
POSITIONS = ("nose", "mouth", "chin-height", "head-scale", "head-angle", "neck", "ear", "eye-trans")


def _local_changes(rng: np.random.Generator, head: HeadModel, who: dict[str, float]) -> list[float]:
    """Correlated, nearly symmetric local changes [L].

    Each change is its own draw (0.8 of the deviation) plus 14 common factors (0.6): the factors' loadings are constant,
    so that for example a wide nose tends to come with certain mouths. Left and right share a draw up to 10 %.
    """
    labels = head.local_labels
    bare = [label[2:] if label[:2] in ("l-", "r-") else label for label in labels]
    unique = sorted(set(bare))
    loadings = np.random.default_rng(20180604).normal(size=(len(unique), 14))
    loadings /= np.linalg.norm(loadings, axis=1, keepdims=True)
    values = 0.8 * rng.normal(size=len(unique)) + 0.6 * loadings @ rng.normal(size=14)
    drawn = dict(zip(unique, values, strict=True))
    asymmetry = dict(zip(unique, rng.normal(0, 0.10, len(unique)), strict=True))
    drawn["eye-epicanthus-out"] -= 1.2 * who["asian"]  # a fold at the inner corner
    # MakeHuman's eyes stand close: 1.20 of the eye distance down to the mouth, where adults have about 1.1.
    drawn["eye-trans-out"] += 2.0
    result = []
    for label, name in zip(labels, bare, strict=True):
        scale = next((share for prefix, share in GENTLE.items() if name.startswith(prefix)), 1.0)
        side = {"l-": 1.0, "r-": -1.0}.get(label[:2], 0.0)
        deviation = 0.33 if name.startswith(POSITIONS) else 0.46
        value = (drawn[name] + side * asymmetry[name]) * deviation * scale
        if name.startswith(("head-", "chin-triangle")) and name.removeprefix("head-") in (
            "diamond",
            "invertedtriangular",
            "oval",
            "rectangular",
            "round",
            "square",
            "triangular",
        ):
            value = max(value, 0.0) * 0.8
        result.append(float(np.clip(value, -1.0, 1.0)))
    return result


def _ancestry(rng: np.random.Generator) -> dict[str, float]:
    mixture = rng.dirichlet([0.35, 0.35, 0.35])
    return {name: float(value) for name, value in zip(("african", "asian", "caucasian"), mixture, strict=True)}


def _hair(rng: np.random.Generator, who: dict[str, float], years: float) -> dict[str, Any]:
    gender = "male" if who["gender"] > 0.5 else "female"
    weights = np.array(STYLE_WEIGHTS[gender], float)
    if who["african"] > 0.5:
        for name, factor in {"afro": 5, "dreads": 5, "curly_short": 3, "buzz": 2, "long_curly": 2}.items():
            weights[HAIR_STYLES.index(name)] *= factor
        for name in ("long_straight", "side_part", "fringe", "bob"):
            weights[HAIR_STYLES.index(name)] *= 0.35
    else:
        weights[HAIR_STYLES.index("afro")] *= 0.15
        weights[HAIR_STYLES.index("dreads")] *= 0.3
    if gender == "male" and years > 45:
        for name in ("horseshoe", "bald", "buzz"):
            weights[HAIR_STYLES.index(name)] *= 2
    style = _choice(rng, HAIR_STYLES, weights)
    dark = who["african"] + who["asian"]
    names = list(HAIR_COLOURS)
    light = max(0.03, 1 - dark)
    colour_weights = [3 * dark + 0.4, 2 * dark + 1.5, 2.2 * light + 0.3, 1.8 * light, 1.5 * light, 1.3 * light]
    colour_weights += [0.25 * light + 0.05, 0.5 * light, 0.4 * light + 0.05, 0.12]
    colour = _choice(rng, names, colour_weights)
    grey = float(np.clip((years - rng.uniform(38, 68)) / 22, 0, 1)) if rng.random() < 0.85 else 0.0
    root = np.array(HAIR_COLOURS[colour]) * np.exp(rng.normal(0, 0.22)) * np.exp(rng.normal(0, 0.06, 3))
    if colour == "dyed":
        root = np.array(_colour(rng, 0.75, 0.1, 0.4))
    tip = root * np.exp(rng.uniform(-0.1, 0.55)) if rng.random() < 0.75 else np.array(_colour(rng, 0.4, 0.1, 0.5))
    return {
        "style": style,
        "colour": colour,
        "root": [float(c) for c in np.clip(root, 0.004, 0.8)],
        "tip": [float(c) for c in np.clip(tip, 0.004, 0.8)],
        "grey": grey,
        "shine": float(rng.uniform(0.1, 0.9) * (0.3 if style in ("afro", "dreads") else 1.0)),
        "length": float(np.exp(rng.normal(0, 0.22))),
        "volume": float(np.exp(rng.normal(0, 0.28))),
        "curl": float(rng.beta(1.2, 2.5)),
        "part": float(rng.choice([-1, 1]) * rng.uniform(0.0, 5.0)),
        "hairline": float(rng.normal(0.0, 0.8) + 0.6 * (gender == "male") * max(0, years - 30) / 30),
        "recession": float(rng.beta(1.3, 3) * (1.0 if gender == "male" else 0.35) * min(1.6, years / 40)),
        "peak": float(rng.normal(0.0, 0.5)),
        "messy": float(rng.uniform(0.1, 1.0)),
    }


def _facial_hair(rng: np.random.Generator, who: dict[str, float], years: float, hair: dict[str, Any]) -> dict[str, Any]:
    # Shares about as in CelebA's attributes: of men a fifth wears a beard or moustache, as many a stubble.
    weights = np.array([6, 2, 0.45, 0.45, 0.45, 0.75, 0.5, 0.15])
    if years < 27:
        weights[2:] *= 0.5
    if who["gender"] < 0.5:
        weights[1:] = 0
    style = _choice(rng, BEARDS, weights)
    root = np.array(hair["root"] if hair["colour"] not in ("dyed", "platinum") else HAIR_COLOURS["brown"])
    return {
        "style": style,
        "colour": [float(c) for c in np.clip(root * np.exp(rng.normal(0.05, 0.2)), 0.004, 0.5)],
        "length": float(np.exp(rng.normal(0, 0.35))),
        "density": float(rng.uniform(0.5, 1.0)),
        "shadow": float(rng.beta(2, 3) if who["gender"] > 0.5 else 0.0),
        "grey": float(np.clip(hair["grey"] * rng.uniform(0.7, 1.3), 0, 1)),
    }


def draw_identity(seed: int, number: int, head: HeadModel, off: frozenset[str] = frozenset()) -> Identity:
    """The person with this number; `off` names ingredients of `ABLATIONS` that are left out for everybody."""
    rng = identity_generator(seed, number)
    years = float(np.clip(18 + 62 * rng.beta(1.3, 2.0), 18, 80))
    gender = float(np.clip(rng.beta(0.45, 0.45), 0.02, 0.98))
    who = {"gender": gender, "years": years, **_ancestry(rng)}
    who["muscle"] = float(np.clip(rng.normal(0.5, 0.25), 0, 1))
    who["weight"] = float(np.clip(rng.normal(0.52, 0.25), 0, 1))
    local = _local_changes(rng, head, who)
    melanin = who["african"] * rng.normal(0.64, 0.16) + who["asian"] * rng.normal(0.13, 0.07)
    melanin = float(np.clip(melanin + who["caucasian"] * rng.normal(0.06, 0.05), 0.01, 1.0))
    hair = _hair(rng, who, years)
    beard = _facial_hair(rng, who, years, hair)
    eyes = list(IRIS_COLOURS)
    light_eyes = max(0.02, who["caucasian"] - 0.15) * float(melanin < 0.35)
    dark = who["african"] + who["asian"]
    iris = _choice(rng, eyes, [2.5 * dark + 0.3, 1.2, 0.5, 1.2 * light_eyes, light_eyes, light_eyes, 2 * light_eyes])
    brow = {
        "thickness": float(np.exp(rng.normal(0.0 if gender > 0.5 else -0.3, 0.4))),
        "density": float(np.clip(rng.normal(0.75, 0.2), 0.15, 1.0)),
        "arch": float(rng.normal(0.5, 0.6)),
        "tilt": float(rng.normal(0.0, 0.45)),
        "length": float(np.clip(rng.normal(1.0, 0.1), 0.75, 1.2)),
        "gap": float(rng.normal(0.0, 0.35)),
        "height": float(rng.normal(0.0, 0.36)),
        "darkness": float(np.exp(rng.normal(-0.1, 0.35))),
    }
    identity = Identity(
        number=number,
        seed=seed,
        who=who,
        local=local,
        melanin=melanin,
        haemoglobin=float(np.clip(rng.normal(0.5, 0.2), 0.05, 1.0)),
        freckles=float(rng.beta(0.5, 2.2) * (melanin < 0.4)),
        moles=int(rng.poisson(4)),
        blotches=float(rng.beta(1.6, 2.2)),
        tan=float(rng.normal(0, 1)),
        wrinkles=float(np.clip((years - 26) / 50 + rng.normal(0, 0.12), 0.02, 1.1)),
        under_eye=float(rng.beta(1.6, 2.5)),
        lip_colour=float(rng.normal(0, 1)),
        iris=iris,
        iris_size=float(rng.normal(1.0, 0.04)),
        lids=float(rng.normal(0.3, 0.2)),
        teeth=float(np.clip(rng.normal(0.6, 0.15), 0.2, 0.95)),
        brow=brow,
        hair=hair,
        beard=beard,
        marks=int(rng.random() < 0.12),
    )
    return _shaven(identity) if "hair" in off else identity


def _shaven(identity: Identity) -> Identity:
    """Without hair and beard."""
    hair, beard = {**identity.hair, "style": "bald"}, {**identity.beard, "style": "none", "shadow": 0.0}
    return replace(identity, hair=hair, beard=beard)


LOOK_YEARS = 7.0  # standard deviation between the years of a person's looks
DYED_LOOK = 0.15  # share of looks whose hair has another colour than it grows in


def draw_look(identity: Identity, look: int, off: frozenset[str] = frozenset()) -> Identity:
    """The same person at another time: haircut, facial hair, years and what follows from them are drawn anew.

    Look 0 is the identity as it is. Bones, features, skin, eyes and brows stay; hair (and brows with it) has the colour
    that it had, or is dyed.
    """
    if look == 0:
        return identity
    rng = look_generator(identity.seed, identity.number, look)
    years = float(np.clip(identity.who["years"] + rng.normal(0, LOOK_YEARS), 18, 80))
    hair = _hair(rng, identity.who, years)
    if rng.random() >= DYED_LOOK:
        hair |= {name: identity.hair[name] for name in ("colour", "root", "tip")}
    found = replace(
        identity,
        who={**identity.who, "years": years},
        wrinkles=float(np.clip(identity.wrinkles + (years - identity.who["years"]) / 50, 0.02, 1.1)),
        hair=hair,
        beard=_facial_hair(rng, identity.who, years, hair),
    )
    return _shaven(found) if "hair" in off else found


SMILE = {"mouthSmileLeft": 0.8, "mouthSmileRight": 0.8, "cheekSquintLeft": 0.4, "cheekSquintRight": 0.4}
EXPRESSIONS: dict[str, dict[str, float]] = {
    "neutral": {},
    "smile": SMILE,
    "grin": SMILE
    | {"jawOpen": 0.12, "mouthUpperUpLeft": 0.55, "mouthUpperUpRight": 0.55, "mouthLowerDownLeft": 0.4}
    | {"mouthLowerDownRight": 0.4, "eyeSquintLeft": 0.3, "eyeSquintRight": 0.3},
    "laugh": SMILE
    | {"jawOpen": 0.55, "mouthUpperUpLeft": 0.5, "mouthUpperUpRight": 0.5, "eyeSquintLeft": 0.6}
    | {"eyeSquintRight": 0.6, "mouthStretchLeft": 0.3, "mouthStretchRight": 0.3},
    "talk": {"jawOpen": 0.3, "mouthFunnel": 0.25, "mouthLowerDownLeft": 0.2, "mouthLowerDownRight": 0.2},
    "surprise": {"jawOpen": 0.55, "browInnerUp": 0.8, "browOuterUpLeft": 0.8, "browOuterUpRight": 0.8}
    | {"eyeWideLeft": 0.7, "eyeWideRight": 0.7},
    "frown": {"browDownLeft": 0.8, "browDownRight": 0.8, "mouthFrownLeft": 0.5, "mouthFrownRight": 0.5}
    | {"eyeSquintLeft": 0.3, "eyeSquintRight": 0.3},
    "sad": {"browInnerUp": 0.7, "mouthFrownLeft": 0.7, "mouthFrownRight": 0.7, "mouthShrugLower": 0.4},
    "disgust": {"noseSneerLeft": 0.8, "noseSneerRight": 0.8, "mouthUpperUpLeft": 0.5, "mouthUpperUpRight": 0.5},
    "pucker": {"mouthPucker": 0.8, "mouthFunnel": 0.2},
    "press": {"mouthPressLeft": 0.7, "mouthPressRight": 0.7, "mouthDimpleLeft": 0.5, "mouthDimpleRight": 0.5},
    "puff": {"cheekPuff": 0.7, "mouthRollLower": 0.3},
}


def _expression(rng: np.random.Generator, head: HeadModel) -> dict[str, float]:
    name = _choice(rng, list(EXPRESSIONS), [7, 5, 4, 2, 2.5, 1, 1.2, 0.8, 0.5, 0.5, 0.8, 0.3])
    strength = rng.uniform(0.4, 1.1)
    values = {unit: value * strength * rng.uniform(0.7, 1.2) for unit, value in EXPRESSIONS[name].items()}
    for unit in ("browInnerUp", "browDownLeft", "browDownRight", "mouthLeft", "mouthRight", "jawLeft", "jawRight"):
        if rng.random() < 0.3:
            values[unit] = values.get(unit, 0.0) + rng.uniform(0, 0.3)
    lids = 0.9 if rng.random() < 0.02 else max(0.0, rng.normal(0.06, 0.1))
    for side in ("Left", "Right"):
        values[f"eyeBlink{side}"] = lids * rng.uniform(0.9, 1.1)
    return {unit: float(np.clip(value, 0, 1)) for unit, value in values.items() if unit in head.expression_labels}


def towards(azimuth: float, elevation: float) -> tuple[float, float, float]:
    """A unit vector in the camera's frame: azimuth 0 is from the camera, positive from the image's right."""
    a, e = np.radians(azimuth), np.radians(elevation)
    return float(np.sin(a) * np.cos(e)), float(np.sin(e)), float(np.cos(a) * np.cos(e))


def _light(rng: np.random.Generator) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Directional lights (towards, colour, spread as tangent of the half angle) and ambient light linear in the normal.

    Brightness is relative: the camera's exposure normalises it.
    """
    kind = _choice(rng, ["sun", "overcast", "window", "studio", "flash", "backlit", "lamp", "stage"],
                   [2, 3.5, 2.5, 3, 2, 0.4, 1.2, 0.2])  # fmt: skip
    warm = rng.normal(0, 1)

    def white(amount: float, temperature: float) -> tuple[float, float, float]:
        tint = np.exp(temperature * np.array([0.08, 0.0, -0.12])) * np.exp(rng.normal(0, 0.02, 3))
        red, green, blue = (float(c) for c in amount * tint)
        return red, green, blue

    side = rng.choice([-1.0, 1.0])
    lights = []

    def add(azimuth: float, elevation: float, colour: tuple[float, float, float], spread: float) -> None:
        lights.append({"towards": towards(azimuth, elevation), "colour": colour, "spread": float(spread)})

    sky, ground, level = white(1.0, -0.4), white(0.35, 0.6), 0.5
    if kind == "sun":
        add(side * rng.uniform(5, 95), rng.uniform(15, 65), white(rng.uniform(0.9, 1.8), 0.5), 0.02)
        level = rng.uniform(0.45, 0.9)
        sky = white(1.0, -1.2)
    elif kind == "overcast":
        add(side * rng.uniform(0, 70), rng.uniform(40, 80), white(rng.uniform(0.2, 0.6), 0.0), 0.6)
        level = rng.uniform(0.7, 1.0)
    elif kind == "window":
        add(side * rng.uniform(25, 95), rng.uniform(0, 35), white(rng.uniform(0.6, 1.4), -0.4), 0.35)
        level = rng.uniform(0.4, 0.8)
        sky, ground = white(0.7, 0.8), white(0.5, 0.8)
    elif kind == "studio":
        add(side * rng.uniform(15, 55), rng.uniform(15, 50), white(rng.uniform(0.8, 1.3), 0.0), 0.25)
        add(-side * rng.uniform(20, 70), rng.uniform(0, 30), white(rng.uniform(0.15, 0.6), 0.0), 0.35)
        if rng.random() < 0.5:
            add(-side * rng.uniform(120, 165), rng.uniform(20, 50), white(rng.uniform(0.5, 1.6), 0.0), 0.1)
        level = rng.uniform(0.3, 0.6)
    elif kind == "flash":
        add(side * rng.uniform(0, 8), rng.uniform(0, 10), white(rng.uniform(0.7, 1.2), -0.2), 0.03)
        level = rng.uniform(0.3, 0.6)
    elif kind == "backlit":
        add(side * rng.uniform(125, 175), rng.uniform(15, 50), white(rng.uniform(1.5, 3.0), 0.6), 0.03)
        add(side * rng.uniform(-30, 60), rng.uniform(5, 30), white(rng.uniform(0.15, 0.4), 0.0), 0.5)
        level = rng.uniform(0.45, 0.7)
    elif kind == "lamp":
        add(side * rng.uniform(0, 80), rng.uniform(20, 75), white(rng.uniform(0.6, 1.3), 1.2), 0.15)
        if rng.random() < 0.5:
            add(-side * rng.uniform(20, 110), rng.uniform(-10, 40), white(rng.uniform(0.2, 0.7), 1.0), 0.2)
        level = rng.uniform(0.35, 0.7)
        sky, ground = white(0.8, 1.0), white(0.5, 1.2)
    else:
        first, second = _colour(rng, 0.3, 0.8, 1.4), _colour(rng, 0.4, 0.5, 1.2)
        add(side * rng.uniform(20, 80), rng.uniform(5, 50), first, 0.08)
        add(-side * rng.uniform(20, 110), rng.uniform(0, 50), second, 0.1)
        level = rng.uniform(0.3, 0.6)
        sky, ground = _colour(rng, 0.2, 0.5, 1.0), _colour(rng, 0.2, 0.3, 0.8)
    red, green, blue = (c * float(np.exp(warm * t)) for c, t in zip(sky, (0.05, 0.0, -0.07), strict=True))
    sky = (red, green, blue)
    middle = [(a + b) / 2 * level for a, b in zip(sky, ground, strict=True)]
    slope_y = [(a - b) / 2 * level for a, b in zip(sky, ground, strict=True)]
    # Brighter on one side and in front; on stage the sides differ in colour, too.
    hue = 0.2 if kind == "stage" else 0.035
    slope_x = [float(c) for c in np.array(middle) * (rng.normal(0, 0.25) + rng.normal(0, hue, 3))]
    slope_z = [float(c) for c in np.array(middle) * (rng.normal(0.15, 0.15) + rng.normal(0, hue, 3))]
    ambient = {
        "mean": tuple(float(c) for c in middle),
        "x": tuple(slope_x),
        "y": tuple(float(c) for c in slope_y),
        "z": tuple(slope_z),
        "kind": kind,
    }
    return lights, ambient


EVEN_LIGHT: tuple[list[dict[str, Any]], dict[str, Any]] = (
    [{"towards": towards(20, 30), "colour": (0.8, 0.8, 0.8), "spread": 0.3}],
    {"mean": (0.5,) * 3, "x": (0.0,) * 3, "y": (0.15,) * 3, "z": (0.05,) * 3, "kind": "even"},
)


BARE = {"glasses": None, "hat": None, "scarf": None, "occluder": None}


def _worn(rng: np.random.Generator) -> dict[str, Any]:
    worn: dict[str, Any] = {**BARE}
    if rng.random() < 0.13:
        dark = rng.random() < 0.15
        worn["glasses"] = {
            "shape": _choice(rng, ["round", "square", "wide", "oval", "aviator"]),
            "size": float(rng.normal(1.0, 0.07)),
            "rim": float(rng.uniform(0.08, 0.3)),
            "colour": _colour(rng, float(rng.beta(0.6, 2)), 0.01, 0.4),
            "gloss": float(rng.uniform(0.2, 1.0)),
            "tint": [float(c) for c in (rng.uniform(0.04, 0.35) * np.exp(rng.normal(0, 0.2, 3)) if dark
                                         else rng.uniform(0.86, 0.98) * np.ones(3))],
            "mirror": float(rng.uniform(0.0, 0.08)),
            "drop": float(rng.normal(0.0, 0.18)),
        }  # fmt: skip
    if rng.random() < 0.06:
        worn["hat"] = {
            "kind": _choice(rng, ["beanie", "cap", "brim", "band"]),
            "colour": _colour(rng, float(rng.beta(0.8, 1.5)), 0.015, 0.6),
            "second": _colour(rng, float(rng.beta(0.8, 1.5)), 0.015, 0.6),
            "height": float(rng.uniform(0.0, 1.0)),
            "turn": float(rng.normal(0, 12)),
        }
    if rng.random() < 0.04:
        worn["scarf"] = {
            "colour": _colour(rng, float(rng.beta(0.8, 1.5)), 0.03, 0.6),
            "size": float(rng.uniform(0.8, 1.5)),
            "rise": float(rng.uniform(-1.8, 0.0)),
        }
    if rng.random() < 0.04:
        worn["occluder"] = {
            "kind": _choice(rng, ["hand", "hand", "phone", "microphone", "microphone", "cup", "bar"]),
            "place": _choice(rng, ["chin", "cheek", "side", "mouth"], [3, 3, 3, 0.5]),
            "side": float(rng.choice([-1, 1])),
            "turn": float(rng.uniform(-40, 40)),
            "colour": _colour(rng, float(rng.beta(0.6, 1.8)), 0.01, 0.7),
            "jitter": [float(x) for x in rng.normal(0, 0.8, 3)],
        }
    return worn


def _makeup(rng: np.random.Generator, identity: Identity) -> dict[str, Any]:
    wears = rng.random() < (0.5 if identity.who["gender"] < 0.5 else 0.03)
    lip = _colour(rng, 0.8, 0.1, 0.5)
    red, green, blue = (float(c) for c in np.array(lip) * np.array([1.0, 0.3, 0.45]) + np.array([0.12, 0.0, 0.02]))
    lip = (red, green, blue)
    return {
        "lip": lip,
        "lip_amount": float(rng.uniform(0.2, 0.85)) if wears and rng.random() < 0.7 else 0.0,
        "lip_gloss": float(rng.beta(1.2, 2)) if wears else float(rng.beta(1, 6)),
        "shadow": _colour(rng, 0.5, 0.15, 0.7),
        "shadow_amount": float(rng.uniform(0.2, 0.85)) if wears and rng.random() < 0.5 else 0.0,
        "blush": (1.0, float(rng.uniform(0.6, 0.85)), float(rng.uniform(0.6, 0.88))),
        "blush_amount": float(rng.uniform(0.1, 0.7 if wears else 0.35)) if rng.random() < 0.3 else 0.0,
        "mascara": float(rng.uniform(0.3, 1.0)) if wears and rng.random() < 0.5 else 0.0,
    }


def _camera(rng: np.random.Generator) -> dict[str, Any]:
    low = rng.random() < 0.22
    return {
        "exposure": float(rng.normal(0.0, 0.25)),
        "contrast": float(rng.normal(1.0, 0.12)),
        "saturation": float(np.clip(rng.normal(0.98, 0.11), 0.5, 1.25)),
        "balance": [float(c) for c in np.exp(rng.normal(0, 0.035, 3))],
        "grey": bool(rng.random() < 0.05),
        "vignette": float(max(0.0, rng.normal(0.05, 0.12))),
        "blur": float(abs(rng.normal(0, 0.55))) if rng.random() < 0.6 else 0.0,
        "motion": float(rng.uniform(1.5, 5)) if rng.random() < 0.06 else 0.0,
        "motion_angle": float(rng.uniform(0, 180)),
        "downscale": float(rng.uniform(0.3, 0.8)) if low else 1.0,
        "noise": float(min(0.05, np.exp(rng.normal(-4.6, 0.8)))),
        "sharpen": float(rng.uniform(0.2, 0.9)) if rng.random() < 0.3 else 0.0,
        "quality": int(rng.integers(45, 97)),
    }


def draw_photo(
    identity: Identity, image: int, head: HeadModel, off: frozenset[str] = frozenset(), poses: str = "all"
) -> PhotoParameters:
    """Photo number `image` of a person; `poses="frontal"`: yaw within 5 degrees, face calm and bare, picture sharp."""
    rng = photo_generator(identity.seed, identity.number, image)
    frontal = poses == "frontal"
    yaw = float(np.clip(rng.normal(0, 27), -90, 90)) if rng.random() < 0.85 else float(rng.uniform(-90, 90))
    pitch, roll = float(np.clip(rng.normal(0, 9), -28, 28)), float(np.clip(rng.normal(0, 7), -30, 30))
    if frontal:
        yaw, pitch, roll = yaw / 18, pitch / 6, roll / 4
    torso_yaw = float(np.clip(yaw * rng.uniform(0.3, 1.0) + rng.normal(0, 12), yaw - 50, yaw + 50))
    distance = float(np.clip(np.exp(rng.normal(np.log(150), 0.5)), 50, 500))
    expression = _expression(rng, head)
    gaze = (float(rng.normal(-0.35 * yaw, 9)), float(rng.normal(-0.3 * pitch, 5)))
    lights, ambient = _light(rng)
    worn = _worn(rng)  # drawn in any case: what is left out changes nothing else of the photo
    if "occlusion" in off or frontal:
        worn = BARE
    if "expression" in off or frontal:
        expression, gaze = {}, (gaze[0] * 0.3, gaze[1] * 0.3)
    if "light" in off:
        lights, ambient = EVEN_LIGHT
    years = float(np.clip(identity.who["years"] + rng.normal(0, 3.5), 18, 85))
    camera = _camera(rng)
    if frontal:
        camera |= {"blur": 0.0, "motion": 0.0, "downscale": 1.0, "noise": 0.005, "grey": False, "sharpen": 0.0}
        camera |= {"quality": 92, "exposure": 0.3 * camera["exposure"], "contrast": 1.0}
    return PhotoParameters(
        image=image,
        seed=int(rng.integers(1, 2**30)),
        yaw=yaw,
        pitch=pitch,
        roll=roll,
        torso_yaw=torso_yaw,
        torso_pitch=float(rng.normal(0, 5)),
        distance=distance,
        eye_pixels=float(rng.uniform(44, 72)),
        shift=(float(rng.normal(0, 7)), float(rng.normal(0, 7))),
        years=years,
        weight=float(np.clip(identity.who["weight"] + rng.normal(0, 0.06), 0, 1)),
        expression=expression,
        gaze=(float(np.clip(gaze[0], -28, 28)), float(np.clip(gaze[1], -18, 18))),
        lights=lights,
        ambient=ambient,
        background={"kind": _choice(rng, ["blobs", "gradient", "indoor", "stripes", "noise", "scene"]),
                    "seed": int(rng.integers(1, 2**30)), "blur": float(np.exp(rng.normal(0.9, 0.7))),
                    "level": float(np.exp(rng.normal(-0.9, 0.8)))},
        makeup=_makeup(rng, identity),
        clothes={
            "a": _colour(rng, float(rng.beta(0.8, 1.4)), 0.01, 0.75),
            "b": _colour(rng, float(rng.beta(0.8, 1.4)), 0.01, 0.75),
            "pattern": int(rng.choice(6, p=[0.5, 0.14, 0.08, 0.08, 0.12, 0.08])),
            "scale": float(np.exp(rng.normal(-0.6, 0.5))),
            "neckline": float(rng.uniform(-19.5, -16.0)),
            "depth": float(rng.choice([0.0, 0.0, rng.uniform(1, 7)])),
            "width": float(rng.uniform(3, 9)),
        },
        skin_shine=float(rng.beta(1.6, 2.6)),
        camera=camera,
        **worn,
    )  # fmt: skip
