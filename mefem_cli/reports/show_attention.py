"""`mefem show attention RUN CROP...`: where the CLS token of the last block looks, and where an attentive head does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mefem_cli.backbones import vit
from mefem_cli.errors import NoInputError, UsageError
from mefem_cli.faces.source import printable
from mefem_cli.predicting import refuse_other_encoder
from mefem_cli.probes import attentive
from mefem_cli.reports.probe_faces import with_heat
from mefem_cli.reports.show_face import crop_of, decoded, each_readable
from mefem_cli.reports.show_sheet import GAP, PICTURE_WIDTH, Row, Sheet, Tile
from mefem_cli.stores import product, runs
from mefem_cli.stores.crops import MANIFEST, Crops, text_to_path

if TYPE_CHECKING:
    from mefem_cli.evaluation.saved import Head
    from mefem_cli.showing import ShowOptions

RUNS = Path("runs")
NUM_OF_FOLDER, MOST_FACES = 6, 32
SHOWN_PX = 160
LEAST_INCHES, MOST_INCHES = 0.9, 1.5  # side of a tile
SCALE = (
    "Dark blue: nothing, green: an even share, yellow: twice that or more, on one scale for all. Below each the least "
    "and the most that a patch gets, in even shares; the mean is that of the heads."
)


@dataclass(frozen=True)
class Looks:
    """Attention of one face, shares [L, L] of what goes to patches; each sums to what the patches get of 1."""

    heads: np.ndarray  # [H, L, L]: from CLS in the last block
    to_itself: np.ndarray  # (H,): the share that CLS keeps to itself
    pooler: np.ndarray | None  # [L, L]: of an attentive head; None: there is none
    pooler_to_cls: float  # the share of the CLS token among the pooler's tokens

    @property
    def mean(self) -> np.ndarray:
        """The mean over heads, [L, L]."""
        return self.heads.mean(axis=0)


def sheet(arguments: Sequence[str], options: ShowOptions) -> Sheet:
    """Return heat maps over faces. Raises NoInputError for what is no run or crop, UsageError for what does not fit."""
    run, places = _run_and_crops(arguments)
    encoder, description, weights = vit.load_encoder(run, options.encoder if run.is_dir() else None)
    if not encoder.class_token and not options.head:
        raise UsageError(f"{run}: its encoder has no CLS token; name an attentive head with --head FILE")
    head = _attentive_head(options.head, weights, encoder) if options.head else None
    sides = (encoder.image_size, max(SHOWN_PX, encoder.image_size))
    faces = list(_faces(places or _learned_from(description), options.samples or NUM_OF_FOLDER, sides))
    rows = [_row(*face, encoder, head) for face in faces]
    digest = product.file_sha256(weights)
    inputs = {str(weights.absolute()): digest}
    if head:
        inputs[str(head.path.absolute())] = product.file_sha256(head.path)
    what = f"{encoder.num_heads} heads of the last block" if encoder.class_token else "no CLS token"
    lead = f"{weights.parent.name}: {what}. {SCALE}"
    if head:
        lead += f" Pooler: the head for {printable(str(head.about['task']))} from {head.path.name}."
    lead += " Attention says where values were taken from, not why; patches also hold what was gathered from elsewhere."
    return Sheet("Attention over faces", lead, rows, inputs=inputs)


def _run_and_crops(arguments: Sequence[str]) -> tuple[Path, list[Path]]:
    """Return the run, runs/latest where the first argument is none, and the crops."""
    places = [Path(one) for one in arguments]
    if places and ((places[0] / "config.yaml").is_file() or (places[0] / "model.json").is_file()
                   or places[0].suffix == ".safetensors"):  # fmt: skip
        return places[0], places[1:]
    if places and not places[0].exists():
        raise NoInputError(f"{places[0]}: no such run or crop; type mefem show attention RUN CROP...")
    if places and places[0].is_dir() and not (places[0] / MANIFEST).is_file():
        raise NoInputError(f"{places[0]}: neither a run nor a crops folder; type mefem show attention RUN CROP...")
    if not (RUNS / "latest").exists():
        raise NoInputError(f"{RUNS / 'latest'}: no finished run; name one, as in mefem show attention RUN CROP...")
    return runs.latest_run(RUNS), places


def _learned_from(description: dict[str, Any]) -> list[Path]:
    """Return the crops folders that a run learned from. Raises NoInputError where they are not there."""
    places = [Path(folder) for folder in description.get("provenance", {}).get("inputs", {})]
    places = [folder for folder in places if (folder / MANIFEST).is_file()]
    if not places:
        raise NoInputError("name crops: pictures or a crops folder, as in mefem show attention runs/latest crops")
    return places


Face = tuple[str, np.ndarray, np.ndarray]  # name; uint8 [S, S, 3] of the first side, and of the second


def _faces(places: Sequence[Path], num_of_folder: int, sides: tuple[int, int]) -> Iterator[Face]:
    """Yield picture files, and some of crops folders, each in both sides."""
    count = 0
    for place in places:
        if place.is_dir():
            found = list(_of_folder(Crops.open(place), num_of_folder, sides))
        elif place.is_file():
            small, shown = (decoded(place.read_bytes(), side, place) for side in sides)
            found = [(place.name, small, shown)]
        else:
            raise NoInputError(f"{place}: no such crop; name pictures or a crops folder")
        count += len(found)
        if count > MOST_FACES:
            raise UsageError(f"more than {MOST_FACES} crops; name fewer, or some of a folder with --samples")
        yield from found


def _of_folder(crops: Crops, num: int, sides: tuple[int, int]) -> Iterator[Face]:
    chosen = np.linspace(0, len(crops) - 1, min(num, len(crops))).astype(int).tolist()
    sources = crops.columns["source"]
    for row, (small, shown) in each_readable(chosen, lambda row: [crop_of(crops, row, side) for side in sides]):
        yield Path(text_to_path(sources[row])).name or crops.describe(row), small, shown


def _row(name: str, image: np.ndarray, face: np.ndarray, encoder: vit.ViTEncoder, head: Head | None) -> Row:
    """Return the tiles of a crop: `image` in the encoder's size, `face` as it is shown, uint8 [S, S, 3]."""
    looks = look(encoder, image, head)
    num_tiles = 1 + (1 + encoder.num_heads) * encoder.class_token + (head is not None)
    side = float(np.clip(PICTURE_WIDTH / num_tiles - GAP, LEAST_INCHES, MOST_INCHES))
    size = (side, side)
    tiles = [Tile("crop", None, face, size)]
    caption = []
    if len(looks.heads):
        tiles.append(_tile("mean", face, looks.mean, size))
        tiles += [_tile(f"head {number}", face, one, size) for number, one in enumerate(looks.heads, start=1)]
        kept = ", ".join(f"{100 * share:.0f}" for share in looks.to_itself)
        caption.append(f"CLS keeps {kept} % to itself.")
    if looks.pooler is not None:
        tiles.append(_tile("pooler", face, looks.pooler, size))
        if looks.pooler_to_cls:
            caption.append(f"The pooler takes {100 * looks.pooler_to_cls:.0f} % from the CLS token.")
    return Row(printable(name), tiles, " ".join(caption))


