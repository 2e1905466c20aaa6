"""Where work runs: processes that are forked, stopped and never left behind; parts on a cluster, and Ray itself."""

import _thread
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_crops, write_run
from test_crop_run import content, photo

from mefem_cli import main
from mefem_cli.embedding import EmbedOptions
from mefem_cli.errors import MefemError, NoInputError, OutputError, UsageError
from mefem_cli.executors import Stopping, local, parts, processes
from mefem_cli.executors.local import Launcher, environment
from mefem_cli.executors.locks import claimed, is_claimed
from mefem_cli.executors.on_ray import OnRay, refuse_silence, task_resources
from mefem_cli.executors.options import OnOptions, PartsOptions
from mefem_cli.executors.parts import Part
from mefem_cli.stores.crops import read_manifest
from mefem_cli.stores.feature_parts import Parts, folder_of
from mefem_cli.stores.features import FeatureStore

SLEEPS = """
import os, signal, sys, time
folder = sys.argv[1]
signal.signal(signal.SIGTERM, lambda *_: (open(f"{folder}/stopped", "w").close(), sys.exit(75)))
with open(f"{folder}/pid", "w") as file:  # not left to the finaliser, which would swallow the handler's SystemExit
    file.write(str(os.getpid()))
print("some note", file=sys.stderr)
time.sleep(60)
"""


@pytest.fixture
def running(monkeypatch):
    """Processes that run Python code instead of mefem."""

    def with_code(code: str) -> processes.Processes:
        monkeypatch.setattr(processes, "PROGRAM", (sys.executable, "-S", "-E", "-c", code))
        made.append(processes.Processes(environment(1)))
        return made[-1]

    made: list[processes.Processes] = []
    yield with_code
    for one in made:
        one.close()


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.read_text() or path.name == "stopped")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.read_text()


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("print('a')", 0),
        ("import nosuch", 1),
    ],
)
def test_exit_codes_and_stderr_come_back(running, tmp_path, code, expected):
    assert running(code).run(["x"], tmp_path / "log") == expected
    assert ("nosuch" in (tmp_path / "log").read_text()) is (expected == 1)


def test_a_fork_runs_mefem_itself_with_its_own_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MEFEM_PROBE_HEAD", "nosuch")
    one = processes.Processes(environment(1))
    try:
        assert one.run(["--version"], tmp_path / "log") == 0
        assert one.run(["store", str(tmp_path / "nosuch.h5")], tmp_path / "log", {"MEFEM_STORE_JSON": "x"}) == 2
        assert "for '--json'" in (tmp_path / "log").read_text()
        one.run(["store", str(tmp_path / "nosuch.h5")], tmp_path / "log")
        assert "for '--json'" not in (tmp_path / "log").read_text()  # the environment was that command's own
    finally:
        one.close()
    assert "MEFEM_PROBE_HEAD" not in environment(1)


def test_stopping_reaches_what_runs_and_lets_nothing_begin(running, tmp_path):
    one = running(SLEEPS)
    threading.Thread(target=lambda: (wait_for(tmp_path / "pid"), one.stop())).start()
    with pytest.raises(Stopping):
        one.run([str(tmp_path)], tmp_path / "log")
    wait_for(tmp_path / "stopped")
    with pytest.raises(Stopping):
        one.run([str(tmp_path)], tmp_path / "log")
    with pytest.raises(Stopping):
        Launcher(one).wait(0.0)


def test_an_interrupt_stops_the_command_first(running, tmp_path):
    one = running(SLEEPS)
    threading.Thread(target=lambda: (wait_for(tmp_path / "pid"), _thread.interrupt_main())).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):  # as Ray cancels a task: in the thread that waits
        one.run([str(tmp_path)], tmp_path / "log")
    assert (tmp_path / "stopped").exists()
    assert time.monotonic() - begun < processes.STOP_SECONDS


def test_a_command_whose_server_is_killed_is_stopped_and_lost(running, tmp_path):
    one = running(SLEEPS)

    def kill_the_server():
        wait_for(tmp_path / "pid")
        one._server[0].kill()

    threading.Thread(target=kill_the_server).start()
    assert one.run([str(tmp_path)], tmp_path / "log") == -signal.SIGKILL
    wait_for(tmp_path / "stopped")
    pid = int((tmp_path / "pid").read_text())
    (tmp_path / "pid").unlink()
    while is_there(pid):
        time.sleep(0.01)
    monkey = threading.Thread(target=lambda: os.kill(int(wait_for(tmp_path / "pid")), signal.SIGTERM))
    monkey.start()
    assert one.run([str(tmp_path)], tmp_path / "log") == 75  # by a new server


