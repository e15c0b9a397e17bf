"""What goes wrong between a laptop and a host, in every phase of a run: `scripts/faults` runs all of it."""
