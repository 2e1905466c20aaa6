"""The attentive pooler: one learned query looks at the patch tokens, then a linear layer reads it.

    q = q + crossattention(q, LN(x))      no output projection after the attention
    q = q + MLP(LN(q))
    y = linear(q)

After V-JEPA's probe (Bardes et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mefem_cli.probes import Fitted, Fold, State, _grid

FEATURES = ("patches", "patches+cls")
HEAD_WIDTH = 64  # features for each attention head, as in a ViT
MLP_RATIO = 4


@dataclass(frozen=True)
class Options:
    """Heads trained by gradient, attentive and mlp."""

    learning_rates: str = "3e-4,1e-3,3e-3,1e-2,3e-2"  # learning rates to choose among (attentive, mlp)
    weight_decays: str = "0.01,0.3,1,3"  # weight decays to choose among, with each learning rate (attentive, mlp)
    epochs: int = 20  # passes over the training fold; the best is chosen inside (attentive, mlp)
    head_batch: int = 64  # faces in a training step of a head (attentive, mlp)

    def __post_init__(self) -> None:
        _grid.Recipe(**vars(self))


def fit_predict(fold: Fold, options: Options) -> Fitted:
    """Train the grid of heads on tokens [N, T, D] and predict the test fold with the chosen one."""
    build = _build(fold.features.shape[2])
    return _grid.fit_predict(fold, _grid.Recipe(**vars(options)), build, AttentivePooler.shares)


def predict(state: State, features: np.ndarray) -> np.ndarray:
    """Return what a fitted head reads from tokens [m, T, D]: numbers (m,), or class probabilities [m, C]."""
    return _grid.predict(state, features, _build(features.shape[2]))


@torch.no_grad()
def look(state: State, features: np.ndarray) -> np.ndarray:
    """Return the share of each token [m, T, D] in what a fitted head reads, [m, T]; they sum to 1."""
    head = cast(AttentivePooler, _grid.restore(state, _build(features.shape[2])))
    return head.shares(torch.from_numpy(features).float())[0].numpy()


def _build(width: int) -> _grid.Build:
    return lambda heads, outputs, generator: AttentivePooler(heads, width, outputs, generator)


class AttentivePooler(nn.Module):
    """G attentive poolers side by side: tokens [B, T, D] -> [G, B, outputs].

    Reordered so that tokens meet only two products whose cost does not hold D x D (equal to the steps above, a test
    compares them; h counts attention heads of width d = D / H):

    - logits q_h . (W_h LN(x_t) + b_h) = (W_h' q_h) . LN(x_t) + constant: the query is folded into the key projection,
      and the constant (with the key bias) drops out of the softmax over t.
    - sum_t a_t (V_h LN(x_t) + c_h) = V_h (sum_t a_t LN(x_t)) + c_h, as the a_t sum to 1: pool first, project after.
    - LN(x) = gain * z + shift with z the tokens normalised without gain: gain joins the folded query and, with shift,
      acts on the pooled vector, so z is computed once for all G heads. The shift drops out of the softmax as well.
    """

    def __init__(self, heads: int, width: int, outputs: int, generator: torch.Generator):
        super().__init__()
        self.num_attention_heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1
        hidden = MLP_RATIO * width

        def uniform(*shape: int, fan_in: int = width) -> nn.Parameter:
            return _grid.stack(heads, *shape, fan_in=fan_in, generator=generator)

        self.query = uniform(width)  # already projected: a learned query times a matrix is a learned query
        self.token_gain = nn.Parameter(torch.ones(heads, width))
        self.token_shift = nn.Parameter(torch.zeros(heads, width))
        self.key = uniform(width, width)  # [G, out, in]
        self.value = uniform(width, width)
        self.value_bias = nn.Parameter(torch.zeros(heads, width))
        self.norm_gain = nn.Parameter(torch.ones(heads, width))
        self.norm_shift = nn.Parameter(torch.zeros(heads, width))
        self.expand = uniform(width, hidden)  # [G, in, out]
        self.expand_bias = nn.Parameter(torch.zeros(heads, hidden))
        self.contract = uniform(hidden, width, fan_in=hidden)
        self.contract_bias = nn.Parameter(torch.zeros(heads, width))
        self.readout = uniform(width, outputs)
        self.readout_bias = nn.Parameter(torch.zeros(heads, outputs))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [G, B, outputs] from tokens [B, T, D]."""
        query = self.query[:, None] + self.attend(tokens)  # [G, B, D]
        normed = torch.addcmul(self.norm_shift[:, None], _layer_norm(query), self.norm_gain[:, None])
        hidden = functional.gelu(torch.baddbmm(self.expand_bias[:, None], normed, self.expand))
        query = query + torch.baddbmm(self.contract_bias[:, None], hidden, self.contract)
        return torch.baddbmm(self.readout_bias[:, None], query, self.readout)

    def attend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the query of each head gathers from tokens [B, T, D]: [G, B, D]."""
        heads, width = self.query.shape
        attention_heads = self.num_attention_heads
        z = _layer_norm(tokens)  # [B, T, D]
        pooled = (self._attention(z) @ z).unflatten(1, (heads, attention_heads))  # [B, G, H, D]
        pooled = torch.addcmul(self.token_shift[:, None], pooled, self.token_gain[:, None])

        value = self.value.view(heads, attention_heads, width // attention_heads, width)
        gathered = torch.einsum("bghi,ghoi->gbho", pooled, value).flatten(2)  # [G, B, D]
        return gathered + self.value_bias[:, None]

    def shares(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the share of each token [B, T, D] in what is gathered, [G, B, T]: a mean over attention heads."""
        attention = self._attention(_layer_norm(tokens)).unflatten(1, (-1, self.num_attention_heads))
        return attention.mean(dim=2).transpose(0, 1)

    def _attention(self, z: torch.Tensor) -> torch.Tensor:
        """Return the attention [B, G * H, T] to tokens normalised without gain [B, T, D]."""
        heads, width = self.query.shape
        head_width = width // self.num_attention_heads
        query = self.query.view(heads, self.num_attention_heads, 1, head_width)
        key = self.key.view(heads, self.num_attention_heads, head_width, width)
        folded = (query @ key).squeeze(2) * self.token_gain[:, None] / head_width**0.5  # [G, H, D]
        return (z @ folded.flatten(0, 1).T).transpose(1, 2).softmax(dim=2)


def _layer_norm(values: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(values, values.shape[-1:], eps=1e-6)
