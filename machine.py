"""What this machine has: its devices and dtypes by name, their memory, time and bandwidth, a compiler.

    python -c "import machine; print(machine.device_name(machine.pick_device(None)))"

What a user names on a command line is checked here, before anything is loaded.

Sources: PyTorch's documentation of torch.cuda; proc(5) for free memory.
"""

import contextlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hotloop"


def pick_device(name: str | None, kinds: Sequence[str] = ("cuda", "mps", "cpu")) -> torch.device:
    """The device of that name, or the first of `kinds` that there is; ValueError where it is not available."""
    counts = {"mps": int(torch.backends.mps.is_available()), "cpu": 1}
    counts["cuda"] = torch.cuda.device_count() if torch.cuda.is_available() else 0  # it counts those it cannot use, too
    if name is None:
        name = next(kind for kind in kinds if counts[kind])
    counts = {kind: counts[kind] for kind in sorted(kinds)}
    kind, _, index = name.partition(":")
    if kind not in counts or (index and not index.isdigit()):
        raise ValueError(f"--device {name}: not known; known: {', '.join(counts)} (or cuda:N)")
    if int(index or 0) >= counts[kind]:
        there = ", ".join(f"{k} ({n})" for k, n in counts.items() if n)
        raise ValueError(f"--device {name}: not available on this machine; available: {there}")
    if index and kind == "cuda":
        torch.cuda.set_device(int(index))  # kernels and graphs run on the current one
    return torch.device(name)


def pick_dtype(name: str | None) -> torch.dtype | None:
    """bf16 | fp16 | fp32 -> torch dtype; None: as the checkpoint has it."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype {name}: not known; known: {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def check_compiler(device: torch.device) -> None:
    """ValueError where torch.compile would find no C++ compiler, which it needs on a CPU."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as Inductor looks for it
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"--compile on a CPU needs a C++ compiler, and there is no {compiler}: install it, or name "
                         "another one in CXX, or leave --compile out")  # fmt: skip


def device_name(device: torch.device) -> str:
    """What the recorded measurements call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
    return f"{kind}, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, within the limits of a container or a shell too; None where unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    room = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        room.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError, KeyError):  # version 2 of control groups; no number: no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        room.append(limit - used + int(stat["inactive_file"]))  # files that were read make way
    with contextlib.suppress(OSError):
        limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], int(Path("/proc/self/statm").read_text().split()[0])
        room += [limit - pages * resource.getpagesize()] if limit != resource.RLIM_INFINITY else []
    return min(room, default=None)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held so far: on the GPU where there is one, else by the process. GB = 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux; what getrusage tells may be the parent's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def peak_bandwidth(device: torch.device) -> float | None:
    """Read bandwidth in GB/s as it was last measured on this device (`benchmark.py`); None: it has not been."""
    try:
        return json.loads((CACHE_DIR / "bandwidth.json").read_text())[device_name(device)]
    except (OSError, ValueError, KeyError):
        return None


def remember_bandwidth(device: torch.device, gbs: float) -> None:
    """Keep a measured read bandwidth in GB/s for `peak_bandwidth`, in the user's cache directory."""
    file = CACHE_DIR / "bandwidth.json"
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_suffix(f".{os.getpid()}.tmp")
    tmp.write_text(json.dumps(known | {device_name(device): gbs}))
    tmp.replace(file)


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(work: Callable, device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin
