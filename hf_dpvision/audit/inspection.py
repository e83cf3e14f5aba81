"""The audit of a whole training run: canaries in, train, score, and what the scores show of epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.examples import Streamed
from ..errors import ArgumentRefused
from .audited import AuditedTrainer
from .canaries import CanarySet, with_canaries
from .single_run import best_guesses


@dataclass(frozen=True)
class Finding:
    """What the audit of one run found.

    Attributes:
        claimed: epsilon that the audited run claims, at `delta`.
        lower: what epsilon is at least, wrong with probability at most `1 - confidence`.
        canaries, included: how many there were, and how many were in.
        guesses, right: those that the bound comes from.
        tries: (guesses, right, bound) of every number of guesses that was tried.
        scores: `[canaries]`; how much the loss of each fell by training. Private, as the coins are.
        present: `[canaries]`; the coins.
    """

    claimed: float
    delta: float
    lower: float
    confidence: float
    canaries: int
    included: int
    guesses: int
    right: int
    tries: tuple[tuple[int, int, float], ...]
    scores: np.ndarray = field(repr=False)
    present: np.ndarray = field(repr=False)

    @property
    def violated(self) -> bool:
        """Whether the claim is contradicted."""
        return self.lower > self.claimed

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without scores and coins; an infinite claim is the text "inf"."""
        told = {name: value for name, value in asdict(self).items() if name not in ("scores", "present")}
        claimed = self.claimed if math.isfinite(self.claimed) else "inf"
        return told | {"claimed": claimed, "tries": [list(one) for one in self.tries], "violated": self.violated}


def audit_run(
    trainer: AuditedTrainer, canaries: int, confidence: float = 0.95, *, coins: np.random.Generator | None = None
) -> Finding:
    """Put canaries into the training set of `trainer`, train it, and bound epsilon from below by their losses.

    Each canary is in with probability 1/2; the auditor guesses which were, by how much their loss fell from the first
    weights to the last, without looking at anything between. See `single_run.py` for the arithmetic.

    Guarantee: if the run is (epsilon, delta)-differentially private, `lower` exceeds epsilon with probability at most
    `1 - confidence`. The reverse does not hold: a low bound proves nothing.

    Args:
        trainer: a `DPTrainer` that has not been trained. Its training set is replaced; the model that comes out has
            seen mislabelled examples and is not for release.
        canaries: how many; at most half as many as there are examples.
        confidence: in (0, 1).
        coins: for tests; by default the operating system's.

    Raises:
        ArgumentRefused: the run claims no finite epsilon, has been trained, groups its rows, or reads a stream.
        RefusedError: as `with_canaries` and `DPTrainer.train`.
    """
    _refuse(trainer)
    label = trainer.args.label_names[0]
    audited = with_canaries(trainer.train_dataset, canaries, label, coins)
    trainer.train_dataset = audited
    losses = {}
    trainer.model.to(trainer.args.device)
    losses["before"] = _losses(trainer, audited)
    trainer.args.run_report = False  # nothing of this run is for release
    trainer.train()
    losses["after"] = _losses(trainer, audited)
    statement = trainer.privacy_statement()
    claimed, delta = statement["guarantee"]["epsilon"], statement["guarantee"]["delta"]
    scores = losses["before"] - losses["after"]
    scores = np.where(np.isnan(scores), 0.0, scores)  # a diverged run: no guess is better than a coin
    lower, guesses, right, tries = best_guesses(scores, audited.present, delta, confidence)
    return Finding(
        claimed=math.inf if claimed == "inf" else claimed,
        delta=delta,
        lower=lower,
        confidence=confidence,
        canaries=canaries,
        included=int(audited.present.sum()),
        guesses=guesses,
        right=right,
        tries=tuple(tries),
        scores=scores,
        present=audited.present,
    )


def _refuse(trainer: AuditedTrainer) -> None:
    args = trainer.args
    if args.disable_dp:
        raise ArgumentRefused("disable_dp=True: the run claims nothing, so there is no claim to audit.")
    if trainer.state.global_step or trainer.privacy_statement()["steps"]:
        raise ArgumentRefused("The trainer has been trained already: the canaries must be in from the first step on.")
    if args.privacy_unit_column is not None:
        raise ArgumentRefused(
            f"privacy_unit_column={args.privacy_unit_column!r}: the audit inserts single examples, and the claim is "
            "about units. Audit the same recipe without it."
        )
    if isinstance(trainer.train_dataset, Streamed):
        raise ArgumentRefused("The training set is a stream, and canaries go in by index. Pass a map-style data set.")
    if args.world_size > 1:
        raise ArgumentRefused(f"{args.world_size} processes: every process would flip other coins. Start one.")


def _losses(trainer: AuditedTrainer, audited: CanarySet) -> np.ndarray:
    """The loss of every canary, in or not, in evaluation mode; `[canaries]`."""
    args = trainer.args
    size = max(1, args.per_device_eval_batch_size)
    trainer.model.eval()
    found = []
    with torch.no_grad():
        starts = range(0, len(audited.canaries), size)
        for start in tqdm(starts, "losses of the canaries", delay=2, leave=False, disable=not args.shows_progress):
            batch = trainer.data_collator(list(audited.canaries[start : start + size]))
            found.append(trainer.per_sample_loss(trainer.model, _on(batch, args.device)).float().cpu())
    return torch.cat(found).numpy()


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
