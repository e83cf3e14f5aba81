"""Settings for all tests: one thread, no network, the same draws in every run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator


# Before anything imports the Hub client, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402


settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the tensors are tiny; several test processes share the machine


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Random weights and inputs are the same whatever ran before, and so are the algorithms."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)  # a trainer with full_determinism=True switches them on for good


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """A recipe that a test runs in this process may quieten loggers; the next test hears them again."""
    loggers = [logging.getLogger(name) for name in ("hf_dpvision", "hf_dpvision.checkpoints", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
