"""`deploy ui`: a page on this machine that shows runs, until Ctrl-C."""

import json
from collections.abc import Sequence
from pathlib import Path

from rollouts.remote.errors import DeployError
from rollouts.remote.report_verbs import extra
from rollouts.view.screen import Screen
from rollouts.view.ui.run_source import RunSource


def ui(
    directories: Sequence[str],
    screen: Screen,
    *,
    remote: str | None,
    port: int | None,
) -> int:
    """Serve the page, and print its link. Raises DeployError where it cannot be."""
    with extra("view"):
        import altair  # noqa: F401  all that the page needs is asked for before a port is taken
        import jinja2  # noqa: F401
        import numpy  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
        import vl_convert  # noqa: F401

    from rollouts.remote.ui_builder import Builder
    from rollouts.view.ui.desk import Desk
    from rollouts.view.ui.serving import PortInUseError, listen, serve

    source = _source(directories, remote)
    try:
        listener = listen(port)
    except PortInUseError as error:
        source.close()
        raise DeployError(
            f"the page cannot be served: {error.strerror}.",
            fix="name another --port, or none: then the first free one from 8090 on is taken",
        ) from None

    def tell(link: str) -> None:
        if screen.as_json:
            print(json.dumps({"link": link, "port": listener.getsockname()[1]}), flush=True)
        else:
            print(
                f"{source.title}: {link}\nThe link is for you alone. Ctrl-C ends the page.",
                flush=True,
            )

    serve(Desk(source, Builder(remote)), listener, tell)
    return 0


def _source(directories: Sequence[str], remote: str | None) -> RunSource:
    if remote is None:
        from rollouts.remote.ui_runs import KnownRuns

        return KnownRuns([Path(name) for name in directories])
    if directories:
        raise DeployError("--remote shows the runs of that host: no directory is named with it.")
    from rollouts.remote.ui_host import HostRuns

    return HostRuns(remote)