def test_a_lock_is_held_by_the_command_too(running, tmp_path):
    one, folder = running(SLEEPS), tmp_path / "cell"
    folder.mkdir()
    launch = Launcher(one)
    assert not is_claimed(folder)
    with claimed(folder, launch) as lock:
        attempt = threading.Thread(target=lambda: launch([str(tmp_path)], tmp_path / "log", lock))
        attempt.start()
        pid = int(wait_for(tmp_path / "pid"))
    assert is_claimed(folder)  # who claimed it has let go, the command has not
    os.kill(pid, signal.SIGTERM)
    attempt.join()
    with claimed(folder, launch):
        assert is_claimed(folder)
    assert not is_claimed(folder)


# Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["slurm", "rays", "ray//x:1", ""])
def test_a_wrong_place_is_a_usage_error(on):
    with pytest.raises(UsageError, match="wanted local, ray, ray://HOST:PORT or ray:HOST:PORT"):
        OnOptions(on)


@pytest.mark.parametrize(("on", "count", "message"), [("local", 3, "add --on ray"), ("ray", 0, "wanted 1 or more")])
def test_wrong_parts_are_usage_errors(on, count, message):
    with pytest.raises(UsageError, match=message):
        PartsOptions(on, count)


@pytest.mark.parametrize(
    ("machines", "jobs", "wants_gpu", "expected"),
    [
        ([{"CPU": 8, "GPU": 2}, {"CPU": 16}], None, True, {"num_cpus": 4, "num_gpus": 1}),
        ([{"CPU": 1, "GPU": 4}], None, True, {"num_cpus": 1, "num_gpus": 1}),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 16}], None, False, {"num_cpus": 8}),
        ([{"CPU": 2}, {"CPU": 6}, {}], 2, True, {"num_cpus": 4}),
        ([{"CPU": 2}, {"CPU": 6}], 1, True, {"num_cpus": 6}),  # no task is larger than a machine
        ([{"CPU": 2}], 9, True, {"num_cpus": 1}),
    ],
)
def test_resources_of_a_task(machines, jobs, wants_gpu, expected):
    assert task_resources(machines, jobs, wants_gpu) == expected


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_gone_is_told_at_once(scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        refuse_silence("ray", address)  # somebody listens
    with pytest.raises(NoInputError, match=f"no Ray cluster answers at {address} .*type ray stop"):
        refuse_silence("ray", address)
    for named in ("", "auto", "local"):
        refuse_silence("ray", named)


def test_without_ray_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NoInputError, match=r'wants the package ray; type pip install "mefem-cli\[ray\]"'):
        OnRay("ray", None, False, tmp_path)


# Parts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """Parts run in this process, one after another; returns their words."""
    ran = []

    def run_parts(options, make, folder, wants_gpu=False):
        assert folder.is_dir()
        codes = []
        for number in range(1, (options.parts or 2) + 1):
            part = make(number, options.parts or 2)
            part.folder.mkdir(parents=True, exist_ok=True)
            ran.append(part.words)
            try:
                main.dispatch(list(part.words))
                codes.append((part, 0))
            except MefemError as error:
                part.log.write_text(f"a note\nmefem {part.words[0]}: {error}\n")
                codes.append((part, error.exit_code))
        return codes

    monkeypatch.setattr(parts, "run_parts", run_parts)
    return ran


def run_here(capsys, *words: str) -> str:
    capsys.readouterr()
    main.dispatch(list(words))
    return capsys.readouterr().out.splitlines()[-1]


