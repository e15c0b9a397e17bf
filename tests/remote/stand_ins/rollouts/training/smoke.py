"""Stands in for the smoke test, which needs torch.

STAND_IN_SMOKE=fail fails; any other value is a file that is made before it hangs.
"""

import json
import os
import sys
import time
from pathlib import Path

way = os.environ.get("STAND_IN_SMOKE", "")
if way == "fail":
    sys.exit(
        "error: smoke test: bf16 product: wrong by 3, on device cuda:0 (NVIDIA H200) with torch 2.13.0, driver 580"
    )
if way:
    Path(way).touch()
    time.sleep(600)
report = Path(sys.argv[sys.argv.index("--report") + 1])
report.write_text(json.dumps({"doing": "", "parts": {"torch": 0.1, "bf16 product": 0.0}}))
print("smoke test: passed", flush=True)
