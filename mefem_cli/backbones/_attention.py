"""Attention as timm computes it, but fast in bf16 on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional


def speed_up_attention(blocks: Iterable[nn.Module]) -> None:
    """Let the plain attention of transformer blocks run in float32 where it is faster; nothing else changes."""
    for block in blocks:
        if type(getattr(block, "attn", None)) is Attention and _is_plain(block.attn):
            block.attn.__class__ = CPUAttention  # the same parameters and names, another forward pass


def _is_plain(attention: Any) -> bool:
    """Whether there is nothing between the two linear layers but the attention itself."""
    between = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    return all(one is None or isinstance(one, nn.Identity) for one in between) and not attention.attn_drop.p


class CPUAttention(Attention):
    """timm's attention that leaves bf16 for the step between its linear layers, if it is on a CPU.

    There the bf16 kernel is slower than float32 and both casts. Forward and backward pass, 8 faces, 6 heads, one Zen 4
    core, torch 2.15: 8.9 against 2.9 ms for 42 tokens of 64 features, 37.8 against 28.2 ms for 197 tokens.
    """

    def forward(  # type: ignore[override]  # the other options differ between versions of timm
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Mix tokens [B, n, D] -> [B, n, D]."""
        if attn_mask is not None or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            masks: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}  # timm 1.0.15 has none
            return super().forward(x, **masks, **others)
        features = self.qkv(x).float().unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, n, 3, heads, d]
        with torch.autocast("cpu", enabled=False):
            mixed = functional.scaled_dot_product_attention(*features.permute(2, 0, 3, 1, 4).unbind())
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
