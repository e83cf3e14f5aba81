"""The report of a run: `report.html` and `report.png`, drawn from the statement, the ledger and the public log.

facts.py says what may stand there, figures.py draws it, page.py writes the page, writing.py the files.
"""

from .facts import RunFacts, facts_of_run
from .page import compared_parts
from .writing import PRIVATE_FILES, RELEASED_FILES, write_report


__all__ = ["PRIVATE_FILES", "RELEASED_FILES", "RunFacts", "compared_parts", "facts_of_run", "write_report"]
