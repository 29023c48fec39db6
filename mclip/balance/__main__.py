"""`python -m mclip.balance` is `mclip balance`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["balance"]
    runpy.run_module("mclip", run_name="__main__", alter_sys=True)
