"""`mefem crop` as people and programs call it: what is on stdout, on stderr, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

HEAVY = ("torch", "numpy", "h5py", "sklearn", "mediapipe", "pyarrow", "PIL")


def mefem(*arguments, cwd=None, **options):
    command = [sys.executable, "-m", "mefem_cli", "crop", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, **options)


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        side = 100 if index == 2 else 250
        Image.fromarray(pixels).resize((side, side)).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "photos" / "labels.csv").write_text("path,age\n0.png,5\n")
    (tmp_path / "photos" / "notes.txt").write_text("a good day")
    return tmp_path / "photos"


def test_stdout_is_the_path_and_nothing_else(photos, tmp_path):
    first = mefem("photos", "--detector", "none", cwd=tmp_path)
    assert (first.returncode, first.stdout) == (0, f"{tmp_path / 'crops'}\n")
    assert "2 crops" in first.stderr
    assert "1 small" in first.stderr
    assert "--labels" in first.stderr  # the table beside the photos is mentioned, not used
    quiet = mefem("photos", "--detector", "none", "--quiet", cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, f"{tmp_path / 'crops'}\n", "")


def test_json_object(photos, tmp_path):
    answer = mefem(photos, "--detector", "none", "--json", "-o", tmp_path / "out")
    record = json.loads(answer.stdout)
    assert record["out"] == str(tmp_path / "out")
    assert record["crops"] == 2
    assert record["rejects"] == {"small": 1}
    assert record["skipped"] == {".csv": 1, ".txt": 1}
    assert record["seconds"] > 0


def test_real_faces_and_silent_models(shared_data, tmp_path):
    answer = mefem(shared_data / "crop_scenes" / "single_400.jpg", "-o", tmp_path / "out")
    assert answer.stdout == f"{tmp_path / 'out'}\n"
    assert answer.stderr == "      1 crop\n"


def test_dry_run_touches_nothing(photos, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    answer = mefem(photos, "--detector", "none", "--dry-run", "--json", "-o", tmp_path / "out")
    plan = json.loads(answer.stdout)
    assert (plan["sources"], plan["to_read"], plan["state"], plan["kinds"]) == (3, 3, "new", {".png": 3})
    assert plan["expected_rejects"] == {"small": 1}
    assert plan["options"]["size"] == 224
    assert plan["seconds"] > 0
    assert mefem(photos, "--detector", "none", "-n", "-o", tmp_path / "out").stdout.startswith("out ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "no photos named; type mefem crop FOLDER"),
        (["photo"], 3, 'did you mean "photos"'),
        (["photos/notes.txt", "--detector", "none"], 3, "no usable face: 1 unreadable"),
        (["photos/*.gif"], 3, "no image matches"),
        (["photos", "--detector", "shrot"], 2, 'did you mean "short"'),
        (["photos", "--size", "big"], 2, "--size big"),
        (["photos", "--labels", "absent.csv"], 2, "absent.csv"),
        (["photos", "--key", "x"], 2, "--labels"),
        (["photos", "-o", "photos/0.png/out"], 4, "name another --out"),
        (["photos", "--detector", "none", "--max-rejects", "0"], 3, "fewer than 1 reject beside 2 crops"),
    ],
)
def test_errors_are_one_line_with_their_code(photos, tmp_path, arguments, code, words):
    answer = mefem(*arguments, "--quiet", cwd=tmp_path)
    assert (answer.returncode, answer.stdout) == (code, "")
    assert answer.stderr.count("\n") == 1
    assert words in answer.stderr


def test_options_without_effect_are_told(photos, tmp_path):
    answer = mefem(photos, "--detector", "none", "--scale", "3", "-o", tmp_path / "out")
    assert "--scale has no effect" in answer.stderr


def test_options_without_effect_on_merging_are_told(photos, tmp_path):
    for part in (1, 2):
        mefem(photos, "--detector", "none", "--shard", f"{part}/2", "-o", tmp_path / str(part))
    idle = ("--shard", "1/2", "--limit", "1", "--workers", "2", "--retry-rejected", "--size", "100")
    answer = mefem("--merge", *idle, tmp_path / "1", tmp_path / "2", "-o", tmp_path / "out")
    assert answer.stdout == f"{tmp_path / 'out'}\n"
    assert [name for name in idle if name[:2] == "--" and f"{name} has no effect" not in answer.stderr] == []


def test_paths_on_stdin(photos, tmp_path):
    answer = mefem(
        "-", "--detector", "none", "-o", tmp_path / "out", cwd=tmp_path, input="photos/0.png\nphotos/1.png\n"
    )
    assert answer.stdout == f"{tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "images" / "photos" / "1.png.jpg").exists()


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['mefem', 'crop', '--help']\n"
        "from mefem_cli.main import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stderr == "[]\n"
    assert "--detector auto|short|full|none" in answer.stdout


class Checker(HTMLParser):
    """Collects what a page would load, and whether its tags are balanced."""

    def __init__(self):
        super().__init__()
        self.loads, self.open_tags, self.scripts = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        self.scripts += tag == "script" or any(name.startswith("on") for name, _ in attributes)
        if tag not in ("meta", "img", "br"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


def test_long_names_fill_few_lines_of_the_contact_sheet(photos, tmp_path):
    name = f"{'n' * 100}.png"
    (photos / "0.png").rename(photos / name)
    mefem(photos, "--detector", "none", "-o", tmp_path / "out")
    page = (tmp_path / "out" / "contact.html").read_text(encoding="utf-8")
    assert page.count("n" * 100) == 1  # whole under the pointer
    assert f"{'n' * 26}.png" in page.replace(name, "")


def test_contact_sheet_is_whole_and_offline(photos, tmp_path):
    (photos / "<script>alert(1)<").mkdir()
    (photos / "<script>alert(1)<" / '"><script>.jpg').write_bytes(b"no image")
    Image.new("RGB", (50, 50)).save(photos / "' onload='alert(1).jpg")
    mefem(photos, "--detector", "none", "-o", tmp_path / "out")
    page = (tmp_path / "out" / "contact.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open_tags == []
    assert checker.scripts == 0
    assert len(checker.loads) == 4  # 2 crops, 2 small pictures
    assert all(one.startswith("data:image/jpeg;base64,") for one in checker.loads)
    assert "prefers-color-scheme: dark" in page
    assert "border" not in page.partition("<table>")[2]
