"""The JavaScript that draws charts, out of vl-convert's wheel, for pages that reach no network."""

import contextlib
import importlib.metadata
from pathlib import Path

from rollouts.plain_files import read_plain
from rollouts.run_dir import home_dir, write_text_atomic


def bundle_version() -> str:
    """Return the version of what `javascript` returns."""
    return importlib.metadata.version("vl-convert-python")


def bundle_file() -> Path:
    """Return where `javascript` is kept: bundling takes seconds. A file a version, in the cache of rollouts' home."""
    return home_dir() / "cache" / f"vega-{bundle_version()}.js"


def javascript() -> str:
    """Return vega, vega-lite and vega-embed as one script that sets `window.vegaEmbed`."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return read_plain(bundle_file()).decode()
    import vl_convert

    made = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    with contextlib.suppress(OSError):  # a full disk, say: it is made again next time
        write_text_atomic(bundle_file(), made, mode=0o600)
    return made
