"""How the control side reaches a host, and what it learns there. Knows nothing of runs and plans."""
