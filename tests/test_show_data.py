"""`mefem show crops|run|store|attention`: what is drawn is what is there, by slow references; names are escaped."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from synthetic import smooth_faces, write_crops, write_run

from mefem_cli.backbones import vit
from mefem_cli.engine import monitors
from mefem_cli.errors import NoInputError, OutputError, UsageError
from mefem_cli.evaluation import saved
from mefem_cli.probes import attentive
from mefem_cli.reports import health, show_attention, show_crops, show_runs, show_sheet, show_store
from mefem_cli.reports.curves import draw_panel
from mefem_cli.showing import ShowOptions
from mefem_cli.stores import crops as crops_folder
from mefem_cli.stores.ablations import CellRecord, StrandRecord
from mefem_cli.stores.features import FeatureStore, FeatureWriter
from mefem_cli.stores.product import file_sha256
from mefem_cli.stores.runs import Run

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>$\\frac{"


def drawn(tile) -> Figure:
    """Draw a tile into a figure."""
    figure = Figure(figsize=tile.size)
    tile.draw(figure)
    return figure


def is_harmless(page: str) -> bool:
    """Whether nothing of HOSTILE became an element."""
    return "<script>alert" not in page and "<img src=x" not in page


# Crops ----------------------------------------------------------------------------------------------------------------


def labelled_crops(folder: Path, count: int = 12) -> Path:
    """Write crops with numbers, classes and a label whose name means harm; three sources are rejected."""
    ages = [20.0 + number for number in range(count - 2)] + [float("nan")] * 2
    sexes = [HOSTILE if number == 1 else "ab"[number % 2] for number in range(count - 1)] + [""]
    names = [f"p{max(number, 1):02d}" for number in range(count)]  # one fewer than crops
    write_crops(folder, count, 64, age=ages, sex=sexes, name=names, **{HOSTILE: [1.0] * count})
    rows = crops_folder.read_manifest(folder).to_pylist()
    for number, reason in enumerate(("small", "border", "small")):
        rows.append({"id": f"{number:016x}", "source": "photos/x.jpg", "status": "rejected", "reason": reason})
    for row in rows[:count]:
        row |= {"crop_side": 64.0 + rows.index(row), "score": 0.9}
    table = crops_folder.read_manifest(folder)
    crops_folder.write_manifest(folder, pa.Table.from_pylist(rows, schema=table.schema))
    return folder


def test_crops_are_counted_by_label_size_and_reason(tmp_path):
    folder = labelled_crops(tmp_path / "crops")
    sheet = show_crops.sheet([folder], ShowOptions())
    titles = {}
    for row in sheet.rows[1:]:
        for tile in row.tiles:
            (axis,) = drawn(tile).axes
            titles[axis.get_title(loc="left")] = axis
    heights = {title: sum(bar.get_height() for bar in axis.patches) for title, axis in titles.items()}
    widths = {title: [bar.get_width() for bar in axis.patches] for title, axis in titles.items()}
    assert heights["age (10)"] == 10
    assert sorted(widths["sex (11)"]) == [1, 4, 6]
    assert heights["side of the square, px"] == 12
    assert widths["rejects"] == [2, 1]
    assert widths["name (12)"] == [2] + [1] * 9 + [1]
    names = [label.get_text() for label in titles["name (12)"].get_yticklabels()]
    assert names[0] == "p01" and names[-1] == "1 other"
    assert sheet.lead.startswith("12 crops of 64 px, 3 rejects, in ")


@pytest.mark.parametrize(("low", "high"), [(21, 49), (0, 95), (1799, 1799), (-30, 400)])
def test_bins_of_whole_numbers_hold_equally_many_of_them(low, high):
    values = np.arange(low, high + 1.0)
    edges = show_crops.bin_edges(values)
    counts, _ = np.histogram(values, edges)
    assert counts.sum() == len(values)
    assert not ((edges + 0.5) % np.diff(edges)[0]).any()
    assert len(set(counts[1:-1])) <= 1 and counts.max() == np.diff(edges)[0]  # the outer ones may reach further
    assert len(counts) <= 2 * show_crops.NUM_BINS + 1


@pytest.mark.parametrize(
    "values", [[1799.0], [1799.5], [224.0], [300.0, 5000.0], [0.0], [1e16], [-1e-9], [1e308, -1e308], [1e308]]
)
@pytest.mark.parametrize("mark", [224.0, None])
def test_bars_are_wide_enough_to_be_seen_and_numbers_below_them_stand_apart(values, mark):
    figure = Figure(figsize=show_crops.PANEL, dpi=show_sheet.DPI)
    show_crops.histogram("side", np.array(values), mark)(figure)
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    bars = [bar for bar in axis.patches if bar.get_height()]
    assert sum(bar.get_height() for bar in bars) == len(values)
    assert all(bar.get_width() > 0.01 * (high - low) for bar in bars)
    FigureCanvasAgg(figure).draw()
    boxes = [tick.label1.get_window_extent() for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert boxes and all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


def test_the_contact_sheet_shows_crops_with_their_labels(tmp_path):
    folder = labelled_crops(tmp_path / "crops")
    tiles = show_crops.sheet([folder], ShowOptions(by="age", samples=4, seed=1)).rows[0].tiles
    assert len(tiles) == 4
    stored = crops_folder.Crops.open(folder)
    for tile in tiles:
        (number,) = re.findall(r"photos/(\d+)\.png", tile.hover)
        age = stored.labels["age"][int(number)]
        assert tile.title == ("-" if np.isnan(age) else f"{age:.4g}")
        with Image.open(folder / "images" / f"{number}.jpg") as image:
            whole = image.resize((show_crops.FACE_PX,) * 2, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(tile.pixels, np.asarray(whole))


def test_names_of_labels_and_classes_are_escaped(tmp_path, mefem_command):
    labelled_crops(tmp_path / "crops")
    code, stdout, stderr = mefem_command("show", "crops")
    assert (code, stderr) == (0, "")
    page = Path(stdout.strip()).read_text()
    assert is_harmless(page) and page.count("data:image/jpeg") == 12
    code, _, _ = mefem_command("show", "crops", "-o", "crops.png", "--samples", "2")
    assert code == 0
    code, _, stderr = mefem_command("show", "crops", "--by", "agee")
    assert code == 2 and 'did you mean "age"' in stderr


def test_crops_that_are_gone_or_damaged_are_left_out_and_named(tmp_path, mefem_command):
    crops = labelled_crops(tmp_path / "crops")
    opened = crops_folder.Crops.open(crops)
    paths = [crops / re.search(r"\((.*)\)", opened.describe(row)).group(1) for row in range(len(opened))]
    gone, cut, *rest = paths
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    code, stdout, stderr = mefem_command("show", "crops")
    assert code == 0 and stderr.count("left out: ") == 2
    assert gone.name in stderr and "No such file" in stderr and cut.name in stderr
    page = Path(stdout.strip()).read_text()
    assert page.count("data:image/jpeg") == 10 and "Crops (10 of 12)" in page
    code, _, stderr = mefem_command("show", "masks", "--crops", "crops", "--mask", "quadrants", "-o", "m.png")
    assert code == 0 and stderr.count("left out: ") == 2  # the third stands behind the masks
    for path in rest:
        path.unlink()
    for words in (["crops"], ["masks", "--crops", "crops"]):
        code, stdout, stderr = mefem_command("show", *words)
        assert (code, stdout) == (3, "") and "no crop can be read; the first: " in stderr
        assert "left out: 9 more" in stderr


# Runs -----------------------------------------------------------------------------------------------------------------


def measured_run(path: Path, offset: float = 0.0, epochs: int = 4) -> Run:
    """Write a run with metrics; `offset` is added to all measures."""
    run = Run.create(path, {"crops": ["crops"], "epochs": epochs, "warmup_epochs": 1.0, "lr": 1e-3 + offset})
    for epoch in range(epochs + 1):
        if epoch:
            run.append_metrics({"kind": "step", "step": 5 * epoch, "epoch": epoch - 1, "loss": 0.3, "grad_norm": 0.1})
        run.append_metrics(
            {
                "kind": "epoch",
                "step": 5 * epoch,
                "epoch": epoch,
                "monitor_loss": 0.2 + offset,
                "loss_over_position": 1 - 0.1 * epoch + offset,
                "rankme_centred": 9.0 + epoch + offset,
                "feature_std": 0.4,
                "spectrum": [0.6 - 0.01 * epoch, 0.3],
            }
        )
    return run


def test_curves_of_runs_are_their_metrics(tmp_path):
    names = [f"run{number}" for number in range(5)]
    metrics = {name: list(measured_run(tmp_path / name, 0.01 * place).metrics()) for place, name in enumerate(names)}
    panels = {panel.name: panel for panel in show_runs.compare(metrics)}
    assert {"loss", "loss_over_position", "rankme", "feature_std", "spectrum", "grad_norm"} <= set(panels)
    for place, (name, curve) in enumerate(zip(names, panels["rankme"].curves, strict=True)):
        assert (curve.label, curve.colour, curve.dashed) == (name, place % 4, place == 4)
        assert list(curve.y) == [9.0 + epoch + 0.01 * place for epoch in range(5)]
    assert list(panels["spectrum"].curves[0].y) == pytest.approx([0.56, 0.3])  # the last epoch


def test_a_run_of_a_grid_is_named_by_its_cell(tmp_path):
    strands = [
        StrandRecord(f"cells/{key}", seed, 1, [CellRecord(f"width={width}", "", "features.h5", [])])
        for key, width, seed in (("aa", 2, 0), ("bb", 3, 0), ("cc", 2, 1))
    ]
    record = {"command": [], "inputs": {}, "strands": [asdict(one) for one in strands]}
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    paths = [tmp_path / "cells" / key / "run" for key in ("cc", "bb", "dd")]
    assert show_runs.names_of(paths) == ["width=2 seed 1", "width=3 seed 0", "run"]  # the last is no cell of it
    (tmp_path / "provenance.json").write_text("[1]")
    assert show_runs.names_of(paths[:2]) == ["cc/run", "bb/run"]


def test_runs_side_by_side_name_what_differs(tmp_path, mefem_command, monkeypatch):
    monkeypatch.setattr(show_runs, "COMPARED", {"rankme": 0, "spectrum": -1})  # drawing takes most of the time
    measured_run(tmp_path / "a")
    measured_run(tmp_path / HOSTILE.replace("/", ""), 0.01)
    code, stdout, stderr = mefem_command("show", "run", "a", HOSTILE.replace("/", ""), "-o", "both.html")
    assert (code, stderr) == (0, "")
    page = Path(stdout.strip()).read_text()
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "<td>lr</td><td>0.001</td><td>0.011" in page
    assert "<td>warmup_epochs</td>" not in page
    assert mefem_command("show", "run", "a", HOSTILE.replace("/", ""), "-o", "both.svg")[0] == 0
    picture = Path("both.svg").read_text()
    assert "It dips as learning begins" in picture and "Shares of the variance by direction" in picture


def test_runs_of_no_epochs_have_whole_numbers_below_their_points(tmp_path):
    panels = show_runs.compare({"a": list(measured_run(tmp_path / "a", epochs=0).metrics())})
    for panel in panels:
        figure = Figure()
        draw_panel(figure, panel)
        FigureCanvasAgg(figure).draw()
        axis = figure.axes[0]
        low, high = axis.get_xlim()
        shown = [tick.label1.get_text() for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        assert shown == (["0"] if panel.name != "spectrum" else ["1", "2"])


def test_a_run_is_judged_as_on_its_own_page(tmp_path, mefem_command, monkeypatch):
    monkeypatch.setattr(show_runs, "COMPARED", {"rankme": 0})
    measured_run(tmp_path / "a")
    short = measured_run(tmp_path / "b", 0.39)  # loss over position: .99 at the end
    _, stdout, _ = mefem_command("show", "run", "a", "b", "-o", "both.html")
    page = Path(stdout.strip()).read_text()
    assert "In each figure a line for each run that has the measure." in page
    assert f"<td>{health.TOO_SHORT}</td>" in page and "Too early" not in page
    assert f"<strong>{health.TOO_SHORT}</strong>" in health.write(short, show_runs.about(short), "").read_text()


def test_the_health_page_is_written_anew_when_it_is_older_than_the_metrics(tmp_path, mefem_command, monkeypatch):
    monkeypatch.setattr("mefem_cli.reports.curves.draw", lambda panel: "<svg></svg>")
    run = measured_run(tmp_path / "runs" / "one")
    code, stdout, _ = mefem_command("show", "run", "runs/one")
    report = run.path / "report.html"
    assert (code, stdout) == (0, f"{report}\n")
    assert "4 epochs of 5 steps" in report.read_text()
    about = show_runs.about(run)
    assert (about.warmup_steps, about.total_epochs) == (5, 4)
    report.write_text("as it was")
    assert mefem_command("show", "run", "runs/one")[0] == 0
    assert report.read_text() == "as it was"  # it is younger
    os.utime(report, ns=(0, 0))
    assert mefem_command("show", "run", "runs/one")[0] == 0
    assert "4 epochs of 5 steps" in report.read_text()


@pytest.mark.parametrize("line", ["[1, 2]", '{"kind": "epoch"}', '{"kind": "epoch", "epoch": "x", "step": 3}', "null"])
def test_damaged_metrics_are_one_line(line, tmp_path, mefem_command, monkeypatch):
    monkeypatch.setattr("mefem_cli.reports.curves.draw", lambda panel: "<svg></svg>")
    run = measured_run(tmp_path / "a")
    with run.metrics_path.open("a") as file:
        file.write(line + "\n")
    for words in (["run", "a"], ["run", "a", "-o", "a.png"]):
        code, stdout, stderr = mefem_command("show", *words)
        assert (code, stdout) == (3, "") and stderr.count("\n") == 1, stderr


# Stores ---------------------------------------------------------------------------------------------------------------


def features_of(num: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, width)) * np.geomspace(4, 0.1, width) + 3


@pytest.mark.parametrize(("num", "width"), [(50, 8), (6, 20), (40, 40)])
def test_components_are_those_of_the_singular_values_and_of_scikit_learn(num, width):
    features = features_of(num, width).astype(np.float32)
    found = show_store.components(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    shares = singular**2 / (singular**2).sum()
    np.testing.assert_allclose(found.shares, shares, atol=1e-9)
    model = PCA(2, svd_solver="full").fit(features.astype(np.float64))
    for expected in (centred @ directions[:2].T, model.transform(features.astype(np.float64))):
        sign = np.sign((expected * found.points).sum(axis=0))
        np.testing.assert_allclose(found.points, expected * sign, atol=1e-6)
    half = show_store.directions_for(found.shares, 0.5)
    assert shares[:half].sum() >= 0.5 > shares[: half - 1].sum()


def faces_store(folder: Path, num: int = 30) -> Path:
    """Write crops and a store of their features, as `mefem embed` would; one crop has changed since."""
    write_crops(folder / "crops", num, 64)
    crops = crops_folder.Crops.open(folder / "crops")
    features = features_of(num, 6)
    labels = {
        "age": np.where(np.arange(num) == 3, np.nan, np.arange(num) + 20.0),
        "sex": np.array([HOSTILE if row == 1 else "ab"[row % 2] for row in range(num)], object),
        HOSTILE: np.array([HOSTILE] * num, object),
    }
    record = {"model": {"name": HOSTILE}, "inputs": crops.inputs()}
    with FeatureWriter(folder / "features.h5", record, 6, has_cls=False) as writer:
        writer.append(crops.ids, mean=features)
        writer.finish(labels, {name: crops.columns[name] for name in ("source", "crop_sha256")})
    Image.new("RGB", (64, 64)).save(folder / "crops" / "images" / "0002.jpg")
    return folder / "features.h5"


def test_a_page_shows_each_face_where_its_features_put_it(tmp_path, mefem_command):
    path = faces_store(tmp_path)
    code, stdout, stderr = mefem_command("show", "store", "--by", "age")
    assert (code, stderr) == (0, "")
    page = Path(stdout.strip()).read_text()
    assert is_harmless(page) and not re.search(r"""(src|href)=["']?(https?:)?//""", page)  # nothing is fetched
    with FeatureStore.open(path) as store:
        features, ages, ids = store.read("mean"), store.labels["age"], list(store.ids)
        sources = list(store.meta["source"])
        rank = monitors.rankme(torch.from_numpy(features), centred=True)
    assert f"{rank:.1f} about the mean face" in page
    found = show_store.components(features)
    circles = re.findall(r'<circle data-i="(\d+)" cx="([\d.]+)" cy="([\d.]+)" r="\d" fill="(#\w+)"', page)
    assert circles[0][0] == "3"  # without an age: it is grey and covers nothing
    circles.sort(key=lambda one: int(one[0]))
    assert [int(one[0]) for one in circles] == list(range(len(ids)))
    places = np.array([one[1:3] for one in circles], float)
    for axis, sign in ((0, 1), (1, -1)):  # y grows downwards
        fit = np.polyfit(found.points[:, axis], places[:, axis], 1)
        assert sign * fit[0] > 0
        np.testing.assert_allclose(np.polyval(fit, found.points[:, axis]), places[:, axis], atol=0.06)
    cards = json.loads(page.partition('id="faces">')[2].partition("</script>")[0])
    for row, (words, data) in enumerate(cards):
        lines = words.split("\n")
        assert lines[0] == Path(sources[row]).name
        assert f"age: {'-' if np.isnan(ages[row]) else f'{ages[row]:.4g}'}" in lines
        if row == 2:
            assert data == ""  # another picture than was embedded
            continue
        with Image.open(tmp_path / "crops" / "images" / f"{row:04d}.jpg") as image:
            whole = np.asarray(image.resize((64, 64)), float)
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert np.abs(np.asarray(image, float) - whole).mean() < 6
    colours = [one[3] for one in circles]
    assert colours[3] == show_store.UNKNOWN
    assert len(set(colours)) > 20


