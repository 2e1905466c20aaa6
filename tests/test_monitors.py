"""Health: measures against slow references, the alarm on recorded and real runs, --watch, --track, resources."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import synthetic
import torch
from synthetic import write_crops
from torch import nn
from torch.nn import functional

from mefem_cli import main
from mefem_cli.backbones import vit
from mefem_cli.engine import alarm, monitors, resources, seeds, track, tune
from mefem_cli.engine.alarm import Alarm, judge
from mefem_cli.engine.device import Device
from mefem_cli.engine.stream import ImageStream
from mefem_cli.errors import Diverged, UsageError
from mefem_cli.evaluation import watch
from mefem_cli.objectives import mefem
from mefem_cli.parts import Given
from mefem_cli.stores.crops import Crops
from mefem_cli.stores.runs import Run

CPU = Device(torch.device("cpu"), torch.float32, "test")
SIZE, NUM_FACES = 32, 320
ENCODER = vit.Options(
    backbone="vit_tiny_patch16_224", image_size=SIZE, patch_size=8, depth=1, embed_dim=48, num_heads=3
)
TINY = shlex.split(
    "--backbone vit_tiny_patch16_224 --depth 1 --embed-dim 48 --num-heads 3 --image-size 32 --patch-size 8 --width 1 "
    "--predictor-depth 1 --precision fp32 --device cpu --batch-size 16 --warmup-epochs 0.5 --epochs 9"
)
UNTRAINED = ["--ema", "0:0", "--predictor-depth", "0", "--lr", "1e-2"]  # the predictor never sees the source


def coloured_faces(count: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """A blob of one colour on another: what hides behind a mask can be told from what does not."""
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size] / size - 0.5
    faces = []
    for _ in range(count):
        y, x, radius = generator.uniform(-0.1, 0.1), generator.uniform(-0.1, 0.1), generator.uniform(0.1, 0.4)
        blob = np.exp(-((row - y) ** 2 + (column - x) ** 2) / radius**2)[..., None]
        faces.append(generator.uniform(0, 255, 3) * (1 - blob) + generator.uniform(0, 255, 3) * blob)
    return np.array(faces).astype(np.uint8)


@pytest.fixture(scope="module")
def crops_folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "smooth_faces", coloured_faces)
        folder = tmp_path_factory.mktemp("data") / "crops"
        redness = [float(face[..., 0].mean()) for face in coloured_faces(NUM_FACES)]
        subjects = [f"s{number // 2}" for number in range(NUM_FACES)]
        sexes = ["m" if value > 127 else "f" for value in redness]
        return write_crops(folder, NUM_FACES, size=SIZE, subject=subjects, redness=redness, sex=sexes)


def build(**options) -> mefem.MeFEm:
    torch.manual_seed(0)
    settings = mefem.Options(**{"ema": "0.9:1", "predictor_depth": 1, **options})
    encoder = vit.build(ENCODER, class_token=mefem.wants_class_token(settings))
    return mefem.build(settings, encoder, Given({"width": 1}))


def run_mefem(*arguments: str, monkeypatch) -> int:
    """Run the program in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["mefem", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return int(ended.value.code or 0)


def read_metrics(run: Path) -> list[dict]:
    def refuse(literal: str) -> float:
        raise AssertionError(f"{literal} is no JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# Formulas -----------------------------------------------------------------------------------------------------------


def test_the_spectrum_holds_the_eigenvalues_of_the_covariance_as_shares():
    features = torch.randn(90, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 5, 40) + 7
    eigenvalues = np.linalg.eigvalsh(np.cov(features.double().numpy(), rowvar=False))[::-1]
    shares = monitors.spectrum(features)
    assert len(shares) == 32
    assert shares == pytest.approx(eigenvalues[:32] / eigenvalues.sum(), rel=1e-6)
    assert monitors.spectrum(torch.ones(20, 4)) == [0, 0, 0, 0]


def test_features_that_are_not_finite_have_no_measures_but_no_error_either():
    broken = torch.randn(20, 4)
    broken[3, 2] = math.nan
    for value in (monitors.rankme(broken), monitors.rankme(broken, centred=True), *monitors.spectrum(broken)):
        assert math.isnan(value)


def test_rings_are_patches_at_like_distance():
    objective = build()
    radius = objective.token_radius()
    values = torch.rand(len(radius), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = defaultdict(float)
    for row in range(4):
        for column in range(4):
            ring = int(math.hypot(row - 1.5, column - 1.5))
            expected[ring] += values[1 + 4 * row + column].item()  # behind CLS
    assert monitors.by_ring(values, radius).tolist() == pytest.approx([expected[ring] for ring in range(3)])


def test_the_ema_distance_is_that_of_all_trained_weights_as_one_vector():
    objective = build()
    target, source = objective.target_encoder, objective.source_encoder
    assert monitors.relative_distance(target, source) == 0
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    trained = [name for name, one in source.named_parameters() if one.requires_grad]
    assert "vit.pos_embed" not in trained
    one, other = (
        torch.cat([dict(net.named_parameters())[name].flatten() for name in trained]) for net in (target, source)
    )
    assert monitors.relative_distance(target, source) == pytest.approx(
        ((other - one).norm() / one.norm()).item(), rel=1e-5
    )
    assert math.isnan(monitors.relative_distance(nn.Linear(2, 3), nn.Linear(3, 2)))


# Measures on the monitor faces --------------------------------------------------------------------------------------


def slow_losses(objective, images: torch.Tensor, draws, mean_target: torch.Tensor) -> dict[str, list]:
    """Loss of every predictor at every face's target tokens, one at a time, as (token, loss); no weights."""
    found = defaultdict(list)
    patches = objective.source_encoder.patchify(images)
    targets = objective.token_targets(images)
    (split,) = objective.splits(draws)
    for face in range(len(images)):
        source = objective.source_encoder(patches[face : face + 1], split.source[face : face + 1])
        predicted = objective.predictor(source, split.source[face : face + 1], split.target[face : face + 1])[0]
        for place, token in enumerate(split.target[face].tolist()):
            guesses = {"model": predicted[place], "position": mean_target[token], "mean": mean_target.mean(0)}
            for name, guess in guesses.items():
                found[name].append((token, functional.smooth_l1_loss(guess, targets[face, token]).item()))
    return found


@torch.no_grad()
def test_health_equals_its_definitions(crops_folder):
    objective, stream = build(), ImageStream(Crops.open(crops_folder), SIZE)
    objective.source_encoder.vit.blocks[0].mlp.fc1.weight += 0.05
    monitor, reference = np.arange(0, 71), np.arange(100, 170)
    found = dict(monitors.health(objective, stream, monitor, reference, CPU, seed=3))

    seen = next(stream.batches([reference], CPU.torch)).images
    mean_target = objective.token_targets(seen).mean(0)
    losses = defaultdict(list)
    for number, rows in enumerate((monitor[:36], monitor[36:])):  # batches of at most 64, even
        images = next(stream.batches([rows], CPU.torch)).images
        draws = objective.draw(len(rows), seeds.torch_generator(3, seeds.MONITOR, number))
        for name, found_there in slow_losses(objective, images, draws, mean_target).items():
            losses[name] += found_there
    weights = objective.loss_weight.tolist()
    total = {name: float(np.mean([weights[token] * loss for token, loss in one])) for name, one in losses.items()}
    assert found["monitor_faces"] == 71
    assert found["monitor_loss"] == pytest.approx(total["model"], rel=1e-4)
    assert found["position_loss"] == pytest.approx(total["position"], rel=1e-4)
    assert found["loss_over_position"] == pytest.approx(total["model"] / total["position"], rel=1e-4)
    assert found["loss_over_mean"] == pytest.approx(total["model"] / total["mean"], rel=1e-4)

    def mean_over(name: str, tokens) -> float:
        return float(np.mean([loss for token, loss in losses[name] if token in tokens]))

    radius = [math.hypot(row - 1.5, column - 1.5) for row in range(4) for column in range(4)]
    for ring in range(3):
        tokens = {1 + place for place, one in enumerate(radius) if int(one) == ring}
        assert found["loss_rings"][ring] == pytest.approx(mean_over("model", tokens), rel=1e-4)
        ratio = mean_over("model", tokens) / mean_over("position", tokens)
        assert found["rings_over_position"][ring] == pytest.approx(ratio, rel=1e-4)
    assert found["loss_cls"] == pytest.approx(mean_over("model", {0}), rel=1e-4)
    assert found["cls_over_position"] == pytest.approx(mean_over("model", {0}) / mean_over("position", {0}), rel=1e-4)

    images = next(stream.batches([monitor], CPU.torch)).images
    for kind, suffix in (("mean", ""), ("cls", "_cls")):
        features = objective.target_encoder.features(images)[kind]
        assert found[f"feature_std{suffix}"] == pytest.approx(features.std(0).mean().item(), rel=1e-4)
        assert found[f"rankme_centred{suffix}"] == pytest.approx(monitors.rankme(features, centred=True), rel=1e-4)
        assert found[f"spectrum{suffix}"] == pytest.approx(monitors.spectrum(features), rel=1e-3, abs=1e-6)
    assert found["ema_distance"] > 0
    assert objective.training


def test_an_encoder_without_a_class_token_has_no_measures_of_it(crops_folder):
    stream = ImageStream(Crops.open(crops_folder), SIZE)
    found = dict(monitors.health(build(cls_prob=None), stream, np.arange(10), np.arange(20, 90), CPU, seed=0))
    assert not [name for name in found if "cls" in name]
    assert {"loss_rings", "rankme", "loss_over_position"} <= found.keys()


def test_unreadable_crops_are_left_out_of_every_measure(crops_folder, tmp_path):
    """Their stand-ins are copies of other faces, which would lower RankMe and weigh those faces twice."""
    folder = tmp_path / "crops"
    faces = coloured_faces(140)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "smooth_faces", lambda *_: faces)
        write_crops(folder, 140, size=SIZE)
    whole = Crops.open(folder)
    broken = [3, 40, *range(64, 70)]  # batches of at most 64 split as 35 + 35
    for number in broken:
        (folder / "images" / f"{number:04d}.jpg").write_bytes(b"\xff\xd8 cut")
    stream, objective = ImageStream(whole, SIZE), build()
    features = monitors.pooled_features(objective.target_encoder, stream, np.arange(70), CPU)
    kept = [row for row in range(70) if row not in broken]
    assert features["rows"].tolist() == kept
    alone = monitors.pooled_features(objective.target_encoder, stream, np.array(kept), CPU)
    assert torch.allclose(features["mean"], alone["mean"], atol=1e-5)
    found = dict(monitors.health(objective, stream, np.arange(70), np.arange(70, 140), CPU, seed=0))
    assert found["monitor_faces"] == 62
    assert found["feature_std"] == pytest.approx(alone["mean"].std(0).mean().item(), rel=1e-4)


def test_what_is_not_finite_becomes_null_in_metrics(tmp_path):
    run = Run.create(tmp_path / "run", {"crops": []})
    run.append_metrics({"kind": "epoch", "step": 1, "loss": math.nan, "spectrum": [1.0, math.inf], "skipped": 3})
    assert read_metrics(run.path) == [{"kind": "epoch", "step": 1, "loss": None, "spectrum": [1.0, None], "skipped": 3}]


# The alarm ----------------------------------------------------------------------------------------------------------


def epochs_of(feature_std, ratio, rankme_centred=None, steps: int = 29) -> list[dict]:
    """Epoch rows of a run; a missing `rankme_centred` is 12 throughout."""
    return [
        {
            "kind": "epoch",
            "step": steps * epoch,
            "epoch": epoch,
            "feature_std": feature_std[epoch],
            "loss_over_position": ratio[epoch],
            "monitor_loss": 0.1,
            "rankme_centred": rankme_centred[epoch] if rankme_centred else 12.0,
        }
        for epoch in range(len(ratio))
    ]


# As measured: EMA 0:0 at the rate of 1e-3 and 2e-2; EMA 0:0 with no predictor depth; the healthy run whose spread fell
# furthest (rate 2e-3), the one whose RankMe dipped lowest, the slowest one, and one that came back.
COLLAPSED = epochs_of(
    [0.311, 0.067, 0.062, 0.031, 0.032, 0.031, 0.032],
    [2.3, 19.5, 8.2, 72.4, 3.2, 1.56, 1.31],
    [11, 19, 14, 16, 7.5, 7, 7],
)
COLLAPSED_LATE = epochs_of(
    [0.311, 0.106, 0.102, 0.115, 0.119, 0.243, 0.094, 0.074], [2.27, 2.7, 1.25, 1.08, 1.07, 1.06, 4.8, 1.26]
)
POSITION_ONLY = epochs_of(
    [0.309] * 13, [2.33, 1.406, 1.262, 1.176, 1.129, 1.111, 1.099, 1.095, 1.092, 1.092, 1.089, 1.088, 1.088]
)
NARROW_SCALE = epochs_of(
    [0.31, 0.31, 0.22, 0.17, 0.15, 0.14, 0.14], [2.46, 0.67, 0.57, 0.54, 0.53, 0.49, 0.47], steps=60
)
DIPPED = epochs_of([0.31, 0.43, 0.34, 0.34], [2.22, 0.40, 0.50, 0.46], [14.5, 4.73, 5.37, 6.31])
SLOW = epochs_of([0.31] * 7, [2.36, 2.1, 1.7, 1.37, 1.03, 0.84, 0.76], steps=60)
CAME_BACK = epochs_of(
    [0.311, 0.504, 0.422, 0.411, 0.305, 0.356, 0.238, 0.42, 0.439],
    [2.27, 1.28, 1.27, 1.14, 1.11, 1.05, 1.05, 1.09, 0.888],
    [11.1, 4.1, 3.3, 2.5, 3.8, 4.5, 5.5, 4.2, 4.6],
)
ONE_DIRECTION = epochs_of([0.6] * 5, [1.8, 0.9, 0.6, 0.3, 0.1], [9, 3, 1.8, 1.5, 1.4])


@pytest.mark.parametrize(
    ("epochs", "kind", "first_alarm"),
    [
        (COLLAPSED, "collapsed", 2),
        (COLLAPSED_LATE, "collapsed", 2),
        (ONE_DIRECTION, "collapsed", 3),
        (POSITION_ONLY, "position only", 10),
        (NARROW_SCALE, "healthy", None),
        (DIPPED, "healthy", None),
        (SLOW, "healthy", None),
        (CAME_BACK, "healthy", None),
        (SLOW[:5], "early", None),
        (SLOW[:1], "early", None),
        ([], "early", None),
    ],
)
def test_the_alarm_on_runs_as_they_were(epochs, kind, first_alarm):
    assert judge(epochs, warmup_steps=87).kind == kind
    sounded = [row["epoch"] for row, _ in alarm.episodes(epochs, warmup_steps=87)]
    assert sounded == ([] if first_alarm is None else [first_alarm])


def test_a_second_episode_sounds_again_and_a_continued_one_does_not():
    again = [*COLLAPSED[:5], *NARROW_SCALE[2:4], *COLLAPSED[3:6]]
    epochs = [{**row, "epoch": place, "step": 29 * place} for place, row in enumerate(again)]
    assert [row["epoch"] for row, _ in alarm.episodes(epochs)] == [2, 8]


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ({"feature_std": None, "monitor_loss": None, "loss_over_position": None}, "diverged"),
        ({"feature_std": math.nan}, "diverged"),
        ({"loss": math.nan}, "healthy"),  # a step in it was skipped
        ({"rankme_centred": None}, "healthy"),
    ],
)
def test_missing_numbers_are_no_collapse(last, kind):
    epochs = [*NARROW_SCALE[:-1], {**NARROW_SCALE[-1], **last}]
    assert judge(epochs).kind == kind


