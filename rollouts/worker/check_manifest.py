"""Is a checkpoint on this host what its manifest says? Sent from the laptop before a resume. Standard library only.

python3 check_manifest DIRECTORY        prints {"problems": [text, ...]}
"""

import json
import sys
from pathlib import Path

from rollouts.manifest import manifest_problems

PROBLEMS_MAX = 20


def main() -> None:
    directory = Path(sys.argv[1])
    found = manifest_problems(directory)[:PROBLEMS_MAX]
    print(json.dumps({"problems": [problem.replace(f"{directory}/", "") for problem in found]}))


if __name__ == "__main__":
    main()
