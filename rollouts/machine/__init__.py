"""What both sides read of a machine: its GPUs and its ports. Standard library only."""
