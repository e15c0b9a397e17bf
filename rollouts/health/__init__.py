"""Is a run well? Rules over its records, applied on the host while it goes on and here afterwards. Standard library."""
