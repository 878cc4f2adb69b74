"""The explorer as a web application: a static page, and what it asks for as JSON, bytes and JPEG.

It only reads, and gives out nothing but images of the set, by their row. A page of another site cannot use it: without
a token the name it is called by must be one of this machine's own, and what a browser says comes from elsewhere is
refused; browsers are told to give no other site what it answers. The token of the address becomes a cookie, with which
the page asks for the rest.
"""

import json
import re
import secrets
from importlib import resources
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_vicreg.explore.command import is_loopback
from hf_vicreg.explore.explorer import Explorer
from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.training.errors import InputError

COOKIE = "hf_vicreg_explore"  # and something of its own: a browser keeps one jar for all ports of a machine
SIDES = (96, 640)  # of the pictures that are given out, in pixels
MOST_FOUND, MOST_LISTED = 200, 200
MOST_BYTES = 64 * 2**20  # of what is sent here
MOST_CLASSES, LONGEST_LABEL = 200, 100
STATIC = {
    "/": (("explore", "index.html"), "text/html"),
    "/page.css": (("report", "page.css"), "text/css"),
    "/explore.css": (("explore", "explore.css"), "text/css"),
    "/page.js": (("report", "page.js"), "text/javascript"),
    "/map.js": (("explore", "map.js"), "text/javascript"),
    "/panels.js": (("explore", "panels.js"), "text/javascript"),
    "/explore.js": (("explore", "explore.js"), "text/javascript"),
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


def application(explorer: Explorer, token: str | None = None) -> ASGIApp:
    """Return the application of an explorer; with a token it answers those alone who have it."""
    routes = [Route(path, _file(*place)) for path, place in STATIC.items()]
    routes += [
        Route(f"/{name}", _Answer(explorer, answer), methods=methods)
        for name, answer, methods in (
            ("about", _about, ["GET"]),
            ("points", _points, ["GET"]),
            ("clusters", _clusters, ["GET"]),
            ("image/{row}", _image, ["GET"]),
            ("name/{row}", _name, ["GET"]),
            ("near/{row}", _near_row, ["GET"]),
            ("words", _words, ["GET"]),
            ("copies", _copies, ["GET"]),
            ("outliers", _outliers, ["GET"]),
            ("near", _near_image, ["POST"]),
            ("spread", _spread, ["POST"]),
            ("labels.csv", _labels, ["POST"]),
            ("files.txt", _files, ["POST"]),
        )
    ]
    errors: Any = {InputError: _told, HTTPException: _refused}
    return _Guard(Starlette(routes=routes, exception_handlers=errors), token)


class _Guard:
    """Lets in who may come in, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, token: str | None):
        self.app, self.token, self.cookie = app, token, f"{COOKIE}_{secrets.token_hex(4)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = list(message.get("headers", []))
                names = {name.lower() for name, _ in answered}
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*answered, *(pair for pair in own if pair[0] not in names)]}
            await send(message)

        refusal = self._refusal(Request(scope))
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        if self.token is None:
            name = re.sub(r":\d*$", "", request.headers.get("host", ""))
            if not is_loopback(name.strip("[]").lower()):  # a name that somebody else has pointed here
                return _error(403, "this explorer is asked by the names of this machine alone")
            return _error(403, "this explorer is asked by its own page alone") if _is_foreign(request) else None
        given = request.query_params.get("token")
        if given is not None and request.url.path == "/" and self._is_token(given):
            answer = RedirectResponse("./", 303)  # the address in the browser's history has no token
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return answer
        if self._is_token(request.cookies.get(self.cookie, "")) or self._is_token(given or ""):
            return None
        return _error(403, "this explorer needs the token of the address that it printed")

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), (self.token or "").encode())


def _is_foreign(request: Request) -> bool:
    """Whether a page of another site asks, by what browsers say of it; a link that leads here is followed."""
    if request.method == "GET" and request.url.path == "/":
        return False
    site, origin = (request.headers.get(name) for name in ("sec-fetch-site", "origin"))
    elsewhere = origin is not None and origin.partition("//")[2] != request.headers.get("host")
    return elsewhere or site not in (None, "none", "same-origin")


class _Answer:
    """An endpoint that computes in a thread: `answer(explorer, request, body)`."""

    def __init__(self, explorer: Explorer, answer: Any):
        self.explorer, self.answer = explorer, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise HTTPException(413, f"expected at most {MOST_BYTES:,} bytes")
        response = await run_in_threadpool(self.answer, self.explorer, request, bytes(body))
        await response(scope, receive, send)


def _file(place: tuple[str, str], kind: str) -> Any:
    room, name = place
    text = (resources.files(f"hf_vicreg.{room}") / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(text, media_type=kind)

    return answer


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": one_line(text)}, status)


async def _told(request: Request, error: Exception) -> Response:
    return _error(400, str(error))


async def _refused(request: Request, error: Any) -> Response:
    return _error(error.status_code, error.detail)


def _about(explorer: Explorer, request: Request, body: bytes) -> Response:
    images = explorer.images
    return JSONResponse(
        {
            "title": images.title,
            "key": images.key,
            "model": one_line(images.record["model"].get("name")),
            "count": len(images),
            "unreadable": images.num_unreadable,
            "has_images": images.source is not None,
            "has_model": images.encoder is not None,
            "takes_words": explorer.takes_words,
            "maps": list(explorer.analysis.maps),
            "clusters": [{"count": count, "central": central} for count, central in explorer.clusters()],
        }
    )


def _points(explorer: Explorer, request: Request, body: bytes) -> Response:
    """Answer x and y of every image, from 0 to 65535, as little-endian 16-bit numbers."""
    found = explorer.analysis.maps.get(request.query_params.get("map", ""))
    if found is None:
        raise HTTPException(404, "no map of that name")
    return Response(found.astype("<u2").tobytes(), media_type="application/octet-stream")


def _clusters(explorer: Explorer, request: Request, body: bytes) -> Response:
    return Response(explorer.analysis.clusters.astype("<u2").tobytes(), media_type="application/octet-stream")


def _image(explorer: Explorer, request: Request, body: bytes) -> Response:
    side = _number(request, "side", SIDES[0])
    picture = explorer.picture(_row(explorer, request), side) if side in SIDES else None
    if picture is None:
        raise HTTPException(404, "no such image at hand")
    return Response(picture, media_type="image/jpeg")  # kept by no browser: the next set has the same address


def _name(explorer: Explorer, request: Request, body: bytes) -> Response:
    return JSONResponse({"name": explorer.images.shown_name(_row(explorer, request))})


def _near_row(explorer: Explorer, request: Request, body: bytes) -> Response:
    return _found(explorer.near_row(_row(explorer, request), _number(request, "count", 24, MOST_FOUND)))


def _words(explorer: Explorer, request: Request, body: bytes) -> Response:
    return _found(explorer.near_words(request.query_params.get("text", ""), _number(request, "count", 24, MOST_FOUND)))


def _near_image(explorer: Explorer, request: Request, body: bytes) -> Response:
    return _found(explorer.near_image(body, _number(request, "count", 24, MOST_FOUND)))


def _copies(explorer: Explorer, request: Request, body: bytes) -> Response:
    found = explorer.copies(_number(request, "percent", 50, 100) / 100)
    groups = zip(found.groups, found.cosines, found.identical, strict=True)
    listed = [{"rows": rows, "cosine": cosine, "identical": same} for rows, cosine, same in groups]
    return JSONResponse(
        {
            "groups": listed[:MOST_LISTED],
            "num_groups": len(listed),
            "num_images": sum(map(len, found.groups)),
            "num_identical": sum(count > 0 for count in found.identical),
            "extra": [row for group in found.groups for row in group[1:]],
        }
    )


def _outliers(explorer: Explorer, request: Request, body: bytes) -> Response:
    return JSONResponse([list(pair) for pair in explorer.outliers(_number(request, "count", 60, MOST_LISTED))])


def _spread(explorer: Explorer, request: Request, body: bytes) -> Response:
    """Answer the class of every image, how sure it is in hundredths, and the class of each row that was sent."""
    given, _ = _clicks(explorer, body)
    found = explorer.spread(given)
    sure = np.round(100 * found.confidences).astype(int).tolist()
    answer = {"names": found.names, "classes": found.classes.tolist(), "sure": sure}
    return JSONResponse(answer | {"given": list(found.given.items())})


def _labels(explorer: Explorer, request: Request, body: bytes) -> Response:
    return _download(explorer.labels_csv(*_clicks(explorer, body)), "text/csv", "labels.csv")


def _files(explorer: Explorer, request: Request, body: bytes) -> Response:
    rows = _json(body).get("rows")
    if not isinstance(rows, list):
        raise HTTPException(400, "expected `rows`, a list")
    return _download(explorer.files_text([_checked(explorer, row) for row in rows]), "text/plain", "files.txt")


def _download(text: bytes, kind: str, name: str) -> Response:
    return Response(text, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})


def _found(pairs: list[tuple[int, float]]) -> Response:
    return JSONResponse([[row, round(min(1.0, cosine), 4)] for row, cosine in pairs])


def _row(explorer: Explorer, request: Request) -> int:
    text = request.path_params["row"]
    return _checked(explorer, int(text) if text.isdecimal() and len(text) < 10 else None)


def _checked(explorer: Explorer, row: Any) -> int:
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(explorer):
        raise HTTPException(404, f"no such image: expected a row from 0 to {len(explorer) - 1}")
    return row


def _number(request: Request, name: str, default: int, most: int = 10_000) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or not 0 <= int(text[:9]) <= most:
        raise HTTPException(400, f"expected a number from 0 to {most} for `{name}`")
    return int(text[:9])


def _clicks(explorer: Explorer, body: bytes) -> tuple[dict[int, str], float]:
    sent = _json(body)
    pairs, least = sent.get("given"), sent.get("least", 0.8)
    if not isinstance(pairs, list) or not isinstance(least, int | float) or not 0 <= least <= 1:
        raise HTTPException(400, "expected `given`, a list of [row, label], and `least` from 0 to 1")
    given = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], str):
            raise HTTPException(400, "expected `given`, a list of [row, label]")
        label = one_line(pair[1])
        if not 0 < len(label) <= LONGEST_LABEL:
            raise HTTPException(400, f"expected labels of 1 to {LONGEST_LABEL} characters")
        given[_checked(explorer, pair[0])] = label
    if len(set(given.values())) > MOST_CLASSES:
        raise HTTPException(400, f"expected at most {MOST_CLASSES} labels")
    return given, float(least)


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise HTTPException(400, "expected an object of JSON")
    return found
