"""Embedding networks: the released keys and golden outputs, inference of the architecture, recomputation."""

import runpy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import build_network, network_from_state
from networks.layers import run_blocks
from networks.released import ImprovedResidual, SqueezeExcitation


@pytest.fixture(scope="module")
def stand_in(shared):
    """The checkpoint generator of the research data: network name -> state_dict."""
    return runpy.run_path(str(shared / "checkpoint" / "make_state.py"))["make"]


@pytest.mark.parametrize("name", ["r18", "r101"])
def test_released_keys_and_golden_outputs(shared, stand_in, name):
    state = stand_in(name)
    with torch.device("meta"):
        built = build_network(name).state_dict()
    assert list(built) == list(state)
    assert [value.shape for value in built.values()] == [value.shape for value in state.values()]
    assert [value.dtype for value in built.values()] == [value.dtype for value in state.values()]
    golden = np.load(shared / "checkpoint" / f"golden_{name}.npz")
    network = network_from_state(state)
    assert not network.training
    with torch.no_grad():
        features = network(torch.from_numpy(golden["input"])).numpy()
    assert np.abs(features - golden["embedding"]).max() < 1e-4


def _parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("name", "millions", "gflop"), [("r101", 52.2, 14.96), ("r18", 21.8, 3.42)])
def test_size_and_arithmetic_are_the_published_ones(name, millions, gflop):
    with torch.device("meta"):
        network = build_network(name).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 112, 112))
    assert round(_parameters(network) / 1e6, 1) == millions
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.01)


def test_depths_and_squeeze_excitation():
    with torch.device("meta"):
        for name, blocks in {"r18": 8, "r34": 16, "r50": 16, "r101": 33, "r152": 50}.items():
            network = build_network(name)
            assert sum(isinstance(module, ImprovedResidual) for module in network.modules()) == blocks
            assert sum(isinstance(module, SqueezeExcitation) for module in network.modules()) == blocks
        assert not any(".se." in key for key in build_network("r18", use_se=False).state_dict())


def test_mobilefacenet_is_the_papers():
    """0.99 M parameters with 128 dimensions and 221 M multiply-adds (Chen et al. 2018, Table 2 gives 0.99 M)."""
    with torch.device("meta"):
        network = build_network("mfn", embedding_size=128).eval()
        with FlopCounterMode(display=False) as counter:
            assert network(torch.empty(2, 3, 112, 112)).shape == (2, 128)
    batch_norm_and_prelu = sum(
        parameter.numel()
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d | nn.PReLU)
        for parameter in module.parameters()
    )
    assert 0.96e6 < _parameters(network) - batch_norm_and_prelu < 1.0e6
    assert counter.get_total_flops() / 4 / 1e6 == pytest.approx(221, abs=4)
    sides = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    with torch.device("meta"):
        network(torch.empty(1, 3, 112, 112))
    assert sides == [28] * 5 + [14] * 7 + [7] * 3


@pytest.mark.parametrize(("name", "use_se", "size"), [("r18", False, 64), ("mfn", True, 128)])
def test_architecture_is_read_from_the_state(name, use_se, size):
    torch.manual_seed(3)
    network = build_network(name, use_se, size).eval()
    before = torch.random.get_rng_state()
    again = network_from_state(network.state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)
    crops = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(again(crops), network(crops))
        assert again(crops).shape == (2, size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("bn3.weight"), "bn3.weight is missing"),
        (lambda state: state.pop("fc.weight"), "fc.weight is missing"),
        (lambda state: state.pop("layer3.1.conv1.weight"), r"depths \(2, 2, 1, 2\)"),
        (lambda state: state.update(extra=torch.zeros(1)), "looks like r18, but has the unknown key extra"),
        (lambda state: state.update({"bn1.bias": torch.zeros(3)}), r"bn1.bias is \(3,\), not \(64,\)"),
        (lambda state: state.update({"bn1.bias": [0.0]}), r"bn1.bias is list"),
        (lambda state: state.update({"fc.weight": torch.tensor(1.0)}), "fc.weight has no rows"),
        (lambda state: state.clear(), "it has no keys"),
    ],
)
def test_a_foreign_state_is_refused_with_the_key(damage, message):
    state = build_network("r18", embedding_size=8).state_dict()
    damage(state)
    with pytest.raises(ValueError, match=message):
        network_from_state(state)


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="r18, r34"):
        build_network("r19")
    with pytest.raises(ValueError, match="not positive"):
        build_network("mfn", embedding_size=0)


def test_recomputation_under_torch_compile_counts_a_batch_once():
    """The compiler's own recomputation must agree with plain training too: gradients, statistics, counters."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(7)
        network = build_network("mfn", embedding_size=16, recompute=recompute)
        network.blocks = network.blocks[:2]
        run = partial(run_blocks, network.blocks, recompute=recompute)
        blocks = torch.compile(run, backend="aot_eager")
        x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(1))
        blocks(x).square().sum().backward()
        results.append((network.blocks.state_dict(), [parameter.grad for parameter in network.blocks.parameters()]))
    (state, gradients), (state_again, gradients_again) = results
    assert all(torch.allclose(state[key], state_again[key]) for key in state)
    assert all(torch.allclose(one, other) for one, other in zip(gradients, gradients_again, strict=True))


def test_strided_depthwise_runs_in_float32_under_cpu_autocast_only():
    """Its bfloat16 gradient is slow on CPU; elsewhere in the network, but for its end, autocast applies."""
    network = build_network("mfn", embedding_size=16)
    dtypes = {True: set(), False: set()}
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module is not network.project[0]:
            strided_depthwise = module.groups > 1 and module.stride[0] > 1
            module.register_forward_hook(
                lambda module, inputs, output, kind=strided_depthwise: dtypes[kind].add(output.dtype)
            )
    with torch.autocast("cpu", torch.bfloat16):
        low = network(torch.randn(2, 3, 112, 112))
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    low.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("r18", "fc"),
        ("mfn", "project.0"),
        ("ir18", "fc"),
        ("mbf", "features.layers.2"),
        ("vit_t", "feature.2"),
        ("adaface_ir_18", "output_layer.3"),
    ],
)
def test_under_autocast_the_last_layers_run_in_float32(name, last):
    torch.manual_seed(0)
    network = build_network(name, embedding_size=16).eval()
    x = torch.randn(1, 3, 112, 112)
    seen = []
    network.get_submodule(last).register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype))
    )
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        feature = network(x)
    assert seen == [(torch.float32, torch.float32)] and feature.dtype == torch.float32
    assert not torch.equal(feature, feature.bfloat16().float())  # not rounded on the way, either
