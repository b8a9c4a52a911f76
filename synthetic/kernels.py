"""The ray tracer: warp kernels that turn meshes, textures and a table of uniforms into images.

One kernel thread is one ray; the same code runs on a CPU (one after the other) and on CUDA (all heads of a batch in one
launch). Everything is deterministic: random numbers are hashed from (photo seed, pixel), and sums have a fixed order.

Light is a few directional sources with a soft edge (one jittered shadow ray each) plus an ambient term that is linear
in the normal. Skin is diffuse light (blurred in the image afterwards, which is what sub-surface scattering does to it)
times painted albedo, plus a GGX highlight; hair is Kajiya and Kay's cylinder model on ribbons whose strands are cut out
by a hash; eyes are spheres painted in angles around the gaze. The price of this choice over path tracing is no light
that bounces between surfaces; the gain is about two rays per pixel.
"""

import os
import sys

import warp as wp

# Warp reads the functions below as its own language: no return annotations on kernels, no `in`, and float(0.0) is how
# a variable is declared.
# ruff: noqa: ANN201, RUF046, SIM109, UP018

wp.config.log_level = wp.LOG_ERROR
wp.config.enable_backward = False  # no gradients are wanted; halves the compilation
# A quarter faster than warp's defaults; infinities stay infinities, which the slab tests of the bounding tree need.
wp.set_module_options(
    {
        "cpu_compiler_flags": "-march=native -ffp-contract=fast -mreassociate -freciprocal-math -fno-signed-zeros "
        "-fapprox-func -mllvm=-inline-threshold=9000"
    }
)


def start(device: str) -> None:
    """Initialise warp for `cpu` or `cuda...`; on a CPU without its warning (not Python's) of no driver."""
    if device != "cpu":
        wp.init()
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        wp.init()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# Materials of faces; the first six are head.SKIN ... head.LASH.
SKIN = wp.constant(0)
CAVITY = wp.constant(1)
EYE = wp.constant(2)
TEETH = wp.constant(3)
TONGUE = wp.constant(4)
LASH = wp.constant(5)
HAIR = wp.constant(6)
BEARD = wp.constant(7)
PROP = wp.constant(8)
HAND = wp.constant(9)
# What a pixel of hair is marked with that no ray was sent through.
UNSEEN = wp.constant(-1.0)

# The sphere that the paint is wrapped on, in canonical coordinates: see `skin.Canvas`.
CENTRE_Y = -3.0
CENTRE_Z = -6.0
PHI_TOP = 1.5707963
PHI_RANGE = 2.9670597
FAR = 1000.0


@wp.struct
class Uniforms:
    """What one photo needs besides its mesh. Directions are unit vectors in the head's frame, colours linear RGB."""

    origin: wp.vec3
    right: wp.vec3
    up: wp.vec3
    forward: wp.vec3
    focal: float
    centre_x: float
    centre_y: float
    light0: wp.vec3
    light1: wp.vec3
    light2: wp.vec3
    colour0: wp.vec3
    colour1: wp.vec3
    colour2: wp.vec3
    spread0: float
    spread1: float
    spread2: float
    ambient: wp.vec3
    ambient_x: wp.vec3
    ambient_y: wp.vec3
    ambient_z: wp.vec3
    eye_r: wp.vec3
    eye_l: wp.vec3
    gaze_r: wp.vec3
    gaze_l: wp.vec3
    iris: float
    pupil: float
    iris_inner: wp.vec3
    iris_outer: wp.vec3
    sclera: wp.vec3
    eye_seed: float
    hair_root: wp.vec3
    hair_tip: wp.vec3
    hair_shine: float
    hair_grey: float
    beard_grey: float
    beard: wp.vec3
    lash: wp.vec3
    lash_amount: float
    teeth: wp.vec3
    lip: wp.vec3
    lip_amount: float
    lip_gloss: float
    shadow: wp.vec3
    shadow_amount: float
    blush: wp.vec3
    blush_amount: float
    shine: float
    bump: float
    skin_tone: wp.vec3
    cloth_a: wp.vec3
    cloth_b: wp.vec3
    cloth_pattern: int
    cloth_scale: float
    neckline: float
    neck_depth: float
    neck_width: float
    lens: wp.vec3
    lens_mirror: float
    seed: int


@wp.struct
class Hit:
    """Where a ray ended: enough to shade it later."""

    material: int  # -1: nothing
    depth: float
    normal: wp.vec3
    flat: wp.vec3
    place: wp.vec3  # canonical position; for hair the strand's direction
    detail: wp.vec4  # hair: across, along, seed; worn and held things: reflectance and a code of pattern and gloss
    sky: float


@wp.struct
class Surface:
    """Light that leaves a point: irradiance (blurred if `scatter`) times albedo, plus `extra`."""

    irradiance: wp.vec3
    albedo: wp.vec3
    extra: wp.vec3
    scatter: float
    material: int


@wp.func
def fract(x: float) -> float:
    return x - wp.floor(x)


@wp.func
def hash1(x: float, y: float) -> float:
    return fract(wp.sin(x * 12.9898 + y * 78.233) * 43758.547)


@wp.func
def noise2(x: float, y: float) -> float:
    ix = wp.floor(x)
    iy = wp.floor(y)
    fx = x - ix
    fy = y - iy
    fx = fx * fx * (3.0 - 2.0 * fx)
    fy = fy * fy * (3.0 - 2.0 * fy)
    a = hash1(ix, iy)
    b = hash1(ix + 1.0, iy)
    c = hash1(ix, iy + 1.0)
    d = hash1(ix + 1.0, iy + 1.0)
    return (a + (b - a) * fx) * (1.0 - fy) + (c + (d - c) * fx) * fy


@wp.func
def mixed(a: wp.vec3, b: wp.vec3, t: float) -> wp.vec3:
    return a * (1.0 - t) + b * t


