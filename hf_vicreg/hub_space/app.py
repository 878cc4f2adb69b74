"""The app of a Space: a static page, and what it asks for. A visitor's picture is looked at in memory and not kept.

`python -m hub_space.app`, in the Space's folder; `HOST` and `PORT` say where. `--model FOLDER` takes another model
than `model.json` names, `--check` looks at every picture and ends.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .looking import Looking, packed

HERE = Path(__file__).resolve().parent
MOST_BYTES = 16 * 2**20  # of a picture that is sent here
STATIC = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/space.css": ("space.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/attention.js": ("attention.js", "text/javascript"),
    "/space.js": ("space.js", "text/javascript"),
}
HEADERS = {  # a Space is shown in a frame of the Hub's
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self' https://huggingface.co",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Space:
    """The pictures of a Space and its model, and what the page asks of them."""

    def __init__(self, folder: Path, model: str | None = None):
        """Load the model that `model.json` of a Space's folder names, or another."""
        self.told = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.files = sorted((folder / "pictures").glob("*.png"))
        self.pictures = []
        for path in self.files:
            with Image.open(path, formats=["PNG"]) as picture:
                self.pictures.append(picture.convert("RGB"))
        revision = self.told["revision"] if model is None else None
        self.looking = Looking(model or self.told["model"], revision, self.pictures)

    def application(self) -> Starlette:
        """Return the application."""
        routes = [Route(path, self._static(*file)) for path, file in STATIC.items()]
        routes += [
            Route("/about", self._about),
            Route("/picture/{number:int}", self._picture),
            Route("/look/{number:int}", self._look),
            Route("/look", self._look_at_sent, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._refused})

    def _static(self, name: str, kind: str) -> Any:
        content = (HERE / name).read_bytes()

        async def answer(request: Request) -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

        return answer

    async def _about(self, request: Request) -> Response:
        features = self.looking.features
        told = {name: self.told[name] for name in ("model", "revision", "link", "pictures")}
        shape = {"count": len(self.files), "features": packed(features), "width": features.shape[1]}
        return JSONResponse(told | shape, headers=HEADERS)

    async def _picture(self, request: Request) -> Response:
        content = self.files[self._number(request)].read_bytes()
        return Response(content, media_type="image/png", headers=HEADERS)

    async def _look(self, request: Request) -> Response:
        number = self._number(request)
        found = await run_in_threadpool(self.looking.look, self.pictures[number], f"picture {number + 1}")
        return JSONResponse(found, headers=HEADERS)

    async def _look_at_sent(self, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise HTTPException(413, f"a picture of at most {MOST_BYTES // 2**20} MB is needed")
        try:
            found = await run_in_threadpool(self.looking.look_at_sent, bytes(body))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return JSONResponse(found, headers=HEADERS)

    def _number(self, request: Request) -> int:
        number = request.path_params["number"]
        if number >= len(self.files):
            raise HTTPException(404, "no such picture")
        return number

    async def _refused(self, request: Request, error: Any) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, headers=HEADERS)


def main() -> None:
    """Serve the Space that this module lies in."""
    parser = argparse.ArgumentParser(description="The app of a Space.")
    parser.add_argument("--model", help="folder of a model to show in place of the one that model.json names")
    parser.add_argument("--check", action="store_true", help="look at every picture and end")
    parsed = parser.parse_args()
    space = Space(HERE.parent, parsed.model)
    if parsed.check:
        for picture in space.pictures:
            space.looking.look(picture, "picture")
        return
    import uvicorn

    host, port = os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "7860"))
    uvicorn.run(
        space.application(),
        host=host,
        port=port,
        access_log=False,
        server_header=False,
        ws="none",
        limit_concurrency=64,
    )


if __name__ == "__main__":
    main()
