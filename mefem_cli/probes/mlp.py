"""One hidden layer on a feature vector: y = W2 gelu(W1 z + b1) + b2, z standardised over the training fold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mefem_cli.errors import UsageError
from mefem_cli.probes import Fitted, Fold, State, _grid, scaling

FEATURES = ("cls", "mean")


@dataclass(frozen=True)
class Options:
    """One hidden layer, trained as attentive heads are."""

    hidden: int = 256  # width of the hidden layer
    learning_rates: str = "3e-4,1e-3,3e-3,1e-2,3e-2"  # learning rates to choose among
    weight_decays: str = "0.01,0.3,1,3"  # weight decays to choose among, with each learning rate
    epochs: int = 20  # passes over the training fold; the best is chosen inside
    head_batch: int = 64  # faces in a training step of a head

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise UsageError(f"--hidden {self.hidden}: wanted a whole number from 1")
        self.recipe  # noqa: B018 (building it checks the other options)

    @property
    def recipe(self) -> _grid.Recipe:
        """How the grid of heads is trained."""
        return _grid.Recipe(self.learning_rates, self.weight_decays, self.epochs, self.head_batch)


def fit_predict(fold: Fold, options: Options) -> Fitted:
    """Train the grid of heads on features [N, D] and predict the test fold with the chosen one."""
    mean, scale = scaling(fold.train_features)
    features = ((fold.features - mean) * scale).astype("float32")
    fitted = _grid.fit_predict(replace(fold, features=features), options.recipe, _build(len(mean), options.hidden))
    return replace(fitted, state={**fitted.state, "mean": mean, "scale": scale})


def predict(state: State, features: np.ndarray) -> np.ndarray:
    """Return what a fitted head reads from features [m, D]: numbers (m,), or class probabilities [m, C]."""
    scaled = ((features - state["mean"]) * state["scale"]).astype("float32")
    return _grid.predict(state, scaled, _build(*state["head.first"].shape))


def _build(width: int, hidden: int) -> _grid.Build:
    return lambda heads, outputs, generator: HiddenLayer(heads, width, hidden, outputs, generator)


class HiddenLayer(nn.Module):
    """G one-hidden-layer networks side by side: [B, D] -> [G, B, outputs]."""

    def __init__(self, heads: int, width: int, hidden: int, outputs: int, generator: torch.Generator):
        super().__init__()
        self.first = _grid.stack(heads, width, hidden, fan_in=width, generator=generator)
        self.first_bias = nn.Parameter(torch.zeros(heads, hidden))
        self.second = _grid.stack(heads, hidden, outputs, fan_in=hidden, generator=generator)
        self.second_bias = nn.Parameter(torch.zeros(heads, outputs))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return [G, B, outputs] from features [B, D]."""
        shared = features.expand(len(self.first), -1, -1)
        hidden = functional.gelu(torch.baddbmm(self.first_bias[:, None], shared, self.first))
        return torch.baddbmm(self.second_bias[:, None], hidden, self.second)
