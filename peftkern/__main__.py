"""`python -m peftkern`: the same as the `peftkern` command."""

import sys

from peftkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
