"""The embedding networks and the margin head they are trained with: the door to networks/.

A network maps crops [N, 3, 112, 112], prepared as its `feeding` says, to features [N, embedding_size]. The embedding of
an image is the L2-normalised sum of the features of the image and of its mirror image; that belongs to whoever uses the
network. `NETWORKS` names all of them (networks/catalogue.py); a state_dict says by its keys and shapes which one it
belongs to. Nothing here knows of files, devices or options.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks.adaface import AdaFaceIR
from networks.catalogue import NETWORKS, RELEASED, Feeding
from networks.iresnet import IResNet
from networks.mbf import InsightFaceMobile
from networks.mobilefacenet import MobileFaceNet
from networks.released import SELResNet
from networks.vit import VisionTransformer
from training.margin import MarginHead
from utils import shown

__all__ = [
    "FAMILIES",
    "MEAN",
    "NETWORKS",
    "STD",
    "MarginHead",
    "build_network",
    "feeding_of",
    "name_of",
    "network_from_state",
    "takes_side",
]

# How the released family is fed: RGB in [0, 1].
MEAN, STD = RELEASED.mean, RELEASED.std

# By the names that the catalogue uses.
FAMILIES: dict[str, Any] = {
    "released": SELResNet,
    "mobilefacenet": MobileFaceNet,
    "iresnet": IResNet,
    "mbf": InsightFaceMobile,
    "vit": VisionTransformer,
    "adaface": AdaFaceIR,
}


def build_network(
    name: str,
    use_se: bool = True,
    embedding_size: int = 512,
    *,
    recompute: bool = False,
    drop_path: float | None = None,
    token_mask: float | None = None,
) -> nn.Module:
    """A freshly initialised embedding network in training mode.

    `name` is one of `NETWORKS`; `use_se` concerns the released residual networks, `drop_path` and `token_mask` the
    transformers (None takes the public code's). With `recompute`, a training step stores only the input of each block
    and computes the rest a second time; its gradients and running statistics are those without. Raises ValueError for
    unknown names and impossible sizes.
    """
    if embedding_size < 1:
        raise ValueError(f"embedding size {embedding_size} is not positive")
    if name not in NETWORKS:
        raise ValueError(f"no network named {name!r} (there are {', '.join(NETWORKS)})")
    entry = NETWORKS[name]
    settings = dict(entry.settings)
    if entry.family == "released":
        settings["use_se"] = use_se
    given = {"drop_path": drop_path, "token_mask": token_mask}
    for key, value in given.items():
        if value is not None and key not in entry.training:
            raise ValueError(f"{name} has no {key.replace('_', ' ')}; the transformers do")
    drawn = dict(entry.training) | {key: value for key, value in given.items() if value is not None}
    return FAMILIES[entry.family](**settings, **drawn, embedding_size=embedding_size, recompute=recompute)


def takes_side(name: str, side: int) -> bool:
    """Whether a network of `NETWORKS` can be fed with crops of `side` pixels; tried without any arithmetic."""
    with torch.device("meta"):
        network = build_network(name).eval()
        try:
            network(torch.empty(1, 3, side, side))
        except RuntimeError:
            return False
    return True


def feeding_of(network: nn.Module) -> Feeding:
    """How a network wants its input; one that does not say is fed as the released family."""
    return getattr(network, "feeding", RELEASED)


def name_of(state: Mapping[str, Any]) -> str | None:
    """The name in `NETWORKS` of the network that a plain state_dict belongs to, by its keys and a few shapes.

    None for a network that is none of them. r34 and r50 are one network, which is called r34 here.
    """
    family, settings = _recognised(state)
    if family is None:
        return None
    return next((name for name, entry in NETWORKS.items() if _is_of(entry, family, settings)), None)


def network_from_state(state: Mapping[str, Any]) -> nn.Module:
    """The network that a plain state_dict belongs to, in evaluation mode, with these weights in float32.

    Family, depth, squeeze-excitation and embedding size are read from the keys and shapes. Counters of batches, which
    old files lack, may be missing. Raises ValueError, naming the first key that does not fit, when the state is none of
    ours.
    """
    name = name_of(state)
    family, settings = _recognised(state)
    if family is None:
        raise ValueError(f"not the weights of an embedding network that is known: {_appearance(state)}; {_known()}")
    if name is None:
        shape = ", ".join(f"{key} {value}" for key, value in settings.items())
        raise ValueError(f"not the weights of an embedding network that is known: {shape}; {_known()}")
    with torch.device("meta"):  # no initial weights are drawn, and the caller's random numbers are left alone
        network = FAMILIES[family](**settings)
    expected = network.state_dict()
    counters = {key: torch.zeros((), dtype=torch.int64) for key in expected if key.endswith("num_batches_tracked")}
    state = {**counters, **state}
    for key in counters:  # `half()` over a whole state_dict makes these float16, too; nobody uses them
        if isinstance(state[key], Tensor) and state[key].is_floating_point() and state[key].dim() == 0:
            state[key] = counters[key]
    for key in (*expected, *state):
        _check(key, state, expected, name)
    network.to_empty(device="cpu").load_state_dict(state)
    return network.eval()


def _check(key: str, state: Mapping[str, Any], expected: Mapping[str, Tensor], name: str) -> None:
    if key not in state:
        raise ValueError(f"looks like {name}, but {key} is missing")
    if key not in expected:
        raise ValueError(f"looks like {name}, but has the unknown key {_name(key)}")
    found, wanted = state[key], expected[key]
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"weights do not fit {name}: {key} is {shape}, not {tuple(wanted.shape)}")
    if found.is_floating_point() != wanted.is_floating_point():  # copying would cast without a word
        raise ValueError(f"weights do not fit {name}: {key} is {found.dtype}, not {wanted.dtype}")
    if found.layout != torch.strided or found.device.type == "meta":
        raise ValueError(f"weights do not fit {name}: {key} is no dense tensor with values")


def _name(key: str) -> str:
    """A key for an error message: as it is, or quoted and cut where no network has such a one."""
    return key if key.isprintable() and len(key) < 100 else shown(key)


def _recognised(state: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Family and settings that the keys of a state speak for; the caller checks that all keys fit."""
    for family, build in FAMILIES.items():
        settings = build.settings_of(state)
        if settings is not None:
            return family, settings
    return None, {}


def _is_of(entry: Any, family: str, settings: Mapping[str, Any]) -> bool:
    return entry.family == family and all(settings[key] == value for key, value in entry.settings.items())


def _appearance(state: Mapping[str, Any]) -> str:
    """What the keys of a foreign state look like, in a few words."""
    keys = list(state)
    if not keys:
        return "it has no keys"
    first = [f"{shown(key)} {tuple(getattr(state[key], 'shape', ()))}" for key in keys[:3]]
    more = f", ... ({len(keys)} in all)" if len(keys) > len(first) else ""
    return f"its keys are {', '.join(first)}{more}"


def _known() -> str:
    return (
        "known are the released layout, InsightFace's arcface_torch (r18 ... r200, mbf, ViT) and AdaFace's "
        "IR networks; anything else can be measured as ONNX"
    )
