"""Run exported models with a runtime of another environment: needs NumPy and that runtime, nothing of this repository.

    python run_exported.py RUNTIME MODEL PIXELS FEATURES

RUNTIME is onnxruntime, opencv, openvino or insightface. PIXELS is a .npy, float32 [n, 3, 112, 112], RGB from 0 to 255;
FEATURES, float32 [n, D], is written: of all crops at once, after the first alone has given the same.
"""

import sys

import numpy as np


def onnxruntime(path, pixels):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: pixels})[0]


def opencv(path, pixels):
    import cv2

    net = cv2.dnn.readNetFromONNX(path)
    net.setInput(pixels)
    return net.forward()


def openvino(path, pixels):
    import openvino

    # Else it computes in bfloat16 where the CPU can, which moves features by a hundredth of their size.
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pixels)[0]


def insightface(path, pixels):
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    model = ArcFaceONNX(path)
    model.prepare(ctx_id=-1)
    return model.get_feat([crop.transpose(1, 2, 0)[..., ::-1].astype(np.uint8) for crop in pixels])


def main(runtime, path, pixels, features):
    crops = np.load(pixels)
    run = {"onnxruntime": onnxruntime, "opencv": opencv, "openvino": openvino, "insightface": insightface}[runtime]
    found = run(path, crops)
    assert np.allclose(run(path, crops[:1]), found[:1], atol=1e-4 * np.abs(found).max()), "a batch is not its crops"
    np.save(features, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
