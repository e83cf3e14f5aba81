"""The arguments that say how single examples' gradients are bounded; part of `DPTrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .clipping import Automatic, ByPrefix, Clipping, Flat, PerGroup, Shares, by_block, by_layer
from .config import json_object
from .errors import ArgumentRefused


STYLES = {"flat": Flat, "automatic": Automatic}
GROUPINGS = {"per_layer": by_layer, "per_block": by_block}
PER_GROUP = "per_group"
CLIPPINGS = (*STYLES, *GROUPINGS, PER_GROUP)
SHARES = tuple(shares.value for shares in Shares)


@dataclass
class ClippingArguments:
    """One norm over all parameters, or one for each group of them; the bound is C in total either way."""

    per_sample_max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "Clip norm C: the most that one example's gradient contributes, in Euclidean norm."},
    )
    clipping: str = field(
        default="flat",
        metadata={
            "help": "How gradients of single examples are bounded: 'flat' shortens those above C, 'automatic' "
            "normalises all of them to about C. 'per_layer', 'per_block' and 'per_group' (by clipping_groups) bound "
            "every group of parameters by its part of C; the noise is that of C.",
            "choices": list(CLIPPINGS),
        },
    )
    clipping_groups: dict | str | None = field(
        default=None,
        metadata={
            "help": "With clipping 'per_group': beginnings of parameters' names and the group of each, as "
            '{"vit.embeddings": "early", "vit": "blocks", "": "rest"}. The longest that fits counts.'
        },
    )
    group_clipping: str = field(
        default="flat",
        metadata={"help": "With groups, what happens within each: 'flat' or 'automatic'.", "choices": list(STYLES)},
    )
    clipping_shares: str = field(
        default="equal",
        metadata={
            "help": "With groups, how C is divided: 'equal' gives each of m groups C / sqrt(m), 'size' a part that "
            "grows with the square root of the group's number of parameters.",
            "choices": list(SHARES),
        },
    )

    @property
    def clips_groups(self) -> bool:
        """Whether there is more than one norm."""
        return self.clipping not in STYLES

    @property
    def clipping_function(self) -> str:
        """How a factor follows from a norm: 'flat' or 'automatic'."""
        return self.group_clipping if self.clips_groups else self.clipping

    @property
    def clipping_granularity(self) -> str:
        """What has a norm of its own: 'global' for all parameters together, 'layer', 'block' or 'group'."""
        return self.clipping.removeprefix("per_") if self.clips_groups else "global"

    def clipping_facts(self) -> str | dict[str, Any]:
        """What must not change while a run is resumed."""
        if not self.clips_groups:
            return self.clipping
        return {
            "groups": self.clipping if self.clipping_groups is None else self.clipping_groups,
            "within": self.group_clipping,
            "shares": self.clipping_shares,
        }

    def build_clipping(self) -> Clipping:
        """Return the clipping as an object; `sensitivity()` is `per_sample_max_grad_norm`."""
        style = STYLES[self.clipping_function](max_norm=self.per_sample_max_grad_norm)
        if not self.clips_groups:
            return style
        groups = GROUPINGS[self.clipping] if self.clipping in GROUPINGS else ByPrefix(self._named_groups() or {})
        return PerGroup(style, groups, Shares(self.clipping_shares))

    def _named_groups(self) -> dict[str, str] | None:
        return json_object("clipping_groups", self.clipping_groups, '{"vit.embeddings": "early", "": "rest"}')

    def refuse_clipping(self) -> None:
        """Read the groups, and raise where these arguments contradict one another.

        Raises:
            ArgumentRefused: naming the argument.
        """
        self.clipping_groups = groups = self._named_groups()
        if (self.clipping_groups is not None) != (self.clipping == PER_GROUP):
            raise ArgumentRefused(
                f"clipping={self.clipping!r} with clipping_groups={self.clipping_groups!r}: groups are named if, and "
                "only if, clipping is 'per_group'. Give both, or choose 'per_layer' or 'per_block', which name them."
            )
        for name in ("group_clipping", "clipping_shares"):
            value = getattr(self, name)
            if not self.clips_groups and value != getattr(type(self), name):
                raise ArgumentRefused(
                    f"{name}={value!r} would have no effect: clipping={self.clipping!r} has one norm over all "
                    "parameters. Choose 'per_layer', 'per_block' or 'per_group', or leave it out."
                )
        if groups is not None and not (groups and all(isinstance(text, str) for text in [*groups, *groups.values()])):
            raise ArgumentRefused(
                f"clipping_groups={groups!r}: a mapping from beginnings of parameters' names to names of groups is "
                'needed, such as {"vit.embeddings": "early", "": "rest"}.'
            )

