"""Geometry of the patch grid that several masks and the loss weights share."""

from __future__ import annotations

import torch


def distance_from_centre(grid_size: int) -> torch.Tensor:
    """Return each patch centre's distance from the image centre in patches, float64 [L * L], row-major."""
    offset = torch.arange(grid_size, dtype=torch.float64) - (grid_size - 1) / 2
    return torch.hypot(offset[:, None], offset[None, :]).flatten()


def farthest_last(patches: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Sort each row of patch indices by distance from the image centre, equal distances by index.

    So the last column is the patch farthest from the centre, ties to the last in row-major order.
    """
    by_index = patches.sort(dim=1).values
    distance = distance_from_centre(grid_size).round(decimals=9)[by_index]  # equal radii must be equal numbers
    return by_index.gather(1, distance.sort(dim=1, stable=True).indices)
