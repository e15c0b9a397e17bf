"""Agents: a policy behind an endpoint, an environment that answers it, and the episode of the two."""
