"""What a job on several hosts needs that one on a single host needs as well."""

from tests.e2e.conftest import environments, tool_path
from tests.remote.conftest import laptop, project, shared

__all__ = ["environments", "laptop", "project", "shared", "tool_path"]
