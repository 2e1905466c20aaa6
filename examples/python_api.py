"""The four commands as library calls: crops -> encoder -> features -> score.

Command:   python examples/python_api.py CROPS [LABEL]
Time:      about a minute for a few hundred crops
Hardware:  2 cores of an AMD EPYC, no GPU
Expected:  r2 about 0 after two epochs; the point is the code
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from mefem_cli import parts
from mefem_cli.backbones import vit
from mefem_cli.engine import seeds
from mefem_cli.engine.device import choose_device
from mefem_cli.engine.fit import Trainer
from mefem_cli.engine.plan import TrainOptions, make_plan
from mefem_cli.engine.stream import ImageStream
from mefem_cli.evaluation import evaluate
from mefem_cli.objectives import mefem
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.features import FeatureStore, FeatureWriter
from mefem_cli.stores.runs import Run


def main(crops_folder: Path, label: str) -> None:
    """Train a small encoder on a crops folder for two epochs and read a label from its mean features."""
    out = Path(tempfile.mkdtemp(prefix="mefem-api-"))
    crops = Crops.open(crops_folder)
    rows = np.arange(len(crops))
    plan = make_plan(TrainOptions(epochs=2), len(crops))
    device = choose_device()

    seeds.seed_initialisation(0)
    encoder = vit.build(vit.Options(backbone="vit_tiny_patch16_224", depth=2, image_size=112))
    options = mefem.resolve(mefem.Options(predictor_depth=2), plan.batch_size, plan.total_steps, paper=False)
    objective = mefem.build(options, encoder, parts.Given({"width": 2}))
    stream = ImageStream(crops, encoder.image_size)
    Trainer(objective, stream, rows, plan, device, Run.create(out / "run", {}), seed=0).fit(rows[:0], 5.0, resume=False)

    target = objective.target_encoder.eval()
    with FeatureWriter(out / "features.h5", {}, target.embed_dim, has_cls=False) as writer:
        for batch in stream.batches(np.array_split(rows, max(1, len(rows) // 32)), device.torch):
            mean = target.features(batch.images)["mean"].detach().cpu().numpy()
            writer.append([crops.ids[row] for row in batch.index], mean=mean)
        writer.finish(crops.labels, {})

    with FeatureStore.open(out / "features.h5") as store:
        problem = evaluate.prepare(store, label)
        score = evaluate.evaluate_head(store, problem, "linear", "mean")
    for name, interval in score.metrics.items():
        print(f"{label} {name} {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "bmi")
