"""Training steps to compare: ours, its bare matrix products and attention, and one made of the parts of `lightly`.

Each is a function without arguments that takes one whole step; images lie on the device beforehand.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.models.vision_transformer import Attention
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mefem_cli import parts
from mefem_cli.backbones import vit
from mefem_cli.backbones._attention import CPUAttention
from mefem_cli.engine import seeds
from mefem_cli.engine.device import choose_device
from mefem_cli.engine.fit import Trainer
from mefem_cli.engine.plan import Plan
from mefem_cli.engine.stream import Batch
from mefem_cli.objectives import mefem
from mefem_cli.stores.runs import Run

Step = Callable[[], Any]
_FOLDER = tempfile.TemporaryDirectory(prefix="mefem-benchmark-")  # for what a trainer may write; gone at the end


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    backbone: str = "vit_small_patch16_224"
    batch_size: int = 16
    precision: str = "fp32"
    device: str = "cpu"
    mask: str = "stripes"
    compile: Literal["on", "off"] = "off"


class NoImages:
    """Stands for the stream of images, which these steps do not wait for."""

    waited = 0.0


def our_trainer(setting: Setting) -> Trainer:
    """Return the engine's own trainer, about to take its first step of a long run."""
    seeds.seed_initialisation(0)
    options = mefem.Options(mask=setting.mask, ema="0.996:1")
    objective = mefem.build(options, vit.build(vit.Options(backbone=setting.backbone)), parts.Given({}))
    plan = Plan("small", setting.batch_size, 1, 100, 100, 300, 5e-4, (0.04, 0.4))
    device = choose_device(setting.device, setting.precision)
    run = Run(Path(_FOLDER.name))
    trainer = Trainer(objective, NoImages(), np.arange(10_000), plan, device, run, 0, compile=setting.compile)  # type: ignore[arg-type]
    trainer.objective.train()
    trainer._settle_step()
    return trainer


def random_batch(trainer: Trainer) -> Batch:
    """Return noise on the device, laid out in memory as the stream's images are."""
    count = trainer.plan.batch_size
    pixels = torch.randint(0, 256, (count, 224, 224, 3), dtype=torch.uint8, device=trainer.device.torch)
    return Batch(pixels.permute(0, 3, 1, 2), np.arange(count), np.ones(count, dtype=bool))


def our_step(setting: Setting) -> Step:
    """Masks, both encoders, predictor, loss, backward pass, gradient norm, AdamW and EMA: all that a step does."""
    trainer = our_trainer(setting)
    batch = random_batch(trainer)

    def step() -> None:
        trainer._train_step(batch)
        trainer.step += 1

    return step


def our_update(setting: Setting) -> Step:
    """What of our step does not depend on the batch: gradient norm, AdamW and EMA."""
    trainer = our_trainer(setting)
    trainer._train_step(random_batch(trainer))

    def step() -> None:
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trainer.parameters])
        trainer._optimizer_step((~torch.isfinite(norm)).float())
        trainer.objective.after_step(0, trainer.plan.total_steps)

    return step


# Bare matrix products and attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorShape:
    """A tensor of a recorded call, without its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Call:
    """A matrix product or an attention that a step called."""

    operator: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Notes every matrix product and attention of a step, forward and backward, behind autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution") or "scaled_dot_product" in name:
            self.calls.append(Call(func, tuple(map(_shape_of, args)), kwargs or {}))
        return func(*args, **(kwargs or {}))


def _shape_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorShape(tuple(value.shape), value.stride(), value.dtype, value.device)
    return value


def bare_step(setting: Setting, nominal: bool = True) -> Step:
    """The products and attentions of our step, one after another on random numbers: same shapes, strides and types.

    Without biases, casts, norms, activations, residuals, loss, optimiser and EMA. Operands of a shape are shared.
    `nominal`: attention in the precision asked for, where our step leaves bf16 on a CPU.
    """
    trainer = our_trainer(setting)
    for module in trainer.objective.modules() if nominal else ():
        if type(module) is CPUAttention:
            module.__class__ = Attention
    with Recorder() as recorder:
        trainer._train_step(random_batch(trainer))
    pool: dict[tuple[int, TensorShape], torch.Tensor] = {}
    calls = [
        (one.operator, [_operand(value, place, pool) for place, value in enumerate(one.arguments)], one.keywords)
        for one in map(_without_bias, recorder.calls)
    ]

    def step() -> None:
        for operator, arguments, keywords in calls:
            operator(*arguments, **keywords)

    return step


def _without_bias(call: Call) -> Call:
    if call.operator._schema.name != "aten::addmm":
        return call
    return Call(torch.ops.aten.mm.default, call.arguments[1:3], {})


def _operand(value: Any, place: int, pool: dict[tuple[int, TensorShape], torch.Tensor]) -> Any:
    if not isinstance(value, TensorShape):
        return value
    if (place, value) not in pool:
        tensor = torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=value.device)
        pool[place, value] = tensor.normal_() if value.dtype.is_floating_point else tensor.zero_()
    return pool[place, value]


def count_operations(setting: Setting) -> int:
    """Return the floating point operations of a step per image: 2 m n k a product, attention alike."""
    trainer = our_trainer(setting)
    batch = random_batch(trainer)
    with FlopCounterMode(display=False) as counter:
        trainer._train_step(batch)
    return counter.get_total_flops() // setting.batch_size


# The same of the parts of lightly -------------------------------------------------------------------------------------


def lightly_step(setting: Setting) -> Step:
    """The same tokens, widths and precision of lightly's masked ViT, I-JEPA predictor, gathers and EMA.

    Kinder to it than to ours: images come normalised, masks are there, the loss is not weighted, no gradient norm.
    """
    import timm
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.ijepa_timm import IJEPAPredictorTIMM

    seeds.seed_initialisation(0)
    device = choose_device(setting.device, setting.precision)
    backbone = timm.create_model(setting.backbone, num_classes=0, global_pool="")
    width, heads = backbone.embed_dim, backbone.blocks[0].attn.num_heads
    source_encoder = MaskedVisionTransformerTIMM(backbone).to(device.torch)
    target_encoder = copy.deepcopy(source_encoder).requires_grad_(False)
    predictor = IJEPAPredictorTIMM(196, 6, width, width // 2, heads)
    predictor.decoder.pos_embed = torch.nn.Parameter(torch.zeros(1, 197, width // 2), requires_grad=False)  # with CLS
    predictor.to(device.torch)
    trained = [*source_encoder.parameters(), *predictor.parameters()]
    trained = [parameter for parameter in trained if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.04, fused=True)
    images = torch.randn(setting.batch_size, 3, 224, 224, device=device.torch)
    trainer = our_trainer(setting)
    draws = trainer.device.put(trainer.objective.draw(setting.batch_size, torch.Generator().manual_seed(0)))
    (split,) = trainer.objective.splits(draws)
    del trainer

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with device.autocast():
            with torch.no_grad():
                targets = target_encoder.encode(images)
                targets = functional.layer_norm(targets.float(), targets.shape[-1:])
                targets = utils.get_at_index(targets, split.target)
            source = source_encoder.encode(images, idx_keep=split.source)
            predictions = predictor(source, split.source, split.target)
            loss = functional.smooth_l1_loss(predictions.float(), targets)
        loss.backward()
        optimizer.step()
        utils.update_momentum(source_encoder, target_encoder, 0.996)

    return step


STEPS: dict[str, Callable[[Setting], Step]] = {
    "bare": bare_step,
    "bare, float32 attention": lambda setting: bare_step(setting, nominal=False),
    "mefem": our_step,
    "mefem's update": our_update,
    "lightly": lightly_step,
}
