from typing import Any


def enabled_clouds(workspace: str | None = None, expand: bool = False) -> Any:
    return lambda: ["AWS", "GCP", "Kubernetes"]
