"""How fast is `mefem pretrain`? Each figure is a ratio to a baseline of the same run: medians of interleaved repeats.

    python examples/benchmarks/pretrain.py                  all sections
    python examples/benchmarks/pretrain.py loader           decoders, and loading against the usual pipeline
    python examples/benchmarks/pretrain.py masks            multiblock against lightly's I-JEPA collator, tables, share
    python examples/benchmarks/pretrain.py step             ViT-S/16 on the CPU against its bare products and lightly
    python examples/benchmarks/pretrain.py memory           a million crops, and a run of ViT-S/16 at batch 32
    python examples/benchmarks/pretrain.py gpu              ViT-S/16 and ViT-B/16 against the rate of an 8192 product

Wants `pip install ".[reference]"`, and for crops to load photos (`--photos`). The CPU sections take under two minutes
each on two free cores. On a busy machine compare the columns in CPU seconds, which leave out the time that other
processes had.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from contenders import STEPS, Setting, Step, count_operations, our_step, our_trainer
from loading import loader, make_data
from measuring import interleaved, median, ratio, table

from mefem_cli import parts
from mefem_cli.engine import allocator
from mefem_cli.masks import multiblock

MASK_BATCHES = (64, 256, 1024, 2048)
MATRIX_SIDE = 8192  # of the product whose rate is the device's
PAPER_OPERATIONS = {"vit_small_patch16_224": 19e9, "vit_base_patch16_224": 71e9}  # per image, issue and docs
GPU_BATCHES = {"vit_small_patch16_224": 1024, "vit_base_patch16_224": 512}


# Masks ----------------------------------------------------------------------------------------------------------------


def masks(arguments: argparse.Namespace) -> None:
    """Multiblock against the collator of lightly, the table masks, and their share of a CPU step."""
    from lightly.data.ijepa_collate import IJEPAMaskCollator

    collate = IJEPAMaskCollator(input_size=(224, 224), patch_size=16)
    blocks, generator = multiblock.Multiblock(14), torch.Generator().manual_seed(0)
    rows = []
    for count in MASK_BATCHES:
        images, draws = list(range(count)), max(MASK_BATCHES) // count  # the collator collates numbers for nothing

        def draw(count: int = count, draws: int = draws) -> None:
            for _ in range(draws):
                blocks.draw(count, generator)

        seconds = interleaved({"mefem": draw, "lightly": lambda those=images: collate(those)}, arguments.repeats)
        ours, theirs = median(seconds["mefem"], "cpu") / draws, median(seconds["lightly"], "cpu")
        rows.append((count, f"{ours / count * 1e6:.2f}", f"{theirs / count * 1e6:.1f}", f"{theirs / ours:.0f}x"))
    table("multiblock, both modes, us per image", ("batch", "mefem", "lightly I-JEPA collator", "faster by"), rows)

    rows = []
    for mask in parts.names("masks"):
        trainer = our_trainer(Setting(mask=mask, batch_size=16))
        step, objective = our_step(Setting(mask=mask, batch_size=16)), trainer.objective
        seconds = interleaved(
            {"draw": lambda one=objective: [one.splits(one.draw(16, generator)) for _ in range(100)], "step": step}, 3
        )
        draw, whole = median(seconds["draw"], "cpu") / 100, median(seconds["step"], "cpu")
        rows.append((mask, f"{draw / 16 * 1e6:.2f}", f"{whole * 1e3:.0f}", f"{100 * draw / whole:.4f} %"))
    header = ("mask", "us per image", "step, ms", "share of the step")
    table("drawing the token splits of 16 images, ViT-S/16 in fp32 on the CPU", header, rows)


# The step on the CPU --------------------------------------------------------------------------------------------------


def step(arguments: argparse.Namespace) -> None:
    """The whole step against its bare products and attention, and against the parts of lightly."""
    setting = Setting(batch_size=arguments.batch_size, backbone=arguments.backbone)
    for precision in arguments.precision:
        chosen = replace(setting, precision=precision)
        names = [name for name in STEPS if precision == "bf16" or name != "bare, float32 attention"]
        seconds = interleaved({name: STEPS[name](chosen) for name in names}, arguments.repeats)
        rows = [
            (
                name,
                f"{median(seconds[name], 'wall') * 1e3:.0f}",
                f"{median(seconds[name], 'cpu') * 1e3:.0f}",
                f"{ratio(seconds, name, 'bare', 'wall'):.3f}",
                f"{ratio(seconds, name, 'bare', 'cpu'):.3f}",
                f"{peak_memory(name, chosen, arguments):.0f}" if name in ("mefem", "lightly") else "",
            )
            for name in names
        ]
        header = ("step", "wall ms", "CPU ms", "wall / bare", "CPU / bare", "peak MiB")
        table(f"{setting.backbone}, batch {setting.batch_size}, {precision}", header, rows)


def peak_memory(name: str, setting: Setting, arguments: argparse.Namespace) -> float:
    """Return the peak memory of two steps in a process of their own, MiB, PyTorch itself included."""
    options = ["--precision", setting.precision, "--batch-size", str(setting.batch_size)]
    command = [sys.executable, __file__, "step-memory", "--only", name, "--backbone", setting.backbone, *options]
    command += ["--threads", str(arguments.threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def step_memory(arguments: argparse.Namespace) -> None:
    """Print the peak memory of this process after two steps, MiB."""
    take_step = STEPS[arguments.only](
        Setting(arguments.backbone, arguments.batch_size, precision=arguments.precision[0])
    )
    take_step()
    take_step()
    status = Path("/proc/self/status").read_text()  # getrusage would count the memory of the process before exec
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


# The step on a GPU ----------------------------------------------------------------------------------------------------


def gpu(arguments: argparse.Namespace) -> None:
    """The share of the measured matrix rate that a step reaches, and where the rest of its time goes."""
    if not torch.cuda.is_available():
        print("\ngpu: not run, there is no GPU here; run this section where there is one")
        return
    rate = matrix_rate()
    rows = []
    for backbone, batch_size in GPU_BATCHES.items():
        operations = count_operations(Setting(backbone, 2))
        print(
            f"\n{backbone}: {operations / 1e9:.1f} GFLOP per image; planned with {PAPER_OPERATIONS[backbone] / 1e9:.0f}"
        )
        for compiled in ("off", "on"):
            setting = Setting(backbone, batch_size, "bf16", "cuda", compile=compiled)  # type: ignore[arg-type]
            take_step = our_step(setting)
            seconds = cuda_seconds(take_step, arguments.repeats)
            reached = operations * batch_size / seconds / rate
            gigabytes = torch.cuda.max_memory_allocated() / 1e9
            images = f"{batch_size / seconds:.0f}"
            rows.append(
                (backbone, batch_size, compiled, f"{seconds * 1e3:.1f}", images, f"{gigabytes:.1f}", f"{reached:.1%}")
            )
            where_the_time_goes(take_step, f"{backbone}, compile {compiled}")
            torch.cuda.reset_peak_memory_stats()
    header = ("backbone", "batch", "compile", "step, ms", "images/s", "peak GB", "of the matrix rate")
    table(
        f"bf16 on {torch.cuda.get_device_name()}, {rate / 1e12:.0f} TFLOP/s in an {MATRIX_SIDE}^3 product", header, rows
    )


def matrix_rate() -> float:
    """Return the operations per second of a large bf16 product on the GPU."""
    left, right = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * MATRIX_SIDE**3 / cuda_seconds(lambda: left @ right, 50)


def cuda_seconds(take_step: Step, repeats: int) -> float:
    """Return the median seconds of a step on the GPU after ten that warm up."""
    for _ in range(10):
        take_step()
    seconds = []
    for _ in range(max(repeats, 20)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        take_step()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


KERNELS = {  # a word of a kernel's name -> what it does; the first that fits counts
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "wgmma", "splitk"),
    "optimiser and EMA": ("adam", "lerp", "multi_tensor", "foreach"),
    "norms": ("layer_norm", "layernorm", "gammabeta"),
    "GELU": ("gelu",),
    "loss": ("smooth_l1",),
    "gathers": ("index", "gather", "scatter", "embedding"),
    "copies and casts": ("copy", "memcpy", "memset", "cat", "fill"),
    "compiled": ("triton",),
    "sums": ("reduce",),
}


def where_the_time_goes(take_step: Step, title: str) -> None:
    """Print the GPU time of three steps by kind of kernel, and the time in which the GPU waits."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        begun = time.perf_counter()
        for _ in range(3):
            take_step()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - begun) / 3 * 1e3
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.key.lower()
            kind = next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "elementwise")
            spent[kind] = spent.get(kind, 0.0) + event.self_device_time_total / 3e3
    spent["waiting"] = max(wall - sum(spent.values()), 0.0)
    rows = [(kind, f"{ms:.2f}", f"{ms / wall:.1%}") for kind, ms in sorted(spent.items(), key=lambda item: -item[1])]
    table(f"{title}: where a step of {wall:.1f} ms (profiled) goes", ("kind", "ms", "share"), rows)


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> None:
    """Print the memory that the index of a million crops takes, and that of a whole run of ViT-S/16 at batch 32."""
    with tempfile.TemporaryDirectory(prefix="mefem-benchmark-") as name:
        folder = Path(name)
        _million("make", folder / "million")
        mebibytes, seconds = map(float, _million("open", folder / "million").split())
        rows = [("added by opening 1,000,000 crops", f"{mebibytes:.0f}", f"{seconds:.1f}")]
        make_data(arguments.photos, folder / "crops")
        command = [sys.executable, "-m", "mefem_cli", "pretrain", str(folder / "crops"), "-o", str(folder / "run")]
        command += ["--epochs", "1", "--batch-size", "32", "--limit", "160", "--monitor", "32", "--backbone"]
        begun = time.perf_counter()
        peak = _peak([*command, "vit_small_patch16_224"], folder)
        rows.append(("mefem pretrain, ViT-S/16, batch 32", f"{peak:.0f}", f"{time.perf_counter() - begun:.0f}"))
    table("memory", ("what", "MiB", "s"), rows)


def _million(verb: str, folder: Path) -> str:
    command = [sys.executable, str(Path(__file__).with_name("million.py")), verb, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _peak(command: list[str], folder: Path) -> float:
    """Run a command; return the most memory that it held, MiB."""
    job = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert job.stderr is not None
    told = job.stderr.read()
    _, status, usage = os.wait4(job.pid, 0)
    if status:
        raise SystemExit(told.decode())
    return usage.ru_maxrss / 1024


def machine() -> str:
    """Return the processor, the threads and the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


SECTIONS = {"loader": loader, "masks": masks, "step": step, "memory": memory, "gpu": gpu}


def main() -> None:
    """Run the sections that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", choices=[*SECTIONS, "step-memory"], default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument(
        "--photos",
        type=Path,
        default=Path("../shared/data/faces"),
        help="photos to cut crops from (default: %(default)s)",
    )
    parser.add_argument("--only", choices=list(STEPS), default="mefem", help="the step whose memory is measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    allocator.keep_freed_memory()  # as mefem pretrain does on a CPU; it serves all steps alike
    if arguments.section == ["step-memory"]:
        step_memory(arguments)
        return
    print(machine())
    for name in arguments.section:
        SECTIONS[name](arguments)


if __name__ == "__main__":
    main()
