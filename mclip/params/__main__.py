"""`python -m mclip.params` is `mclip params`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["params"]
    runpy.run_module("mclip", run_name="__main__", alter_sys=True)