def test_crop_in_parts_is_crop(here, tmp_path, capsys):
    for number in range(9):
        photo(tmp_path / "photos" / f"{number}.jpg", number)
    recipe = [str(tmp_path / "photos"), "--detector", "none", "--workers", "1"]
    made = run_here(capsys, "crop", *recipe, "--on", "ray", "--parts", "3", "-o", str(tmp_path / "crops"))
    assert made == str(tmp_path / "crops") and len(here) == 3
    assert all("--detector=none" in words and "--workers=1" in words for words in here)
    run_here(capsys, "crop", *recipe, "-o", str(tmp_path / "whole"))
    assert read_manifest(tmp_path / "crops").equals(read_manifest(tmp_path / "whole"))
    pictures = [
        {name: one for name, one in content(tmp_path / out).items() if "images" in name} for out in ("crops", "whole")
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 9
    photo(tmp_path / "photos" / "new.jpg", 10)
    run_here(capsys, "crop", *recipe, "--on", "ray", "--parts", "3", "-o", str(tmp_path / "crops"))
    assert read_manifest(tmp_path / "crops").num_rows == 10
    with pytest.raises(OutputError, match="holds 3 parts; type that --parts, or --overwrite"):
        run_here(capsys, "crop", *recipe, "--on", "ray", "--parts", "4", "-o", str(tmp_path / "crops"))
    with pytest.raises(OutputError, match="was not made in parts"):
        run_here(capsys, "crop", *recipe, "--on", "ray", "-o", str(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-"], "a list on stdin cannot be cut"),
        ([], "no photos named"),
        (["photos", "--limit", "3"], "--on ray and --limit"),
        (["photos", "--shard", "1/2"], "--on ray and --shard"),
        (["a", "b", "--merge"], "--on ray and --merge"),
    ],
)
def test_what_crop_cannot_do_in_parts_is_refused(here, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        main.dispatch(["crop", *words, "--on", "ray"])
    assert here == [] and list(tmp_path.iterdir()) == []


def test_a_part_that_fails_says_why(here, tmp_path, capsys):
    words = ["--detector", "none", "--on", "ray", "-o", str(tmp_path / "crops")]
    photo(tmp_path / "photos" / "a.jpg")
    with pytest.raises(NoInputError, match="type the same without --on"):  # one photo is in one part
        run_here(capsys, "crop", str(tmp_path / "photos"), *words)
    with pytest.raises(NoInputError, match="part [12]-2: .*no such"):
        run_here(capsys, "crop", str(tmp_path / "nosuch"), *words)


@pytest.fixture
def work(tmp_path) -> Path:
    write_crops(tmp_path / "crops", 30, size=64, age=[float(number) for number in range(30)])
    write_run(tmp_path / "run")
    return tmp_path


def embed_words(work: Path, name: str, *more: str) -> list[str]:
    words = ["embed", str(work / "crops"), "--model", str(work / "run"), "--batch-size", "7", "--dtype", "float32"]
    return [*words, "--precision", "fp32", "-o", str(work / name), *more]


def test_shards_and_a_last_run_make_the_store(work, capsys):
    for shard in ("2/3", "1/3"):
        made = run_here(capsys, *embed_words(work, "a.h5", "--shard", shard))
        assert made == str(folder_of(work / "a.h5"))
    assert len(Parts(folder_of(work / "a.h5"))) == 20 and not (work / "a.h5").exists()
    run_here(capsys, *embed_words(work, "a.h5", "--shard", "1/3"))  # again: nothing is done twice
    assert len(Parts(folder_of(work / "a.h5"))) == 20
    run_here(capsys, *embed_words(work, "a.h5"))  # what is missing, and the store
    run_here(capsys, *embed_words(work, "b.h5"))
    with FeatureStore.open(work / "a.h5") as one, FeatureStore.open(work / "b.h5") as other:
        assert list(one.ids) == list(other.ids)
        assert np.allclose(one.read("cls"), other.read("cls"), atol=1e-5)
    assert not folder_of(work / "a.h5").exists()


def test_embed_in_parts_is_embed(here, work, capsys):
    made = run_here(capsys, *embed_words(work, "a.h5", "--on", "ray", "--parts", "3"))
    assert made == str(work / "a.h5")
    assert [words[-1] for words in here[:3]] == ["--shard=1/3", "--shard=2/3", "--shard=3/3"] and len(here) == 4
    with FeatureStore.open(work / "a.h5") as store:
        assert len(store) == 30
    assert [path.name for path in work.glob(".*")] == []
    with pytest.raises(OutputError, match="part 1-2: .*was made differently"):
        run_here(capsys, *embed_words(work, "a.h5", "--patches", "--on", "ray"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "other"], "one encoder at a time; 2 are named"),
        (["--gpus", "2"], "--on ray and --gpus"),
        (["--shard", "1/2"], "--on ray and --shard"),
    ],
)
def test_what_embed_cannot_do_in_parts_is_refused(here, work, words, message):
    with pytest.raises(UsageError, match=message):
        main.dispatch(embed_words(work, "a.h5", "--on", "ray", *words))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1-2", "x"])
def test_a_wrong_shard_is_a_usage_error(shard):
    with pytest.raises(UsageError, match="wanted i/N"):
        EmbedOptions(shard=shard)


# Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "mefem-cli[ray]"')
def test_parts_on_ray(tmp_path, monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        made = {}
        cluster = OnRay("ray", None, False, tmp_path)
        words = [("--version",), ("store", str(tmp_path / "nosuch.h5"))]
        items = [Part(one, tmp_path / str(number), "part") for number, one in enumerate(words)]
        cluster.run(parts.run_part, items, made.__setitem__)
        assert [made[one] for one in items] == [0, 2]
        assert "mefem store" in items[1].log.read_text()
        assert (cluster.num_machines, cluster.resources) == (1, {"num_cpus": 2})
        with pytest.raises(OutputError, match="does not see"):
            OnRay("ray", None, False, tmp_path / "elsewhere").run(parts.run_part, items[:1], made.__setitem__)
    finally:
        ray.shutdown()
    assert local.cores() >= 1
