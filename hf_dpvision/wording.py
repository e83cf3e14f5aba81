"""The privacy statement in words: what the card shows and `hf-dpvision statement` prints, from `privacy.json` alone.

Everything here depends on the statement and on nothing else, so that anyone can make the same text again and compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .accounting.claim import round_down, round_up
from .accounting.search import Search, search_of


@dataclass(frozen=True)
class Unit:
    """The unit of privacy in words.

    Attributes:
        what: in the claim.
        noun, count: what the claim calls one unit, and their public number.
        short: beside a value of epsilon.
        record: in the table.
        limit: further rows of the table.
        neighbour: what differs between neighbouring data sets.
        member: what the table calls one unit.
        particular, used: in the plain sentence.
        covered, left_out: sentences on what is protected, and on what is not.
    """

    what: str
    noun: str
    count: str
    short: str
    record: str
    limit: tuple[tuple[str, str], ...]
    neighbour: str
    member: str
    particular: str
    used: str
    covered: tuple[str, ...]
    left_out: tuple[str, ...]


_PRETRAINING = "The data the model was pretrained on. The guarantee is about fine-tuning."
_EXAMPLE = Unit(
    what="one training image (one record of the training set)",
    noun="record",
    count="size of the data set",
    short="one training image",
    record="one example (one row of the training set)",
    limit=(),
    neighbour="one example contributes nothing; the size of the data set is public",
    member="example",
    particular="one particular image it was fine-tuned on, even knowing all the other ones",
    used="that image having been used",
    covered=(
        "Each single image of the training set together with its label: its influence on the released weights is "
        "bounded as stated, at every step of the run and whatever else an attacker knows.",
    ),
    left_out=(
        _PRETRAINING,
        "The number of training images and the list of classes; both count as public.",
        "Several images of one person, taken together: the unit is one image. Protection of k images weakens with k.",
    ),
)


def unit_in_words(column: str | None, most: int | None) -> Unit:
    """Return how to speak of the unit of privacy.

    Args:
        column: all rows with the same value in it are one unit; None if every example is one.
        most: k, the most examples of one unit in one step; None if every example is one.
    """
    if column is None:
        return _EXAMPLE
    together = f"all training images with the same value in column {column!r}"
    return Unit(
        what=f"{together}, taken together; at most {most} of them, chosen anew at random, take part in one step",
        noun="unit",
        count="number of units",
        short=f"{together}, at most {most} of them in a step",
        record=f"one unit (all rows of the training set with the same value in column {column!r})",
        limit=(("examples of one unit in one step", f"at most {most}, chosen anew at random where there are more"),),
        neighbour="one unit, with all its examples, contributes nothing; the number of units is public",
        member="unit",
        particular=f"one particular unit it was fine-tuned on, that is {together}, even knowing all the other units",
        used="the images of that unit having been used",
        covered=(
            f"All images of the training set with the same value in column {column!r}, together with their labels: "
            "their joint influence on the released weights is bounded as stated, at every step of the run and "
            "whatever else an attacker knows.",
        ),
        left_out=(
            _PRETRAINING,
            "The number of units, that of all training images, and the list of classes; they count as public.",
            "Several units, taken together, such as relatives: protection of k units weakens with k. Whoever has "
            f"images under several values of column {column!r} is several units.",
            "Images of a unit that are not in the training set, held-out ones among them.",
        ),
    )


def unit_of(statement: Mapping[str, Any]) -> Unit:
    """Return how to speak of the unit that a statement names."""
    if statement["unit_of_privacy"] == "example":
        return _EXAMPLE
    return unit_in_words(statement["grouping"]["column"], statement["grouping"]["examples_per_unit"])


_EVALUATION = {
    "private": "Values measured on held-out data, which is not public, and every choice made by looking at them.",
    "public": "Values measured on held-out data. That data is public, and nothing protects it.",
}
_CHOICES = (
    "A search over hyper-parameters, or a choice among several runs on the same images: each further run spends "
    "budget of its own."
)
_OTHER_CHOICES = (
    "Any search over hyper-parameters, or choice among runs on the same images, beyond the one accounted for: each "
    "further run spends budget of its own."
)
_OTHER_RUNS = (
    "The runs of the search that were not chosen, and how many runs there were: the guarantee holds as long as "
    "nothing of them is released."
)
_NOT_COVERED_AFTER = (
    "Anything else released from the same images, which adds to the budget spent.",
    "What can be learned about a person from such images in general, whether or not theirs was used.",
    "Attacks on the rounding of floating-point noise, and on the time that training took.",
)
_ROWS = {
    "indexed": "",
    "materialised": "; the rows are those of a stream that was kept as a whole",
    "windows": "; the rows are those of a stream that was gone through once for some steps at a time",
}
_LARGEST_EXPONENT = 700.0  # e^epsilon beyond it is no number


def not_covered(eval_data: str, unit: Unit, search: Search | None = None) -> list[str]:
    """Return the sentences on what the guarantee leaves out.

    Args:
        eval_data: `private` or `public`.
        unit: of privacy.
        search: over settings that is paid for, if there was one.
    """
    choices = [_CHOICES] if search is None else [_OTHER_CHOICES]
    if search is not None and search.stopping is not None:
        choices.append(_OTHER_RUNS)
    return [*unit.left_out, _EVALUATION[eval_data], *choices, *_NOT_COVERED_AFTER]


def is_protected(statement: Mapping[str, Any]) -> bool:
    """Whether the statement claims a finite epsilon."""
    return statement["guarantee"]["epsilon"] != "inf"


def odds(epsilon: float) -> str:
    """Return the largest factor e^epsilon by which the odds of one unit's membership can change, rounded up."""
    factor = math.exp(min(epsilon, _LARGEST_EXPONENT))
    return f"{factor:.3g}" if factor > 1e6 else round_up(factor, digits=1 if factor < 100 else 0)


