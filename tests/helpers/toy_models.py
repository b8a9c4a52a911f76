"""A small ONNX model whose features can be computed by hand."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DIM = 4
KERNEL = np.random.default_rng(7).normal(size=(DIM, 3, 112, 112)).astype(np.float32) / 400

# How such a model says that it is fed; with its mirror image.
TEACHER = {
    "format": "face-embedding-1",
    "channels": "rgb",
    "mean": "[127.5, 127.5, 127.5]",
    "std": "[127.5, 127.5, 127.5]",
    "pixel_range": "255",
    "mirror": "caller",
}


def write_onnx(path, *, batch="n", side=112, kind=TensorProto.FLOAT, outputs=("feature",), metadata=None):
    """A model whose feature is one weighted sum over all pixels per dimension: [n, 3, 112, 112] -> [n, 4]."""
    kernel = KERNEL.astype(np.float16) if kind == TensorProto.FLOAT16 else KERNEL
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["crops", "kernel"], ["map"]),
            *(helper.make_node("Flatten", ["map"], [name]) for name in outputs),
        ],
        "sums",
        [helper.make_tensor_value_info("crops", kind, [batch, 3, side, side])],
        [helper.make_tensor_value_info(name, kind, [batch, DIM]) for name in outputs],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path
