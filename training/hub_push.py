"""A run's encoder onto the Hub while it trains: `hf-vicreg publish` in a process of its own, one at a time.

A push neither fails a run nor holds it up: what goes wrong is a warning, and a checkpoint that comes while an earlier
one is still being pushed is left to the next. The token is the stored login's, or `HF_TOKEN`'s.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from hf_vicreg.training.errors import InputError

logger = logging.getLogger(__name__)

LOG = "hub_push.log"
SNAPSHOT = "hub_snapshot"
NICENESS = 10
GRACE_S = 10.0  # between being asked to end and being killed
TIMEOUT_S = 3600.0  # of the last push, which is waited for; the Hub's own time-outs are far shorter
# of the launcher: the process is none of its ranks
DISTRIBUTED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
DISTRIBUTED_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "GROUP_", "ROLE_")


def check_account(repo: str) -> None:
    """Find out before a run what would make all its pushes fail.

    Raises:
        InputError: No token, one that may only read or that the Hub does not accept, or none of the owner's. A Hub
            that does not answer is a warning: it may when the first push comes.
    """
    try:
        account = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise InputError(
            "`push_to_hub`: expected a token with write access, got none; run `hf auth login` or set HF_TOKEN."
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError("`push_to_hub`: the token is not accepted; run `hf auth login` again.") from None
        logger.warning("push_to_hub: the Hub answered %d; training goes on", error.response.status_code)
        return
    except Exception as error:  # of the network, and of the library underneath, which differs between versions
        logger.warning("push_to_hub: no answer from the Hub (%s); training goes on", type(error).__name__)
        return
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError("`push_to_hub`: expected a token with write access, this one may only read; make another.")
    owners = [account["name"], *(one["name"] for one in account.get("orgs", []))]
    owner = repo.partition("/")[0]
    if owner not in owners:
        raise InputError(f"`hub_model_id`: expected one of the token's owners {owners}, got {owner!r}.")


class HubPush:
    """Pushes of one run; used on the main process alone."""

    def __init__(self, folder: Path, repo: str, *, private: bool):
        """Push nothing yet.

        Args:
            folder: The run's folder; `hub_push.log` in it is what the pushes said.
            repo: OWNER/NAME.
            private: Make a new repository a private one.
        """
        self.folder, self.repo, self.private = folder, repo, private
        self.process: subprocess.Popen | None = None
        self.pushing = ""

    def offer(self, what: str, write: Callable[[Path], None]) -> None:
        """Push what `write` puts into a folder, in the background; nothing if a push is still under way.

        Args:
            what: For the log: which state of the run it is.
            write: Writes a folder that `hf-vicreg publish` takes.
        """
        if self.process is not None and self.process.poll() is None:
            logger.info("push_to_hub: %s is still being pushed, %s is left to the next one", self.pushing, what)
            return
        self._tell()
        snapshot = self.folder / SNAPSHOT
        try:
            shutil.rmtree(snapshot, ignore_errors=True)
            snapshot.mkdir()
            write(snapshot)
            self._start(what, snapshot)
        except Exception as error:
            logger.warning("push_to_hub: %s was not pushed: %s", what, error)

    def finish(self) -> None:
        """Push the finished run's folder and wait for it; what goes wrong is a warning."""
        self._wait()
        shutil.rmtree(self.folder / SNAPSHOT, ignore_errors=True)
        try:
            self._start("the finished run", self.folder)
        except OSError as error:
            logger.warning("push_to_hub: the finished run was not pushed: %s", error)
        self._wait()

    def abandon(self) -> None:
        """End a push under way: it is whole on the Hub or not there."""
        if self.process is not None:
            # an interrupt first: it has copies in temporary folders, and checks in processes of their own
            for number in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(GRACE_S)
                    break
            self.process = None
        shutil.rmtree(self.folder / SNAPSHOT, ignore_errors=True)

    def _start(self, what: str, folder: Path) -> None:
        command = [sys.executable, "-m", "hf_vicreg.cli", "publish", str(folder), "--repo", self.repo]
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in DISTRIBUTED and not key.startswith(DISTRIBUTED_PREFIXES)
        }
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # its checks are small, and not in the way
        with (self.folder / LOG).open("w") as log:
            self.process = subprocess.Popen(
                command + ["--private"] * self.private,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the run, which then sees to it
            )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.process.pid, NICENESS)
        self.pushing = what

    def _wait(self) -> None:
        if self.process is None:
            return
        try:
            self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("push_to_hub: %s was not pushed within %.0f s", self.pushing, TIMEOUT_S)
            self.abandon()
        self._tell()

    def _tell(self) -> None:
        """Say how the last push went."""
        if self.process is None:
            return
        said = []
        with contextlib.suppress(OSError):
            said = (self.folder / LOG).read_text(errors="replace").strip().splitlines()
        said = said or ["nothing was said"]
        if self.process.returncode == 0:
            logger.info("push_to_hub: %s: %s", self.pushing, said[-1])
        else:
            remedy = f"`hf-vicreg publish {self.folder} --repo {self.repo}` does it by hand"
            logger.warning(
                "push_to_hub: %s was not pushed: %s; %s", self.pushing, said[-1].removeprefix("error: "), remedy
            )
        self.process = None
