"""Start several processes by torchrun or accelerate, on one machine, with the gloo backend on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock


TESTS = Path(__file__).parent
PATIENCE = 300  # seconds; only guards against a hang


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command with what the workers need in its environment, and wait for it."""
    paths = [str(TESTS), str(TESTS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False
    )


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--redirects", "3", "--log_dir", "{folder}/logs",
            "--master_addr", "127.0.0.1", "--master_port")  # fmt: skip
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port")  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """What a launch left behind: a folder with the workers' reports, its exit code and what it printed last."""

    folder: Path
    code: int
    stderr: str


def launched_once(
    factory: pytest.TempPathFactory,
    name: str,
    launcher: tuple[str, ...],
    worker: Path,
    *jobs: str,
    prepare: Callable[[Path], None] | None = None,
) -> Launched:
    """Launch a worker script for these jobs, once per test run; `{folder}` in the launcher's options is their folder.

    With pytest-xdist several test processes ask for it; the first one launches, the others wait. `prepare` is called
    with the folder beforehand.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"launched-by-{name}"
    result = folder / "launched.json"
    with FileLock(f"{folder}.lock"):
        if not result.exists():
            folder.mkdir()
            if prepare is not None:
                prepare(folder)
            options = [option.format(folder=folder) for option in launcher]
            ended = launch(*options, free_port(), str(worker), *jobs, str(folder))
            result.write_text(json.dumps({"code": ended.returncode, "stderr": ended.stderr}))
    return Launched(folder, **json.loads(result.read_text()))
