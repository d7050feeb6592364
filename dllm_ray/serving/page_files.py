"""The chat page's files, as they lie in the package."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "woff2": "font/woff2",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page."""

    content: bytes
    type: str
    tag: str
    """Changes with the content."""

    def response(self, request: Request) -> Response:
        """The file, unless the browser has it already. Browsers ask each time, so a new version is seen at once."""
        headers = {"cache-control": "no-cache", "etag": self.tag}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=None, headers=headers | {"content-type": self.type})


def read_page() -> dict[str, PageFile]:
    """Name -> file, of all there are: what has no name here can't be asked for."""
    folder = files("dllm_ray.serving") / "page"
    found = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            content = file.read_bytes()
            found[file.name] = PageFile(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found
