"""What `mefem probe` costs, and how often its intervals hold. Run: python examples/benchmarks/probe.py [SECTION ...]

Things that are compared take turns in one process: on a busy machine times differ by a third, ratios by a few per cent.

    heads     an epoch of 20 attentive heads trained in one pass, over that of one head (wanted: at most 4x), and both
              over a textbook head (keys and values of every token, then attention); 196 tokens of 384 features
    ridge     10,000 x 384 CLS features, 5 folds, ridge with its penalty chosen inside, 2,000 bootstraps: seconds from
              an open store to the scores (wanted: under 10 s on 2 cores)
    coverage  2,000 simulated studies of 300 people, of whom a third have two photos: how often the 95 % interval of
              2,000 bootstraps holds the truth of the population (wanted: 93 to 97 %)

Time: about 4 minutes on 2 cores. `--device cuda` trains the heads on a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measuring import interleaved, median, ratio, table
from torch import nn
from torch.nn import functional

from mefem_cli.evaluation import bootstrap
from mefem_cli.evaluation.evaluate import Predictions, ProbeOptions
from mefem_cli.evaluation.job import Job
from mefem_cli.probes import Fold, _grid, attentive
from mefem_cli.stores.features import FeatureStore, FeatureWriter

TOKENS, WIDTH = 196, 384
GRID = [(rate, decay) for rate in np.geomspace(1e-4, 1e-2, 10) for decay in (0.01, 1.0)]  # 20 heads


class TextbookHead(nn.Module):
    """One head as the method states it: LayerNorm, keys and values of all tokens, attention, MLP, linear."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.heads = width // attentive.HEAD_WIDTH
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.norm, self.norm_after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width)
        hidden = attentive.MLP_RATIO * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.readout = nn.Linear(width, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [B, 1] from tokens [B, T, D]."""
        batch, num_tokens, width = tokens.shape
        pairs = self.key_value(self.norm(tokens)).view(batch, num_tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = self.query.view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        gathered = functional.scaled_dot_product_attention(query, pairs[0], pairs[1])  # [B, H, 1, d]
        query = self.query + gathered.reshape(batch, width)
        return self.readout(query + self.mlp(self.norm_after(query)))


def heads(folder: Path, args: argparse.Namespace) -> None:
    """Compare an epoch of 20 heads, of one head and of a textbook head."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((args.faces, TOKENS, WIDTH), np.float32).astype(np.float16)
    target = features[:, 0, 0].astype(np.float64)
    rows = np.arange(args.faces)
    fold = Fold(features, rows, rows[:0], target, rows % 5, device=args.device)
    device = torch.device(args.device)

    def ours(grid: list[tuple[float, float]]) -> Callable[[], object]:
        recipe = _grid.Recipe("1e-3", "0", 1, args.batch)
        trainer = _grid._Trainer(fold, recipe, attentive._build(WIDTH), device)
        everyone = np.ones(args.faces, bool)

        def epoch() -> None:
            trainer.train(grid, everyone, 1)
            _wait(device)

        return epoch

    tasks = {
        "one head": ours(GRID[:1]),
        f"{len(GRID)} heads": ours(GRID),
        "textbook head": _textbook(fold, device, args),
    }
    seconds = interleaved(tasks, args.repeats)
    lines = []
    for name in seconds:
        over_one = [f"{ratio(seconds, name, 'one head', clock):.2f}" for clock in ("wall", "cpu")]
        lines.append((name, f"{median(seconds[name], 'wall'):.2f}", *over_one))
    title = f"an epoch of {args.faces} faces, batches of {args.batch}, {args.device}, {torch.get_num_threads()} threads"
    table(title, ("", "s", "over one head, wall", "over one head, CPU"), lines)
    several = ratio(seconds, f"{len(GRID)} heads", "textbook head", "wall")
    print(f"\n{len(GRID)} heads in one pass cost {several:.2f} of one textbook head, {several / len(GRID):.3f} a head")


def _textbook(fold: Fold, device: torch.device, args: argparse.Namespace) -> Callable[[], object]:
    head = TextbookHead().to(device)
    optimiser = torch.optim.AdamW(head.parameters(), fused=True)
    target = torch.from_numpy(fold.target).float()[:, None].to(device)

    def epoch() -> None:
        for batch in torch.randperm(args.faces).split(args.batch):
            tokens = torch.from_numpy(fold.features[batch.numpy()]).to(device).float()
            (head(tokens) - target[batch]).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        _wait(device)

    return epoch


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ridge(folder: Path, args: argparse.Namespace) -> None:
    """Time a probe of 10,000 faces from an open store to its scores."""
    rng = np.random.default_rng(0)
    count = 10_000
    features = rng.standard_normal((count, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    people = np.array([f"p{row // 2}" for row in range(count)], dtype=object)
    labels = {"bmi": 25 + features[:, :20].sum(axis=1) / 3 + rng.standard_normal(count), "subject": people}
    with FeatureWriter(folder / "cls.h5", {}, WIDTH, has_mean=False) as writer:
        writer.append([f"{row:05}" for row in range(count)], features)
        writer.finish(labels, {})
    with FeatureStore.open(folder / "cls.h5") as store:
        wall, cpu = time.perf_counter(), time.process_time()
        job = Job.prepare([store], ["bmi"], ProbeOptions(head="linear"))
        prepared = time.perf_counter()
        (score,) = job.run().scores
        wall, cpu, prepare = time.perf_counter() - wall, time.process_time() - cpu, prepared - wall
    shown = score.metrics["r2"]
    cells = (f"{wall:.1f}", f"{cpu:.1f}", f"{prepare:.1f}", f"{shown.value:.3f} [{shown.low:.3f}, {shown.high:.3f}]")
    title = f"{count:,} x {WIDTH}, 5 folds, ridge, 2,000 bootstraps"
    table(title, ("s", "CPU s", "of them preparing", "r2"), [cells])


def coverage(folder: Path, args: argparse.Namespace) -> None:
    """Count how often intervals hold the r2 and the MAE of the population that studies are drawn from."""
    studies, people, replicates = 2000, 300, 2000
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(people), 1 + (np.arange(people) % 3 == 0))
    ids, fold = np.arange(len(group)).astype(str), np.zeros(len(group), int)
    truth = {"r2": 0.5, "mae": np.sqrt(2 / np.pi * 0.5)}  # predictions and errors are normal with variance 0.5 each
    held = dict.fromkeys(truth, 0)
    for number in range(studies):
        prediction = rng.normal(0, np.sqrt(0.5), people)[group]
        error = rng.normal(0, np.sqrt(0.4), people)[group] + rng.normal(0, np.sqrt(0.1), len(group))
        found = bootstrap.intervals(Predictions(ids, prediction + error, prediction, fold, group), replicates, number)
        for name, value in truth.items():
            held[name] += found[name].low <= value <= found[name].high
    lines = [(name, f"{100 * count / studies:.2f} %") for name, count in held.items()]
    table(f"{studies:,} studies of {people} people, {replicates:,} bootstraps", ("", "held the truth"), lines)


SECTIONS = {"heads": heads, "ridge": ridge, "coverage": coverage}


def main() -> None:
    """Run the sections that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; without any all")
    parser.add_argument("--faces", type=int, default=512, help="faces of an epoch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="faces of a step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where heads are trained (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in args.sections or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="mefem-benchmark-") as folder:
            SECTIONS[name](Path(folder), args)


if __name__ == "__main__":
    main()
