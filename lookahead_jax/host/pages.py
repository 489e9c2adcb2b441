"""HTML pages in one file, made from Jinja templates: text never becomes markup."""

import json
from typing import Any

import jinja2
from markupsafe import Markup

_ROOM = "lookahead_jax.host"


def embed_json(data: object) -> Markup:
    """JSON for the inside of a script element, which it cannot end."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def render_page(package: str, template: str, **values: Any) -> str:
    """The template of that name in the folder `templates` of a package, filled in.

    It may extend `page.html` of this package, which has the head of every page.

    Values are escaped unless they are `Markup`; a value that the template needs and does not get is
    an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader(_ROOM)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)