@wp.func
def step(low: float, high: float, x: float) -> float:
    t = wp.clamp((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


@wp.func
def canvas_uv(q: wp.vec3) -> wp.vec2:
    """Texture coordinates in [0, 1] of a canonical position; the inverse is `skin.Canvas.direction`."""
    x = q[0]
    y = q[1] - CENTRE_Y
    z = q[2] - CENTRE_Z
    theta = wp.atan2(x, z)
    t = wp.abs(theta) * 0.31830989
    s = 1.5 * t - 0.5 * t * t
    u = 0.5 + 0.5 * wp.sign(theta) * s
    phi = wp.atan2(y, wp.sqrt(x * x + z * z))
    return wp.vec2(u, (PHI_TOP - phi) / PHI_RANGE)


@wp.func
def fetch(texture: wp.array3d(dtype=wp.uint8), x: float, y: float) -> wp.vec4:
    """Bilinear value in [0, 1] at texel coordinates."""
    height = texture.shape[0]
    width = texture.shape[1]
    x = wp.clamp(x, 0.0, float(width) - 1.001)
    y = wp.clamp(y, 0.0, float(height) - 1.001)
    ix = int(x)
    iy = int(y)
    fx = x - float(ix)
    fy = y - float(iy)
    w00 = (1.0 - fx) * (1.0 - fy)
    w10 = fx * (1.0 - fy)
    w01 = (1.0 - fx) * fy
    w11 = fx * fy
    out = wp.vec4(0.0, 0.0, 0.0, 0.0)
    for c in range(4):
        out[c] = (
            float(texture[iy, ix, c]) * w00
            + float(texture[iy, ix + 1, c]) * w10
            + float(texture[iy + 1, ix, c]) * w01
            + float(texture[iy + 1, ix + 1, c]) * w11
        ) * 0.003921569
    return out


@wp.func
def fetch_height(texture: wp.array3d(dtype=wp.uint8), x: int, y: int) -> float:
    x = wp.clamp(x, 0, texture.shape[1] - 1)
    y = wp.clamp(y, 0, texture.shape[0] - 1)
    return float(texture[y, x, 3]) * 0.003921569


@wp.func
def ambient_light(u: Uniforms, n: wp.vec3) -> wp.vec3:
    e = u.ambient + u.ambient_x * n[0] + u.ambient_y * n[1] + u.ambient_z * n[2]
    return wp.vec3(wp.max(e[0], 0.0), wp.max(e[1], 0.0), wp.max(e[2], 0.0))


@wp.func
def highlight(n: wp.vec3, v: wp.vec3, light: wp.vec3, roughness: float, f0: float) -> float:
    """GGX times visibility times Fresnel times cosine (Karis's approximation of the visibility term)."""
    nl = wp.dot(n, light)
    if nl <= 0.0:
        return 0.0
    h = wp.normalize(v + light)
    nh = wp.max(wp.dot(n, h), 0.0)
    lh = wp.max(wp.dot(light, h), 0.0)
    a = roughness * roughness
    a2 = a * a
    d = nh * nh * (a2 - 1.0) + 1.0
    f = f0 + (1.0 - f0) * wp.pow(1.0 - lh, 5.0)
    return f * nl * a2 / (12.566 * d * d * wp.max(0.1, lh * lh) * (a + 0.5)) * 4.0


@wp.func
def strand_cut(s: float, t: float, seed: float, strands: float) -> int:
    """1 where a ribbon has hair at (s across, t along): strands end at different lengths, with gaps near the tip."""
    k = wp.floor(s * strands)
    end = 0.75 + 0.25 * hash1(k, seed)
    if t > end:
        return 0
    edge = wp.abs(s - 0.5) * 2.0
    if edge > 1.0 - 0.6 * t * t * t * hash1(seed, k + 3.0):
        return 0
    gap = fract(s * strands)
    if gap < 0.32 * (t - 0.35) and hash1(k + 7.0, seed) > 0.4:
        return 0
    return 1


@wp.func
def hair_light(tangent: wp.vec3, v: wp.vec3, light: wp.vec3, shine: float) -> wp.vec2:
    """Kajiya-Kay: (diffuse factor, specular factor)."""
    tl = wp.dot(tangent, light)
    tv = wp.dot(tangent, v)
    sl = wp.sqrt(wp.max(1.0 - tl * tl, 0.0))
    sv = wp.sqrt(wp.max(1.0 - tv * tv, 0.0))
    along = wp.max(sl * sv - tl * tv, 0.0)
    return wp.vec2(sl, wp.pow(along, 12.0 + 60.0 * shine) * (0.15 + shine))


@wp.func
def lit(
    body: wp.uint64, props: wp.uint64, has_props: int, p: wp.vec3, light: wp.vec3, spread: float, jitter: wp.vec2
) -> float:
    """1 when a jittered ray towards the light is free, else 0."""
    helper = wp.vec3(0.0, 1.0, 0.0)
    if wp.abs(light[1]) > 0.9:
        helper = wp.vec3(1.0, 0.0, 0.0)
    a = wp.normalize(wp.cross(light, helper))
    b = wp.cross(light, a)
    r = spread * wp.sqrt(jitter[0])
    angle = 6.2831853 * jitter[1]
    d = wp.normalize(light + a * (r * wp.cos(angle)) + b * (r * wp.sin(angle)))
    if wp.mesh_query_ray_anyhit(body, p, d, FAR):
        return 0.0
    if has_props == 1 and wp.mesh_query_ray_anyhit(props, p, d, FAR):
        return 0.0
    return 1.0


@wp.func
def cloth_colour(u: Uniforms, q: wp.vec3) -> wp.vec3:
    x = q[0] * u.cloth_scale
    y = q[1] * u.cloth_scale
    t = float(0.0)
    if u.cloth_pattern == 1:
        t = step(0.45, 0.55, fract(y))
    elif u.cloth_pattern == 2:
        t = step(0.45, 0.55, fract(x))
    elif u.cloth_pattern == 3:
        t = 0.5 * (step(0.45, 0.55, fract(x)) + step(0.45, 0.55, fract(y)))
    elif u.cloth_pattern == 4:
        t = step(0.55, 0.6, noise2(x * 2.0 + u.eye_seed, y * 2.0))
    elif u.cloth_pattern == 5:
        dx = fract(x) - 0.5
        dy = fract(y) - 0.5
        t = 1.0 - step(0.06, 0.09, dx * dx + dy * dy)
    knit = 0.85 + 0.3 * noise2(q[0] * 9.0, q[1] * 9.0)
    return mixed(u.cloth_a, u.cloth_b, t) * knit


@wp.func
def prop_pattern(q: wp.vec3, kind: float) -> float:
    """Brightness of a worn or held object: knitted (1), woven (2), printed (3), plain (0)."""
    if kind < 0.5:
        return 1.0
    if kind < 1.5:
        return 0.65 + 0.5 * wp.abs(wp.sin(q[0] * 9.0)) * (0.6 + 0.4 * wp.abs(wp.sin(q[1] * 14.0)))
    if kind < 2.5:
        return 0.8 + 0.35 * noise2(q[0] * 7.0, q[1] * 7.0)
    return 0.45 + 1.1 * step(0.35, 0.65, noise2(q[0] * 0.9 + 5.0, q[1] * 0.9))


@wp.struct
class Scene:
    """The meshes of a batch and what hangs on their vertices; per photo `body`, `props`, `lenses` and their flags."""

    body: wp.array(dtype=wp.uint64)
    props: wp.array(dtype=wp.uint64)
    lenses: wp.array(dtype=wp.uint64)
    flags: wp.array2d(dtype=wp.int32)
    materials: wp.array(dtype=wp.int32)
    aux: wp.array(dtype=wp.vec3)
    strand: wp.array(dtype=wp.vec3)
    occlusion: wp.array(dtype=float)
    prop_faces: wp.array(dtype=wp.int32)
    prop_start: wp.array(dtype=wp.int32)
    prop_normals: wp.array(dtype=wp.vec3)
    prop_colours: wp.array(dtype=wp.vec3)
    prop_info: wp.array(dtype=wp.vec3)


@wp.func
def trace(
    b: int,
    scene: Scene,
    faces: wp.array(dtype=wp.int32),
    normals: wp.array2d(dtype=wp.vec3),
    u: Uniforms,
    direction: wp.vec3,
) -> Hit:
    """The nearest thing along a ray from the camera: head, hair (through the gaps between strands), worn things."""
    out = Hit()
    out.material = -1
    out.depth = FAR
    out.sky = 1.0
    body = scene.body[b]
    o = u.origin
    distance = float(0.0)
    for _pass in range(5):
        r = wp.mesh_query_ray(body, o, direction, FAR)
        if not r.result:
            break
        distance += r.t
        m = scene.materials[r.face]
        i0 = faces[3 * r.face]
        i1 = faces[3 * r.face + 1]
        i2 = faces[3 * r.face + 2]
        w0 = r.u
        w1 = r.v
        w2 = 1.0 - w0 - w1
        seen = int(1)
        st = wp.vec3(0.0, 0.0, 0.0)
        if m >= LASH:
            st = scene.strand[i0] * w0 + scene.strand[i1] * w1 + scene.strand[i2] * w2
            if m == LASH:
                keep = u.lash_amount * (1.0 - st[1])
                if st[0] < 0.0:  # the lower lid's are few and short
                    keep = 0.35 * u.lash_amount * (1.0 - 2.0 * st[1])
                if hash1(wp.floor(st[0] * 60.0), 3.0) > keep:
                    seen = 0
            else:
                seen = strand_cut(st[0], st[1], st[2], 7.0)
        if seen == 1:
            out.material = m
            out.depth = distance
            out.normal = wp.normalize(normals[b, i0] * w0 + normals[b, i1] * w1 + normals[b, i2] * w2)
            out.flat = r.normal
            out.place = scene.aux[i0] * w0 + scene.aux[i1] * w1 + scene.aux[i2] * w2
            out.detail = wp.vec4(st[0], st[1], st[2], 0.0)
            out.sky = scene.occlusion[i0] * w0 + scene.occlusion[i1] * w1 + scene.occlusion[i2] * w2
            break
        o = o + direction * (r.t + 0.002)
        distance += 0.002
    if scene.flags[b, 0] == 1:
        r = wp.mesh_query_ray(scene.props[b], u.origin, direction, out.depth)
        if r.result:
            offset = 3 * (scene.prop_start[b] + r.face)
            i0 = scene.prop_faces[offset]
            i1 = scene.prop_faces[offset + 1]
            i2 = scene.prop_faces[offset + 2]
            w0 = r.u
            w1 = r.v
            w2 = 1.0 - w0 - w1
            out.normal = wp.normalize(
                scene.prop_normals[i0] * w0 + scene.prop_normals[i1] * w1 + scene.prop_normals[i2] * w2
            )
            colour = scene.prop_colours[i0] * w0 + scene.prop_colours[i1] * w1 + scene.prop_colours[i2] * w2
            info = scene.prop_info[i0]
            out.detail = wp.vec4(colour[0], colour[1], colour[2], 2.0 * info[0] + 0.9 * info[1])
            out.material = PROP
            if info[2] > 0.5:
                out.material = HAND
            out.depth = r.t
            out.flat = r.normal
            out.sky = 0.85
    # Ribbons and worn things are seen from both sides.
    if out.material >= LASH and wp.dot(out.normal, direction) > 0.0:
        out.normal = -out.normal
    return out


@wp.func
def camera_ray(u: Uniforms, x: float, y: float) -> wp.vec3:
    """Direction through image position (x, y) in pixels."""
    return wp.normalize(u.forward + u.right * ((x - u.centre_x) / u.focal) + u.up * ((u.centre_y - y) / u.focal))


@wp.func
def visible(
    b: int, scene: Scene, u: Uniforms, hit: Hit, direction: wp.vec3, x: int, y: int, state: wp.uint32
) -> wp.vec3:
    """Which of the three lights reach a point: one jittered shadow ray each, none for lights behind the surface.

    The jitter is stratified over 4 x 4 neighbours (interleaved sampling, Keller and Heidrich 2001): `soften` averages
    them, so that a soft light is sampled 16 times for the price of one.
    """
    out = wp.vec3(0.0, 0.0, 0.0)
    p = u.origin + direction * hit.depth
    hairy = int(0)
    if hit.material == HAIR or hit.material == BEARD:
        hairy = 1
    start = hit.flat * 0.03
    if wp.dot(hit.flat, direction) > 0.0:
        start = -start
    for k in range(3):
        light = u.light0
        colour = u.colour0
        spread = u.spread0
        if k == 1:
            light = u.light1
            colour = u.colour1
            spread = u.spread1
        if k == 2:
            light = u.light2
            colour = u.colour2
            spread = u.spread2
        jitter = wp.vec2(
            (float((x + k) % 4) + wp.randf(state)) * 0.25, (float((y + 2 * k) % 4) + wp.randf(state)) * 0.25
        )
        if colour[0] + colour[1] + colour[2] < 0.001:
            continue
        if hairy == 0 and wp.dot(hit.normal, light) < -0.28:
            continue
        from_here = p + start
        if hairy == 1:
            from_here = p + light * 0.35
        out[k] = lit(scene.body[b], scene.props[b], scene.flags[b, 0], from_here, light, spread, jitter)
    return out


@wp.struct
class Eye:
    """What is seen of an eye at a point."""

    albedo: wp.vec3
    normal: wp.vec3
    shiny: wp.vec3  # the normal of the highlight: of the cornea


@wp.func
def eye(u: Uniforms, p: wp.vec3) -> Eye:
    """A sphere painted in angles around the gaze: pupil, iris and its fibres, white with veins."""
    out = Eye()
    centre = u.eye_l
    gaze = u.gaze_l
    side = float(1.0)
    if wp.length_sq(p - u.eye_r) < wp.length_sq(p - u.eye_l):
        centre = u.eye_r
        gaze = u.gaze_r
        side = -1.0
    d = wp.normalize(p - centre)
    cosine = wp.dot(d, gaze)
    angle = wp.acos(wp.clamp(cosine, -1.0, 1.0))
    rho = angle / u.iris
    up = wp.normalize(wp.vec3(0.0, 1.0, 0.0) - gaze * gaze[1])
    east = wp.cross(up, gaze)
    turn = wp.atan2(wp.dot(d, up), wp.dot(d, east))
    fibre = noise2(turn * 9.0 + u.eye_seed * side, rho * 2.5) * 0.6 + noise2(turn * 25.0, rho * 4.0) * 0.4
    ring = mixed(u.iris_inner, u.iris_outer, step(0.35, 0.85, rho + 0.25 * (fibre - 0.5)))
    iris = ring * (0.55 + 0.9 * fibre)
    iris = iris * (1.0 - 0.75 * step(0.8, 1.0, rho))
    iris = iris * step(u.pupil - 0.05, u.pupil + 0.06, rho)
    edge = step(1.0, 2.2, rho)
    vein = step(0.62, 0.9, noise2(turn * 14.0 + u.eye_seed, rho * 3.0 + side * 5.0))
    white = wp.cw_mul(u.sclera, mixed(wp.vec3(1.0, 1.0, 1.0), wp.vec3(0.85, 0.55, 0.5), edge * (0.35 + 0.5 * vein)))
    out.albedo = mixed(iris, white, step(0.93, 1.07, rho))
    out.shiny = wp.normalize(d + (d - gaze * cosine) * (0.5 * (1.0 - step(0.9, 1.3, rho))))
    out.normal = wp.normalize(d * 0.6 + gaze * 0.4)
    return out


@wp.func
def teeth(u: Uniforms, q: wp.vec3) -> wp.vec3:
    """Colour of an arch with dark gaps at even angles."""
    tooth = wp.abs(fract(wp.atan2(q[0], q[2] + 3.5) * 4.2 + 0.5) - 0.5)
    return u.teeth * (0.75 + 0.25 * step(0.02, 0.08, tooth))


@wp.func
def strand(u: Uniforms, material: int, st: wp.vec4) -> wp.vec3:
    """Colour of hair or beard: a tone for each strand and clump, some of them grey."""
    strand_tone = 0.8 + 0.4 * hash1(wp.floor(st[0] * 7.0), st[2] + 11.0)
    clump = 0.8 + 0.4 * hash1(st[2], 5.0)
    albedo = wp.vec3(0.5, 0.5, 0.5)
    if material == HAIR:
        albedo = mixed(u.hair_root, u.hair_tip, st[1]) * (strand_tone * clump)
        aged = step(-0.3, 0.7, u.hair_grey - 0.4 * hash1(wp.floor(st[0] * 7.0) + 0.5, st[2]))
        albedo = mixed(albedo, wp.vec3(0.42, 0.41, 0.39) * (0.6 + 0.4 * strand_tone), aged)
    else:
        albedo = u.beard * (strand_tone * clump)
        aged = step(-0.3, 0.7, u.beard_grey - 0.4 * hash1(wp.floor(st[0] * 7.0) + 0.5, st[2]))
        albedo = mixed(albedo, wp.vec3(0.42, 0.41, 0.39) * (0.6 + 0.4 * strand_tone), aged)
    return albedo


@wp.func
def shade(
    b: int,
    scene: Scene,
    paint: wp.array3d(dtype=wp.uint8),
    masks: wp.array3d(dtype=wp.uint8),
    u: Uniforms,
    hit: Hit,
    free: wp.vec3,
    direction: wp.vec3,
) -> Surface:
    """The light that leaves a hit towards the camera, given which lights reach it."""
    out = Surface()
    v = -direction
    material = hit.material
    n = hit.normal
    q = hit.place
    st = hit.detail
    open_sky = hit.sky
    body_depth = hit.depth
    p = u.origin + direction * body_depth
    # A grazing interpolated normal may point away from the viewer; lean it back.
    nv = wp.dot(n, v)
    if nv < 0.05:
        n = wp.normalize(n + v * (0.05 - nv))
    out.material = material
    albedo = wp.vec3(0.5, 0.5, 0.5)
    roughness = float(0.5)
    f0 = float(0.028)
    wrap = wp.vec3(0.0, 0.0, 0.0)
    scatter = float(0.0)
    spec = float(1.0)
    shiny = n
    tangent = wp.vec3(0.0, 0.0, 0.0)
    if material == SKIN:
        uv = canvas_uv(q)
        tx = uv[0] * float(paint.shape[1]) - 0.5
        ty = uv[1] * float(paint.shape[0]) - 0.5
        texel = fetch(paint, tx, ty)
        mask = fetch(masks, tx, ty)
        albedo = wp.vec3(texel[0] * texel[0], texel[1] * texel[1], texel[2] * texel[2])
        ix = int(tx + 0.5)
        iy = int(ty + 0.5)
        hu = fetch_height(paint, ix + 1, iy) - fetch_height(paint, ix - 1, iy)
        hv = fetch_height(paint, ix, iy + 1) - fetch_height(paint, ix, iy - 1)
        radial = wp.normalize(wp.vec3(q[0], q[1] - CENTRE_Y, q[2] - CENTRE_Z))
        east = wp.normalize(wp.vec3(radial[2], 0.0, -radial[0]) + wp.vec3(0.0001, 0.0, 0.0))
        south = wp.cross(east, radial)
        n = wp.normalize(n - (east * hu + south * hv) * u.bump)
        albedo = mixed(albedo, u.lip, mask[0] * u.lip_amount)
        albedo = mixed(albedo, wp.cw_mul(albedo, u.shadow), mask[1] * u.shadow_amount)
        albedo = mixed(albedo, wp.cw_mul(albedo, u.blush), mask[2] * u.blush_amount)
        wrap = wp.vec3(0.28, 0.11, 0.05)
        roughness = 0.46 - 0.10 * u.shine - 0.14 * mask[0] * u.lip_gloss
        spec = (0.35 + 0.75 * u.shine) * (0.6 + 0.8 * mask[3]) * (1.0 + 1.5 * mask[0] * u.lip_gloss)
        scatter = 1.0
        shiny = n
        neck = u.neckline - u.neck_depth * (1.0 - step(0.0, u.neck_width, wp.abs(q[0])))
        if q[2] < -4.0:
            neck = u.neckline + 1.0
        if q[1] < neck:
            albedo = cloth_colour(u, q)
            fold = noise2(q[0] * 0.5 + u.eye_seed, q[1] * 0.35) - 0.5
            fold2 = noise2(q[0] * 0.5 + 9.0, q[1] * 0.4 + u.eye_seed) - 0.5
            n = wp.normalize(n + wp.vec3(fold, 0.4 * fold2, 0.0) * 0.7)
            wrap = wp.vec3(0.0, 0.0, 0.0)
            spec = 0.15
            roughness = 0.8
            scatter = 0.0
            material = PROP
            out.material = PROP
            if q[1] > neck - 0.5:
                open_sky = open_sky * (0.55 + 0.9 * (neck - q[1]))
        elif q[1] < neck + 0.8:
            open_sky = open_sky * (0.6 + 0.5 * (q[1] - neck))
    elif material == EYE:
        seen = eye(u, p)
        albedo = seen.albedo
        n = seen.normal
        shiny = seen.shiny
        roughness = 0.14
        f0 = 0.03
        spec = 1.5
        scatter = 0.5
        open_sky = open_sky * 0.85
    elif material == TEETH:
        albedo = teeth(u, q)
        roughness = 0.3
        f0 = 0.04
        scatter = 0.5
        open_sky = 0.35 + 0.65 * open_sky  # light that came through lips and from tooth to tooth
        wrap = wp.vec3(0.3, 0.3, 0.3)
    elif material == CAVITY:
        albedo = wp.vec3(0.22, 0.055, 0.045)
        spec = 0.2
        open_sky = 0.12 + 0.6 * open_sky
    elif material == TONGUE:
        albedo = wp.vec3(0.42, 0.13, 0.12)
        roughness = 0.35
        open_sky = 0.15 + 0.7 * open_sky
        scatter = 0.5
    elif material == LASH:
        albedo = u.lash
        spec = 0.0
    elif material == HAIR or material == BEARD:
        tangent = wp.normalize(q)
        albedo = strand(u, material, st)
        open_sky = open_sky * (0.35 + 0.65 * st[1])
    elif material == HAND:
        albedo = wp.cw_mul(u.skin_tone, wp.vec3(st[0], st[1], st[2]))
        wrap = wp.vec3(0.28, 0.11, 0.05)
        scatter = 1.0
        spec = 0.6
    else:
        kind = wp.floor(st[3] * 0.5)
        gloss = (st[3] - 2.0 * kind) / 0.9
        albedo = wp.vec3(st[0], st[1], st[2]) * prop_pattern(p, kind)
        roughness = 0.75 - 0.6 * gloss
        f0 = 0.04
        spec = 0.3 + 1.2 * gloss
    irradiance = ambient_light(u, n) * open_sky
    extra = wp.vec3(0.0, 0.0, 0.0)
    for k in range(3):
        light = u.light0
        colour = u.colour0
        if k == 1:
            light = u.light1
            colour = u.colour1
        if k == 2:
            light = u.light2
            colour = u.colour2
        if colour[0] + colour[1] + colour[2] < 0.001:
            continue
        nl = wp.dot(n, light)
        if material == HAIR or material == BEARD:
            kk = hair_light(tangent, v, light, u.hair_shine)
            facing = wp.clamp(0.45 + 0.55 * nl, 0.0, 1.0)
            through = 0.15 + 0.85 * free[k]
            irradiance += colour * (kk[0] * facing * through)
            extra += wp.cw_mul(colour, mixed(albedo, wp.vec3(1.0, 1.0, 1.0), 0.25)) * (kk[1] * facing * free[k] * 0.9)
            continue
        if nl < -0.28:
            continue
        reach = free[k]
        if material == TEETH or material == TONGUE or material == CAVITY:
            reach = 0.3 + 0.7 * reach  # light comes through lips and cheeks
        if reach > 0.0:
            for c in range(3):
                w = wrap[c]
                irradiance[c] = irradiance[c] + colour[c] * reach * wp.max((nl + w) / ((1.0 + w) * (1.0 + w)), 0.0)
            extra += colour * (highlight(shiny, v, light, roughness, f0) * spec * reach)
    # Sheen: the surroundings mirrored at grazing angles.
    if material != HAIR and material != BEARD and material != LASH and material != CAVITY:
        nv = wp.max(wp.dot(shiny, v), 0.0)
        fresnel = f0 + (1.0 - f0) * wp.pow(1.0 - nv, 5.0) * (1.0 - roughness)
        mirrored = shiny * (2.0 * nv) - v
        extra += ambient_light(u, mirrored) * (fresnel * spec * open_sky * 0.7)
    # Glasses: the lens tints what is behind it and mirrors the ambient light.
    if scene.flags[b, 1] == 1:
        r = wp.mesh_query_ray(scene.lenses[b], u.origin, direction, body_depth)
        if r.result:
            albedo = wp.cw_mul(albedo, u.lens)
            extra = wp.cw_mul(extra, u.lens)
            ln = r.normal
            if wp.dot(ln, v) < 0.0:
                ln = -ln
            nv = wp.dot(ln, v)
            mirrored = ln * (2.0 * nv) - v
            f = 0.04 + 0.96 * wp.pow(1.0 - nv, 5.0)
            extra += ambient_light(u, mirrored) * (f + u.lens_mirror)
            extra += u.colour0 * (highlight(ln, v, u.light0, 0.12, 0.06) * 0.5)
            scatter = scatter * 0.5
    out.irradiance = irradiance
    out.albedo = albedo
    out.extra = extra
    out.scatter = scatter
    return out


@wp.struct
class Buffers:
    """What is known of every pixel after tracing, [B, H, W] each."""

    normal: wp.array3d(dtype=wp.vec4)  # and open sky
    place: wp.array3d(dtype=wp.vec4)  # and depth
    flat: wp.array3d(dtype=wp.vec4)  # and material
    detail: wp.array3d(dtype=wp.vec4)
    free: wp.array3d(dtype=wp.vec3)  # which lights arrive
    raw: wp.array3d(dtype=wp.vec3)  # the same before `soften`, grid pixels only


@wp.func
def store(buffers: Buffers, b: int, y: int, x: int, hit: Hit, free: wp.vec3):
    buffers.normal[b, y, x] = wp.vec4(hit.normal[0], hit.normal[1], hit.normal[2], hit.sky)
    buffers.place[b, y, x] = wp.vec4(hit.place[0], hit.place[1], hit.place[2], hit.depth)
    buffers.flat[b, y, x] = wp.vec4(hit.flat[0], hit.flat[1], hit.flat[2], float(hit.material))
    buffers.detail[b, y, x] = hit.detail
    buffers.free[b, y, x] = free


@wp.func
def store_nothing(buffers: Buffers, b: int, y: int, x: int):
    """A miss; what else there is of the pixel is never read."""
    buffers.place[b, y, x] = wp.vec4(0.0, 0.0, 0.0, FAR)
    buffers.flat[b, y, x] = wp.vec4(0.0, 0.0, 0.0, -1.0)


@wp.func
def load(buffers: Buffers, b: int, y: int, x: int) -> Hit:
    out = Hit()
    n = buffers.normal[b, y, x]
    p = buffers.place[b, y, x]
    f = buffers.flat[b, y, x]
    out.normal = wp.vec3(n[0], n[1], n[2])
    out.sky = n[3]
    out.place = wp.vec3(p[0], p[1], p[2])
    out.depth = p[3]
    out.flat = wp.vec3(f[0], f[1], f[2])
    out.material = int(f[3])
    out.detail = buffers.detail[b, y, x]
    return out


@wp.kernel(enable_backward=False)
def trace_grid(
    scene: Scene,
    faces: wp.array(dtype=wp.int32),
    normals: wp.array2d(dtype=wp.vec3),
    uniforms: wp.array(dtype=Uniforms),
    buffers: Buffers,
):
    """Trace every second pixel of every second row, with shadow rays."""
    b, gy, gx = wp.tid()
    y = 2 * gy
    x = 2 * gx
    u = uniforms[b]
    direction = camera_ray(u, float(x) + 0.5, float(y) + 0.5)
    hit = trace(b, scene, faces, normals, u, direction)
    free = wp.vec3(0.0, 0.0, 0.0)
    if hit.material >= 0:
        free = visible(b, scene, u, hit, direction, gx, gy, wp.rand_init(u.seed, y * 4096 + x))
    store(buffers, b, y, x, hit, free)
    buffers.raw[b, gy, gx] = free


@wp.kernel(enable_backward=False)
def soften(uniforms: wp.array(dtype=Uniforms), buffers: Buffers):
    """Average the shadow rays of up to 4 x 4 grid neighbours on the same surface; fewer for a small source."""
    b, gy, gx = wp.tid()
    here = buffers.place[b, 2 * gy, 2 * gx]
    material = buffers.flat[b, 2 * gy, 2 * gx][3]
    if material < 0.0:
        return
    u = uniforms[b]
    total = wp.vec3(0.0, 0.0, 0.0)
    counts = wp.vec3(0.0, 0.0, 0.0)
    for k in range(16):
        dy = k // 4 - 2
        dx = k % 4 - 2
        yy = wp.clamp(gy + dy, 0, buffers.raw.shape[1] - 1)
        xx = wp.clamp(gx + dx, 0, buffers.raw.shape[2] - 1)
        there = buffers.place[b, 2 * yy, 2 * xx]
        if buffers.flat[b, 2 * yy, 2 * xx][3] == material and wp.abs(there[3] - here[3]) < 0.8:
            f = buffers.raw[b, yy, xx]
            reach = wp.max(wp.abs(float(dx)), wp.abs(float(dy)))
            for c in range(3):
                spread = u.spread0
                if c == 1:
                    spread = u.spread1
                if c == 2:
                    spread = u.spread2
                if reach <= 0.5 + 20.0 * spread:
                    total[c] = total[c] + f[c]
                    counts[c] = counts[c] + 1.0
    buffers.free[b, 2 * gy, 2 * gx] = wp.vec3(total[0] / counts[0], total[1] / counts[1], total[2] / counts[2])


@wp.func
def delicate(q: wp.vec3) -> int:
    """1 around eyes and mouth, where parts are thinner than the grid."""
    if q[2] < -3.0:
        return 0
    x = (wp.abs(q[0]) - 2.9) / 2.3
    y = q[1] / 1.5
    if x * x + y * y < 1.0:
        return 1
    x = q[0] / 3.4
    y = (q[1] + 6.8) / 1.9
    if x * x + y * y < 1.0:
        return 1
    return 0


@wp.kernel(enable_backward=False)
def trace_rest(
    scene: Scene,
    faces: wp.array(dtype=wp.int32),
    normals: wp.array2d(dtype=wp.vec3),
    uniforms: wp.array(dtype=Uniforms),
    buffers: Buffers,
):
    """The pixels between the grid's: interpolated where all their neighbours saw the same smooth skin, else traced.

    Within hair only the pixels with an even sum of coordinates are traced; `fill_hair` makes the others' light of
    their four neighbours'.
    Shadows are the neighbours' of the same material wherever there are any, so a quarter of the pixels pays for shadow
    rays; the blur of `scatter_light` hides the difference.
    """
    b, y, x = wp.tid()
    if x % 2 == 0 and y % 2 == 0:
        return
    height = buffers.free.shape[1]
    width = buffers.free.shape[2]
    x0 = x - x % 2
    y0 = y - y % 2
    x1 = wp.min(x + x % 2, width - 1 - (width - 1) % 2)
    y1 = wp.min(y + y % 2, height - 1 - (height - 1) % 2)
    some = wp.max(
        wp.max(buffers.flat[b, y0, x0][3], buffers.flat[b, y0, x1][3]),
        wp.max(buffers.flat[b, y1, x0][3], buffers.flat[b, y1, x1][3]),
    )
    if some < 0.0:  # nothing around it, nothing here
        store_nothing(buffers, b, y, x)
        return
    u = uniforms[b]
    direction = camera_ray(u, float(x) + 0.5, float(y) + 0.5)
    first = load(buffers, b, y0, x0)
    near = first.depth
    far = first.depth
    same = int(1)
    normal = wp.vec3(0.0, 0.0, 0.0)
    place = wp.vec3(0.0, 0.0, 0.0)
    flat = wp.vec3(0.0, 0.0, 0.0)
    sky = float(0.0)
    free = wp.vec3(0.0, 0.0, 0.0)
    depth = float(0.0)
    twist = float(0.0)
    hairy = int(0)
    if first.material == HAIR and (x + y) % 2 == 1:
        hairy = 1
    for k in range(4):
        hit = load(buffers, b, wp.where(k < 2, y0, y1), wp.where(k % 2 == 0, x0, x1))
        if hit.material != first.material:
            same = 0
            hairy = 0
        if wp.dot(hit.normal, first.normal) < 0.88:
            same = 0
        twist += hit.depth * wp.where(k == 0 or k == 3, 1.0, -1.0)
        near = wp.min(near, hit.depth)
        far = wp.max(far, hit.depth)
        normal += hit.normal
        place += hit.place
        flat += hit.flat
        sky += 0.25 * hit.sky
        depth += 0.25 * hit.depth
        free += 0.25 * buffers.free[b, wp.where(k < 2, y0, y1), wp.where(k % 2 == 0, x0, x1)]
    smooth = int(0)
    if first.material == SKIN and same == 1 and (far - near < 0.4 or (far - near < 1.2 and wp.abs(twist) < 0.1)):
        smooth = 1 - delicate(place * 0.25)
    if smooth + hairy > 0 and scene.flags[b, 0] == 1:
        r = wp.mesh_query_ray(scene.props[b], u.origin, direction, depth)
        if r.result:
            smooth = 0
            hairy = 0
    if hairy == 1:
        first.depth = depth
        first.detail = wp.vec4(0.0, 0.0, 0.0, UNSEEN)
        store(buffers, b, y, x, first, free)
        return
    if smooth == 1:
        first.normal = wp.normalize(normal)
        first.place = place * 0.25
        first.flat = wp.normalize(flat)
        first.sky = sky
        first.depth = depth
        store(buffers, b, y, x, first, free)
        return
    hit = trace(b, scene, faces, normals, u, direction)
    total = wp.vec3(0.0, 0.0, 0.0)
    count = float(0.0)
    if hit.material >= 0:
        for k in range(4):
            yy = wp.where(k < 2, y0, y1)
            xx = wp.where(k % 2 == 0, x0, x1)
            gap = wp.abs(buffers.place[b, yy, xx][3] - hit.depth)
            if int(buffers.flat[b, yy, xx][3]) == hit.material and gap < 1.0:
                total += buffers.free[b, yy, xx]
                count += 1.0
        if count > 0.0:
            total = total / count
        else:
            total = visible(b, scene, u, hit, direction, x, y, wp.rand_init(u.seed, y * 4096 + x))
    store(buffers, b, y, x, hit, total)


@wp.kernel(enable_backward=False)
def light_up(
    scene: Scene,
    paint: wp.array3d(dtype=wp.uint8),
    masks: wp.array3d(dtype=wp.uint8),
    uniforms: wp.array(dtype=Uniforms),
    buffers: Buffers,
    irradiance: wp.array3d(dtype=wp.vec4),
    albedo: wp.array3d(dtype=wp.vec4),
    extra: wp.array3d(dtype=wp.vec4),
):
    """Shade every pixel: (irradiance, scatter), (albedo, 1 + material or 0), (extra radiance, depth)."""
    b, y, x = wp.tid()
    if buffers.flat[b, y, x][3] < 0.0:
        irradiance[b, y, x] = wp.vec4(0.0, 0.0, 0.0, 0.0)
        albedo[b, y, x] = wp.vec4(0.0, 0.0, 0.0, 0.0)
        extra[b, y, x] = wp.vec4(0.0, 0.0, 0.0, FAR)
        return
    hit = load(buffers, b, y, x)
    if hit.material == HAIR and hit.detail[3] == UNSEEN:
        irradiance[b, y, x] = wp.vec4(0.0, 0.0, 0.0, UNSEEN)
        albedo[b, y, x] = wp.vec4(0.0, 0.0, 0.0, 1.0 + float(hit.material))
        extra[b, y, x] = wp.vec4(0.0, 0.0, 0.0, hit.depth)
        return
    u = uniforms[b]
    direction = camera_ray(u, float(x) + 0.5, float(y) + 0.5)
    s = shade(b, scene, paint, masks, u, hit, buffers.free[b, y, x], direction)
    irradiance[b, y, x] = wp.vec4(s.irradiance[0], s.irradiance[1], s.irradiance[2], s.scatter)
    albedo[b, y, x] = wp.vec4(s.albedo[0], s.albedo[1], s.albedo[2], 1.0 + float(s.material))
    extra[b, y, x] = wp.vec4(s.extra[0], s.extra[1], s.extra[2], hit.depth)


@wp.kernel(enable_backward=False)
def fill_hair(
    irradiance: wp.array3d(dtype=wp.vec4), albedo: wp.array3d(dtype=wp.vec4), extra: wp.array3d(dtype=wp.vec4)
):
    """Pixels of hair that `trace_rest` left out: the average of the neighbours that saw hair, all of them traced."""
    b, y, x = wp.tid()
    if irradiance[b, y, x][3] != UNSEEN:
        return
    light = wp.vec3(0.0, 0.0, 0.0)
    colour = wp.vec3(0.0, 0.0, 0.0)
    shine = wp.vec3(0.0, 0.0, 0.0)
    count = float(0.0)
    for k in range(4):
        xx = x + wp.where(k == 0, 1, wp.where(k == 1, -1, 0))
        yy = y + wp.where(k == 2, 1, wp.where(k == 3, -1, 0))
        if xx >= 0 and yy >= 0 and xx < irradiance.shape[2] and yy < irradiance.shape[1]:
            a = albedo[b, yy, xx]
            if a[3] == 1.0 + float(HAIR):
                i = irradiance[b, yy, xx]
                e = extra[b, yy, xx]
                light += wp.vec3(i[0], i[1], i[2])
                colour += wp.vec3(a[0], a[1], a[2])
                shine += wp.vec3(e[0], e[1], e[2])
                count += 1.0
    light = light / count
    colour = colour / count
    shine = shine / count
    irradiance[b, y, x] = wp.vec4(light[0], light[1], light[2], 0.0)
    albedo[b, y, x] = wp.vec4(colour[0], colour[1], colour[2], albedo[b, y, x][3])
    extra[b, y, x] = wp.vec4(shine[0], shine[1], shine[2], extra[b, y, x][3])


@wp.kernel(enable_backward=False)
def scatter_light(
    source: wp.array3d(dtype=wp.vec4),
    extra: wp.array3d(dtype=wp.vec4),
    uniforms: wp.array(dtype=Uniforms),
    vertical: int,
    target: wp.array3d(dtype=wp.vec4),
):
    """One half of a separable blur of the light that entered skin: red travels farthest (Jensen et al. 2001).

    Weights fall off with depth difference, so light does not leak from the nose to the cheek behind it. What does not
    scatter gets the narrowest kernel, which removes the grain of one shadow ray per pixel.
    """
    b, y, x = wp.tid()
    centre = source[b, y, x]
    depth = extra[b, y, x][3]
    if depth >= FAR:
        target[b, y, x] = centre
        return
    pixels = uniforms[b].focal / depth  # pixels per centimetre
    soft = centre[3]
    red = wp.max(0.22 * pixels * soft, 0.7)
    green = wp.max(0.09 * pixels * soft, 0.7)
    blue = wp.max(0.05 * pixels * soft, 0.7)
    radius = wp.min(int(2.0 * red + 0.5), 5)
    # exp(-i i / 2 s s) for i = 1, 2, ... by two products each: the ratio of neighbours is itself a geometric series.
    first = wp.vec3(wp.exp(-0.5 / (red * red)), wp.exp(-0.5 / (green * green)), wp.exp(-0.5 / (blue * blue)))
    square = wp.cw_mul(first, first)
    ratio = first
    gauss = wp.vec3(1.0, 1.0, 1.0)
    total = wp.vec3(centre[0], centre[1], centre[2])
    weights = wp.vec3(1.0, 1.0, 1.0)
    for i in range(1, radius + 1):
        gauss = wp.cw_mul(gauss, ratio)
        ratio = wp.cw_mul(ratio, square)
        for side in range(2):
            xx = x
            yy = y
            if vertical == 1:
                yy = wp.clamp(y + i - 2 * i * side, 0, source.shape[1] - 1)
            else:
                xx = wp.clamp(x + i - 2 * i * side, 0, source.shape[2] - 1)
            value = source[b, yy, xx]
            gap = wp.abs(extra[b, yy, xx][3] - depth)
            if gap < 1.5 and wp.abs(value[3] - soft) < 0.6:
                w = gauss * (1.0 - gap * 0.6667)
                weights += w
                total += wp.cw_mul(w, wp.vec3(value[0], value[1], value[2]))
    target[b, y, x] = wp.vec4(total[0] / weights[0], total[1] / weights[1], total[2] / weights[2], soft)


@wp.kernel(enable_backward=False)
def compose(
    scene: Scene,
    faces: wp.array(dtype=wp.int32),
    normals: wp.array2d(dtype=wp.vec3),
    paint: wp.array3d(dtype=wp.uint8),
    masks: wp.array3d(dtype=wp.uint8),
    uniforms: wp.array(dtype=Uniforms),
    buffers: Buffers,
    irradiance: wp.array3d(dtype=wp.vec4),
    albedo: wp.array3d(dtype=wp.vec4),
    extra: wp.array3d(dtype=wp.vec4),
    background: wp.array3d(dtype=wp.vec3),
    more: int,
    image: wp.array3d(dtype=wp.vec3),
):
    """Linear RGB of every pixel; pixels on an edge of depth or material get up to `more` further rays."""
    b, y, x = wp.tid()
    behind = background[b, y, x]
    a = albedo[b, y, x]
    e = extra[b, y, x]
    colour = behind
    if a[3] > 0.0:
        i = irradiance[b, y, x]
        colour = wp.vec3(a[0] * i[0] + e[0], a[1] * i[1] + e[1], a[2] * i[2] + e[2])
    edge = int(0)
    hair = int(0)  # of this pixel and its neighbours, how many saw hair or beard
    around = wp.vec3(0.0, 0.0, 0.0)
    if wp.abs(a[3] - 7.5) < 1.0:
        hair = 1
    for k in range(4):
        xx = wp.clamp(x + wp.where(k == 0, 1, wp.where(k == 1, -1, 0)), 0, image.shape[2] - 1)
        yy = wp.clamp(y + wp.where(k == 2, 1, wp.where(k == 3, -1, 0)), 0, image.shape[1] - 1)
        beside = albedo[b, yy, xx]
        shine = extra[b, yy, xx]
        if beside[3] != a[3] or wp.abs(shine[3] - e[3]) > 0.8:
            edge = 1
        if wp.abs(beside[3] - 7.5) < 1.0:
            hair += 1
        if beside[3] > 0.0:
            i = irradiance[b, yy, xx]
            around += wp.vec3(beside[0] * i[0] + shine[0], beside[1] * i[1] + shine[1], beside[2] * i[2] + shine[2])
        else:
            around += background[b, yy, xx]
    if edge == 0:
        image[b, y, x] = colour
        return
    if hair == 5:
        # Nearly every pixel within hair is an edge: its neighbours are samples enough of strands finer than a pixel.
        image[b, y, x] = colour * 0.6 + around * 0.1
        return
    if hair > 0:  # where hair ends, neighbours stand for one of the rays
        more = 1
    u = uniforms[b]
    total = colour
    free = buffers.free[b, y, x]
    for k in range(more):
        # Points of a rotated grid around the centre that the first ray took.
        first = wp.where(hair > 0, (x + y) % 2, k) == 0
        direction = camera_ray(u, float(x) + wp.where(first, 0.23, 0.81), float(y) + wp.where(first, 0.19, 0.83))
        hit = trace(b, scene, faces, normals, u, direction)
        if hit.material >= 0:
            if a[3] == 0.0:
                free = wp.vec3(0.7, 0.7, 0.7)
            s = shade(b, scene, paint, masks, u, hit, free, direction)
            total += wp.cw_mul(s.albedo, s.irradiance) + s.extra
        else:
            total += behind
    total = total / float(more + 1)
    if hair > 0:
        total = total * 0.8 + around * 0.05
    image[b, y, x] = total


@wp.kernel(enable_backward=False)
def vertex_normals(
    points: wp.array2d(dtype=wp.vec3),
    faces: wp.array(dtype=wp.int32),
    rings: wp.array2d(dtype=wp.int32),
    normals: wp.array2d(dtype=wp.vec3),
):
    """Area-weighted normals of the first vertices of each photo; `rings` as of `head.vertex_rings`, in its order."""
    b, i = wp.tid()
    total = wp.vec3(0.0, 0.0, 0.0)
    last = faces.shape[0] // 3
    for k in range(rings.shape[1]):
        face = rings[i, k]
        if face >= last:
            break
        a = points[b, faces[3 * face]]
        total += wp.cross(points[b, faces[3 * face + 1]] - a, points[b, faces[3 * face + 2]] - a)
    normals[b, i] = wp.normalize(total)


@wp.kernel(enable_backward=False)
def occlude(
    body: wp.uint64,
    points: wp.array(dtype=wp.vec3),
    normals: wp.array(dtype=wp.vec3),
    count: int,
    rays: int,
    reach: float,
    occlusion: wp.array(dtype=float),
):
    """Share of the cosine-weighted hemisphere over each vertex that is open within `reach` centimetres."""
    i = wp.tid()
    if i >= count:
        return
    n = normals[i]
    helper = wp.vec3(0.0, 1.0, 0.0)
    if wp.abs(n[1]) > 0.9:
        helper = wp.vec3(1.0, 0.0, 0.0)
    a = wp.normalize(wp.cross(n, helper))
    b = wp.cross(n, a)
    free = float(0.0)
    for k in range(rays):
        # A golden-angle spiral over the disc, lifted to the hemisphere: cosine weighted without random numbers.
        r2 = (float(k) + 0.5) / float(rays)
        angle = 2.3999632 * float(k) + float(i % 7)
        r = wp.sqrt(r2)
        d = a * (r * wp.cos(angle)) + b * (r * wp.sin(angle)) + n * wp.sqrt(1.0 - r2)
        hit = wp.mesh_query_ray(body, points[i] + n * 0.05, d, reach)
        if hit.result:
            free += 0.5 * hit.t / reach
        else:
            free += 1.0
    occlusion[i] = free / float(rays)


@wp.kernel(enable_backward=False)
def surface_from_outside(
    body: wp.uint64,
    directions: wp.array(dtype=wp.vec3),
    centre: wp.vec3,
    face: wp.array(dtype=wp.int32),
    bary: wp.array(dtype=wp.vec2),
    radius: wp.array(dtype=float),
):
    """Outermost surface point in each direction from `centre`: face (-1: none), barycentric weights, distance."""
    i = wp.tid()
    d = directions[i]
    r = wp.mesh_query_ray(body, centre + d * 60.0, -d, 60.0)
    face[i] = -1
    radius[i] = 0.0
    if r.result:
        face[i] = r.face
        bary[i] = wp.vec2(r.u, r.v)
        radius[i] = 60.0 - r.t
