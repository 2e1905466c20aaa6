"""Faces on ArcFace's template, and networks in ONNX: against SciPy, formulas and onnxruntime called by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic import smooth_faces, write_crops

from mefem_cli import parts
from mefem_cli.backbones import _alignment, _frozen
from mefem_cli.backbones import onnx as onnx_choice
from mefem_cli.errors import MefemError, NoInputError, UsageError
from mefem_cli.faces import geometry
from mefem_cli.stores import crops

BUFFALO = _frozen.Preprocessing(112, (0.5,) * 3, (0.5,) * 3, "bilinear", "arcface")
FACE = np.array([[84.0, 92.0], [141.0, 95.0], [113.0, 124.0], [112.0, 156.0], [60.0, 100.0], [165.0, 104.0]])
TEMPLATE = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [56.14, 92.28]]


def umeyama(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Umeyama (1991), equations 38 to 43, by a singular value decomposition, as a matrix [2, 3]."""
    mean, target_mean = points.mean(0), targets.mean(0)
    covariance = (targets - target_mean).T @ (points - mean) / len(points)
    left, values, right = np.linalg.svd(covariance)
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    rotation = left @ np.diag(signs) @ right
    scale = (values * signs).sum() / ((points - mean) ** 2).sum() * len(points)
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ mean])


coordinate = st.floats(-300, 300)


@given(st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=3, max_size=6))
@settings(max_examples=200)
def test_the_similarity_is_umeyamas(rows):
    values = np.array(rows)
    points, targets = values[:, :2] + np.arange(len(rows))[:, None] * [40, 7], values[:, 2:]
    ours, theirs = _alignment.similarity(points, targets), umeyama(points, targets)
    spread, target_spread = (np.ptp(one, axis=0).max() + 1e-9 for one in (points, targets))
    if np.linalg.norm(theirs[:, :2]) * spread > 1e-3 * target_spread:  # else there is no direction to find
        np.testing.assert_allclose(ours[:, :2], theirs[:, :2], atol=1e-6 * (1 + abs(theirs[:, :2]).max()))
    assert ours[0, 0] * ours[1, 1] >= ours[0, 1] * ours[1, 0]  # no reflection


