"""What the fields of one statement say about each other; no accountant is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from .. import wording
from ..accounting import Bounds, Event, Ledger, claim
from ..accounting.search import search_of
from .findings import Finding, difference, differences


_ROUNDING = 1e-12  # relative, of one product or quotient


def inconsistencies(statement: Mapping[str, Any], where: str) -> list[Finding]:
    """Return a finding for every field that contradicts another one of the same statement.

    Args:
        statement: valid by its schema.
        where: name of its file in the findings.
    """
    relations = (*_guarantee(statement), *_run(statement), *_noise(statement), *_words(statement))
    return [difference(where, *relation) for relation in relations]


Relation = tuple[str, object, object, str]  # field, stated, expected, why


def _guarantee(statement: Mapping[str, Any]) -> Iterator[Relation]:
    guarantee, accountant = statement["guarantee"], statement["accountant"]
    reasons = [
        reason
        for reason, holds in (
            ("mechanism is none", statement["mechanism"] == "none"),
            (f"unsafe_flags has {', '.join(statement['unsafe_flags'])}", bool(statement["unsafe_flags"])),
        )
        if holds
    ]
    if reasons:
        if guarantee["epsilon"] != "inf":
            yield "guarantee.epsilon", guarantee["epsilon"], "inf", reasons[0]
    elif guarantee["epsilon"] != accountant["upper"]:
        yield "guarantee.epsilon", guarantee["epsilon"], accountant["upper"], "accountant.upper is what may be claimed"
    without = "disable_dp" in statement["unsafe_flags"]
    if without != (statement["mechanism"] == "none"):
        yield "mechanism", statement["mechanism"], "none" if without else "dp-sgd", "unsafe_flags say so"
    if guarantee["epsilon"] != "inf":
        yield from _finite(guarantee, accountant, statement["sampling"]["dataset_size"])


def _finite(guarantee: Mapping[str, Any], accountant: Mapping[str, Any], dataset_size: int) -> Iterator[Relation]:
    ends = [accountant[name] for name in ("lower", "estimate", "upper")]
    if ends != sorted(ends):
        yield "accountant.estimate", ends[1], [ends[0], ends[2]], "between lower and upper"
    delta = guarantee["delta"]
    if delta * dataset_size >= 1:
        expected = f"below 1 / {dataset_size}"
        yield "guarantee.delta", delta, expected, "else publishing one whole example would satisfy the guarantee"


def _run(statement: Mapping[str, Any]) -> Iterator[Relation]:
    sampling, events, flags = statement["sampling"], statement["events"], statement["unsafe_flags"]
    steps = sum(event["steps"] for event in events)
    if statement["steps"] != steps:
        yield "steps", statement["steps"], steps, "sum of the steps of events"
    size, batch = sampling["dataset_size"], sampling["expected_batch_size"]
    rate = batch / size if size else 0.0
    if not _close(sampling["rate"], rate):
        yield "sampling.rate", sampling["rate"], rate, "sampling.expected_batch_size / sampling.dataset_size"
    if events and "disable_dp" not in flags and not _one_of(sampling["rate"], "sample_rate", statement):
        yield "sampling.rate", sampling["rate"], events[-1]["sample_rate"], f"events[{len(events) - 1}].sample_rate"
    trained = statement["trainable_parameters"]
    for kind in ("trained", "frozen"):
        if bool(trained[kind]) != bool(trained[f"{kind}_tensors"]):
            tensors = len(trained[f"{kind}_tensors"])
            yield f"trainable_parameters.{kind}", trained[kind], f"numbers in {tensors} tensors", f"{kind}_tensors"
    scope = "subset" if trained["frozen"] else "all"
    if trained["scope"] != scope:
        yield "trainable_parameters.scope", trained["scope"], scope, "trainable_parameters.frozen"
    private = statement["evaluation"]["data"] == "private"
    if statement["evaluation"]["metrics_are_private"] != private:
        yield "evaluation.metrics_are_private", not private, private, "evaluation.data"


def _noise(statement: Mapping[str, Any]) -> Iterator[Relation]:
    noise, clipping, events = statement["noise"], statement["clipping"], statement["events"]
    fixed = noise["rng"].startswith("fixed-seed")
    if fixed != ("fixed_randomness" in statement["unsafe_flags"]):
        expected = ["fixed_randomness"] if fixed else []
        yield "unsafe_flags", statement["unsafe_flags"], expected, "noise.rng"
    cryptographic = noise["rng"].endswith("-aes256ctr")  # the only one of this package that is
    if noise["cryptographic"] != cryptographic:
        yield "noise.cryptographic", noise["cryptographic"], cryptographic, "noise.rng"
    if statement["mechanism"] == "none":
        return
    if clipping is None:
        yield "clipping", None, "a bound", "mechanism is dp-sgd"
        return
    if not _close(clipping["sensitivity"], clipping["bound"]):
        why = f"clipping.bound, with {clipping['function']} clipping"
        yield "clipping.sensitivity", clipping["sensitivity"], clipping["bound"], why
    yield from _groups(clipping)
    std = noise["multiplier"] * clipping["sensitivity"]
    if not _close(noise["std"], std):
        yield "noise.std", noise["std"], std, "noise.multiplier * clipping.sensitivity"
    if events and not _one_of(noise["multiplier"], "noise_multiplier", statement):
        why = f"events[{len(events) - 1}].noise_multiplier"
        yield "noise.multiplier", noise["multiplier"], events[-1]["noise_multiplier"], why


def _groups(clipping: Mapping[str, Any]) -> Iterator[Relation]:
    if clipping["granularity"] != "global":
        total = math.hypot(*clipping["groups"].values())
        if not _close(total, clipping["bound"]):
            yield "clipping.groups", total, clipping["bound"], "the squares of all add up to that of clipping.bound"


def _words(statement: Mapping[str, Any]) -> Iterator[Relation]:
    search = search_of(statement["hyperparameter_tuning"])
    sentences = wording.not_covered(statement["evaluation"]["data"], wording.unit_of(statement), search)
    for path, stated, expected in differences(statement["not_covered"], sentences, "not_covered"):
        yield path, stated, expected, "what this mechanism leaves out"
    if statement["unsafe_flags"] or "inf" in (statement["accountant"]["upper"], statement["guarantee"]["epsilon"]):
        return
    text = _claim(statement)
    for stated, expected in zip(statement["claim"].split("\n"), text.split("\n"), strict=False):
        if stated != expected:
            yield "claim", stated, expected, "what the other fields say"
    if statement["claim"].count("\n") != text.count("\n"):
        yield "claim", f"{statement['claim'].count(chr(10)) + 1} lines", f"{text.count(chr(10)) + 1} lines", "as above"


def _claim(statement: Mapping[str, Any]) -> str:
    accountant, clipping, unit = statement["accountant"], statement["clipping"], wording.unit_of(statement)
    bounds = Bounds(
        lower=min(accountant["lower"], accountant["upper"]),
        estimate=min(max(accountant["estimate"], accountant["lower"]), accountant["upper"]),
        upper=accountant["upper"],
        accountant=accountant["name"],
        delta=statement["guarantee"]["delta"],
        eps_error=accountant["eps_error"],
        delta_error=accountant["delta_error"],
        notes=tuple(accountant["notes"]),
    )
    return claim(
        bounds,
        Ledger(Event(**event) for event in statement["events"]),
        clip_norm=None if clipping is None else clipping["sensitivity"],
        dataset_size=statement["sampling"]["dataset_size"] or None,
        privacy_unit=unit.what,
        noun=unit.noun,
        count=unit.count,
        search=search_of(statement["hyperparameter_tuning"]),
    )


def _one_of(stated: float, name: str, statement: Mapping[str, Any]) -> bool:
    """Whether the value is that of the last steps; of a search that is composed, the run chosen may be any."""
    chosen = statement["hyperparameter_tuning"]["on_private_data"] == "accounted"
    return any(_close(stated, event[name]) for event in statement["events"][0 if chosen else -1 :])


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _ROUNDING * max(abs(one), abs(other))
