"""A GPU for machines without one: tensors that say they are on it, compute on the CPU, and fail where CUDA fails.

    with emulated_gpu.EmulatedGpu() as gpu:
        train.main()                    # with --device cuda
    gpu.synchronisations                # each place where the host waited for the device: "train.py:423 item"

What fails as on a GPU: operands on two devices (0-dimensional CPU operands of pointwise operations, CPU indices of a
GPU tensor and copies are allowed, as there), NumPy looking at a GPU tensor, a forked process that touches the GPU,
fused optimisers whose lists differ in layout, and nvJPEG called where it would write to memory in use. What is counted:
values read on the host, copies that wait, and operations whose result's size the host must know. Autocast casts what it
casts on CUDA (PReLU too, unlike on CPU). Memory is that of live tensors, as the caching allocator counts it, without
the workspaces of kernels.

What cannot be seen here, and was checked by reading torch 2.11 and torchvision 0.26 only: the kernels themselves, hence
their limits and their rounding (TensorFloat-32, sums in another order); what order kernels run in, hence everything
about streams; code that torch.compile generates (it is switched off here); nvJPEG, in whose place the CPU's decoder
stands; NCCL and DistributedDataParallel (`emulated_nccl` has stand-ins); warp's kernels; the size of what cuDNN and
cuBLAS allocate.

A tensor is a wrapper (as FakeTensor is, but around a CPU tensor with values). To torch's C++ side it is a CPU tensor,
because autograd would ask a CUDA driver for its stream; so what C++ code inside torch decides by the device (which
foreach kernel, say) is decided as on a CPU. Python code sees a CUDA device.
"""

import contextlib
import os
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from types import FrameType, SimpleNamespace
from unittest import mock

import torch
import torchvision
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

import data_gen

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten

