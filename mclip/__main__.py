"""`python -m mclip` is the command `mclip`."""

import sys

from mclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