def plain_sentences(statement: Mapping[str, Any]) -> list[str]:
    """Return what the guarantee means, for a reader who knows nothing of the field; one paragraph an item."""
    if not is_protected(statement):
        return [
            "Fine-tuned without a privacy guarantee. The model may reveal which images it was trained on, and what "
            "they show."
        ]
    epsilon, delta = statement["guarantee"]["epsilon"], statement["guarantee"]["delta"]
    unit = unit_of(statement)
    return [
        "Fine-tuned with differential privacy: epsilon at most "
        f"{round_up(epsilon, digits=3)} at delta {delta:g}.",
        "In plain words: there is a proven limit to what anyone can find out from this model about "
        f"{unit.particular}. The odds they give for {unit.used} change by a factor of at most {odds(epsilon)} (that "
        f"is e^epsilon), except with a probability of about {delta:g}. A smaller epsilon means a stronger protection.",
    ]


def rows(statement: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table of a protected model: what is stated, and its value."""
    guarantee, accountant, noise = statement["guarantee"], statement["accountant"], statement["noise"]
    sampling, clipping, trained = statement["sampling"], statement["clipping"], statement["trainable_parameters"]
    unit = unit_of(statement)
    table = [
        ("epsilon (upper bound), delta", f"{round_up(guarantee['epsilon'], digits=3)}, {guarantee['delta']:g}"),
        (
            "epsilon, as the accountant brackets it",
            f"{round_down(accountant['lower'])} to {round_up(accountant['upper'])}",
        ),
        ("accountant", f"{accountant['name']} ({accountant['package']} {accountant['version']})"),
        ("Gaussian differential privacy", _gdp(guarantee["gdp"])),
        ("unit of privacy", unit.record),
        *unit.limit,
        ("neighbouring data sets", f"{statement['neighboring_relation']}: {unit.neighbour}"),
        ("attacker", "sees the weights after every step, not only the last ones"),
        ("mechanism", f"{statement['mechanism']}, {statement['definition']}"),
        ("training data", statement["dataset"] or "not named"),
        (f"training {unit.member}s N", str(sampling["dataset_size"])),
        (
            "sampling",
            f"{sampling['scheme']}, every {unit.member} with probability q = {sampling['rate']:.6g} per step"
            + _ROWS[sampling.get("rows", "indexed")],
        ),
        ("expected batch size qN", str(sampling["expected_batch_size"])),
        ("steps T", _steps(statement)),
        ("noise multiplier sigma", f"{noise['multiplier']:.6g}"),
        ("noise standard deviation", f"{noise['std']:.6g} = sigma times the sensitivity"),
        (
            "clip norm C",
            f"{clipping['bound']:.6g}, {clipping['function']} clipping, {clipping['norm']} norm {_norms(clipping)}; "
            f"sensitivity {clipping['sensitivity']:.6g}",
        ),
        (
            "noise generator",
            f"{noise['rng']}; cryptographic: {'yes' if noise['cryptographic'] else 'no'}; floating-point protection: "
            f"{noise['floating_point_protection']}",
        ),
        ("trained parameters", f"{trained['trained']} trained, {trained['frozen']} frozen"),
        ("hyper-parameter search on the private data", _search(search_of(statement["hyperparameter_tuning"]))),
    ]
    return table


def plain_statement(statement: Mapping[str, Any]) -> str:
    """Return the whole statement as plain text: sentences, table, and what is and is not protected."""
    paragraphs = plain_sentences(statement)
    if not is_protected(statement):
        return "\n\n".join([*paragraphs, statement["claim"]])
    table = rows(statement)
    width = max(len(name) for name, _ in table)
    return "\n\n".join(
        [
            *paragraphs,
            "\n".join(f"{name:<{width}}  {value}" for name, value in table),
            "Protected:\n" + "\n".join(f"- {item}" for item in unit_of(statement).covered),
            "Not protected:\n" + "\n".join(f"- {item}" for item in statement["not_covered"]),
        ]
    )


def _search(search: Search | None) -> str:
    if search is None:
        return "unknown; 1 run accounted for"
    if search.stopping is None:
        return f"accounted for: {search.runs} runs, and epsilon is that of all of them together"
    return (
        f"accounted for: the best of a secret number of runs, {search.drawn()}; epsilon is that of the search, steps "
        "and noise are those of one run"
    )


def _gdp(gdp: Mapping[str, Any] | None) -> str:
    if gdp is None:
        return "not computed for a search with random stopping"
    if gdp["kind"] == "exact":
        return f"mu = {round_up(gdp['mu'])}, exact"
    reach = "every delta" if gdp["delta_min"] == 0 else f"every delta from {gdp['delta_min']:.2g} up"
    return f"mu at most {round_up(gdp['mu'])}, for {reach}; an upper bound, no central-limit value"


def _norms(clipping: Mapping[str, Any]) -> str:
    if clipping["granularity"] == "global":
        return "over all trained parameters together"
    bounds = clipping["groups"].values()
    least, most = f"{min(bounds):.3g}", f"{max(bounds):.3g}"
    each = f"{least} for each" if least == most else f"{least} to {most} each"
    groups = {"layer": "by layer", "block": "by block", "group": "by name"}[clipping["granularity"]]
    return (
        f"of each of {len(bounds)} groups of trained parameters ({groups}), whose bounds ({each}) have squares that "
        "add up to that of C"
    )


def _steps(statement: Mapping[str, Any]) -> str:
    events = statement["events"]
    if len(events) < 2:
        return str(statement["steps"])
    parts = (f"{e['steps']} with q = {e['sample_rate']:.6g}, sigma = {e['noise_multiplier']:.6g}" for e in events)
    return f"{statement['steps']}: {'; '.join(parts)}"
