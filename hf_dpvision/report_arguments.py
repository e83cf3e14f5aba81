"""The argument that asks for a report of the run; part of `DPTrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import plots


@dataclass
class ReportArguments:
    """Whether a run draws its report."""

    run_report: bool | None = field(
        default=None,
        metadata={
            "help": "At the end of training, draw report.html and report.png into output_dir: epsilon, learning rate, "
            "noise and size of the released gradients, and metrics on public evaluation data. What the guarantee does "
            "not cover goes into report-private.html and .png, which are never uploaded. By default where matplotlib "
            "is installed (extra 'report')."
        },
    )

    @property
    def draws_report(self) -> bool:
        """Whether a report is drawn: as was said, and else if it can be."""
        return plots.available() if self.run_report is None else self.run_report

    def refuse_report(self) -> None:
        """Raise if a report is asked for that cannot be drawn.

        Raises:
            ArgumentRefused: matplotlib is missing.
        """
        if self.run_report:
            plots.refuse_missing("run_report=True: the report of a run", "report", "leave the argument out")