def test_colours_of_numbers_and_classes():
    values = np.concatenate([np.linspace(0, 10, 101), [np.nan, 1000.0]])
    numbers = show_store.colouring("age", values, len(values))
    assert numbers.limits == tuple(np.percentile(values[np.isfinite(values)], [2, 98]))
    assert numbers.colours[-1] == numbers.colours[-3]  # clipped, so that one face does not take the scale
    assert numbers.classes == (("no value", show_store.UNKNOWN),)
    texts = np.array([*"aaabbc", ""], object)
    classes = show_store.colouring("sex", texts, 7)
    assert [name for name, _ in classes.classes] == ["a", "b", "c", "no value"]
    assert len(set(classes.colours[:3])) == 1 and len(set(classes.colours)) == 4
    many = show_store.colouring("name", np.array([f"{number:02d}" for number in range(12)], object), 12)
    assert [name for name, _ in many.classes][-1] == "5 other values"
    assert len(many.classes) == show_store.MOST_CLASSES
    assert many.chosen.startswith("7 of 12 values are coloured, the first by name, as each is there once; the others")
    assert not classes.chosen
    twice = show_store.colouring("name", np.array([f"{number:02d}" for number in [*range(12), 11]], object), 13)
    assert twice.classes[0][0] == "11"
    assert twice.chosen == "7 of 12 values are coloured, the most frequent; the others are grey."


