"""One kernel starts while the one before it still runs: programmatic dependent launch, on GPUs since Hopper.

A kernel that takes part is launched with `launch_pdl=overlaps(device)`, fetches what it may (weights), and calls
`wait_for_input` before it reads what the kernel before it wrote. Between two small kernels this saves microseconds.

Try it:  TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py

Sources: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

import functools
from types import SimpleNamespace

import torch


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends: programmatic dependent launch, since Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def triton_programs() -> SimpleNamespace:
    """Import Triton and define the function that kernels call; once."""
    # Triton looks up what a kernel uses among the names of its file: those are global, here as in the other files.
    global tl, wait_for_input
    import triton
    import triton.language as tl
    from triton.language.extra import cuda

    @triton.jit
    def wait_for_input(OVERLAP: tl.constexpr):
        """Programmatic dependent launch: until here, the kernel before this one may still run; from here on, the next
        one may start. What was written two kernels ago is complete even before this, because the kernel in between
        either waited like this before it let this one start, or is of another kind, which lets nothing start early.
        (Neither do exchange_cuda.cu's: right after them comes a linear, which reads nothing but constants before.)
        What the kernel right before this one wrote is complete only after this, whatever its kind.
        """
        if OVERLAP:
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()

    return SimpleNamespace(wait_for_input=wait_for_input)
