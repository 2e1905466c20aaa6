"""MeFEm: predict the features of hidden face patches from a stripe of visible ones, with weights that fall off
from the centre of the face and a CLS token that is now source, now target.

    source = source_encoder(image, source tokens)
    target = layer_norm(target_encoder(image, all tokens))[target tokens]      no gradient
    loss   = mean over target tokens of w(token) * smooth_l1(predictor(source), target)

and after each step the target encoder moves towards the source encoder (EMA).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from mefem_cli import parts
from mefem_cli.backbones.vit import ViTEncoder, gather_tokens, sincos_positions
from mefem_cli.engine import schedules
from mefem_cli.errors import UsageError
from mefem_cli.masks import Masker, Split
from mefem_cli.masks._grid import distance_from_centre
from mefem_cli.masks._table import SplitTable

PAPER_GRID = 14

Draw: TypeAlias = torch.Tensor | Split  # rows of the table of splits, int64 [B], or the split itself


@dataclass(frozen=True)
class Options:
    """The objective MeFEm."""

    mask: str = "stripes"  # which patches are source and target: a file in masks/
    cls_prob: float | None = 0.5  # probability that the CLS token joins the source; none: no CLS token at all
    loss_weight: Literal["circular", "uniform"] = "circular"  # weight of a target patch by its distance from the centre
    r0: float = 5.5  # radius at which the circular weight is 1/2, patches of a 14 x 14 grid
    sigma: float = 1.5  # steepness of the circular weight, per patch of a 14 x 14 grid
    predictor_depth: int = 6  # blocks of the predictor
    predictor_width: int | None = None  # features of a predictor token; default: half the encoder's
    ema: str = "auto"  # momentum of the target encoder, START:END; auto plans START from the number of steps
    masks_per_image: int = 1  # draws of the mask per face and step; they share one pass of the target encoder

    def __post_init__(self) -> None:
        if self.cls_prob is not None and not 0 <= self.cls_prob <= 1:
            raise UsageError(f"--cls-prob {self.cls_prob}: wanted a probability from 0 to 1, or none")
        if self.predictor_depth < 0:
            raise UsageError(f"--predictor-depth {self.predictor_depth}: wanted 0 or more blocks")
        if self.predictor_width is not None and self.predictor_width < 1:
            raise UsageError(f"--predictor-width {self.predictor_width}: wanted 1 or more features")
        if self.masks_per_image < 1:
            raise UsageError(f"--masks-per-image {self.masks_per_image}: wanted 1 or more")
        if not (0 < self.sigma < math.inf and abs(self.r0) < math.inf):
            raise UsageError(f"--sigma {self.sigma} --r0 {self.r0}: wanted a positive steepness and a finite radius")
        if self.ema != "auto":
            parse_ema(self.ema)


def parse_ema(text: str) -> tuple[float, float]:
    """Return START and END of `--ema START:END`. Raises UsageError unless both lie in [0, 1]."""
    try:
        start, end = (float(part) for part in text.split(":"))
        if 0 <= start <= 1 and 0 <= end <= 1:
            return start, end
    except ValueError:
        pass
    raise UsageError(f"--ema {text}: wanted START:END, both from 0 to 1, such as .996:1, or auto")


def planned_ema(options: Options, batch_size: int, total_steps: int, paper: bool) -> str:
    """Return `START:END` as asked, or planned: the paper's .996:1, or what fits the length of the run."""
    if options.ema != "auto":
        return options.ema
    paper_ema = 1 - schedules.PAPER_EMA_GAP, 1.0
    start, end = paper_ema if paper else schedules.small_data_ema(batch_size, total_steps)
    return f"{start:.6g}:{end:.6g}"


def build(options: Options, encoder: ViTEncoder, given: parts.Given) -> MeFEm:
    """Return the objective around an untrained encoder. `given` holds the options of the mask."""
    module = parts.load("masks", options.mask)
    masker = module.build(given.build(f"masks.{options.mask}"), encoder.grid_size)
    return MeFEm(encoder, masker, options)


