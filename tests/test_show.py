"""`mefem show`: the command, its errors, the forms of a picture, masks, weights, parts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import fields
from html import unescape
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import Image
from synthetic import smooth_faces, write_crops

from mefem_cli import parts, showing
from mefem_cli.backbones import vit
from mefem_cli.errors import OutputError, UsageError
from mefem_cli.masks import stripes
from mefem_cli.objectives import mefem
from mefem_cli.parts import Given
from mefem_cli.reports import fonts, show_masks, show_parts, show_sheet, show_weights
from mefem_cli.reports.show_sheet import Row, Sheet, Tile
from mefem_cli.showing import ShowOptions

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>$\\frac{"


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "name what to show"),
        (("mask",), 2, 'did you mean "masks"'),
        (("masks", "--mask", "strips"), 2, 'did you mean "stripes"'),
        (("masks", "face.jpg"), 2, "mefem show masks --crops face.jpg"),
        (("masks", "--mask", "stripes", "--crops", "missing.jpg"), 3, "missing.jpg: no such crop"),
        (("masks", "--mask", "stripes", "--crops", "note.txt"), 3, "note.txt: cannot be read as a picture"),
        (("masks", "--width", "20"), 2, "stripes of 1 to 13"),
        (("weights", "--grid", "1"), 2, "wanted 2 to 64"),
        (("weights", "-o", "picture.gif"), 2, "wanted .html, .png, .svg"),
        (("weights", "-o", "note.html"), 4, "was not drawn by mefem show"),
        (("crops", "missing"), 3, "no such crops folder"),
        (("crops", "."), 3, "is no crops folder"),
        (("store", "missing.h5"), 3, "does not exist"),
        (("store", "note.txt"), 3, "is not an HDF5 file"),
        (("store", "a.h5", "b.h5"), 2, "one feature store at a time"),
        (("run", "missing"), 3, "no run folder"),
        (("run",), 3, "runs/latest: no finished run"),
        (("run", *"123456789"), 2, "at most 8"),
        (("attention", "missing"), 3, "no such run or crop"),
        (("attention",), 3, "runs/latest: no finished run"),
        (("parts", "mask"), 2, 'did you mean "masks"'),
        (("parts", "-o", "parts.png"), 2, "mefem show parts -o parts.html"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, code, said, mefem_command, tmp_path):
    for name in ("note.txt", "note.html"):
        (tmp_path / name).write_text("mine")
    found, stdout, stderr = mefem_command("show", *words)
    assert (found, stdout) == (code, "")
    assert said in stderr and stderr.count("\n") == 1, stderr
    assert (tmp_path / "note.html").read_text() == "mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["note.html", "note.txt"]


def test_stdout_is_the_path_and_a_picture_of_ours_is_drawn_anew(mefem_command, tmp_path):
    page = tmp_path / "mefem-weights.html"
    assert mefem_command("show", "weights") == (0, f"{page}\n", "")
    first = page.read_text()
    code, stdout, _ = mefem_command("show", "weights", "--r0", "4", "--json")
    assert code == 0 and json.loads(stdout)["out"] == str(page)
    assert page.read_text() != first
    assert "<td>r0</td><td>4.0</td>" in page.read_text()  # how it was made


def test_an_option_without_effect_is_named(mefem_command):
    code, _, stderr = mefem_command("show", "weights", "--width", "3", "--samples", "2")
    assert code == 0
    assert stderr == "warning: --samples has no effect with weights\nwarning: --width has no effect with weights\n"


def test_every_option_is_used_by_some_kind():
    used = {name for names in showing.USES.values() for name in names} | {"out", "overwrite"}
    assert used == {one.name for one in fields(ShowOptions)}


@pytest.mark.parametrize("words", [["weights", "-o", "w.png"], ["parts"], ["parts", "--json"], ["--help"]])
def test_neither_torch_nor_what_is_as_heavy_is_loaded(words, tmp_path):
    code = (
        "import sys; from mefem_cli import main\n"
        f"main.dispatch(['show', *{words!r}])\n"
        "heavy = {'torch', 'timm', 'h5py', 'sklearn', 'mediapipe', 'pyarrow', 'scipy'}\n"
        "loaded = sorted(heavy & {name.partition('.')[0] for name in sys.modules})\n"
        "print('loaded', loaded, file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert answer.stderr.endswith("loaded []\n"), answer.stderr


# Forms of a picture ---------------------------------------------------------------------------------------------------


def a_sheet(name: str = HOSTILE) -> Sheet:
    face = smooth_faces(1, 64)[0]
    tiles = [Tile(name, None, face, hover=name), Tile(name, lambda figure: show_sheet.photo(figure, face))]
    return Sheet(name, name, [Row(name, tiles, name)], inputs={name: "0"})


@pytest.mark.parametrize("form", ["html", "png", "svg"])
def test_every_form_holds_names_that_mean_harm_and_says_how_it_was_made(form, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mefem", "show", HOSTILE])
    path = tmp_path / f"sheet.{form}"
    show_sheet.write(a_sheet(), path, {"by": HOSTILE})
    assert show_sheet.is_ours(path)
    if form == "png":
        with Image.open(path) as image:
            assert json.loads(image.info["mefem"])["options"] == {"by": HOSTILE}
            assert np.asarray(image.convert("RGB")).std() > 10  # something is drawn
        return
    text = path.read_text()
    assert "<script" not in text and "<img src=x" not in text
    assert text.count("&lt;script&gt;") >= 3
    assert "mefem show" in text


@pytest.mark.parametrize("form", ["html", "png", "svg"])
def test_letters_that_no_font_has_are_one_warning_of_a_picture(form, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [__file__, str(tmp_path / "gone.ttf")])

    def draw(figure) -> None:
        show_sheet.axes_at(figure, 0.2, 0.2, 0.7, 0.7).set_yticks([0, 1], ["女", show_sheet.plain("$x_\U000f0000")])

    show_sheet.write(Sheet("Zoë", "", [Row("", [Tile("男", draw)])]), tmp_path / f"sheet.{form}", {})
    said = capsys.readouterr().err
    assert said.count("\n") == (form == "png")
    assert (
        form != "png" or 'has all letters of "女" and 1 more: in PNGs a box' in said
    )  # private letters are "?" by then


def test_letters_come_from_an_installed_font_that_has_them(monkeypatch, capsys):
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "STIXGeneral.ttf"
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [__file__, str(path)])
    own, lent = (set(FT2Font(one).get_charmap()) for one in (findfont("DejaVu Sans"), path))
    figure = Figure()
    strange, usual = figure.text(0, 0, chr(min(lent - own))), figure.text(0, 0, "a")
    assert fonts.lend(figure) == []
    assert strange.get_fontfamily() == ["DejaVu Sans", "STIXGeneral"] != usual.get_fontfamily()
    FigureCanvasAgg(figure).draw()  # a letter that lacks would be a warning, which is an error here
    assert capsys.readouterr().err == ""


def test_a_file_of_others_stays(tmp_path):
    mine = tmp_path / "figure.png"
    mine.write_bytes(b"a picture")
    with pytest.raises(OutputError, match="--overwrite"):
        show_sheet.check(mine, overwrite=False)
    show_sheet.check(mine, overwrite=True)
    with pytest.raises(OutputError, match="is a folder"):
        (tmp_path / "folder.png").mkdir()
        show_sheet.check(tmp_path / "folder.png", overwrite=True)


def test_a_long_row_goes_on_in_the_next_line():
    tiles = [Tile("", lambda figure: None, size=(3.0, 1.0))] * 7
    assert [len(line) for line in show_sheet._lines_of(Row("", tiles))] == [3, 3, 1]
    for num, expected in ((5, [3, 2, 2]), (4, [3, 3])):
        lines = show_sheet._lines_of(Row("", tiles[:num], together=tiles[num : num + 2]))
        assert [len(line) for line in lines] == expected


def test_names_of_tiles_grow_downwards_from_below_the_picture():
    tiles = [Tile("photos/holiday_2x4_r0c0.jpg", None, smooth_faces(1, 64)[0], (0.92, 0.92))]
    height = tiles[0].size[1] + show_sheet._title_height(tiles)
    figure = Figure(figsize=(4, height))
    FigureCanvasAgg(figure)
    show_sheet._draw_tiles(figure, tiles, 4)
    lines = figure.findobj(Text)
    boxes = [one.get_window_extent() for one in lines if one.get_text()]
    assert len(boxes) == 3
    assert [box.y0 for box in boxes] == sorted((box.y0 for box in boxes), reverse=True)
    assert boxes[0].y1 <= figure.dpi * (height - tiles[0].size[1]) + 0.5 and boxes[-1].y0 >= 0  # dots


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(show_masks, "NUM_DRAWS", 400)


def modes(name: str, given: dict | None = None, **options) -> list[show_masks.Mode]:
    return list(show_masks.modes_of(name, ShowOptions(**options), Given(given or {})))


@pytest.mark.parametrize("cls_prob", [0.5, 0.2, 1.0, None])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_chances_of_stripes_are_those_of_the_formula(cls_prob, width, few_draws):
    (mode,) = modes("stripes", {"width": str(width)}, cls_prob=cls_prob)
    start = stripes.start_probabilities(14, width).numpy()
    expected = np.zeros((14, 14))
    for first, chance in enumerate(start):
        for stripe in (np.s_[first : first + width, :], np.s_[:, first : first + width]):
            here = np.zeros((14, 14))
            here[stripe] = 1
            last = np.argwhere(here)[-1]
            here[tuple(last)] = 1 - (cls_prob or 0)  # the last patch leaves where CLS joins the source
            expected += chance / 2 * here
    np.testing.assert_allclose(mode.p_source, expected, atol=1e-12)
    np.testing.assert_allclose(mode.p_target, 1 - expected, atol=1e-12)
    assert mode.is_exact


def test_samples_are_the_draws_of_training(few_draws):
    settings = mefem.Options(mask="stripes")
    tiny = vit.Options("vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=3)
    objective = mefem.build(settings, vit.build(tiny), Given({"width": 2}))
    generator = show_masks.seeds.torch_generator(7, show_masks.seeds.MASKS)
    (split,) = objective.splits(objective.draw(400, generator))
    (mode,) = modes("stripes", {"width": "2"}, seed=7, samples=20)
    assert len(mode.source) == 20
    for number in range(20):
        source, target = (
            {token - 1 for token in side[number].tolist() if token} for side in (split.source, split.target)
        )
        assert set(np.flatnonzero(mode.source[number])) == source
        assert set(np.flatnonzero(mode.target[number])) == target
        assert mode.cls_in_source[number] == (0 in split.source[number])
    assert set(mode.cls_in_source) == {True, False}


@pytest.mark.parametrize("name", ["stripes", "quadrants", "multiblock"])
def test_the_patch_that_moved_completes_the_source(name, few_draws):
    for mode in modes(name, samples=40):
        assert not (mode.source & mode.target).any()
        moved = mode.moved.sum(axis=(1, 2))
        assert (moved == mode.cls_in_source).all()
        assert (mode.target | ~mode.moved).all()
        if name == "multiblock":
            continue
        assert (mode.source | mode.target).all()
        whole = (mode.source | mode.moved).reshape(40, -1)
        assert set(whole.sum(axis=1)) == {42 if name == "stripes" else 49}
        for one in (mode.source | mode.moved)[:10]:  # a rectangle
            rows, columns = one.any(axis=1).sum(), one.any(axis=0).sum()
            assert rows * columns == one.sum()


def test_chances_of_multiblock_are_counted_and_it_says_so():
    found = modes("multiblock", cls_prob=None, samples=2)
    assert [mode.name for mode in found] == ["8 blocks of 15 %", "2 blocks of 70 %"]
    masker = parts.load("masks", "multiblock").build(None, 14)
    mean = np.mean([mode.p_source for mode in found], axis=0)
    np.testing.assert_allclose(mean, masker.p_source().numpy(), atol=0.02)
    assert [round(mode.p_source.sum()) for mode in found] == [48, 12]
    assert [round(mode.p_target.sum()) for mode in found] == [100, 144]
    assert not any(mode.is_exact for mode in found)
    row = show_masks._row(found[0], smooth_faces(1, 224)[0], ShowOptions(cls_prob=None, samples=2), (1, 1))
    assert "counted over 20,000 draws" in row.caption
    assert "48 source and 100 target patches, 48 in neither" in row.caption


def test_what_is_drawn_is_the_draw_and_its_chances(few_draws):
    options = ShowOptions(samples=2)
    (mode,) = modes("stripes", samples=2)
    face = smooth_faces(1, 224)[0]
    row = show_masks._row(mode, face, options, (0.5, 1.0))
    assert len(row.tiles) == 2 and len(row.together) == 2
    for number, tile in enumerate(row.tiles):
        figure = Figure(figsize=tile.size)
        tile.draw(figure)
        drawn = np.asarray(figure.axes[0].images[0].get_array())
        in_source = np.kron(mode.source[number], np.ones((16, 16), bool))
        assert (drawn[in_source] == face[in_source]).all()
        veiled = drawn[~in_source].astype(int)
        assert (veiled[:, 2] > veiled[:, 0]).all()  # blue, whatever the face
        words = [text.get_text() for text in figure.axes[0].texts]
        assert words == ["CLS", "in source" if mode.cls_in_source[number] else "in target"]
    for tile, chance, end in zip(row.together, (mode.p_source, mode.p_target), (0.5, 1), strict=True):
        figure = Figure(figsize=tile.size)
        tile.draw(figure)
        np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), chance)
        assert figure.axes[0].images[0].get_clim() == (0, end)


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ({"cls_prob": 0.5, "mask": ["stripes"]}, ["source", "target", "moved"]),
        ({"cls_prob": 0.0, "mask": ["stripes"]}, ["source", "target"]),
        ({"cls_prob": None, "mask": ["stripes,multiblock"]}, ["source", "target", "in"]),
    ],
)
def test_the_legend_has_what_the_draws_have_and_all_rows_one_scale(words, kinds, few_draws, monkeypatch):
    monkeypatch.setattr(show_masks, "rendered_face", lambda side: smooth_faces(1, side)[0])
    legend, *rows = show_masks.sheet(ShowOptions(**words), Given({})).rows
    figure = Figure(figsize=legend.tiles[0].size)
    legend.tiles[0].draw(figure)
    assert [text.get_text().split()[0].strip(":") for text in figure.axes[0].texts] == kinds
    for pair in zip(*(row.together for row in rows), strict=True):
        images = []
        for tile in pair:
            figure = Figure(figsize=tile.size)
            tile.draw(figure)
            images.append(figure.axes[0].images[0])
        assert {image.get_clim() for image in images} == {(0, max(image.get_array().max() for image in images))}


@pytest.mark.parametrize("grid", [28, 64])
def test_lines_leave_as_much_of_a_fine_grid_as_of_that_of_14(grid):
    def brightness(side: int) -> float:
        """Mean of a white face of which every other patch is source and framed, the rest in neither."""
        source, none = np.indices((side, side)).sum(axis=0) % 2 == 0, np.zeros((side, side), bool)
        mode = show_masks.Mode("", "", source[None], none[None], none[None], None, none, none, is_exact=True)
        figure = Figure(figsize=(1.2, 1.2 * (1 + show_masks.HEADROOM)), dpi=300)
        show_masks._sample(mode, 0, np.full((16 * side, 16 * side, 3), 255, np.uint8))(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return float(np.asarray(canvas.buffer_rgba())[..., :3].mean() / 255)

    assert brightness(grid) == pytest.approx(brightness(14), abs=0.03)


def test_source_target_and_neither_differ_without_colour():
    grey = np.full((6, 6, 3), 120, np.uint8)
    source, target = (np.array([[one, other, 0]] * 3, bool) for one, other in ((1, 0), (0, 1)))
    columns = show_masks.composite(grey, source, target).mean(axis=(0, 2)).reshape(3, 2).mean(axis=1)
    assert columns[0] + 40 < columns[1] < columns[2] - 40  # light, lighter; outlines and hatching come on top


def test_the_face_is_the_crop_that_is_named_else_a_rendered_one(tmp_path, few_draws, mefem_command):
    folder = write_crops(tmp_path / "crops", 2)
    options = ShowOptions(mask=["stripes"], crops=str(folder), samples=1, cls_prob=None)
    drawn = Figure()
    show_masks.sheet(options, Given({})).rows[1].tiles[0].draw(drawn)
    (mode,) = modes("stripes", samples=1, cls_prob=None)
    in_source = np.kron(mode.source[0], np.ones((16, 16), bool))
    with Image.open(folder / "images" / "0000.jpg") as image:
        difference = np.abs(np.asarray(image).astype(int) - drawn.axes[0].images[0].get_array())[in_source]
    assert difference.max() <= 3  # two decoders of JPEG
    rendered = show_masks.rendered_face(224)
    assert rendered.shape == (224, 224, 3) and rendered.std() > 30


def test_masks_that_do_not_fit_the_grid_are_left_out_unless_asked_for(mefem_command, monkeypatch, few_draws):
    monkeypatch.setattr(show_masks, "rendered_face", lambda side: smooth_faces(1, side)[0])
    code, stdout, stderr = mefem_command("show", "masks", "--grid", "7", "--samples", "1", "--cls-prob", "none")
    assert code == 0 and stderr.startswith("warning: left out: --mask quadrants")
    assert "quadrants</h2>" not in Path(stdout.strip()).read_text()
    assert "<td>grid</td><td>7</td>" in Path(stdout.strip()).read_text()
    code, stdout, _ = mefem_command("show", "masks", "--mask", "stripes", "--width", "2", "--samples", "1")
    assert code == 0 and "28 source and 169 target tokens" in Path(stdout.strip()).read_text()
    assert "<td>width</td><td>2</td>" in Path(stdout.strip()).read_text()
    code, _, stderr = mefem_command("show", "masks", "--grid", "7", "--mask", "quadrants")
    assert code == 2 and "wanted an even side" in stderr


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "r0", "sigma"), [(14, 5.5, 1.5), (16, 4.0, 0.7), (6, 7.5, 3.0)])
def test_weights_are_those_of_the_loss_and_the_other_sign_is_their_complement(grid, r0, sigma):
    tiny = vit.Options("vit_tiny_patch16_224", 16 * grid, 16, depth=1, embed_dim=4, num_heads=1)
    expected = mefem.token_weights(vit.build(tiny), mefem.Options(r0=r0, sigma=sigma))
    assert expected[0] == 1
    ours, printed = show_weights.grid_weights(grid, r0, sigma)
    np.testing.assert_allclose(ours.flatten(), expected[1:].numpy(), atol=1e-6)
    radius = show_weights.radius_of_patches(grid)
    scale = grid / 14
    np.testing.assert_allclose(printed, 1 / (1 + np.exp(-sigma / scale * (radius - r0 * scale))), atol=1e-12)
    tiles = show_weights.sheet(grid, r0, sigma).rows[0].tiles
    for tile, weights in zip(tiles, (ours, printed), strict=False):
        figure = Figure(figsize=tile.size)
        tile.draw(figure)
        np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), weights)


@pytest.mark.parametrize(
    ("grid", "r0", "said", "hair"),
    [
        (14, 5.5, "0.999 in the middle, 0.004 in the corners;", True),
        (2, 5.5, "all patches weigh the same on so small a grid, 0.695;", False),
        (14, 90.0, "all patches weigh the same, 1.000;", False),
        (14, 0.1, "0.287 in the middle, 0.000 in the corners;", True),
    ],
)
def test_the_words_below_weights_fit_them(grid, r0, said, hair):
    caption = show_weights.sheet(grid, r0, 1.5).rows[0].caption
    assert f"Left as trained: {said}" in caption
    assert ("hair and background" in caption) == hair


def test_the_profile_passes_one_half_at_r0():
    figure = Figure()
    show_weights.sheet(14, 5.0, 2.0).rows[0].tiles[2].draw(figure)
    (axis,) = figure.axes
    for line in (line for line in axis.lines if len(line.get_xdata()) == 400):
        x, y = line.get_data()
        assert np.interp(5.0, x, y) == pytest.approx(0.5, abs=1e-3)


def test_defaults_are_those_of_the_objective():
    shown, trained = ({one.name: one.default for one in fields(kind)} for kind in (ShowOptions, mefem.Options))
    for name in ("cls_prob", "r0", "sigma"):
        assert shown[name] == trained[name]
    assert show_weights.PAPER_GRID == mefem.PAPER_GRID == ShowOptions().grid


def test_no_weight_overflows():
    assert show_weights.circular_weight(np.array([0.0, 1e4]), 5.0, 1e3).tolist() == [1.0, 0.0]


# Parts ----------------------------------------------------------------------------------------------------------------


def test_every_part_is_told_with_its_options(mefem_command):
    code, stdout, _ = mefem_command("show", "parts", "--json")
    rooms = json.loads(stdout)
    assert code == 0 and list(rooms) == ["masks", "objectives", "backbones", "probes", "tasks"]
    for room, found in rooms.items():
        assert [part["name"] for part in found] == parts.names(room)
        for part in found:
            module = importlib.import_module(f"mefem_cli.{room}.{part['name']}")
            known = [one.name for one in fields(module.Options)] if hasattr(module, "Options") else []
            assert [one["flag"] for one in part["options"]] == [f"--{name.replace('_', '-')}" for name in known]
            assert part["summary"].split()[0] == module.__doc__.split()[0]
    typed = {part["typed"] for found in rooms.values() for part in found}
    assert {"--mask stripes", "--backbone NAME", "--model farl:PATH", "--head knn", "mefem probe bmi"} <= typed


def test_parts_as_a_table_hold_every_option(mefem_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, stdout, stderr = mefem_command("show", "parts", "masks", "objectives")
    assert (code, stderr) == (0, "")
    for part in show_parts.every_part(["masks", "objectives"]):
        assert part.typed in stdout and part.summary in stdout
        assert all(f"{one.flag} {one.metavar}" in stdout and one.help in stdout for one in part.options)
    assert "mefem probe" not in stdout
    monkeypatch.delenv("COLUMNS")
    narrow = mefem_command("show", "parts")[1]
    assert max(map(len, narrow.splitlines())) == 80
    assert all(part.typed in narrow for part in show_parts.every_part())


def test_parts_as_a_page_hold_every_option(mefem_command):
    code, stdout, stderr = mefem_command("show", "parts", "masks", "probes", "-o", "parts.html")
    assert (code, stderr) == (0, "")
    page = unescape(Path(stdout.strip()).read_text())
    for part in show_parts.every_part(["masks", "probes"]):
        assert f"<td>{part.typed}</td><td>{part.summary}</td>" in page
        assert all(f"<td>{one.flag} {one.metavar}</td><td>{one.help}" in page for one in part.options)
    assert "(default 0.175)</td>" in page and "mefem probe" not in page


def test_a_room_that_is_none_is_refused():
    with pytest.raises(UsageError, match='did you mean "tasks"'):
        show_parts.every_part(["task"])
