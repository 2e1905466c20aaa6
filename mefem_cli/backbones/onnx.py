"""onnx:PATH, a network in ONNX format, such as InsightFace's Buffalo or another face recogniser."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mefem_cli import console
from mefem_cli.backbones._frozen import ARCFACE, NO_ALIGNMENT, FrozenEncoder, Loaded, Preprocessing, hint, refuse_source
from mefem_cli.backbones._tensors import name_of, read_tensors
from mefem_cli.errors import MefemError, NoInputError, UsageError

SPEC = "onnx:PATH"
BUFFALO_SIZE = 112
CENTRE, SCALE = 127.5, 127.5  # of values 0 to 255: what most face recognisers take is -1 to 1
FIRST_NODES = 8  # among which a network that normalises its input itself has Sub and Mul
CHECKS_EXTERNAL_DATA = (1, 24)  # the version of onnxruntime from which weights beside a file stay in its folder
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Options:
    """An ONNX network."""

    preset: Literal["buffalo", "none"] = "buffalo"  # buffalo: 112 px, RGB, faces aligned by keypoints as
    # InsightFace does; none: the whole crop, with --input-size, --input-mean and --input-std
    input_size: int | None = None  # side of the input, px; default: what the file says
    input_mean: str | None = None  # subtracted from values 0 to 255, one number or R,G,B; default: 127.5
    input_std: str | None = None  # what they are then divided by, one number or R,G,B; default: 127.5


def load(argument: str, encoder: str | None, options: Options) -> Loaded:
    """Open a network with one image input [B, 3, S, S] whose first output is the features: "cls" alone."""
    refuse_source(SPEC, encoder)
    path = Path(argument)
    network = Network(path)
    mean, std, normalises_itself = _normalisation(path, options)
    is_buffalo = options.preset == "buffalo"
    if is_buffalo and network.size not in (None, BUFFALO_SIZE):
        raise UsageError(
            f"{path} takes {network.size} px, not the {BUFFALO_SIZE} of --preset buffalo; type --preset none with "
            "--input-mean and --input-std"
        )
    size = BUFFALO_SIZE if is_buffalo else network.size or options.input_size
    if size is None:
        raise UsageError(f"{path} does not say the size of its input; type --input-size")
    if options.input_size not in (None, size):
        raise UsageError(f"--input-size {options.input_size}: {path} takes {size} px; leave it out")
    preprocessing = Preprocessing(
        size,
        tuple(value / 255 for value in mean),
        tuple(value / 255 for value in std),
        "bilinear" if is_buffalo else "bicubic",
        ARCFACE if is_buffalo else NO_ALIGNMENT,
    )
    frozen = OnnxEncoder(network, preprocessing, mean, std)
    details = {"preset": options.preset, "normalises_itself": normalises_itself, "output": network.output}
    return Loaded(frozen, name_of("onnx", path), path, details=details)


Colours = tuple[float, float, float]


def _normalisation(path: Path, options: Options) -> tuple[Colours, Colours, bool]:
    """Return mean and standard deviation of values 0 to 255, and whether the network has its own in it."""
    given = {"--input-mean": options.input_mean, "--input-std": options.input_std}
    if options.preset == "buffalo":
        extra = [name for name, value in {**given, "--input-size": options.input_size}.items() if value is not None]
        if extra:
            raise UsageError(f"{extra[0]}: --preset buffalo has its own; add --preset none")
        if {"Sub", "Mul"} <= set(first_operators(path)):  # as InsightFace tells
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), True
    mean, std = (_colours(name, text, CENTRE) for name, text in given.items())
    if not all(std):
        raise UsageError(f"--input-std {options.input_std}: wanted numbers other than 0")
    return mean, std, False


def _colours(name: str, text: str | None, default: float) -> Colours:
    try:
        numbers = [float(part) for part in text.split(",")] if text is not None else [default]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not np.isfinite(numbers).all():
        raise UsageError(f"{name} {text}: wanted one number or three, such as 123.7,116.3,103.5")
    red, green, blue = numbers if len(numbers) == 3 else numbers * 3
    return red, green, blue


class OnnxEncoder(FrozenEncoder):
    """The first output of a network in ONNX format as "cls"; onnxruntime runs it, on the device of the images."""

    num_patches = 0
    class_token = True
    has_mean = False

    def __init__(self, network: Network, preprocessing: Preprocessing, mean: Colours, std: Colours):
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        size = preprocessing.image_size
        self.embed_dim = network.probe(size)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return "cls" [B, D] of uint8 images, red first."""
        values = images.float().sub_(self.mean).div_(self.std).cpu().numpy()
        features = self.network.run(values, images.device)
        return {"cls": torch.from_numpy(features).to(images.device)}