def test_long_values_are_told_apart_by_their_ends(tmp_path):
    names = np.array([f"FLUX1_dev_image_of_a_person_with_hat_{number:05d}.png" for number in range(20)], object)
    colours = show_store.colouring("subject", names, 20)
    figure = Figure(figsize=show_store.MAP)
    show_store._drawn_map(features_of(20, 2), colours, np.array([0.6, 0.4]))(figure)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(set(legend)) == len(legend) == 8
    assert re.findall(r"</i>(.*?)</span>", show_store._key(colours)) == [
        *(f"FLUX1_dev_image_of_a…_with_hat_{number:05d}.png" for number in range(7)),
        "13 other values",
    ]


def test_large_stores_are_sampled_and_it_is_said(tmp_path, monkeypatch):
    path = faces_store(tmp_path)
    monkeypatch.setattr(show_store, "MOST_MEASURED", 20)
    monkeypatch.setattr(show_store, "MOST_DRAWN", 5)
    row = show_store.sheet(path, ShowOptions(by="sex"), is_page=True).rows[0]
    assert row.page.count("<circle ") == 5
    assert "those of 20 faces, chosen at random from 30 (--seed). 5 of them are drawn." in row.caption
    drawing = show_store.sheet(path, ShowOptions(by="sex"), is_page=False).rows[0].tiles[0]
    (points,) = drawn(drawing).axes[0].collections
    assert len(points.get_offsets()) == 20


