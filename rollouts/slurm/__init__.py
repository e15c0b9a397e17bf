"""Runs that Slurm starts: what it says of their jobs, and writing that down. For both sides; standard library only."""