class Network:
    """A network that onnxruntime runs. Raises NoInputError for a file that is none, or no image network."""

    def __init__(self, path: Path):
        self.path = path
        self._device = torch.device("cpu")
        self._session = self._open(["CPUExecutionProvider"])
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.input, self.output = inputs[0].name, outputs[0].name
        shape = inputs[0].shape
        self._type = NUMPY_TYPES.get(inputs[0].type)
        sides = shape[2:] if len(shape) == 4 else []
        if (
            len(inputs) != 1
            or self._type is None
            or len(shape) != 4
            or shape[1] not in (3, None)
            or sides[0] != sides[1]
        ):
            raise NoInputError(
                f"{path}: wanted one input of images [B, 3, S, S] in float, it has "
                f"{', '.join(f'{one.name} {one.shape} {one.type}' for one in inputs)[:200]}; export it so"
            )
        self.size: int | None = sides[0] if isinstance(sides[0], int) else None
        self.batch: int | None = shape[0] if isinstance(shape[0], int) else None  # None: any

    def probe(self, size: int) -> int:
        """Return how many features an image has, by running the network once; find out whether it takes batches."""
        features = self._run(np.zeros((self.batch or 1, 3, size, size), np.float32))
        if self.batch is None:
            try:
                if self._run(np.zeros((2, 3, size, size), np.float32)).shape != (2, features.shape[1]):
                    self.batch = 1
            except NoInputError:
                self.batch = 1  # it says so, but there is a shape within that knows one image only
        return int(features.shape[1])

    def run(self, values: np.ndarray, device: torch.device) -> np.ndarray:
        """Return features float32 [B, D] of normalised images [B, 3, S, S]."""
        if device != self._device:
            self._move(device)
        if self.batch is None:
            return self._run(values)
        missing = -len(values) % self.batch
        filled = np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])
        steps = range(0, len(filled), self.batch)
        return np.concatenate([self._run(filled[start : start + self.batch]) for start in steps])[: len(values)]

    def _run(self, values: np.ndarray) -> np.ndarray:
        try:
            features = self._session.run([self.output], {self.input: values.astype(self._type, copy=False)})[0]
        except Exception as error:  # onnxruntime's own, which share no base
            if "memory" in str(error).lower():
                raise torch.OutOfMemoryError(str(error)) from error
            raise NoInputError(f"{self.path}: cannot be run on {values.shape[2]} px ({_first_line(error)})") from error
        if not isinstance(features, np.ndarray) or features.ndim < 2 or len(features) != len(values):
            raise NoInputError(f"{self.path}: its first output, {self.output}, is not a vector for each image")
        return features.reshape(len(values), -1).astype(np.float32)

    def _move(self, device: torch.device) -> None:
        onnxruntime = _onnxruntime()
        self._device = device
        if device.type != "cuda":
            return
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            console.warn("this onnxruntime runs on the CPU only; for the GPU type pip install onnxruntime-gpu")
            return
        self._session = self._open(
            [("CUDAExecutionProvider", {"device_id": device.index or 0}), "CPUExecutionProvider"]
        )

    def _open(self, providers: list[Any]) -> Any:
        onnxruntime = _onnxruntime()
        if self.path.is_dir():
            raise NoInputError(f"{self.path} is a folder; name the .onnx file in it")
        if not self.path.is_file():
            raise NoInputError(f"{self.path}: no such file")
        _refuse_external_data(self.path, onnxruntime.__version__)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:  # onnxruntime's own, which share no base
            raise NoInputError(
                f"{self.path}: cannot be read as an ONNX network ({_first_line(error)})"
                + (_hint(self.path) or "; it is damaged, cut short or none; get the file again")
            ) from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError('onnx: needs onnxruntime; type pip install "mefem-cli[onnx]"') from error
    return onnxruntime


def _refuse_external_data(path: Path, version: str) -> None:
    """Refuse a file with weights beside it where onnxruntime would read them from anywhere, as it did before 1.24."""
    if tuple(int(part) for part in version.split(".")[:2]) >= CHECKS_EXTERNAL_DATA:
        return
    with path.open("rb") as file:
        content = file.read()
    if b"location" in content:  # the key with which each such tensor names its file
        wanted = ".".join(map(str, CHECKS_EXTERNAL_DATA))
        raise NoInputError(
            f"{path}: has weights in other files, which onnxruntime {version} would take from any folder; type "
            f"pip install 'onnxruntime>={wanted}'"
        )


def _hint(path: Path) -> str:
    try:
        return hint(path, read_tensors(path), "onnx")
    except MefemError:
        return ""


def _first_line(error: Exception) -> str:
    return ascii((str(error).splitlines() or [type(error).__name__])[0])[1:-1][:200]


# The file ------------------------------------------------------------------------------------------------------------

GRAPH, NODE, OPERATOR = 7, 1, 4  # numbers of ONNX's fields: ModelProto.graph, GraphProto.node, NodeProto.op_type
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # kinds of fields in protocol buffers


def first_operators(path: Path) -> list[str]:
    """Return what the first nodes of a network's graph compute: `["Sub", "Mul", "Conv", ...]`."""
    operators = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start, stop in _fields(content, 0, len(content), GRAPH):
            for node_start, node_stop in _fields(content, start, stop, NODE):
                for first, last in _fields(content, node_start, node_stop, OPERATOR):
                    operators.append(content[first:last].decode("utf-8", "replace"))
                if len(operators) >= FIRST_NODES:
                    return operators
    return operators


def _fields(content: mmap.mmap, start: int, stop: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Yield from where to where a message's fields of a number lie. Raises ValueError for what is no message."""
    while start < stop:
        key, start = _varint(content, start)
        number, kind = key >> 3, key & 7
        if kind == BYTES:
            length, start = _varint(content, start)
            if number == wanted:
                yield start, min(start + length, stop)
            start += length
        elif kind == VARINT:
            _, start = _varint(content, start)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            start += 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError("not a message of protocol buffers")


def _varint(content: mmap.mmap, start: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for count in range(10):
        byte = content[start + count]
        value |= (byte & 127) << 7 * count
        if byte < 128:
            return value, start + count + 1
    raise ValueError("not a message of protocol buffers")
