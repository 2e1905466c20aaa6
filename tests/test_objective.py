"""The MeFEm objective against slow, obvious references."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention, Block
from torch import nn
from torch.nn import functional

from mefem_cli import parts
from mefem_cli.backbones import vit
from mefem_cli.backbones._attention import CPUAttention, speed_up_attention
from mefem_cli.errors import UsageError
from mefem_cli.masks import Split
from mefem_cli.objectives import mefem

TINY = {"backbone": "vit_tiny_patch16_224", "depth": 2}


def build(image_size: int = 224, patch_size: int = 16, mask: str = "stripes", **options) -> mefem.MeFEm:
    torch.manual_seed(0)
    chosen = mefem.Options(mask=mask, predictor_depth=2, ema="0.9:1", **options)
    backbone = vit.Options(image_size=image_size, patch_size=patch_size, **TINY)
    encoder = vit.build(backbone, class_token=mefem.wants_class_token(chosen))
    return mefem.build(chosen, encoder, parts.Given({"width": "2"} if image_size < 224 and mask == "stripes" else {}))


def images(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def drawn_splits(objective: mefem.MeFEm, count: int, seed: int = 0) -> list[Split]:
    return objective.splits(objective.draw(count, generator(seed)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_face_has_42_source_and_155_target_tokens_together_all_197():
    (split,) = drawn_splits(build(), 500)
    assert (split.source.shape, split.target.shape) == ((500, 42), (500, 155))
    together = torch.cat([split.source, split.target], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(197).expand(500, -1))
    assert split.source.eq(0).any(1).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_without_class_token_there_are_42_source_and_154_target_tokens():
    objective = build(cls_prob=None)
    (split,) = drawn_splits(objective, 100)
    assert (split.source.shape, split.target.shape) == ((100, 42), (100, 154))
    assert objective.source_encoder.num_tokens == 196
    assert "cls" not in objective.source_encoder.features(images(1, 224))


def test_a_source_class_token_takes_the_place_of_the_last_patch_in_row_major_order():
    always, never = build(cls_prob=1.0), build(cls_prob=0.0)
    (with_cls,), (without,) = drawn_splits(always, 50, 1), drawn_splits(never, 50, 1)
    for ours, patches in zip(with_cls.source.tolist(), without.source.tolist(), strict=True):
        assert 0 in ours
        assert patches == sorted(patches)
        assert set(ours) == {0, *patches[:-1]}
    for target, patches in zip(with_cls.target.tolist(), without.source.tolist(), strict=True):
        assert patches[-1] in target
        assert 0 not in target
    assert (without.target == 0).sum(1).tolist() == [1] * 50


@pytest.mark.parametrize("mask", ["quadrants", "multiblock"])
def test_other_masks_give_up_the_patch_farthest_from_the_centre(mask):
    always, never = build(mask=mask, cls_prob=1.0), build(mask=mask, cls_prob=0.0)
    for with_cls, without in zip(drawn_splits(always, 40, 2), drawn_splits(never, 40, 2), strict=True):
        for ours, patches in zip(with_cls.source.tolist(), without.source.tolist(), strict=True):
            (given_up,) = set(patches) - set(ours)
            distance = {patch: math.hypot((patch - 1) // 14 - 6.5, (patch - 1) % 14 - 6.5) for patch in patches}
            ties = [patch for patch in patches if distance[patch] > max(distance.values()) - 1e-9]
            assert given_up == max(ties)


@pytest.mark.parametrize(("image_size", "patch_size", "grid"), [(224, 16, 14), (64, 8, 8)])
def test_circular_weights_follow_the_formula_and_scale_with_the_grid(image_size, patch_size, grid):
    weight = build(image_size, patch_size).loss_weight
    assert weight[0] == 1  # CLS
    scale = grid / 14
    for patch in range(grid * grid):
        r = math.hypot(patch // grid - (grid - 1) / 2, patch % grid - (grid - 1) / 2)
        expected = 1 / (1 + math.exp(1.5 / scale * (r - 5.5 * scale)))
        assert weight[1 + patch].item() == pytest.approx(expected, rel=1e-5)


def test_circular_weights_favour_the_centre():
    weight = build().loss_weight[1:].view(14, 14)
    assert weight[6, 6] > 0.99
    assert weight[0, 0] < 0.01
    assert torch.equal(build(loss_weight="uniform").loss_weight, torch.ones(197))


def reference_loss(objective: mefem.MeFEm, pictures: torch.Tensor, draws: list[Split]) -> float:
    """Contract section 4 in float64, token by token, through timm's own forward passes."""
    objective = copy.deepcopy(objective).double()
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (vit.IMAGENET_MEAN, vit.IMAGENET_STD)
    )
    pixels = (pictures.double() / 255 - mean) / std
    targets = objective.target_encoder.vit.forward_features(pixels)
    source_vit = objective.source_encoder.vit
    tokens = source_vit.patch_embed(pixels)
    tokens = torch.cat([source_vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + source_vit.pos_embed
    total = 0.0
    for split in draws:
        for face in range(len(pictures)):
            source, target = split.source[face], split.target[face]
            encoded = source_vit.norm(source_vit.blocks(tokens[face, source][None]))
            predictor = objective.predictor
            positions = torch.cat([predictor.cls_position, predictor.patch_positions])
            known = predictor.embed(encoded[0]) + positions[source]
            wanted = torch.stack([predictor.mask_token[0, 0] + positions[token] for token in target])
            mixed = predictor.blocks(torch.cat([known, wanted])[None])[0, len(source) :]
            predictions = predictor.output(predictor.norm(mixed))
            for token, prediction in zip(target, predictions, strict=True):
                features = targets[face, token]
                wanted_features = (features - features.mean()) / torch.sqrt(features.var(unbiased=False) + 1e-5)
                difference = (prediction - wanted_features).abs()
                smooth_l1 = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
                total += (objective.loss_weight[token] * smooth_l1).item() / (len(target) * len(pictures) * len(draws))
    return total


@pytest.mark.parametrize("mask", ["stripes", "quadrants", "multiblock"])
@pytest.mark.parametrize("loss_weight", ["circular", "uniform"])
def test_loss_equals_a_slow_reference_in_float64(mask, loss_weight):
    objective = build(64, 8, mask=mask, loss_weight=loss_weight)
    with torch.no_grad():
        for parameter in objective.target_encoder.parameters():  # a target that is not just a copy of the source
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(9)))
    pictures, draws = images(3, 64), objective.draw(3, generator(4))
    losses, _ = objective(pictures, draws)
    splits = objective.splits(draws)
    assert losses["prediction"].item() == pytest.approx(reference_loss(objective, pictures, splits), rel=2e-5)


