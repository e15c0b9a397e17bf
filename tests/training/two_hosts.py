"""Run by test_two_hosts.py as one of two ranks, each as if on a host of its own: files go from one to the other."""

import json
import os
import sys
from pathlib import Path

from rollouts.manifest import manifest_problems, write_manifest
from rollouts.training import distributed, host_files
from rollouts.worker.processes import listeners

host_files.PIECE_BYTES = 1000  # several pieces of small files
FILES = {"model.bin": os.urandom(2500), "optimizer/a.bin": os.urandom(1000), "empty": b""}


def main(top: Path) -> None:
    distributed.initialize("cpu")
    rank = distributed.rank()
    own = top / f"host{rank}"
    written = own / "written"
    written.mkdir(parents=True)
    (written / f"of_{rank}").write_bytes(bytes([rank]) * 2500)
    host_files.collect(written, lambda: ["of_1", "nowhere"], distributed.new_group())
    if rank == 0:
        for name, data in FILES.items():
            (own / "given" / name).parent.mkdir(parents=True, exist_ok=True)
            (own / "given" / name).write_bytes(data)
        write_manifest(own / "given")
    # the second time nothing is sent
    places = [host_files.spread(own / "given", own / "copy") for _ in range(2)]
    damaged = own / "copy" / "empty"
    if rank == 1:
        damaged.write_bytes(b"x")
    places.append(host_files.spread(own / "given", own / "copy"))
    found = {
        "here": sorted(
            path.relative_to(own).as_posix() for path in own.rglob("*") if path.is_file()
        ),
        "places": [place.name for place in places],
        "problems": list(manifest_problems(places[-1])),
        "agent_listens_at": sorted({one.address for one in listeners([os.getppid()])}),
    }
    (top / f"rank_{rank}.json").write_text(json.dumps(found))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
