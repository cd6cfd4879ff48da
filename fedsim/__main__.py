"""``python -m fedsim``: the same as the command ``fedsim``."""

import sys

from fedsim.cli import main

if __name__ == "__main__":
    sys.exit(main())
