"""Shards of images, and a store on loopback that answers with bytes or, now and then, not at all."""

import io
import re
import tarfile
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

SIDE = 8


def coloured(number):
    """An image of one colour that tells its number, up to 2**16."""
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(views):
    """Which image a view is of."""
    return int(views[0, 0, 0, 0]) + 256 * int(views[0, 1, 0, 0])


def write_shards(folder, shards, images, broken=()):
    """Write shards of so many images each, with a label beside each; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for place in range(images):
                number = shard * images + place
                files = {"png": b"broken" if number in broken else coloured(number), "cls": b"0"}
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{folder}/{{0000..{shards - 1:04d}}}.tar"


class Store(ThreadingHTTPServer):
    """Serves a folder, by ranges; fails every so-manieth request: with no word, with an error, or within the answer.

    Attributes:
        drop_every: 20 for 5%; 0 for none.
        secret: What a request has to bring along as `Authorization`, None for nothing.
        requests: How many there were, by whether they were for bytes.
        dropped: How many of them got no whole answer.
    """

    daemon_threads = True

    def __init__(self, folder: Path, drop_every: int, secret: str | None):
        self.folder, self.drop_every, self.secret = folder, drop_every, secret
        self.requests, self.dropped = Counter(), 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        store = self.server
        with store.lock:
            store.requests[body] += 1
            drop = bool(store.drop_every) and store.requests[body] % store.drop_every == 0
            store.dropped += drop
        if drop and not body:
            self.close_connection = True  # not a word
            return
        if drop and store.dropped % 2:
            self.send_error(503)
            return
        path = store.folder / self.path.lstrip("/")
        if store.secret is not None and self.headers["Authorization"] != store.secret:
            self.send_error(403)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked is None:
            self.send_response(200)
        else:
            first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            if first > last:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if drop else content)
        if drop:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@contextmanager
def served(folder, drop_every=0, secret=None):
    """A store of a folder."""
    store = Store(folder, drop_every, secret)
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join(10)