def test_a_store_that_cannot_be_mapped_is_one_line(tmp_path):
    for name, features in (("same", np.ones((5, 4))), ("few", np.eye(2, 4))):
        with FeatureWriter(tmp_path / name, {}, 4, has_mean=False) as writer:
            writer.append([f"{row}" for row in range(len(features))], cls=features)
            writer.finish({}, {})
        with pytest.raises(NoInputError, match="the same for all|wants 3 or more"):
            show_store.sheet(tmp_path / name, ShowOptions(), is_page=True)
    with pytest.raises(UsageError, match="has cls only"):
        show_store.sheet(tmp_path / "same", ShowOptions(features="mean"), is_page=True)


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("attention") / "run")


def by_hand(encoder: vit.ViTEncoder, image: np.ndarray) -> np.ndarray:
    """Return the attention of CLS in the last block, [H, N], head by head with timm's own modules."""
    model = encoder.vit
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    pixels = (pixels - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(encoder.std).view(3, 1, 1)
    patches = model.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.cls_token, patches], dim=1) + model.pos_embed
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    block = model.blocks[-1]
    mixed = block.attn.qkv(block.norm1(tokens))[0]  # [N, 3 D]
    width, size = encoder.embed_dim, encoder.embed_dim // encoder.num_heads
    shares = []
    for head in range(encoder.num_heads):
        query = mixed[0, head * size : (head + 1) * size]
        keys = mixed[:, width + head * size : width + (head + 1) * size]
        logits = torch.tensor([float(query @ key) for key in keys]) / size**0.5
        shares.append((logits.exp() / logits.exp().sum()).numpy())
    return np.array(shares)


