"""InsightFace's vision transformers (recognition/arcface_torch/backbones/vit.py).

Patches of 9 (12 x 12 of them; the last four pixels of both sides are not seen), learned positions, no class token: all
tokens side by side go into two linear layers with batch norm. While it trains, each sample loses a random share of its
tokens before the blocks (their places are then filled by one learned token), and its way through a block is left out
with a probability that grows from 0 at the first block to `drop_path` at the last.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from networks.catalogue import INSIGHTFACE, Feeding, Stages
from networks.layers import count, in_float32, recomputed, row_count

CROP, PATCH, HEADS, MLP_RATIO = 112, 9, 8, 4
TOKENS = (CROP // PATCH) ** 2
INITIAL_STD = 0.02


class Attention(nn.Module):
    """Self-attention of 8 heads; the projection to queries, keys and values has no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> the same."""
        query, key, value = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Two linear layers with ReLU6 between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> the same."""
        return self.fc2(functional.relu6(self.fc1(x)))


class Block(nn.Module):
    """Attention and perceptron, each on normalised tokens and added to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = Perceptron(width)

    def forward(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        """[N, T, width] -> the same. `paths` [2, N]: the factors of what is added, 0 where a sample leaves it out."""
        for index, way in enumerate((self._attend, self._perceive)):
            added = way(x)
            x = x + (added if paths is None else added * paths[index, :, None, None].to(added.dtype))
        return x

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x))

    def _perceive(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


class Patches(nn.Module):
    """One linear map of every patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 112, 112] -> tokens [N, 144, width]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """[N, 3, 112, 112] -> feature [N, embedding_size].

    `drop_path`: the largest probability to leave out a sample's way through a block; `token_mask`: the share of tokens
    that a sample loses. Both only while training, and drawn before the blocks, so that `recompute` draws nothing again.
    """

    feeding: ClassVar[Feeding] = INSIGHTFACE

    def __init__(
        self,
        width: int,
        depth: int,
        embedding_size: int = 512,
        recompute: bool = False,
        drop_path: float = 0.0,
        token_mask: float = 0.0,
    ) -> None:
        super().__init__()
        if not (0 <= drop_path < 1 and 0 <= token_mask < 1):
            raise ValueError(f"drop path {drop_path:g} and token mask {token_mask:g} have to be from 0 to below 1")
        self.recompute, self.drop_path, self.token_mask = recompute, drop_path, token_mask
        first = ("patch_embed", "pos_embed", "blocks.0")
        self.stages: Stages = (first, *((f"blocks.{index}",) for index in range(1, depth)))
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, width))
        # Without a gradient where no token is left out: data parallelism waits for those of all that have one.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width), requires_grad=token_mask > 0)
        self.patch_embed = Patches(width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(TOKENS * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=2e-5),
        )
        nn.init.normal_(self.mask_token, std=INITIAL_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INITIAL_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def settings_of(cls, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """See networks/__init__.py."""
        if "patch_embed.proj.weight" not in state or "feature.0.weight" not in state:
            return None
        depth = count(state, "blocks.{}.norm1.weight")
        width, size = row_count(state, "patch_embed.proj.weight"), row_count(state, "feature.2.weight")
        return {"width": width, "depth": depth, "embedding_size": size}

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 112, 112] -> feature [N, embedding_size]."""
        x = self.patch_embed(x) + self.pos_embed
        seen = self._draw_tokens(x) if self.training and self.token_mask else None
        if seen is not None:
            x = x.gather(1, seen)
        paths = self._draw_paths(x) if self.training and self.drop_path else None
        for index, block in enumerate(self.blocks):
            inputs = (x,) if paths is None else (x, paths[index])
            x = recomputed(block, *inputs) if self.recompute and self.training else block(*inputs)
        x = self.norm(x)
        if seen is not None:
            x = self.mask_token.to(x.dtype).expand(len(x), TOKENS, -1).scatter(1, seen, x)
        return in_float32(self.feature, x.flatten(1))

    def _draw_tokens(self, x: Tensor) -> Tensor:
        """Which tokens each sample keeps, as an index [N, kept, width] into [N, TOKENS, width]."""
        kept = int(TOKENS * (1 - self.token_mask))
        order = torch.rand(len(x), TOKENS, device=x.device).argsort(dim=1)
        return order[:, :kept, None].expand(-1, -1, x.shape[2])

    def _draw_paths(self, x: Tensor) -> Tensor:
        """Factors [depth, 2, N] of what the blocks add: 0, or 1 / (1 - p), so that the mean stays."""
        depth = len(self.blocks)
        kept = 1 - torch.linspace(0, self.drop_path, depth, device=x.device)[:, None, None]
        return (torch.rand(depth, 2, len(x), device=x.device) < kept) / kept
