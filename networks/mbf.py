"""InsightFace's MobileFaceNet (recognition/arcface_torch/backbones/mobilefacenet.py): 2.1 M parameters.

Twice as wide as the paper's between the blocks and not wider inside them; the second convolution has 64 groups of two
channels, and a linear layer with batch norm ends it.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from networks.catalogue import INSIGHTFACE, Feeding, Stages
from networks.layers import convolution, full_map, in_float32, kaiming, row_count, run_blocks

_ROWS = (3, 5, 7)  # which entries of `layers` are rows of bottlenecks; the others are one block each


class Layers(nn.Module):
    """Modules in a row under the key `layers`; with `residual` the input is added."""

    def __init__(self, *modules: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*modules)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], or [N, D] at the end of the network."""
        out = self.layers(x)
        return x + out if self.residual else out


def _conv(
    in_channels: int, channels: int, kernel: int, *, linear: bool = False, padding: int | None = None, **settings: int
) -> Layers:
    activation = () if linear else (nn.PReLU(channels),)
    return Layers(
        convolution(in_channels, channels, kernel, padding=padding, **settings), nn.BatchNorm2d(channels), *activation
    )


def _bottleneck(in_channels: int, hidden: int, channels: int, stride: int) -> Layers:
    """1x1 to `hidden` channels, 3x3 depthwise, linear 1x1; the input is added where there is no stride."""
    return Layers(
        _conv(in_channels, hidden, 1),
        _conv(hidden, hidden, 3, stride=stride, groups=hidden),
        _conv(hidden, channels, 1, linear=True),
        residual=stride == 1,
    )


class InsightFaceMobile(nn.Module):
    """[N, 3, 112, 112] -> feature [N, embedding_size]."""

    feeding: ClassVar[Feeding] = INSIGHTFACE
    stages: ClassVar[Stages] = (  # by the side of the map: 28, 14, 7
        ("layers.0", "layers.1", "layers.2", "layers.3"),
        ("layers.4", "layers.5"),
        ("layers.6", "layers.7"),
    )

    def __init__(self, embedding_size: int = 512, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(
            [
                _conv(3, 128, 3, stride=2),
                _conv(128, 128, 3, groups=64),
                _bottleneck(128, 128, 128, 2),
                Layers(*(_bottleneck(128, 128, 128, 1) for _ in range(4))),
                _bottleneck(128, 256, 256, 2),
                Layers(*(_bottleneck(256, 256, 256, 1) for _ in range(6))),
                _bottleneck(256, 512, 256, 2),
                Layers(*(_bottleneck(256, 256, 256, 1) for _ in range(2))),
            ]
        )
        self.conv_sep = _conv(256, 512, 1)
        self.features = Layers(
            _conv(512, 512, 7, linear=True, padding=0, groups=512),
            nn.Flatten(),
            nn.Linear(512, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        kaiming(self)

    @classmethod
    def settings_of(cls, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """See networks/__init__.py."""
        if "conv_sep.layers.0.weight" not in state:
            return None
        return {"embedding_size": row_count(state, "features.layers.2.weight")}

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> feature [N, embedding_size]."""
        x = run_blocks(self._blocks(), x, self.recompute and self.training)
        return in_float32(self.features, full_map(self.conv_sep(x)))

    def _blocks(self) -> Iterator[nn.Module]:
        for index, module in enumerate(self.layers):
            blocks: Iterable[nn.Module] = cast("Layers", module).layers if index in _ROWS else [module]
            yield from blocks