# The host has to know how many values there are.
SIZE_DEPENDS_ON_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
READ_BY_HOST = {aten._local_scalar_dense.default, aten.equal.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# What autocast on CUDA computes in the low precision: torch/csrc/autocast, kLowerPrecisionFp.
LOW_PRECISION = {
    *(getattr(torch, name) for name in "conv1d conv2d conv3d conv_transpose2d prelu matmul mm mv bmm".split()),
    *(getattr(torch, name) for name in "addmm addmv addbmm baddbmm chain_matmul".split()),
    *(getattr(Tensor, name) for name in "prelu matmul __matmul__ __rmatmul__ mm mv bmm addmm baddbmm".split()),
    torch.nn.functional.linear,
}
# Copies of what Python holds go through pageable memory, and the host waits for them.
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; `held` is its values on the CPU."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        assert type(held) is Tensor, f"a {type(held).__name__} on the GPU"
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device("cpu"), requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, held, requires_grad=False):
        self.held = held
        self.stream = None  # the one whose memory this is, where others may not read it yet
        self.share = _Share(_current(), held.untyped_storage())

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch does it
    device = property(lambda self: _current().device)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return self.device.index

    def record_stream(self, stream):
        self.stream = None

    def __repr__(self, *, tensor_contents=None):
        return f"OnGpu({self.held!r})"

    def __reduce_ex__(self, protocol):
        raise RuntimeError("a GPU tensor is saved: it could be loaded only where there is a GPU, or with map_location")

    def __tensor_flatten__(self):  # Module.to swaps parameters that have this
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGpu(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # torch's stub
        return _current().compute(func, args, kwargs or {})


class _Share:
    """One of the tensors that keep a storage in memory. (A weak reference to the tensor would forbid swapping it.)"""

    def __init__(self, gpu, storage):
        self.gpu, self.key, self.size = gpu, storage._cdata, storage.nbytes()
        gpu.owners[self.key] += 1
        if gpu.owners[self.key] == 1:
            gpu.allocated += self.size
            gpu.peak = max(gpu.peak, gpu.allocated)

    def __del__(self):
        self.gpu.owners[self.key] -= 1
        if not self.gpu.owners[self.key]:
            del self.gpu.owners[self.key]
            self.gpu.allocated -= self.size


class Stream:
    """Everything is done at once: there is nothing to wait for."""

    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class EmulatedGpu(TorchFunctionMode):
    """While entered, this process uses GPU `number` of `count`. One at a time."""

    active: "EmulatedGpu | None" = None

    def __init__(self, number=0, count=1):
        super().__init__()
        self.device, self.count = torch.device("cuda", number), count
        self.synchronisations = []  # "file:line what", in order
        self.computed = 0  # operations on GPU tensors
        self.allocated = self.peak = 0  # bytes
        self.owners: Counter[int] = Counter()  # wrappers of each storage
        self._pinned: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()  # by address
        self.stream = self.default_stream = Stream()
        self._process = os.getpid()
        self._patches = contextlib.ExitStack()
        # Of each thread: gradients and threads of the program enter it once more.
        self._nesting: Counter[int] = Counter()

    def __enter__(self):
        if EmulatedGpu.active is None:
            EmulatedGpu.active = self
            for place, name, stand_in in self._stand_ins():
                self._patches.enter_context(mock.patch.object(place, name, stand_in))
        self._nesting[threading.get_ident()] += 1
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._nesting[threading.get_ident()] -= 1
        if threading.current_thread() is threading.main_thread() and not self._nesting[threading.get_ident()]:
            EmulatedGpu.active = None
            self._patches.close()
            for cached in (data_gen._decoding_stream,):  # a real GPU may be next
                cached.cache_clear()

    # --- what Python code calls --------------------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if handler := _HANDLERS.get(func):
            return handler(self, *args, **kwargs)
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            return self._make(func, args, kwargs)
        if func in LOW_PRECISION and torch.is_autocast_enabled("cuda"):
            args, kwargs = _pytree.tree_map(self._lower, (args, kwargs))
        return func(*args, **kwargs)

    def _make(self, func, args, kwargs):
        """A factory function's tensor on the GPU."""
        self.touch()
        if func in FROM_PYTHON:
            self.wait("copy from Python")
        requires_grad = kwargs.pop("requires_grad", False)
        made = func(*args, **kwargs | {"device": "cpu"})
        made = made if isinstance(made, OnGpu) else OnGpu(made)
        return made.requires_grad_(requires_grad) if requires_grad else made

    def _lower(self, value):
        if not isinstance(value, OnGpu) or value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return value
        return value.to(torch.get_autocast_dtype("cuda"))

    def _to(self, tensor, *args, **kwargs):
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        there = isinstance(tensor, OnGpu)
        if args and isinstance(args[0], Tensor):
            device, dtype = args[0].device, args[0].dtype
        settings = {"copy": copy} | ({} if layout is None else {"memory_format": layout})
        if device is None or there == (device.type == "cuda"):
            # With the device left out, because C++ takes it for another one than a CPU.
            return tensor.to(dtype or tensor.dtype, **settings)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("gradients of copies between devices")
        self.touch()
        self._account(not there and self._is_pinned(tensor), there, non_blocking)
        values = (tensor.held if there else tensor).detach()
        values = values.to(dtype or values.dtype, **settings | {"copy": True})
        return values if there else OnGpu(values)

    def _account(self, pinned, from_gpu, non_blocking):
        if from_gpu and non_blocking:
            raise RuntimeError("a copy to the host that does not wait: its values must not be read before it is done")
        if from_gpu or not (non_blocking and pinned):
            # From pageable memory CUDA copies through a buffer of its own: such a copy waits for its turn there.
            self.wait("copy to host" if from_gpu else "copy from pageable memory" if non_blocking else "copy to device")

    def _cpu(self, tensor, **settings):
        return self._to(tensor, "cpu", **settings)

    def _cuda(self, tensor, device=None, **settings):
        return self._to(tensor, self.device, **settings)

    def _to_list(self, tensor):
        if isinstance(tensor, OnGpu):
            self.wait("tolist")
            return tensor.held.tolist()
        return tensor.tolist()

    def _numpy(self, tensor, *args, **kwargs):
        if isinstance(tensor, OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return tensor.numpy(*args, **kwargs)

    def _array(self, tensor, *args, **kwargs):
        self._numpy(tensor.detach())
        return tensor.__array__(*args, **kwargs)

    def _pin(self, tensor, device=None):
        self.touch()
        pinned = tensor.clone()
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def _is_pinned(self, tensor, device=None):
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _decode(self, images, mode):
        self.touch()
        if self.stream is self.default_stream:
            raise RuntimeError("nvJPEG would write, at once, to memory that kernels in this stream's queue still read")
        if not all(type(image) is Tensor and image.dtype == torch.uint8 and image.ndim == 1 for image in images):
            raise RuntimeError("nvJPEG takes flat uint8 tensors in main memory")
        self.wait("decode")
        decoded = [OnGpu(torch.ops.image.decode_jpeg(image, mode, False)) for image in images]
        for image in decoded:
            image.stream = self.stream
        return decoded

    # --- what is computed --------------------------------------------------------------------------------------------

    def compute(self, func, args, kwargs):
        """One operation of which at least one operand is on the GPU."""
        self.touch()
        self.computed += 1
        flat, structure = _pytree.tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        if any(tensor.stream not in (None, self.stream) for tensor in tensors if isinstance(tensor, OnGpu)):
            raise RuntimeError("memory of another stream that is not recorded: it may be given away before it is read")
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        self._check_devices(func, args, tensors)
        self._check_layout(func, args)
        masks = func in INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if masks or func in SIZE_DEPENDS_ON_VALUES or func in READ_BY_HOST:
            self.wait(func.__name__.split(".")[0].strip("_"))
        known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnGpu)}
        held = [value.held if isinstance(value, OnGpu) else value for value in flat]
        held_args, held_kwargs = _pytree.tree_unflatten(held, structure)
        result = func(*held_args, **held_kwargs)
        if torch.Tag.inplace_view in func.tags:  # the wrapper's shape has to follow
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)

        def wrap(value):
            if not isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else OnGpu(value)  # in place: the same wrapper

        return _pytree.tree_map(wrap, result)

    def _check_devices(self, func, args, tensors):
        strange = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
        if func in INDEXING and isinstance(args[0], OnGpu):  # indices may be on the CPU; copying them waits
            for index in strange:
                if index.ndim and not any(index is other for other in args[2:]):
                    self.wait("copy to device")
                    strange = [tensor for tensor in strange if tensor is not index]
        if torch.Tag.pointwise in func.tags or func in INDEXING or func is aten.fill_.Tensor:
            strange = [tensor for tensor in strange if tensor.ndim]
        if strange:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({func})")

    @staticmethod
    def _check_layout(func, args):
        if "_fused_" not in func.__name__:
            return
        for tensors in zip(*(some for some in args if isinstance(some, list) and some), strict=True):
            layouts = {tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1) for t in tensors}
            if len(layouts) > 1:
                raise RuntimeError(f"{func} takes parameters, gradients and state of one layout, not {layouts}")

    def _copy(self, target, source, non_blocking=False):
        from_gpu, to_gpu = isinstance(source, OnGpu), isinstance(target, OnGpu)
        if from_gpu != to_gpu:
            self._account(not from_gpu and self._is_pinned(source), from_gpu, non_blocking)
        (target.held if to_gpu else target).copy_(source.held if from_gpu else source)
        return target

    # --- accounts ----------------------------------------------------------------------------------------------------

    def touch(self):
        if os.getpid() != self._process:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    def wait(self, why):
        """Note that the host waits for the device, and where in this repository's code."""
        self.touch()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__).resolve():
                return self.synchronisations.append(f"{path.relative_to(ROOT)}:{frame.f_lineno} {why}")
            frame = frame.f_back
        return self.synchronisations.append(why)

    @contextlib.contextmanager
    def _in_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def reset_peak(self, device=None):
        self.peak = self.allocated

    # --- what torch.cuda says ----------------------------------------------------------------------------------------

    def _stand_ins(self):
        gpu, run, decode = self, threading.Thread.run, data_gen.decode_jpeg

        def run_with_gpu(thread):
            with gpu:  # modes are per thread
                run(thread)

        def decode_jpeg(images, device):
            if torch.device(device).type == "cpu":
                return decode(images, device)
            return gpu._decode(images, torchvision.io.ImageReadMode.RGB.value)

        engine = torch.autograd._engine_run_backward

        def run_backward(*args, **kwargs):
            with gpu:  # left by Tensor.backward, but gradients have Python code, too
                return engine(*args, **kwargs)

        properties = SimpleNamespace(name="an emulated GPU", total_memory=80 << 30, multi_processor_count=132)
        cuda = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: gpu.count,
            "current_device": lambda: gpu.device.index,
            "set_device": lambda device: None,
            "synchronize": lambda device=None: gpu.wait("synchronize"),
            "get_device_name": lambda device=None: properties.name,
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda including_emulation=True: True,
            "Stream": Stream,
            "stream": gpu._in_stream,
            "current_stream": lambda device=None: gpu.stream,
            "is_current_stream_capturing": lambda: False,
            "manual_seed_all": lambda seed: None,  # it draws from the CPU's generator
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: None,
            "memory_allocated": lambda device=None: gpu.allocated,
            "max_memory_allocated": lambda device=None: gpu.peak,
            "reset_peak_memory_stats": gpu.reset_peak,
            "empty_cache": lambda: None,
        }
        yield from ((torch.cuda, name, stand_in) for name, stand_in in cuda.items())
        yield torch.accelerator, "is_available", lambda: True
        yield torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
        yield torch.accelerator, "current_device_index", lambda: gpu.device.index
        yield torch.accelerator, "set_device_index", lambda device: None
        yield torch, "compile", lambda model, **settings: model
        yield threading.Thread, "run", run_with_gpu
        yield torch.autograd, "_engine_run_backward", run_backward
        yield data_gen, "decode_jpeg", decode_jpeg


_HANDLERS = {
    Tensor.to: EmulatedGpu._to,
    Tensor.cpu: EmulatedGpu._cpu,
    Tensor.cuda: EmulatedGpu._cuda,
    Tensor.tolist: EmulatedGpu._to_list,
    Tensor.numpy: EmulatedGpu._numpy,
    Tensor.__array__: EmulatedGpu._array,
    Tensor.pin_memory: EmulatedGpu._pin,
    Tensor.is_pinned: EmulatedGpu._is_pinned,
}


def _current():
    if EmulatedGpu.active is None:
        raise RuntimeError("the emulated GPU is gone")
    return EmulatedGpu.active
