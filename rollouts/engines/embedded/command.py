"""The embedded engine's command line. Pure, standard library only. docs/reference/engines.md has the flags."""

from rollouts.engines.server_spec import DeviceType, ServerSpec

READY_PATH = "/ready"


def modules(device_type: DeviceType) -> tuple[str, ...]:
    """Name the modules that a server needs."""
    return ("rollouts.engines.embedded.__main__",)


def argv(server: ServerSpec) -> tuple[str, ...]:
    """Return the arguments after the interpreter, run from the repository's root."""
    engine = server.engine
    flags = (
        *("-m", "rollouts.engines.embedded"),
        *("--model-path", server.model_path),
        *("--host", server.host),
        *("--port", str(server.port)),
        *("--dtype", server.model.dtype),
        *("--device", server.device_type),
        *("--context-length", str(engine.context_length)),
        *("--max-running-requests", str(engine.max_running_requests)),
        *("--mem-fraction-static", str(engine.mem_fraction)),
        *("--random-seed", str(server.seed)),
    )
    return (*flags, "--trust-remote-code") if server.model.trust_remote_code else flags


def env(device_type: DeviceType, tree: str) -> dict[str, str]:
    """Return variables of the process: none."""
    return {}