def test_loss_changes_with_its_weight_and_its_target():
    objective = build(64, 8)
    predictions, targets = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 2.0)
    tokens = torch.tensor([[0, 1, 28], [28, 36, 64]])
    weights = objective.loss_weight[tokens]
    assert objective.loss(predictions, targets, tokens).item() == pytest.approx((1.5 * weights).mean().item())
    assert objective.loss(targets, targets, tokens).item() == 0


def test_the_target_gets_no_gradient_and_the_rest_does():
    objective = build(64, 8)
    losses, _ = objective(images(4, 64), objective.draw(4, generator()))
    losses["prediction"].backward()
    assert all(parameter.grad is None for parameter in objective.target_encoder.parameters())
    without = [
        name for name, parameter in objective.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []


@pytest.mark.parametrize("mask", ["stripes", "multiblock"])
def test_masks_per_image_average_over_draws_that_share_one_pass_of_each_encoder(mask):
    objective = build(64, 8, mask=mask, masks_per_image=3)
    pictures, draws = images(2, 64), objective.draw(2, generator())
    num_modes = len(draws) // 3
    passes: list[str] = []
    for name in ("target_encoder", "source_encoder"):
        getattr(objective, name).register_forward_hook(lambda *_, name=name: passes.append(name))
    together = objective(pictures, draws)[0]["prediction"].item()
    assert passes == ["target_encoder", *["source_encoder"] * num_modes]
    alone = [
        objective(pictures, draws[k : k + num_modes])[0]["prediction"].item() for k in range(0, len(draws), num_modes)
    ]
    assert len(alone) == 3
    assert together == pytest.approx(sum(alone) / 3, rel=1e-5)


@pytest.mark.parametrize("mask", ["stripes", "quadrants"])
@pytest.mark.parametrize("cls_prob", [0.0, 0.3, 1.0])
def test_drawn_table_rows_split_tokens_as_the_mask_and_the_class_token_do_apart(mask, cls_prob):
    """The frequency of every (source patches, where CLS is) against the mask's own table times Bernoulli(P)."""
    objective, faces = build(mask=mask, cls_prob=cls_prob), 40_000
    (split,) = drawn_splits(objective, faces)
    table = objective.masker.table
    expected = {}
    for source, probability in zip(table.splits.source.tolist(), table.probability.tolist(), strict=True):
        tokens = [patch + 1 for patch in source]
        expected[tuple(tokens)] = probability * (1 - cls_prob)
        expected[(*tokens[:-1], 0)] = probability * cls_prob
    counted = Counter(map(tuple, split.source.tolist()))
    assert set(counted) <= set(expected)
    for source, probability in expected.items():
        assert counted[source] / faces == pytest.approx(probability, abs=0.012)


@pytest.mark.parametrize("mask", ["stripes", "quadrants", "multiblock"])
def test_draws_of_a_part_of_the_batch_are_the_part_of_its_splits(mask):
    """Ranks and micro-batches cut what was drawn for the whole batch."""
    objective = build(64, 8, mask=mask, masks_per_image=2)
    draws = objective.draw(6, generator(1))
    part = [Split(one.source[2:5], one.target[2:5]) if isinstance(one, Split) else one[2:5] for one in draws]
    for whole, cut in zip(objective.splits(draws), objective.splits(part), strict=True):
        for side in ("source", "target"):
            tokens = getattr(whole, side).view(2, 6, -1)[:, 2:5].flatten(0, 1)
            assert torch.equal(tokens, getattr(cut, side))


def test_gathered_tokens_are_those_at_the_index_of_their_image():
    tokens = torch.randn(3, 5, 4, generator=generator())
    index = torch.randint(5, (6, 2), generator=generator(1))  # two choices for each of three images
    gathered = vit.gather_tokens(tokens, index)
    for row in range(6):
        for place in range(2):
            assert torch.equal(gathered[row, place], tokens[row % 3, index[row, place]])


def test_ema_moves_every_weight_by_the_closed_form():
    objective = build(64, 8)
    start = {name: value.clone() for name, value in objective.target_encoder.state_dict().items()}
    with torch.no_grad():
        for parameter in objective.source_encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert objective.after_step(0, 11) == {"ema": 0.9}
    assert objective.after_step(5, 11) == {"ema": pytest.approx(0.95)}
    for name, value in objective.target_encoder.state_dict().items():
        moved = 0.0 if name == "vit.pos_embed" else 1 - 0.9 * 0.95
        assert torch.allclose(value - start[name], torch.full_like(value, moved), atol=1e-5), name
    frozen = copy.deepcopy(objective.target_encoder.state_dict())
    objective.after_step(10, 11)  # momentum 1 at the end
    assert all(torch.equal(frozen[name], value) for name, value in objective.target_encoder.state_dict().items())


def test_the_encoder_is_timms_own_with_or_without_a_subset_of_tokens():
    torch.manual_seed(0)
    encoder = vit.build(vit.Options(image_size=64, patch_size=8, **TINY))
    pictures = images(2, 64)
    pixels = (pictures.float() / 255 - torch.tensor(vit.IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
        vit.IMAGENET_STD
    ).view(3, 1, 1)
    expected = encoder.vit.forward_features(pixels)
    patches = encoder.patchify(pictures)
    assert torch.allclose(encoder(patches), expected, atol=1e-5)
    shuffled = torch.stack([torch.randperm(65, generator=generator(seed)) for seed in (0, 1)])
    assert torch.allclose(encoder(patches, shuffled), mefem.gather_tokens(expected, shuffled), atol=1e-5)
    features = encoder.features(pictures)
    assert torch.allclose(features["cls"], expected[:, 0], atol=1e-5)
    assert torch.allclose(features["mean"], expected[:, 1:].mean(1), atol=1e-5)


def test_attention_on_a_cpu_is_timms_own_and_in_bf16_nearer_to_float32():
    objective = build(64, 8)
    blocks = [*objective.source_encoder.vit.blocks, *objective.target_encoder.vit.blocks, *objective.predictor.blocks]
    assert all(type(block.attn) is CPUAttention for block in blocks)
    ours = blocks[0].attn
    timms = copy.deepcopy(ours)
    timms.__class__ = Attention
    tokens = torch.randn(2, 65, 192, generator=generator())
    outputs, gradients = {}, {}
    for name, attention, bf16 in (
        ("exact", timms, False),
        ("same", ours, False),
        ("bf16", timms, True),
        ("ours", ours, True),
    ):
        leaf = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = attention(leaf)
        output.float().square().sum().backward()
        outputs[name], gradients[name] = output.float(), leaf.grad
        assert output.dtype is (torch.bfloat16 if bf16 else torch.float32)
    for result in (outputs, gradients):
        assert torch.equal(result["same"], result["exact"])
        error = {name: (result[name] - result["exact"]).norm() / result["exact"].norm() for name in ("bf16", "ours")}
        assert error["ours"] < min(error["bf16"] * 1.05, 0.02)


def test_attention_on_a_cpu_leaves_bf16(monkeypatch):
    attention, kernels = build(64, 8).predictor.blocks[0].attn, []
    original = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *qkv: kernels.append(qkv[0].dtype) or original(*qkv)
    )
    with torch.autocast("cpu", torch.bfloat16):
        attention(torch.randn(1, 5, 96))
    assert kernels == [torch.float32]


def test_attention_with_more_to_it_stays_timms_own():
    block = Block(64, 2, qk_norm=True, norm_layer=nn.LayerNorm)
    speed_up_attention([block, nn.Linear(2, 2)])
    assert type(block.attn) is Attention


def test_patches_are_the_same_for_both_layouts_of_images_in_memory():
    encoder = vit.build(vit.Options(image_size=64, patch_size=8, **TINY))
    pictures = images(2, 64)
    channels_last = pictures.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as the stream brings them
    patches = encoder.patchify(pictures)
    assert torch.equal(encoder.patchify(channels_last), patches)
    row, column = 3, 5
    pixels = pictures[1, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    assert torch.allclose(patches[1, row * 8 + column], ((pixels - mean) / std).flatten(), atol=1e-6)


def test_hidden_patches_do_not_leak_into_the_source():
    objective = build(64, 8)
    (split,) = drawn_splits(objective, 1)
    patches = objective.source_encoder.patchify(images(1, 64))
    before = objective.source_encoder(patches, split.source)
    hidden = split.target[0][split.target[0] > 0] - 1
    patches[:, hidden] = 7.0
    assert torch.equal(objective.source_encoder(patches, split.source), before)


def test_state_dict_has_timms_names_and_shapes():
    encoder = vit.build(vit.Options())
    plain = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    assert {name: value.shape for name, value in encoder.vit.state_dict().items()} == {
        n: v.shape for n, v in plain.items()
    }


def test_predictor_has_half_the_width_six_blocks_and_the_encoders_heads():
    encoder = vit.build(vit.Options(depth=1))
    predictor = mefem.Predictor(encoder, mefem.Options().predictor_depth, mefem.Options().predictor_width)
    assert (predictor.embed.out_features, len(predictor.blocks), predictor.blocks[0].attn.num_heads) == (192, 6, 6)
    assert predictor.cls_position is not None
    assert predictor.cls_position.abs().max() == 0


def test_sincos_positions_are_fixed_and_the_class_token_has_none():
    encoder = vit.build(vit.Options(image_size=64, patch_size=8, **TINY))
    positions = encoder.vit.pos_embed
    assert not positions.requires_grad
    assert positions[0, 0].abs().max() == 0
    row, column, k, dim = 3, 5, 7, 192
    frequency = 10000 ** (-k / (dim / 4))
    token = positions[0, 1 + row * 8 + column]
    assert token[k].item() == pytest.approx(math.sin(column * frequency), abs=1e-6)
    assert token[dim // 2 + dim // 4 + k].item() == pytest.approx(math.cos(row * frequency), abs=1e-6)


def test_targets_are_layer_normalised():
    objective = build(64, 8)
    targets = objective.token_targets(images(2, 64))
    encoded = objective.target_encoder(objective.target_encoder.patchify(images(2, 64)))
    assert torch.allclose(targets, functional.layer_norm(encoded, (192,)), atol=1e-6)
    assert targets.mean(-1).abs().max() < 1e-5


def test_baselines_know_only_position_or_nothing():
    objective = build(64, 8)
    pictures, draws = images(4, 64), objective.draw(4, generator())
    mean_target = objective.token_targets(pictures).mean(0)
    losses = objective.baselines(pictures, draws, mean_target)
    assert losses["position"] < losses["mean"]
    assert losses["model"].item() == pytest.approx(objective(pictures, draws)[0]["prediction"].item(), rel=1e-6)
    single = objective.baselines(pictures[:1], [rows[:1] for rows in draws], objective.token_targets(pictures[:1])[0])
    assert single["position"] == 0


@pytest.mark.parametrize(
    "name",
    [
        "vit_smal_patch16_224",
        "resnet50",
        "vit_base_patch16_clip_224",
        "vit_small_patch14_reg4_dinov2",
        "beit_base_patch16_224",
    ],
)
def test_unfit_backbones_are_refused(name):
    with pytest.raises(UsageError, match="--backbone"):
        vit.build(vit.Options(backbone=name))


@pytest.mark.parametrize(
    ("given", "typed"),
    [
        ("vit_tiny", 'did you mean "vit_tiny_patch16_224"'),
        ("vit_smal_patch16_224", 'did you mean "vit_small_patch16_224"'),
        ("resnet50", "try vit_tiny_patch16_224, vit_small_patch16_224 or vit_base_patch16_224"),
    ],
)
def test_an_unknown_backbone_names_one_that_can_be_built(given, typed):
    with pytest.raises(UsageError, match=re.escape(typed)) as raised:
        vit.build(vit.Options(backbone=given))
    assert len(str(raised.value)) < 150


@pytest.mark.parametrize("name", ["depth", "embed_dim", "num_heads"])
def test_an_encoder_without_blocks_features_or_heads_is_refused(name):
    for value in (0, -1):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} {value}: wanted 1 or more"):
            vit.Options(**{name: value})


def test_a_predictor_without_features_is_refused_and_not_the_default():
    for width in (0, -4):
        with pytest.raises(UsageError, match=f"--predictor-width {width}: wanted 1 or more"):
            mefem.Options(predictor_width=width)


def test_patches_must_divide_the_image():
    with pytest.raises(UsageError, match="--image-size 208"):
        vit.build(vit.Options(image_size=220))


def test_weight_decay_leaves_out_biases_norms_tokens_and_positions():
    from mefem_cli.engine.fit import parameter_groups

    objective = build(64, 8)
    decaying, constant = parameter_groups(objective)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    assert all(names[id(one)].endswith("weight") and "norm" not in names[id(one)] for one in decaying["params"])
    rest = {names[id(one)] for one in constant["params"]}
    assert {"source_encoder.vit.cls_token", "predictor.mask_token", "predictor.cls_position"} <= rest
    linears = [m for m in objective.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.requires_grad]
    assert len(decaying["params"]) == len(linears)