def by_hand(crop: np.ndarray, points: np.ndarray) -> np.ndarray:
    """An aligned face, uint8 [112, 112, 3], by Umeyama and SciPy, in coordinates of the middles of pixels."""
    from scipy.ndimage import map_coordinates

    matrix = umeyama(points[:4] - 0.5, np.array(TEMPLATE))
    row, column = np.mgrid[:112, :112]
    inverse = np.linalg.inv(matrix[:, :2])
    x, y = np.tensordot(inverse, np.stack([column - matrix[0, 2], row - matrix[1, 2]]), axes=1)
    channels = [map_coordinates(crop[..., c].astype(float), [y, x], order=1, mode="constant") for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("turn", [0, 25, -70])
@pytest.mark.parametrize("points", [4, 6])
def test_an_aligned_face_is_as_scipy_warps_it(turn, points):
    angle = math.radians(turn)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    keypoints = ((FACE - 112) @ rotation.T + 112)[:points]
    crop = smooth_faces(1, seed=turn + 100)[0]
    ours, theirs = _alignment.aligned(crop, keypoints, BUFFALO).astype(int), by_hand(crop, keypoints).astype(int)
    inside = theirs.any(axis=-1) & ours.any(axis=-1)
    assert inside.mean() > 0.9
    assert abs(ours - theirs)[inside].max() <= 1 and abs(ours - theirs)[inside].mean() < 0.01


def test_points_lie_where_the_template_says():
    """A white dot at each point of a face that fits the template exactly is found at the template's points."""
    angle, scale = math.radians(12), 1.7
    turned = np.array(TEMPLATE) @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = turned * scale + [45, 10]
    for number, (x, y) in enumerate(points):
        row, column = np.mgrid[:224, :224] + 0.5
        dot = 255 * np.exp(-((row - y - 0.5) ** 2 + (column - x - 0.5) ** 2) / 18)
        crop = np.repeat(dot[..., None], 3, axis=2).astype(np.uint8)
        values = _alignment.aligned(crop, points + 0.5, BUFFALO)[..., 0].astype(float)
        row, column = np.mgrid[:112, :112]
        found = [(values * one).sum() / values.sum() for one in (column, row)]  # as OpenCV counts: middles of pixels
        np.testing.assert_allclose(found, TEMPLATE[number], atol=0.05)


def test_outside_the_crop_is_black():
    crop = np.full((224, 224, 3), 200, np.uint8)
    values = _alignment.aligned(crop, FACE + [90, 0], BUFFALO)
    assert (values == 0).any() and (values == 200).any()


@given(st.floats(-3.1, 3.1), st.floats(-50, 400), st.floats(-50, 400), st.floats(30, 900), st.integers(32, 512))
def test_keypoints_are_mapped_into_turned_crops(angle, x, y, side, size):
    """The corners of the square, as faces/geometry.py has them, are those of the crop."""
    corners = np.array(geometry.corners(geometry.Square(x, y, side), angle))
    names = crops.KEYPOINTS[:8]
    columns = {name: np.array([value]) for name, value in zip(names, corners.ravel(), strict=True)}
    columns |= {"crop_x": np.array([x]), "crop_y": np.array([y]), "crop_side": np.array([side])}
    columns["angle"] = np.array([math.degrees(angle)])
    expected = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    np.testing.assert_allclose(_alignment.keypoints_in_crop(columns, size)[0], expected, atol=1e-6 * size)


def with_columns(folder: Path, **values: list) -> Path:
    """Set columns of a crops folder's manifest."""
    rows = crops.read_manifest(folder)
    for name, column in values.items():
        index = rows.schema.get_field_index(name)
        rows = rows.set_column(index, rows.schema.field(name), pa.array(column, rows.schema.field(name).type))
    crops.write_manifest(folder, rows)
    return folder


def test_crops_without_keypoints_are_named(tmp_path):
    folder = write_crops(tmp_path / "crops", 3, size=64)
    square = {"crop_x": [10.0] * 3, "crop_y": [20.0] * 3, "crop_side": [128.0] * 3}
    keypoints = {name: [float(number), 50.0, None] for number, name in enumerate(crops.KEYPOINTS)}
    with_columns(folder, **square, **keypoints)
    opened = crops.Crops.open(folder)
    with pytest.raises(NoInputError) as error:
        _alignment.crop_keypoints(opened, "onnx:w600k_r50.onnx")
    message = str(error.value)
    assert f"1 of 3 crops have not, such as {opened.describe(2)}; make crops with mefem crop" in message
    assert message.startswith("--model onnx:w600k_r50.onnx lays faces onto a template by keypoints")
    points = _alignment.crop_keypoints(opened.select([1, 0]), "onnx:x")
    assert points.shape == (2, 4, 2)
    np.testing.assert_allclose(points[0], (np.full((4, 2), 50.0) - [10, 20]) / 2)  # no angle: none was turned
    assert {*_alignment.COLUMNS} <= {*crops.SCHEMA.names}


# Networks in ONNX ----------------------------------------------------------------------------------------------------


def options(**values: object) -> parts.Given:
    return parts.Given({name: str(value) for name, value in values.items()})


@pytest.fixture(scope="session")
def runtime():
    return pytest.importorskip("onnxruntime", reason="pip install mefem-cli[onnx]")


@pytest.fixture(scope="session")
def recogniser(shared_data, runtime) -> Path:
    path = shared_data.parent / "models" / "face_recognition_512.onnx"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return path


@pytest.fixture(scope="session")
def real_crops(shared_data, tmp_path_factory) -> Path:
    from mefem_cli import main

    folder = tmp_path_factory.mktemp("aligned")
    photos = sorted((shared_data / "faces" / "t2i").glob("*.jpg"))[::50]
    (folder / "photos").mkdir()
    for photo in photos:
        (folder / "photos" / photo.name).symlink_to(photo)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main.dispatch(["crop", "photos", "-o", "crops", "--workers", "1", "-q"])
    return folder / "crops"


def test_a_recogniser_gives_what_it_gives_by_hand(recogniser, real_crops, runtime):
    loaded = _frozen.load(f"onnx:{recogniser}")
    encoder = loaded.encoder
    assert encoder.preprocessing == BUFFALO and loaded.name == "onnx:face_recognition_512"
    assert (encoder.embed_dim, encoder.num_patches, encoder.class_token, encoder.has_mean) == (512, 0, True, False)
    opened = crops.Crops.open(real_crops)
    points = _alignment.crop_keypoints(opened, loaded.spec)
    session = runtime.InferenceSession(str(recogniser))
    images, theirs, residuals = [], [], []
    for row in range(len(opened)):
        crop = np.asarray(Image.open(real_crops / opened.columns["path"][row]).convert("RGB"))
        images.append(_alignment.aligned(crop, points[row], encoder.preprocessing))
        picture = [opened.columns[name][row] for name in crops.KEYPOINTS[:8]]
        corner = [opened.columns["crop_x"][row], opened.columns["crop_y"][row]]
        in_crop = (np.array(picture).reshape(4, 2) - corner) * (224 / opened.columns["crop_side"][row])
        matrix = umeyama(in_crop - 0.5, np.array(TEMPLATE))
        residuals.append(np.abs((in_crop - 0.5) @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE).max())
        values = (by_hand(crop, in_crop).astype(np.float32) - 127.5) / 127.5
        theirs.append(session.run(None, {"input": values.transpose(2, 0, 1)[None]})[0][0])
    assert len(images) >= 8
    assert np.median(residuals) < 6  # px: the order of the points is the template's
    with torch.no_grad():
        ours = encoder.features(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))["cls"].numpy()
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.999
    unlike = np.corrcoef(ours)[np.triu_indices(len(ours), 1)]
    assert unlike.mean() < 0.6  # people differ