def _tile(name: str, face: np.ndarray, shares: np.ndarray, size: tuple[float, float]) -> Tile:
    """Return a face under shares [L, L], named with the least and the most of them in even shares."""
    low, high = (float(one) * shares.size for one in (shares.min(), shares.max()))
    return Tile(f"{name}: {low:.2f} to {high:.2f}", None, with_heat(face, shares), size)


# What is measured -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def look(encoder: vit.ViTEncoder, image: np.ndarray, head: Head | None) -> Looks:
    """Return the attention of one crop, uint8 [S, S, 3] of the encoder's size."""
    images = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    kept: list[torch.Tensor] = []
    attention = encoder.vit.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    try:
        features = encoder.features(images)
    finally:
        hook.remove()
    heads, to_itself = torch.zeros(0, encoder.num_patches), torch.zeros(0)
    if encoder.class_token:
        shares = class_attention(attention, kept[0])[0]  # [H, N]
        heads, to_itself = shares[:, 1:], shares[:, 0]
    grid = (encoder.grid_size, encoder.grid_size)
    pooler, to_cls = None, 0.0
    if head is not None:
        pooled = pooler_attention(head, features)
        pooler, to_cls = pooled[: encoder.num_patches].reshape(grid), float(pooled[encoder.num_patches :].sum())
    return Looks(heads.numpy().reshape(-1, *grid), to_itself.numpy(), pooler, to_cls)


def class_attention(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the shares of all tokens [B, N, D] in what the CLS token, the first, gathers: [B, H, N]."""
    queries, keys, _ = attention.qkv(tokens).float().unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    query, keys = attention.q_norm(queries[:, 0]), attention.k_norm(keys)  # [B, H, d], [B, N, H, d]
    logits = torch.einsum("bhd,bnhd->bhn", query, keys) / math.sqrt(query.shape[-1])
    return logits.softmax(dim=-1)


def pooler_attention(head: Head, features: dict[str, torch.Tensor]) -> np.ndarray:
    """Return the share of each token that an attentive head reads, (T,), with CLS last where it reads that too."""
    tokens = features["patches"][0].numpy()
    if "cls" in str(head.about["features"]):
        tokens = np.concatenate([tokens, features["cls"].numpy()])
    tokens = tokens.astype(head.about["dtype"]).astype(np.float32)  # as the store had them
    return attentive.look(head.state, tokens[None])[0]


def _attentive_head(path: str, weights: Path, encoder: vit.ViTEncoder) -> Head:
    """Return a head that looks at patches of this encoder.

    Raises UsageError for a head that looks nowhere, OutputError for one of another encoder.
    """
    from mefem_cli.evaluation import saved

    head = saved.load(Path(path))
    if head.about["head"] != "attentive":
        raise UsageError(
            f"--head {path}: a {head.about['head']} head on {head.about['features']}, which looks nowhere; make one "
            "with mefem probe TASK --head attentive --save FILE"
        )
    which = "source" if weights.name == runs.ENCODER_FILES["source"] else "target"
    model = {"sha256": product.file_sha256(weights), "encoder": which}
    refuse_other_encoder(head, model, asdict(encoder.preprocessing), str(weights))
    return head
