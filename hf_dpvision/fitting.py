"""The largest physical batch that fits the device, found on random examples before step 0.

Memory is taken to grow linearly with the number of examples, as activations do: two small batches give the line.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from .errors import DeviceMemoryError


# Left free: fragments, workspaces of other kernels, batches of a worker.
_MARGIN = 0.8
_TRIED = (2, 4)
_CGROUP = Path("/sys/fs/cgroup")

logger = logging.getLogger(__name__)


def largest_batch(run: Callable[[int], object], device: torch.device, most: int) -> int:
    """Return the largest number of examples, at most `most`, for which `run` fits into the free memory of `device`.

    Guarantee: `run` was called with that number and did not run out of memory, where the device says so (the CPU does
    not: its processes are ended instead, which is why nothing larger than the estimate is tried there).

    Args:
        run: does with that many examples what a step does.
        device: whose memory counts.
        most: beyond it a larger number would not be used.

    Raises:
        DeviceMemoryError: not even one example fits.
    """
    free = _MARGIN * free_bytes(device)
    if _peak(run, 1, device) is None:  # also makes what is made once: handles, caches of kernels
        raise DeviceMemoryError(
            f"{device} ran out of memory on a single example, before step 0. Set backward_passes=2, train fewer "
            "layers, or choose smaller images or a smaller model."
        )
    small, large = (min(n, most) for n in _TRIED)
    low, high = (_peak(run, n, device) for n in (small, large))
    if low is None or high is None:
        return 1 if low is None else small
    slope = (high - low) / max(1, large - small)
    fixed = low - slope * small
    size = most if slope <= 0 else max(1, min(most, int((free - fixed) / slope)))
    while size > 1 and _peak(run, size, device) is None:
        size //= 2
    logger.info("%d examples at once fit into %.1f GiB that are free on %s.", size, free / 2**30, device)
    return size


def _peak(run: Callable[[int], object], size: int, device: torch.device) -> int | None:
    """The peak of a run with `size` examples; None if it runs out of memory."""
    try:
        return peak_bytes(lambda: run(size), device)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
    clear_device_cache(garbage_collection=True)  # behind the handler: the error holds on to activations
    return None


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on `device`; on the CPU also within the limit of a container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return int(min(psutil.virtual_memory().available, _free_in_container()))


def _free_in_container() -> float:
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not limit.exists() or limit.read_text().strip() == "max":
        return math.inf
    return int(limit.read_text()) - int(used.read_text())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `run` has allocated at one time beyond those that were allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"), default=0)