@pytest.fixture(scope="session")
def library(runtime):
    return pytest.importorskip("onnx")


def write_network(
    library, path: Path, *, batch: int | str = "n", size: int | str = 8, normalises: bool = False, kind: int = 1
) -> Path:
    """Mean of each channel of its input times 1, 2, 3 and 4, perhaps after its own (x - 127.5) / 128."""
    helper = library.helper
    real = np.float16 if kind == library.TensorProto.FLOAT16 else np.float32

    def constant(name: str, values: object):
        return library.numpy_helper.from_array(np.array(values, real), name)

    nodes, last = [], "image"
    constants = [constant("weights", [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]])]
    if normalises:
        nodes = [helper.make_node("Sub", ["image", "mean"], ["a"]), helper.make_node("Mul", ["a", "scale"], ["b"])]
        constants += [constant("mean", 127.5), constant("scale", 1 / 128)]
        last = "b"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["embedding"]),
    ]
    image = helper.make_tensor_value_info("image", kind, [batch, 3, size, size])
    embedding = helper.make_tensor_value_info("embedding", kind, [batch, 4])
    graph = helper.make_graph(nodes, "g", [image], [embedding], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    library.save(model, str(path))
    return path


def pictures(size: int, count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def expected_of(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    colours = (images.double().mean(dim=(2, 3)) - torch.tensor(mean)) / torch.tensor(std)
    return torch.cat([colours, colours.sum(1, keepdim=True)], dim=1).float()


@pytest.mark.parametrize("batch", [1, 2, "n"])
def test_free_form_normalisation_and_fixed_batches(library, tmp_path, batch):
    path = write_network(library, tmp_path / "net.onnx", batch=batch)
    images = pictures(8)
    for given_options, mean, std in (
        ({}, [127.5] * 3, [127.5] * 3),
        ({"input_mean": "1,2,3", "input_std": "4,5,6"}, [1, 2, 3], [4, 5, 6]),
        ({"input_mean": 0, "input_std": 255}, [0] * 3, [255] * 3),
    ):
        loaded = _frozen.load(f"onnx:{path}", None, options(preset="none", **given_options))
        torch.testing.assert_close(
            loaded.encoder.features(images)["cls"], expected_of(images, mean, std), atol=1e-5, rtol=1e-5
        )
        preprocessing = loaded.encoder.preprocessing
        assert preprocessing.alignment == "none" and preprocessing.image_size == 8
        np.testing.assert_allclose(preprocessing.mean, np.array(mean) / 255)


def test_a_network_that_normalises_itself_gets_bytes(library, tmp_path):
    images = pictures(112, 2)
    for normalises, std in ((True, 128), (False, 127.5)):
        path = write_network(library, tmp_path / "net.onnx", size=112, normalises=normalises)
        loaded = _frozen.load(f"onnx:{path}")
        expected = expected_of(images, [127.5] * 3, [std] * 3)
        torch.testing.assert_close(loaded.encoder.features(images)["cls"], expected, atol=1e-5, rtol=1e-5)
        assert loaded.details["normalises_itself"] == normalises
        operators = [node.op_type for node in library.load(path).graph.node]
        assert onnx_choice.first_operators(path) == operators[: onnx_choice.FIRST_NODES]


def test_half_precision_and_sizes_that_the_file_does_not_say(library, tmp_path):
    path = write_network(library, tmp_path / "half.onnx", size="s", kind=library.TensorProto.FLOAT16)
    loaded = _frozen.load(f"onnx:{path}", None, options(preset="none", input_size=16))
    features = loaded.encoder.features(pictures(16))["cls"]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected_of(pictures(16), [127.5] * 3, [127.5] * 3), atol=1e-2, rtol=1e-2)
    with pytest.raises(UsageError, match="does not say the size of its input; type --input-size"):
        _frozen.load(f"onnx:{path}", None, options(preset="none"))


def test_unfit_networks_and_options_are_told(library, tmp_path):
    small, page = write_network(library, tmp_path / "small.onnx"), tmp_path / "page.onnx"
    page.write_text("<html>")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(write_network(library, tmp_path / "whole.onnx", size=112).read_bytes()[:-40])
    torch.save({"visual.class_embedding": torch.zeros(3)}, tmp_path / "farl.pth")
    for path, values, said in (
        (small, {}, "takes 8 px, not the 112 of --preset buffalo; type --preset none"),
        (small, {"preset": "none", "input_size": 9}, "takes 8 px; leave it out"),
        (small, {"preset": "none", "input_std": 0}, "wanted numbers other than 0"),
        (small, {"preset": "none", "input_mean": "1,2"}, "wanted one number or three"),
        (small, {"input_mean": "1"}, "--preset buffalo has its own; add --preset none"),
        (page, {}, "cannot be read as an ONNX network"),
        (cut, {}, "cannot be read as an ONNX network"),
        (tmp_path / "none.onnx", {}, "no such file"),
        (tmp_path / "farl.pth", {}, "it looks like a file of farl: type --model farl:"),
    ):
        with pytest.raises(MefemError, match=said) as error:
            _frozen.load(f"onnx:{path}", None, options(**values))
        assert "\n" not in str(error.value)
    for spec in (f"farl:{small}", str(small)):
        with pytest.raises(NoInputError, match="type --model onnx:"):
            _frozen.load(spec)


def test_weights_outside_the_networks_folder_are_not_read(library, runtime, tmp_path, monkeypatch):
    """Old versions of onnxruntime read any file as a tensor; from 1.24 on they refuse, before that we do."""
    folder = tmp_path / "models"
    folder.mkdir()
    path = write_network(library, folder / "net.onnx", size=112)
    model = library.load(path)
    tensor = model.graph.initializer[0]
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "beside").write_bytes(tensor.raw_data)
    for place in ("../secret", str(tmp_path / "secret"), "link", "beside"):
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
        tensor.data_location = library.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", place
        path.write_bytes(model.SerializeToString())
        if place == "beside":
            assert _frozen.load(f"onnx:{path}").encoder.embed_dim == 4
        else:
            with pytest.raises(NoInputError, match="cannot be read as an ONNX network"):
                _frozen.load(f"onnx:{path}")
    monkeypatch.setattr(runtime, "__version__", "1.23.2")
    with pytest.raises(NoInputError, match=r"type pip install 'onnxruntime>=1.24'"):
        _frozen.load(f"onnx:{path}")


def test_without_onnxruntime_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r'type pip install "mefem-cli\[onnx\]"'):
        _frozen.load(f"onnx:{tmp_path / 'net.onnx'}")
