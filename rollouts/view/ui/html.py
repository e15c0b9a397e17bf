"""The pages' HTML: a template each, with the values that its script draws. Text of a host or a model is escaped."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollouts.view.chart_bundle import bundle_version
from rollouts.view.escape import escaped
from rollouts.view.run_report import json_in_html

PAGES = Path(__file__).parent / "pages"


def shown(value: Any) -> Any:
    """Return a JSON value whose texts are escaped, and whose numbers are finite or null."""
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, Mapping):
        return {escaped(str(key)): shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(name: str, data: Mapping[str, Any], *, title: str = "", message: str = "") -> str:
    """Return a page. `data` lies in it as JSON, for its script."""
    import markupsafe

    return (
        _environment()
        .get_template(f"{name}.html")
        .render(
            name=name,
            title=escaped(title),
            message=escaped(message),
            vega=bundle_version(),
            data=markupsafe.Markup(json_in_html(shown(data))),
        )
    )


@functools.cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
