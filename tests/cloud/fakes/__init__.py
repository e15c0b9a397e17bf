"""Stateful stand-ins for the four providers, as real HTTP servers that answer in their words and bill until the end."""
