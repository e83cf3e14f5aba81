"""`python -m hf_dpvision.cli` is the console script."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
