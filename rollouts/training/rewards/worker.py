"""A reward worker's process: `python -m rollouts.training.rewards.worker DOTTED_PATH FILE_DESCRIPTOR`."""

import sys
from multiprocessing.connection import Connection

from rollouts.training.rewards.scoring import serve

if __name__ == "__main__":
    serve(sys.argv[1], Connection(int(sys.argv[2])))