def test_runs_without_monitor_faces_are_not_judged_unless_their_loss_is_lost():
    rows = [{"kind": "epoch", "epoch": epoch, "step": epoch, "loss": 0.1} for epoch in range(3)]
    assert judge(rows).kind == "unmeasured"
    assert judge([*rows, {**rows[0], "loss": None}, {**rows[0], "loss": None}]).kind == "diverged"


def test_epochs_of_one_step_are_not_judged_before_a_hundred_steps():
    flat = epochs_of([0.3] * 200, [1.5] * 200, steps=1)
    assert [row["epoch"] for row, _ in alarm.episodes(flat)] == [100]


def test_a_resumed_run_remembers_its_alarm(tmp_path, capsys):
    trainer = SimpleNamespace(world=SimpleNamespace(is_first=True), run=Run.create(tmp_path / "run", {"crops": []}))
    config = {"lr": 1e-3, "ema": "0:0", "predictor_depth": 0}
    for cut in (2, 4):  # stopped before and after the alarm, which sounds at epoch 2
        heard = []
        for part in (COLLAPSED[:cut], COLLAPSED[cut:]):
            observer = Alarm(config, 0, earlier=COLLAPSED)  # rows after the checkpoint may be there
            for row in part:
                observer.see(trainer, row)
            heard.append(capsys.readouterr().err.count("warning: collapse"))
        assert heard == ([0, 1] if cut == 2 else [1, 0])
    log = (tmp_path / "run" / "run.log").read_text()
    assert "feature_std 0.311 -> 0.062" in log
    assert "--predictor-depth 6" in log
    assert "0:0 lets the target follow" in log


