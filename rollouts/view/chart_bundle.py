"""The JavaScript that draws charts, out of vl-convert's wheel, for pages that reach no network."""

import contextlib
import importlib.metadata

from rollouts.plain_files import read_plain
from rollouts.run_dir import home_dir, write_text_atomic


def javascript() -> str:
    """Return vega, vega-lite and vega-embed as one script that sets `window.vegaEmbed`.

    Bundling takes seconds, so that it is kept in the cache of this machine's rollouts home, a file a version.
    """
    import vl_convert

    kept = home_dir() / "cache" / f"vega-{importlib.metadata.version('vl-convert-python')}.js"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return read_plain(kept).decode()
    made = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    with contextlib.suppress(OSError):  # a full disk, say: it is made again next time
        write_text_atomic(kept, made, mode=0o600)
    return made
