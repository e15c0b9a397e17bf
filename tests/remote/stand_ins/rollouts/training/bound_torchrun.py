"""Stands in for torchrun on several hosts: runs the module after the last -m in this process, as this host's rank."""

import os
import runpy
import sys

os.environ["RANK"] = sys.argv[sys.argv.index("--node-rank") + 1]
position = sys.argv.index("-m")
sys.argv = sys.argv[position + 1 :]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
