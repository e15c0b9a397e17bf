"""Stands in for torchrun: runs the module after -m in this process."""

import runpy
import sys

position = sys.argv.index("-m")
sys.argv = sys.argv[position + 1 :]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
