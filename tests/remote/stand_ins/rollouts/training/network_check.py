"""Stands in for the check of the network between hosts: it passes."""

import json
import os
import sys
from pathlib import Path

if os.environ["RANK"] == "0":
    report = Path(sys.argv[sys.argv.index("--report") + 1])
    report.write_text(json.dumps({"doing": "", "parts": {"gigabytes_per_s": 1.5, "ranks": 2}}))
