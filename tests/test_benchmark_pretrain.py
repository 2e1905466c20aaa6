"""The benchmark of training steps: what it compares is what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

from contenders import Setting, Step, bare_step, count_operations, lightly_step  # noqa: E402

WIDTH, DEPTH, PIXELS = 192, 12, 3 * 16 * 16  # of vit_tiny_patch16_224
TINY = Setting(backbone="vit_tiny_patch16_224", batch_size=1)


@pytest.fixture(scope="module")
def ours() -> int:
    """Operations of our step."""
    return count_operations(TINY)


def count(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def blocks(tokens: int, width: int, depth: int) -> int:
    """Operations of a forward pass through blocks: 24 D^2 a token for the products, 4 n D for the attention."""
    return depth * tokens * (24 * width**2 + 4 * tokens * width)


def test_operations_are_those_of_42_source_155_target_and_197_tokens(ours):
    """By hand: a trained pass costs three forward passes, and a little more as attention is computed again."""
    trained = blocks(42, WIDTH, DEPTH) + blocks(197, WIDTH // 2, 6) + 2 * WIDTH * WIDTH // 2 * (42 + 155)
    patches = 2 * PIXELS * WIDTH * (196 + 2 * 42)  # pixels get no gradient
    assert ours == pytest.approx(3 * trained + blocks(197, WIDTH, DEPTH) + patches, rel=0.03)


def test_bare_products_and_attention_are_all_operations_of_a_step(ours):
    assert count(bare_step(TINY)) == ours


def test_lightlys_parts_do_the_same_operations_but_embed_hidden_patches_too(ours):
    pytest.importorskip("lightly", reason="lightly is of the extra `reference`")
    hidden_patches = 2 * 2 * PIXELS * WIDTH * (196 - 42)
    assert count(lightly_step(TINY)) == ours + hidden_patches