@torch.no_grad()
def test_class_attention_is_that_of_timms_blocks_by_hand(run_folder):
    encoder, _, _ = vit.load_encoder(run_folder)
    for image in smooth_faces(2, 64):
        looks = show_attention.look(encoder, image, None)
        expected = by_hand(encoder, image)
        np.testing.assert_allclose(looks.heads.reshape(3, 64), expected[:, 1:], atol=1e-6)
        np.testing.assert_allclose(looks.to_itself, expected[:, 0], atol=1e-6)
        np.testing.assert_allclose(looks.mean.flatten(), expected[:, 1:].mean(axis=0), atol=1e-6)
        assert expected.std() > 1e-4  # attention that is even everywhere would prove nothing


def pooler_by_hand(state: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Return what the query looks at in tokens [T, D], (T,): keys of LN(x), one softmax for each attention head."""
    width = tokens.shape[1]
    centred = tokens - tokens.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt(tokens.var(axis=1, keepdims=True) + 1e-6)
    normed = normed * state["head.token_gain"] + state["head.token_shift"]
    keys = normed @ state["head.key"].T
    size = 64 if width % 64 == 0 else width
    shares = []
    for begin in range(0, width, size):
        logits = keys[:, begin : begin + size] @ state["head.query"][begin : begin + size] / size**0.5
        shares.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
    return np.mean(shares, axis=0)


@pytest.mark.parametrize("width", [48, 128])
def test_the_pooler_looks_where_its_definition_says(width):
    rng = np.random.default_rng(0)
    head = attentive.AttentivePooler(1, width, 1, torch.Generator().manual_seed(0))
    state = {f"head.{name}": 2 * one.detach()[0].numpy() + 0.1 * rng.normal(size=one.shape[1:])
             for name, one in head.named_parameters()}  # fmt: skip
    state["outputs"] = np.array(1)
    tokens = rng.normal(size=(10, width)).astype(np.float32) + 1
    found = attentive.look(state, tokens[None])[0]
    np.testing.assert_allclose(found, pooler_by_hand(state, tokens), atol=1e-5)
    assert found.sum() == pytest.approx(1, abs=1e-5) and found.std() > 1e-3


def attentive_head(path: Path, run: Path, features: str = "patches+cls", **about) -> Path:
    """Write an attentive head with random weights for a run's encoder."""
    encoder, _, weights = vit.load_encoder(run)
    head = attentive.AttentivePooler(1, encoder.embed_dim, 1, torch.Generator().manual_seed(1))
    state = {f"head.{name}": 3 * one.detach()[0].numpy() for name, one in head.named_parameters()}
    state |= {"outputs": np.array(1), "mean_of_target": np.array(0.0), "scale_of_target": np.array(1.0)}
    preprocessing = {"image_size": 64, "mean": list(encoder.mean), "std": list(encoder.std), "interpolation": "bicubic"}
    header = {
        "format": saved.FORMAT,
        "version": 1,
        "task": HOSTILE,
        "kind": "regression",
        "classes": [],
        "unit": "",
        "head": "attentive",
        "features": features,
        "model": {"name": "run", "sha256": file_sha256(weights), "encoder": "target"},
        "preprocessing": preprocessing,
        "dtype": "float16",
        "crop_rule": None,
        "scores": {},
        "chosen_among": [],
        "half_widths": dict.fromkeys(saved.LEVELS, 1.0),
        "far": 1.0,
        "labels": {"min": 0.0},
        "must_not_be_used_for": [],
        **about,
    }
    centre = {"mean": np.zeros(48), "scale": np.ones(48), "whitening": np.eye(48)}
    saved._write(path, header, state, {name: one.astype(np.float32) for name, one in centre.items()})
    return path


def test_the_pooler_of_a_head_is_shown_over_the_patches_it_was_made_for(run_folder, tmp_path):
    head = saved.load(attentive_head(tmp_path / "x.head", run_folder))
    encoder, _, _ = vit.load_encoder(run_folder)
    image = smooth_faces(1, 64)[0]
    looks = show_attention.look(encoder, image, head)
    features = encoder.features(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
    tokens = np.concatenate([features["patches"][0].numpy(), features["cls"].numpy()])
    expected = pooler_by_hand(head.state, tokens.astype(np.float16).astype(np.float64))
    np.testing.assert_allclose(looks.pooler.flatten(), expected[:64], atol=1e-5)
    assert looks.pooler_to_cls == pytest.approx(expected[64], abs=1e-5)


def test_heads_of_other_encoders_and_other_kinds_are_refused(run_folder, tmp_path):
    crops = write_crops(tmp_path / "crops", 2, 64)
    other = attentive_head(tmp_path / "other.head", run_folder, model={"name": "other", "sha256": "0"})
    with pytest.raises(OutputError, match="another encoder"):
        show_attention.sheet([str(run_folder), str(crops)], ShowOptions(head=str(other)))
    (tmp_path / "junk.head").write_bytes(b"junk")
    with pytest.raises(NoInputError, match="not a head or damaged"):
        show_attention.sheet([str(run_folder), str(crops)], ShowOptions(head=str(tmp_path / "junk.head")))


def test_a_page_of_attention_has_a_row_a_face(run_folder, tmp_path, mefem_command):
    write_crops(tmp_path / "crops", 5, 64)
    attentive_head(tmp_path / "x.head", run_folder)
    words = ("show", "attention", str(run_folder), "crops", "crops/images/0001.jpg", "--samples", "2")
    code, stdout, stderr = mefem_command(*words, "--head", "x.head")
    assert (code, stderr) == (0, "")
    page = Path(stdout.strip()).read_text()
    assert is_harmless(page)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["0000.png", "0004.png", "0001.jpg"]
    assert page.count("data:image/jpeg") == 3 * (1 + 1 + 3 + 1)  # crop, mean, heads, pooler
    assert mefem_command(*words[:4], "--samples", "1", "-o", "a.png")[0] == 0


def test_runs_without_a_class_token_are_told_so(tmp_path, mefem_command):
    write_run(tmp_path / "run", class_token=False)
    write_crops(tmp_path / "crops", 1, 64)
    code, _, stderr = mefem_command("show", "attention", "run", "crops")
    assert code == 2 and "no CLS token; name an attentive head" in stderr
    head = attentive_head(tmp_path / "x.head", tmp_path / "run", features="patches")
    sheet = show_attention.sheet([str(tmp_path / "run"), str(tmp_path / "crops")], ShowOptions(head=str(head)))
    crop, pooler = sheet.rows[0].tiles
    with Image.open(tmp_path / "crops" / "images" / "0000.jpg") as image:
        shares = show_attention.look(vit.load_encoder(tmp_path / "run")[0], np.asarray(image), saved.load(head)).pooler
    assert crop.title == "crop"
    assert pooler.title == f"pooler: {64 * shares.min():.2f} to {64 * shares.max():.2f}"
    assert "in even shares" in sheet.lead and shares.max() > 1.05 * shares.min()


def test_too_many_faces_are_refused(run_folder, tmp_path):
    crops = write_crops(tmp_path / "crops", 40, 64)
    with pytest.raises(UsageError, match="more than 32 crops"):
        show_attention.sheet([str(run_folder), str(crops)], ShowOptions(samples=40))


@pytest.mark.parametrize(("times", "expected"), [(1, "200 values,\neach 1 time at most"), (40, "190 others")])
def test_names_of_people_are_counted_and_classes_are_bars(times, expected):
    values = np.array([f"p{number}" for number in range(200)] + [f"p{one}" for one in range(10)] * (times - 1), object)
    figure = Figure(figsize=show_crops.PANEL)
    tile = show_crops._panel_of("subject", values)
    assert tile.draw is not None
    tile.draw(figure)
    FigureCanvasAgg(figure).draw()
    (axis,) = figure.axes
    texts = {text.get_text() for text in (*axis.texts, *axis.get_yticklabels())}
    assert expected in texts and ("190 others" in texts) == (times > 1)
