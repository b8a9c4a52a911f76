"""Photos per second of synthesize.py in its steady state, the parts of it, and what bare ray tracing costs.

    python benchmarks/synthesize.py
    python benchmarks/synthesize.py --device cuda --identities 40

The first figure is the tool's own way: a process per core (with a GPU, as many of them as its memory holds), each
photographing one person after the other with every ingredient on, timed by the clock on the wall from the moment that
all have started. The parts are seconds of one process, of CPU time or, with a GPU, by the clock. Two alternatives see
the same meshes in the same run. The plain way traces with this tracer one ray per pixel and one shadow ray per light,
with no interpolation between neighbours and no reuse of shadows. Bare rays are the least that a picture costs which is
traced pixel by pixel: one ray each and one more from where it ends, nothing shaded, no paint, hair, camera or JPEG.
"""

import argparse
import multiprocessing
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch
import warp as wp

from synthetic import kernels, render
from synthetic.dataset import worker_processes
from synthetic.parameters import draw_identity, draw_photo
from synthetic.photo import encode


@wp.kernel(enable_backward=False)
def every_pixel(
    scene: kernels.Scene,
    faces: wp.array(dtype=wp.int32),
    normals: wp.array2d(dtype=wp.vec3),
    uniforms: wp.array(dtype=kernels.Uniforms),
    buffers: kernels.Buffers,
):
    """The plain way: every pixel its own primary and shadow rays."""
    b, y, x = wp.tid()
    u = uniforms[b]
    direction = kernels.camera_ray(u, float(x) + 0.5, float(y) + 0.5)
    hit = kernels.trace(b, scene, faces, normals, u, direction)
    free = wp.vec3(0.0, 0.0, 0.0)
    if hit.material >= 0:
        free = kernels.visible(b, scene, u, hit, direction, x, y, wp.rand_init(u.seed, y * 4096 + x))
    kernels.store(buffers, b, y, x, hit, free)


@wp.kernel(enable_backward=False)
def bare_rays(scene: kernels.Scene, uniforms: wp.array(dtype=kernels.Uniforms), hits: wp.array3d(dtype=wp.int32)):
    """One primary ray per thread and, from what it meets, one ray towards the first light: no shading at all."""
    b, y, x = wp.tid()
    u = uniforms[b]
    direction = kernels.camera_ray(u, float(x) + 0.5, float(y) + 0.5)
    r = wp.mesh_query_ray(scene.body[b], u.origin, direction, 1000.0)
    seen = 0
    if r.result:
        seen = 1
        p = u.origin + direction * (r.t - 0.03)
        if wp.mesh_query_ray_anyhit(scene.body[b], p, u.light0, 1000.0):
            seen = 2
    hits[b, y, x] = seen


def photographs(renderer, number, images):
    """Everything that synthesize.py does for a person, except writing the files; returns their bytes."""
    identity = draw_identity(1, number, renderer.head)
    photos = [draw_photo(identity, k, renderer.head) for k in range(images)]
    pictures, _ = renderer.photograph(identity, photos)
    return [encode(image, photo.camera["quality"]) for image, photo in zip(pictures, photos, strict=True)]


def one_process(device, numbers, images, ready):
    """Photograph some people once all processes have come this far; returns the seconds it took."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    renderer = render.Renderer(torch.device(device))
    photographs(renderer, 10_000 + numbers[0], 2)
    ready.wait()
    start = time.perf_counter()
    for number in numbers:
        photographs(renderer, number, images)
    return time.perf_counter() - start


def side_by_side(device, processes, identities, images):
    """Photos per second of so many processes with so many people each."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        ready = manager.Barrier(processes)
        tasks = [(device, range(k * identities, (k + 1) * identities), images, ready) for k in range(processes)]
        seconds = pool.starmap(one_process, tasks, chunksize=1)
    return processes * identities * images / max(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--identities", type=int, default=10)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--processes", type=int, help="default: as synthesize.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cpu = options.device == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    renderer = render.Renderer(torch.device(options.device))
    spent, calls = defaultdict(float), defaultdict(int)
    extra = {"plain": 0.0, "bare": 0.0, "rays": 0.0}
    launch = wp.launch

    def timed(kernel, dim, inputs, **settings):
        wp.synchronize_device(renderer.warp)
        start = clock()
        launch(kernel, dim, inputs, **settings)
        wp.synchronize_device(renderer.warp)
        spent[kernel.key] += clock() - start
        calls[kernel.key] += 1
        if kernel.key == "trace_grid":  # the alternatives see the same scene
            scene, uniforms = inputs[0], inputs[3]
            count, half, _ = dim
            start = clock()
            launch(every_pixel, (count, 2 * half, 2 * half), inputs, **settings)
            wp.synchronize_device(renderer.warp)
            extra["plain"] += clock() - start
            hits = wp.zeros((count, 2 * half, 2 * half), dtype=wp.int32, device=renderer.warp)
            start = clock()
            launch(bare_rays, hits.shape, [scene, uniforms, hits], **settings)
            wp.synchronize_device(renderer.warp)
            extra["bare"] += clock() - start
            extra["rays"] += float(hits.numpy().size + (hits.numpy() > 0).sum())
            launch(kernel, dim, inputs, **settings)  # restore the grid

    def timed_photographs(number):
        start = clock()
        photographs(renderer, number, options.images)
        return clock() - start

    photographs(renderer, 10_000, options.images)  # compiles
    processes = options.processes or worker_processes(renderer.device)
    rate = side_by_side(options.device, processes, options.identities, options.images)
    print(f"{processes} processes, {options.images} photos a person at 256 px: {rate:.1f} photos/s")
    whole = [timed_photographs(number) for number in range(options.identities)]
    render.wp.launch = timed
    photographs(renderer, 10_001, options.images)
    spent.clear(), calls.clear(), extra.update(plain=0.0, bare=0.0, rays=0.0)
    for number in range(options.identities):
        photographs(renderer, number, options.images)
    render.wp.launch = launch

    photos = options.identities * options.images
    total = 1000 * sum(whole) / photos
    what = "of CPU" if cpu else "on the GPU"
    print(f"{photos} photos of {options.identities} people in one process: {total:.1f} ms {what} each")
    print(f"median identity: {1000 * np.median(whole) / options.images:.1f} ms a photo")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {name:22s} {1000 * seconds / photos:6.2f} ms a photo")
    rest = total - 1000 * sum(spent.values()) / photos
    print(f"  {'everything else':22s} {rest:6.2f} ms a photo (paint, hair, pose, background, camera, JPEG)")
    traced = 1000 * (spent["trace_grid"] + spent["trace_rest"] + spent["soften"]) / photos
    plain = 1000 * extra["plain"] / photos
    print(f"tracing {traced:.1f} ms; a ray and its shadow rays per pixel {plain:.1f} ms: {plain / traced:.2f} times")
    bare, rays = 1000 * extra["bare"] / photos, extra["rays"] / photos
    print(f"bare rays: {rays:,.0f} of {1e6 * bare / rays:.0f} ns each, {bare:.1f} ms")
    print(f"the whole photo takes {total:.1f} ms, {total / bare:.2f} times that")


if __name__ == "__main__":
    main()
