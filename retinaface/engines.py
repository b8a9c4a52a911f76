"""What runs the network."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from retinaface.network import LAYERS, forward
from retinaface.weights import Folded


class TorchEngine:
    """The folded network in PyTorch, channels last, float32 without TF32."""

    def __init__(self, weights: Folded, device: torch.device) -> None:
        self.device = device
        self._weights = {
            name: (
                torch.from_numpy(weight).to(device, memory_format=torch.channels_last),
                torch.from_numpy(bias).to(device),
            )
            for name, (weight, bias) in weights.items()
        }
        self._layers = {layer.name: layer for layer in LAYERS}

    def convolve(self, name: str, x: Tensor, slope: float | None = None) -> Tensor:
        layer = self._layers[name]
        weight, bias = self._weights[name]
        groups = x.shape[1] // layer.shape[1]
        x = functional.conv2d(x, weight, bias, layer.stride, layer.shape[2] // 2, groups=groups)
        if slope is None:
            return x
        return functional.leaky_relu_(x, slope)

    def add_upsampled(self, x: Tensor, coarse: Tensor) -> Tensor:
        return x + functional.interpolate(coarse, size=x.shape[2:], mode="nearest")

    def concatenate(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def run(self, batch: Tensor) -> list[np.ndarray]:
        """[N, height, width, 3] uint8 BGR -> three maps as `network.forward` describes them."""
        mean = torch.tensor([104.0, 117.0, 123.0], device=self.device)
        x = (batch.to(self.device).float() - mean).permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return [m.float().cpu().numpy() for m in forward(self, x)]