def test_advice_fits_the_options():
    config = {"lr": 3e-3, "ema": "0.99:1", "predictor_depth": 6, "precision": "bf16"}
    assert alarm.advice(config, "collapsed") == "Try --lr 0.001."
    assert "--precision fp32" in alarm.advice(config, "diverged")
    assert alarm.advice({}, "position only")  # an objective without any of these


def test_the_alarm_sounds_where_nothing_can_be_learned_and_stops_the_run(crops_folder, tmp_path, monkeypatch, capsys):
    """EMA 0 and no predictor depth, as the issue asks: exit 6, a checkpoint, a report; a resume goes on quietly."""
    run = tmp_path / "run"
    arguments = ["pretrain", str(crops_folder), *TINY, *UNTRAINED, "-o", str(run)]
    assert run_mefem(*arguments, "--stop-on-collapse", monkeypatch=monkeypatch) == 6
    err = capsys.readouterr().err
    assert err.count("warning: position only at epoch") == 1
    assert "Try --predictor-depth 6" in err
    assert "--stop-on-collapse" in err.splitlines()[-1]
    rows = read_metrics(run)
    stopped_at = rows[-1]["epoch"]
    assert rows[-1]["kind"] == "epoch"
    assert 5 < stopped_at <= 9
    assert "Not learning" in (run / "report.html").read_text()
    assert run_mefem("pretrain", "--resume", "-o", str(run), "--epochs", "10", monkeypatch=monkeypatch) == 0
    assert "position only" not in capsys.readouterr().err
    rows = read_metrics(run)
    assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == list(range(11))


