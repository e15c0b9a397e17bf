"""How many files, and so connections, this process may have open. Standard library."""

import resource

REQUESTS_MAX = 2048  # at once; more would only wait at the server


def allow_all() -> None:
    """Raise the soft limit of open files to the hard one: shells set it low for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # macOS names a hard limit that it does not grant
            return


def requests_max() -> int:
    """Return how many requests may be under way at once, each with a connection: half of the files allowed."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return REQUESTS_MAX if soft == resource.RLIM_INFINITY else max(1, min(soft // 2, REQUESTS_MAX))
