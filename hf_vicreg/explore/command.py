"""`hf-vicreg explore`: flags first, the port, then the server until it is stopped."""

import argparse
import contextlib
import ipaddress
import logging
import os
import secrets
import socket
from typing import Any

from hf_vicreg.explore.named import check_images
from hf_vicreg.training.errors import InputError, log_to_stderr
from hf_vicreg.training.prepare.arguments import DEVICES
from hf_vicreg.training.run.places import EMBEDDING_FILE

logger = logging.getLogger(__name__)

HOST, PORT, TRIES = "127.0.0.1", 7866, 20
FLAGS = (
    *("split", "dataset_config_name", "image_column_name", "label_column_name"),
    *("batch_size", "num_workers", "device"),
)


def add_explore(verbs: Any) -> None:
    """Add `explore` to the command's sub-parsers."""
    explore = verbs.add_parser(
        "explore",
        help="a folder of images as a local page: map, search, copies, outliers, clusters, labels",
        description="Embed images, or take the embeddings that `hf-vicreg embed` made, and serve a page on this "
        "machine to look through them. Nothing is written beside the images.",
        epilog="example: hf-vicreg explore my_images runs/mine",
    )
    explore.add_argument(
        "images", metavar="IMAGES", help="as of `hf-vicreg embed`, or a folder of embeddings that it made"
    )
    explore.add_argument(
        "model", metavar="MODEL", nargs="?", help="folder or Hub id of an encoder; of embeddings, to search by image"
    )
    explore.add_argument("--data", metavar="IMAGES", help="the images of a folder of embeddings, to show them")
    explore.add_argument("--port", type=int, default=PORT, help=f"the first to try (default: {PORT})")
    explore.add_argument("--host", default=HOST, help="address to serve on; other machines need the token printed")
    explore.add_argument("--split", help="split of a data set; default: `train`")
    explore.add_argument("--dataset_config_name", help="configuration of the Hub dataset")
    explore.add_argument("--image_column_name", help="column of images; default: the only one")
    explore.add_argument("--label_column_name", help="column of labels; default: `label` if there is one")
    explore.add_argument("--batch_size", type=int, help="images encoded at once (default: 64)")
    explore.add_argument("--num_workers", type=int, help="loader processes; default: as of `hf-vicreg embed`")
    explore.add_argument("--device", choices=DEVICES, help="default: a GPU if there is one")
    explore.set_defaults(run=_explore)


def _explore(parsed: argparse.Namespace) -> int:
    log_to_stderr()
    if not 0 <= parsed.port < 2**16:
        raise InputError(f"`port`: expected 0 to 65535, got {parsed.port}.")
    if not os.path.isfile(os.path.join(parsed.images, EMBEDDING_FILE)):
        check_images(parsed.images, parsed.model, parsed.data)
    listening = listen(parsed.host, parsed.port)
    with listening:
        from hf_vicreg.explore.explorer import open_explorer

        flags = {name: getattr(parsed, name) for name in FLAGS if getattr(parsed, name) is not None}
        explorer = open_explorer(parsed.images, parsed.model, data=parsed.data, **flags)
        import uvicorn

        from hf_vicreg.explore.server import application

        token = None if is_loopback(parsed.host) else secrets.token_urlsafe(24)
        where = address(listening, token)
        print(f"{len(explorer):,} images: {where}\nCtrl-C ends it.", flush=True)
        # no log of what is asked for: the token would be in it
        config = uvicorn.Config(
            application(explorer, token), log_level="warning", access_log=False, server_header=False, ws="none"
        )
        with contextlib.suppress(KeyboardInterrupt):  # which it raises again when all is closed
            uvicorn.Server(config).run(sockets=[listening])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket at the first free port from `port` on; 0 takes any.

    Raises:
        InputError: No address of this machine, or 20 ports in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"`host`: expected a name or address of this machine, got {host!r}.") from error
    for tried in range(port, min(port + TRIES, 2**16)):
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, tried))
            found.listen(128)
        except PermissionError as error:
            found.close()
            raise InputError(f"`port`: expected one that you may take, got {tried}; take one from 1024 on.") from error
        except OSError as error:
            found.close()
            if not _is_own(host, family):
                raise InputError(f"`host`: expected an address of this machine, got {host!r}.") from error
            continue
        if tried != port:
            logger.warning("port %d is in use: %d is taken instead", port, tried)
        return found
    raise InputError(f"`port`: expected a free one from {port} to {tried}, all are in use; name another.")


def address(listening: socket.socket, token: str | None) -> str:
    """Return what to open in a browser; with a token it is in it."""
    host, port = listening.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    if host in ("0.0.0.0", "[::]"):
        host = socket.gethostname()
    return f"http://{host}:{port}/" + (f"?token={token}" if token else "")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_own(host: str, family: int) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
