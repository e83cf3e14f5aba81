"""The section "Why not less" of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .floor import Reasons, largest
from .measure import SAME_PARAMETERS, CaseResult


HEADING = "Why not less"
TEXT = """\
Floors are ratios to the non-private step, as everywhere here. Operations are those of matrix products and
convolutions: the ordinary step's, counted by torch, and by the sizes of each use what the norms need beyond it. At
least that is half of both symmetric Gram matrices, the gradient once more, or, where the gradients of single examples
are no larger than activation and output gradient, the sum of kept ones. Bytes are estimated from the sizes of tensors,
without workspaces of kernels: what the forward pass saves is released while that which one pass holds for the sums
comes into being, for each use activation and output gradient or the gradients of single examples, at least the smaller
of both. Where few parameters are trained, the floor is the measured peak of the ordinary step that trains the same.

A ratio of time above that of operations is not arithmetic. The profile tells what it is: self CPU time by kind of
operator, the least of three steps of each side, in hundredths of the non-private step; the profiler itself slows small
operators."""


def section(cases: Sequence[CaseResult], ours: str, title: Callable[[CaseResult], str], table: Callable) -> list[str]:
    """Lines of the section: a row per case, then the details of each; `ours` names the side that is explained."""
    explained = [result for result in cases if result.reasons is not None]
    if not explained:
        return []
    head = (
        "model", "operations, floor", "planned", "time", "memory, floor", "planned", "measured", "largest differences",
    )  # fmt: skip
    lines = [f"## {HEADING}", "", TEXT, "", *table(head, [_row(result, ours, title) for result in explained]), ""]
    for result in explained:
        lines += [f"### {title(result)}: operations, bytes, profile", "", *_details(result.reasons, table), ""]
    return lines


def _row(result: CaseResult, ours: str, title: Callable[[CaseResult], str]) -> tuple[str, ...]:
    found, side, same = result.reasons, result.find(ours), result.find(SAME_PARAMETERS)
    memory, operations = found.memory, found.operations
    rest = [f"{kind} {100 * share:+.0f}" for kind, share in largest(found.profile, 3)] if found.profile else []
    return (
        title(result),
        f"{operations.least_ratio:.2f}",
        f"{operations.planned_ratio:.2f}",
        f"{result.time_ratio(side).median:.2f}",
        f"{memory.least / memory.non_private if same is None else result.memory_ratio(same):.2f}",
        f"{memory.planned / memory.non_private:.2f}",
        f"{result.memory_ratio(side):.2f}",
        ", ".join(rest),
    )


def _details(found: Reasons, table: Callable) -> list[str]:
    operations, memory = found.operations, found.memory
    counts = [
        ("same parameters, ordinary step", operations.same_parameters),
        ("ours, counted by torch", operations.counted),
        ("ours beyond the ordinary step: Gram matrices", operations.gram),
        ("gradients instantiated for the norm only", operations.instantiation),
        ("sums of kept gradients", operations.sums),
        ("beyond the ordinary step, at least", operations.least),
    ]
    sizes = [
        ("saved by the forward pass", memory.saved),
        ("sums of the trained tensors", memory.sums),
        ("held: activations and output gradients", memory.operands),
        ("held: gradients of single examples", memory.kept),
        ("peak, planned", memory.planned),
        ("peak, at least", memory.least),
    ]
    rows = [("operations, non-private step (G)", f"{operations.non_private / 1e9:.2f}", "1.000")]
    rows += [(name, f"{value / 1e9:.2f}", f"{value / operations.non_private:.3f}") for name, value in counts]
    rows += [("bytes, peak of the non-private step (MiB)", f"{memory.non_private / 2**20:.0f}", "1.000")]
    rows += [(name, f"{value / 2**20:.0f}", f"{value / memory.non_private:.3f}") for name, value in sizes]
    lines = table(("operations and bytes", "amount", "of the non-private step"), rows)
    if not found.profile:
        return lines
    whole = sum(plain for plain, _ in found.profile.values())
    times = [
        (kind, f"{100 * plain / whole:.1f}", f"{100 * ours / whole:.1f}", f"{100 * (ours - plain) / whole:+.1f}")
        for kind, (plain, ours) in found.profile.items()
    ]
    total = sum(ours for _, ours in found.profile.values())
    times.append(("all", "100.0", f"{100 * total / whole:.1f}", f"{100 * (total - whole) / whole:+.1f}"))
    return [*lines, "", *table(("self time by kind", "non-private", "ours", "difference"), times)]
