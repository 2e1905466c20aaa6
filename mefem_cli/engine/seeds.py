"""One seed, many independent streams: every random choice is a function of (seed, purpose, counter)."""

from __future__ import annotations

import numpy as np
import torch

ORDER, MASKS, MONITOR, INITIALISATION = range(4)  # purposes


def numpy_generator(seed: int, purpose: int, counter: int = 0) -> np.random.Generator:
    """Return the generator for one purpose and counter, such as the order of epoch 3."""
    return np.random.default_rng([seed, purpose, counter])


def torch_generator(seed: int, purpose: int, counter: int = 0) -> torch.Generator:
    """Return the CPU generator for one purpose and counter, such as the masks of step 41."""
    state = np.random.SeedSequence([seed, purpose, counter]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def seed_initialisation(seed: int) -> None:
    """Seed torch's global generator, from which layers draw their initial weights."""
    state = np.random.SeedSequence([seed, INITIALISATION]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> np.uint64(1)))