def wants_class_token(options: Options) -> bool:
    """Return whether the encoder has a CLS token."""
    return options.cls_prob is not None


def resolve(options: Options, batch_size: int, total_steps: int, paper: bool) -> Options:
    """Return the options with what depends on the plan filled in: the EMA schedule."""
    return replace(options, ema=planned_ema(options, batch_size, total_steps, paper))


class MeFEm(nn.Module):
    """The joint-embedding predictive objective for centred faces (paper section 3; docs/method.md).

    `options.ema` must be resolved (not "auto") before the first `after_step`.
    """

    def __init__(self, encoder: ViTEncoder, masker: Masker, options: Options):
        super().__init__()
        self.options = options
        self.masker = masker
        self.source_encoder = encoder
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = Predictor(encoder, options.predictor_depth, options.predictor_width)
        self.register_buffer("loss_weight", token_weights(encoder, options), persistent=False)
        self.loss_weight: torch.Tensor
        self.table = token_table(masker.table, options.cls_prob) if masker.table else None
        if self.table:
            self.register_buffer("table_source", self.table.splits.source, persistent=False)
            self.register_buffer("table_target", self.table.splits.target, persistent=False)
        self.table_source: torch.Tensor
        self.table_target: torch.Tensor
        self.image_size = encoder.image_size

    # The three steps of the method ------------------------------------------------------------------------------

    def forward(
        self, images: torch.Tensor, draws: list[Draw]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the named loss terms (their sum is minimised) and named statistics of uint8 images [B, 3, S, S]."""
        patches = self.source_encoder.patchify(images)
        targets = self.targets(patches)  # [B, N, D], N all tokens
        losses = [self._split_loss(patches, targets, tokens) for tokens in self.splits(draws)]
        return {"prediction": torch.stack(losses).mean()}, {}

    def _split_loss(self, patches: torch.Tensor, targets: torch.Tensor, tokens: Split) -> torch.Tensor:
        source = self.source_encoder(patches, tokens.source)  # [K * B, S, D]
        predictions = self.predictor(source, tokens.source, tokens.target)  # [K * B, T, D]
        return self.loss(predictions, gather_tokens(targets, tokens.target), tokens.target)

    @torch.no_grad()
    def targets(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the target encoder's tokens, layer-normalised without affine, float32 [B, N, D]."""
        encoded = self.target_encoder(patches)
        return functional.layer_norm(encoded.float(), encoded.shape[-1:])

    def loss(self, predictions: torch.Tensor, targets: torch.Tensor, target_tokens: torch.Tensor) -> torch.Tensor:
        """Return the weighted smooth-L1 loss: mean over features, times w, mean over target tokens and faces."""
        return (token_loss(predictions, targets) * self.loss_weight[target_tokens]).mean()

    # What the engine asks for -----------------------------------------------------------------------------------

    def draw(self, num_faces: int, generator: torch.Generator) -> list[Draw]:
        """Draw the token splits of a global batch, on the CPU; each tensor's first dimension is the face.

        A draw is the row of each face in the table of splits or, for a mask with too many of them, the split itself.
        """
        draws: list[Draw] = []
        for _ in range(self.options.masks_per_image):
            if self.table:
                draws.append(self.table.draw_rows(num_faces, generator))
            else:
                draws += [self._with_class_token(one, generator) for one in self.masker.draw(num_faces, generator)]
        return draws

    def splits(self, draws: list[Draw]) -> list[Split]:
        """Return the token splits of draws of B faces on their device, int64 `[K * B, S]` and `[K * B, T]`.

        One split per mode of the mask, known by its sizes; K masks per face are stacked, so that they are one pass:
        row k * B + b belongs to face b.
        """
        modes: dict[tuple[int, int], list[Split]] = {}
        for draw in draws:
            split = draw if isinstance(draw, Split) else Split(self.table_source[draw], self.table_target[draw])
            modes.setdefault((split.source.shape[1], split.target.shape[1]), []).append(split)
        return [
            Split(
                torch.cat([split.source for split in mode]).long(), torch.cat([split.target for split in mode]).long()
            )
            for mode in modes.values()
        ]

    def _with_class_token(self, split: Split, generator: torch.Generator) -> Split:
        """Turn patches into tokens, with CLS in the source with probability P."""
        if self.options.cls_prob is None:
            return split
        in_source = torch.rand(len(split.source), 1, generator=generator) < self.options.cls_prob
        return place_class_token(split, in_source)

    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> dict[str, float]:
        """Move the target encoder towards the source encoder; return the schedules' values for the log."""
        momentum = schedules.linear(*parse_ema(self.options.ema), step, total_steps)
        pairs = zip(self.target_encoder.parameters(), self.source_encoder.parameters(), strict=True)
        trained = [(target, source) for target, source in pairs if source.requires_grad]
        targets, sources = (list(side) for side in zip(*trained, strict=True))
        torch._foreach_lerp_(targets, sources, 1 - momentum)
        return {"ema": momentum}

    def encoders(self) -> dict[str, ViTEncoder]:
        """Return the encoders to keep; the first is the one for use."""
        return {"target": self.target_encoder, "source": self.source_encoder}

    def token_targets(self, images: torch.Tensor) -> torch.Tensor:
        """Return the targets of all tokens of uint8 images, float32 [B, N, D]."""
        return self.targets(self.source_encoder.patchify(images))

    @torch.no_grad()
    def baselines(self, images: torch.Tensor, draws: list[Draw], mean_target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the losses of this model and of two predictors that see nothing, on the same faces and masks.

        `mean_target` [N, D] is the mean training target at each position: `position` predicts it, `mean` predicts its
        mean over positions everywhere. `model_by_token` and `position_by_token` [N] are the unweighted losses summed
        where a token was a target, `count_by_token` [N] how often it was.
        """
        patches = self.source_encoder.patchify(images)
        targets = self.targets(patches)
        losses: dict[str, list[torch.Tensor]] = {"model": [], "position": [], "mean": []}
        sums = {name: targets.new_zeros(targets.shape[1]) for name in ("model", "position", "count")}
        for tokens in self.splits(draws):
            wanted = gather_tokens(targets, tokens.target)
            source = self.source_encoder(patches, tokens.source)
            predictions = {
                "model": self.predictor(source, tokens.source, tokens.target),
                "position": mean_target[tokens.target],
                "mean": mean_target.mean(0).expand_as(wanted),
            }
            for name, prediction in predictions.items():
                losses[name].append(self.loss(prediction, wanted, tokens.target))
            where = tokens.target.flatten()
            for name in ("model", "position"):
                sums[name].index_add_(0, where, token_loss(predictions[name], wanted).flatten())
            sums["count"].index_add_(0, where, torch.ones_like(where, dtype=targets.dtype))
        means = {name: torch.stack(values).mean() for name, values in losses.items()}
        return means | {f"{name}_by_token": total for name, total in sums.items()}

    def token_radius(self) -> torch.Tensor:
        """Return each token's distance from the image centre in patches, float64 [N]; NaN for CLS."""
        cls = torch.full((int(self.source_encoder.class_token),), math.nan, dtype=torch.float64)
        return torch.cat([cls, distance_from_centre(self.source_encoder.grid_size)])


def place_class_token(split: Split, in_source: torch.Tensor) -> Split:
    """Turn patches into tokens: CLS is token 0 and joins the source where `in_source` [B, 1] is True, else the target.

    When it joins the source, the last source patch moves to the target, so that shapes never change.
    """
    source, target = split.source + 1, split.target + 1
    cls = torch.zeros_like(source[:, :1])
    given_up = source[:, -1:]
    source = torch.cat([source[:, :-1], torch.where(in_source, cls, given_up)], dim=1)
    target = torch.cat([target, torch.where(in_source, given_up, cls)], dim=1)
    return Split(source, target)


def token_table(table: SplitTable, cls_prob: float | None) -> SplitTable:
    """Return a table of patch splits as one of token splits: each with CLS in the target, then each in the source."""
    if cls_prob is None:
        return table
    without, with_cls = (
        place_class_token(table.splits, torch.full((len(table.probability), 1), in_source))
        for in_source in (False, True)
    )
    splits = Split(torch.cat([without.source, with_cls.source]), torch.cat([without.target, with_cls.target]))
    return SplitTable(splits, torch.cat([table.probability * (1 - cls_prob), table.probability * cls_prob]))


def token_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the smooth-L1 loss (beta 1, float32) averaged over features: [B, T, D] twice -> [B, T]."""
    return functional.smooth_l1_loss(predictions.float(), targets, beta=1.0, reduction="none").mean(-1)


def circular_weight(radius: torch.Tensor, r0: float, sigma: float) -> torch.Tensor:
    """Return w(r) = 1 / (1 + exp(sigma * (r - r0))), which falls from 1 at the centre to 0 at the corners."""
    return torch.sigmoid(sigma * (r0 - radius))


def token_weights(encoder: ViTEncoder, options: Options) -> torch.Tensor:
    """Return the loss weight of every token, float32 [N]; 1 for CLS. r0 and sigma scale with the grid."""
    weights = torch.ones(encoder.num_patches, dtype=torch.float64)
    if options.loss_weight == "circular":
        scale = encoder.grid_size / PAPER_GRID
        weights = circular_weight(distance_from_centre(encoder.grid_size), options.r0 * scale, options.sigma / scale)
    return torch.cat([torch.ones(int(encoder.class_token)), weights.float()])


class Predictor(nn.Module):
    """A narrow ViT that predicts target tokens from encoded source tokens and positions.

    Linear(D -> P), positions added; one learned mask token plus position per target; blocks, norm, Linear(P -> D).
    Positions are the fixed 2-D sin-cos ones; CLS has a learned one that starts at zero.
    """

    def __init__(self, encoder: ViTEncoder, depth: int, width: int | None):
        super().__init__()
        from timm.models.vision_transformer import Block

        from mefem_cli.backbones._attention import speed_up_attention

        width = width or encoder.embed_dim // 2
        if width % encoder.num_heads or width % 4:
            raise UsageError(
                f"--predictor-width {width}: wanted a multiple of 4 and of the encoder's {encoder.num_heads} heads"
            )
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_position = nn.Parameter(torch.zeros(1, width)) if encoder.class_token else None
        self.register_buffer("patch_positions", sincos_positions(width, encoder.grid_size), persistent=False)
        self.patch_positions: torch.Tensor
        norm: Any = nn.LayerNorm
        self.blocks = nn.Sequential(
            *(Block(width, encoder.num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        speed_up_attention(self.blocks)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, encoder.embed_dim)
        self.apply(_init_linear)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, source: torch.Tensor, source_tokens: torch.Tensor, target_tokens: torch.Tensor) -> torch.Tensor:
        """Return predictions [B, T, D] from encoded source tokens [B, S, D] and both index sets."""
        positions = self.patch_positions
        if self.cls_position is not None:
            positions = torch.cat([self.cls_position, positions])
        known = self.embed(source) + positions[source_tokens]
        wanted = self.mask_token + positions[target_tokens]
        tokens = torch.cat([known, wanted.to(known.dtype)], dim=1)  # [B, S + T, P]
        return self.output(self.norm(self.blocks(tokens)[:, -target_tokens.shape[1] :]))


def _init_linear(module: nn.Module) -> None:
    """Truncated normal of std .02, zero biases, as timm initialises its ViTs."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