def test_the_alarm_is_silent_on_a_run_that_learns(crops_folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    options = [
        "--lr",
        "5e-3",
        "--ema",
        ".95:1",
        "--watch",
        "redness,sex",
        "--watch",
        "subject",
    ]
    if importlib.util.find_spec("tensorboard"):
        options += ["--track", "tensorboard"]
    assert run_mefem("pretrain", str(crops_folder), *TINY, *options, "-o", str(run), monkeypatch=monkeypatch) == 0
    assert "warning" not in capsys.readouterr().err
    last = read_metrics(run)[-1]
    assert last["loss_over_position"] < 0.5
    assert last["watch_redness_ridge_r2"] > 0.9
    assert last["watch_redness_n"] == NUM_FACES
    assert last["watch_sex_ridge_accuracy"] > 0.8 > last["watch_sex_majority_accuracy"]
    assert last["watch_subject_ridge_accuracy"] == 0  # people are held out, so nobody is recognised
    assert last["memory_mib"] > 100


# --watch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 12), (20, 45)])
def test_ridge_is_that_of_scikit_learn(shape):
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    generator = np.random.default_rng(0)
    train, test = generator.normal(3, 2, shape), generator.normal(3, 2, (7, shape[1]))
    target = train[:, :3] + generator.normal(0, 1, (len(train), 3))
    path = watch.ridge_path(train, target, test, [0.5, 30.0])
    scaler = StandardScaler().fit(train)
    for found, penalty in zip(path, [0.5, 30.0], strict=True):
        model = Ridge(alpha=penalty).fit(scaler.transform(train), target)
        assert np.allclose(found, model.predict(scaler.transform(test)))


def planned(values: list, people: list | None = None, name: str = "age") -> watch.Probe:
    groups = np.arange(len(values)) if people is None else np.unique(people, return_inverse=True)[1]
    (probe,) = watch.plan_probes([name], {name: np.array(values)}, groups, seed=0)
    return probe


def test_a_label_in_the_features_is_read_and_noise_is_not():
    generator = np.random.default_rng(0)
    age = generator.uniform(20, 80, 300)
    features = generator.normal(0, 1, (300, 16))
    blind = watch.score(features, planned(list(age)))
    assert blind["ridge_r2"] < 0.1 > blind["knn_r2"]
    features[:, 5] = age
    seen = watch.score(features, planned(list(age)))
    assert seen["ridge_r2"] > 0.99
    assert seen["n"] == 300


def test_people_do_not_lie_in_two_folds():
    """Features that name the person tell nothing of others; a split that tore people apart would score 1."""
    generator = np.random.default_rng(0)
    age_of_person = generator.uniform(20, 80, 40)
    people = np.repeat(np.arange(40), 5)
    features = np.eye(40)[people] + generator.normal(0, 0.01, (200, 40))
    scores = watch.score(features, planned(list(age_of_person[people]), list(people)))
    assert scores["ridge_r2"] < 0.05
    assert scores["knn_r2"] < 0.05


def test_classes_are_scored_beside_the_most_frequent_one():
    generator = np.random.default_rng(0)
    names = np.array(["a", "b", "c"])[generator.integers(3, size=200)]
    features = generator.normal(0, 0.3, (200, 8))
    features[np.arange(200), np.searchsorted(["a", "b", "c"], names)] += 2
    scores = watch.score(features, planned(list(names), name="kind"))
    assert scores["ridge_accuracy"] > 0.95 < scores["knn_accuracy"]
    assert scores["majority_accuracy"] == pytest.approx(
        max(np.bincount(np.unique(names, return_inverse=True)[1])) / 200
    )


def test_few_or_useless_labels_are_named_and_not_watched(capsys):
    labels = {
        "rare": np.array([30.0] * 10 + [40.0] * 10 + [np.nan] * 200),
        "same": np.full(220, 1.0),
        "one_clinic": np.arange(220.0),
    }
    groups = np.repeat(np.arange(4), 55)
    assert watch.plan_probes(list(labels), labels, groups, seed=0) == []
    err = capsys.readouterr().err
    for name in labels:
        assert f"--watch {name}: " in err
    assert watch.score(np.full((60, 4), np.nan), planned([float(one) for one in range(60)])) == {"n": 60}


def test_an_unknown_label_is_told_with_the_nearest_one(crops_folder, tmp_path, monkeypatch, capsys):
    arguments = ["pretrain", str(crops_folder), *TINY, "--watch", "rednes", "-o", str(tmp_path / "run")]
    assert run_mefem(*arguments, monkeypatch=monkeypatch) == 2
    assert 'did you mean "redness"?' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_watched_faces_are_bounded():
    labels = {"age": np.random.default_rng(0).uniform(20, 80, 60_000)}
    (probe,) = watch.plan_probes(["age"], labels, np.arange(60_000), seed=0)
    assert len(probe.rows) == 2048
    small = {"age": labels["age"][:3000]}
    (probe,) = watch.plan_probes(["age"], small, np.arange(3000), seed=0)
    assert len(probe.rows) == 512


# --track and resources ----------------------------------------------------------------------------------------------


def test_tensorboard_shows_what_metrics_hold_and_forgets_what_a_resume_writes_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = SimpleNamespace(world=SimpleNamespace(is_first=True))
    for first, loss in ((0, 2.0), (3, 1.0)):  # stopped after step 5, resumed from a checkpoint of step 2
        tracker = track.TensorBoard(tmp_path)
        for step in range(first, 6):
            tracker.see(trainer, {"kind": "step", "step": step, "epoch": 0, "loss": loss, "lr": 1e-3})
            row = {
                "kind": "epoch",
                "step": step,
                "monitor_loss": math.nan,
                "spectrum": [1.0],
                "watch_age_ridge_r2": 0.1,
            }
            tracker.see(trainer, row)
        tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"step/loss", "step/lr", "epoch/watch_age_ridge_r2"}
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [
        (step, 2.0 if step < 3 else 1.0) for step in range(6)
    ]
    silent = track.TensorBoard(tmp_path / "other")
    silent.see(SimpleNamespace(world=SimpleNamespace(is_first=False)), {"kind": "step", "step": 0, "loss": 1.0})
    silent.close()
    assert not (tmp_path / "other").exists()


