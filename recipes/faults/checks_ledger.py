"""Checks of the ledger, the claim and what is left on the disk."""

from __future__ import annotations

import json
import math

from hf_dpvision import accounting

from .findings import Finding, equal
from .lab import CRASH_AT, PLAIN, PLAIN_SIZE, RESUMED_STEPS, SAVED_AT, SPARSE, SPARSE_SIZE, Lab


DELTA = 1e-4


def steps(lab: Lab) -> Finding:
    """The ledger on disk has as many steps as were released, the empty ones among them."""
    runs = (lab.plain, lab.sparse)
    return equal([r.charged for r in runs], [len(r.released) for r in runs], "steps charged")


def charged_first(lab: Lab) -> Finding:
    """The step is in the ledger on disk before its noise is drawn, once for each parameter."""
    early = drawn_for_nothing = 0
    for seen in (lab.plain, lab.sparse):
        starts = [0, *seen.draws_at_releases[:-1]]
        for number, (start, end) in enumerate(zip(starts, seen.draws_at_releases, strict=True), 1):
            early += any(charged != number for charged in seen.charged_at_draws[start:end])
            drawn_for_nothing += end - start != len(seen.names)
    return equal((early, drawn_for_nothing), (0, 0), "(steps not charged first, steps with other than one draw each)")


def rates(lab: Lab) -> Finding:
    """Sample rate and noise multiplier in the ledger are those of the run."""
    expected = [{(s["logical_batch_size"] / size, s["noise_multiplier"])}
                for s, size in ((PLAIN, PLAIN_SIZE), (SPARSE, SPARSE_SIZE))]  # fmt: skip
    found = [lab.plain.rates, lab.sparse.rates]
    told = "; ".join(", ".join(f"q = {q:.4g} and sigma = {sigma:.4g}" for q, sigma in rates) for rates in found)
    return Finding(found != expected, f"ledger says {told}")


def budget(lab: Lab) -> Finding:
    """One step more than was planned is refused."""
    return equal([lab.plain.over_budget, lab.sparse.over_budget], [True, True], "refused")


def claim(lab: Lab) -> Finding:
    """The epsilon that is claimed is the upper bound for the steps released, and not below a certified lower bound."""
    facts = {"sample_rate": PLAIN["logical_batch_size"] / PLAIN_SIZE, "noise_multiplier": PLAIN["noise_multiplier"],
             "steps": len(lab.plain.released), "delta": DELTA}  # fmt: skip
    trainer = lab.plain.trainer
    lower, found = accounting.epsilon(**facts).lower, []
    for accountant in ("rdp", "prv"):
        trainer.args.accountant = accountant
        found.append((trainer.epsilon().upper, accounting.epsilon(**facts, accountant=accountant).upper))
    trainer.args.accountant = "rdp"
    wrong = any(claimed != true or claimed < lower for claimed, true in found)
    told = ", ".join(f"{claimed:.4f} for {true:.4f}" for claimed, true in found)
    return Finding(wrong, f"claimed {told}; at least {lower:.4f}")


def after_resume(lab: Lab) -> Finding:
    """A resumed run keeps the whole ledger: steps before the crash, lost ones too, and those after it."""
    first, second = lab.interrupted
    expected = (CRASH_AT, CRASH_AT + RESUMED_STEPS - SAVED_AT)
    return equal((first.charged, second.charged), expected, "steps charged before and after")


def left_on_disk(lab: Lab) -> Finding:
    """No file holds a sampling key or the state of the noise generator, and no saved log a loss."""
    secrets = {secret for seen in lab.interrupted for secret in seen.secrets}
    spelled = [form for secret in secrets for form in (secret, secret.hex().encode())]
    files = [path for path in (lab.folder / "resumed").rglob("*") if path.is_file()]
    found = sorted({path.name for path in files if any(form in path.read_bytes() for form in spelled)})
    logs = [json.loads(path.read_text())["log_history"] for path in files if path.name == "trainer_state.json"]
    losses = sum("loss" in entry or "train_loss" in entry for log in logs for entry in log)
    return equal((len(secrets) > 0, found, losses), (True, [], 0), "(secrets looked for, files with one, losses)")


def nothing_private_returned(lab: Lab) -> Finding:
    """Neither logs nor the result of `train()` hold the loss on private data."""
    kept = [key for entry in lab.plain.logs for key in entry if "loss" in key]
    return equal((math.isnan(lab.plain.loss), kept), (True, []), "(loss is NaN, losses logged)")
