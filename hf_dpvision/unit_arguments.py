"""The arguments that say whom the guarantee protects; part of `DPTrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field


PRIVACY_UNITS = ("example", "unit")
EXAMPLES_PER_UNIT = 4


@dataclass
class UnitArguments:
    """Every training example is a unit of its own, or all rows that have the same value in one column are one."""

    privacy_unit: str | None = field(
        default=None,
        metadata={
            "help": "Whom the guarantee protects, 'example' or 'unit'; follows from privacy_unit_column.",
            "choices": list(PRIVACY_UNITS),
        },
    )
    privacy_unit_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the training data, such as a patient's number: all rows with the same value are one "
            "unit, protected together. logical_batch_size then counts units, and their number is public."
        },
    )
    examples_per_unit: int | None = field(
        default=None,
        metadata={
            "help": "With privacy_unit_column, the most examples of one unit in one step, 4 by default; of more, so "
            "many are chosen at random at each step. Every unit takes as much memory and time as if it had so many."
        },
    )
    id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column whose values must all differ: a record that is there twice is protected less than claimed."
        },
    )

    def derive_unit(self) -> None:
        """Fill in what was not given; what contradicts it is refused by `refuse_arguments`."""
        if self.privacy_unit_column is not None and self.examples_per_unit is None:
            self.examples_per_unit = EXAMPLES_PER_UNIT
        if self.privacy_unit is None:
            self.privacy_unit = "example" if self.privacy_unit_column is None else "unit"
