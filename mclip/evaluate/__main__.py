"""`python -m mclip.evaluate` is `mclip evaluate`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate"]
    runpy.run_module("mclip", run_name="__main__", alter_sys=True)