def test_missing_tensorboard_is_told_with_what_to_type(monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "mefem-cli\[track\]"'):
        track.refuse_missing("tensorboard")
    track.refuse_missing("none")


def test_operations_are_those_counted_by_hand():
    """Multiply-adds of every matrix product, twice each, forward once and backward twice; the target pass forward."""
    objective = build()
    dim, width, patch, num_source, num_target = 48, 24, 3 * 8 * 8, 4, 13
    tokens = num_source + num_target

    def block(num_tokens: int, features: int) -> int:
        return num_tokens * 12 * features**2 + 2 * num_tokens**2 * features  # qkv, projection, MLP; attention

    target = 16 * patch * dim + block(tokens, dim)
    source = num_source * patch * dim + block(num_source, dim)
    predictor = num_source * dim * width + block(tokens, width) + num_target * width * dim
    backward = 2 * (source + predictor) - num_source * patch * dim  # no gradient for the pixels
    assert resources.operations_per_face(objective) == pytest.approx(
        2 * (target + source + predictor + backward), rel=0.02
    )


def test_counting_operations_changes_nothing_and_ignores_recomputation():
    objective = build()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    plain = resources.operations_per_face(objective)
    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert tune.recompute_activations(objective)
    assert resources.operations_per_face(objective) == plain


def test_an_objective_with_shapes_of_its_data_has_no_count():
    class Sparse(nn.Linear):
        image_size = 8

        def draw(self, num_faces, generator):
            return {}

        def forward(self, images, draws):
            return {"loss": super().forward(images[images > 3][:4].float()).sum()}, {}

    assert resources.operations_per_face(Sparse(4, 1)) is None


def test_diverged_runs_end_with_the_code_of_collapsed_ones():
    assert Diverged.exit_code == 6
