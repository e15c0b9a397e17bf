"""What `deploy doctor` measures on a host, under the host's own Python. Standard library only; it leaves nothing."""
