"""The chat page: one file, which asks nothing of any other server."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

_PAGE = Path(__file__).with_name("page.html").read_text("utf-8")


def _hashes(element: str) -> str:
    """What a policy calls the elements of this name in the page: nothing else may act as one."""
    contents = re.findall(rf"<{element}>(.*?)</{element}>", _PAGE, re.DOTALL)
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def page(request: HttpRequest) -> Response:
    """The page; it holds no secret and asks for the key where the server needs one."""
    return Response(_PAGE, media_type="text/html", headers=_HEADERS)
