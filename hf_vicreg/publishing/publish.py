"""`hf-vicreg publish` and `hf_vicreg.publish`: stage, check, push one commit, download it again and compare."""

import logging
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import validate_repo_id

from hf_vicreg.model_cards.escaping import printable
from hf_vicreg.model_cards.schema import HUB_ID, FileError
from hf_vicreg.publishing.checks import check_loads, check_loads_without_package
from hf_vicreg.publishing.hub_errors import patience
from hf_vicreg.publishing.push import (
    Pushed,
    Remote,
    bring_up_to_date,
    check_account,
    download,
    push,
    read_remote,
    refuse_another,
)
from hf_vicreg.publishing.secret_scan import refuse_secrets
from hf_vicreg.publishing.space import StagedSpace, check_space, stage_space
from hf_vicreg.publishing.staging import Staged, stage
from hf_vicreg.training.errors import InputError, blamed_on

logger = logging.getLogger(__name__)

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Publication:
    """What `publish` did, or would do.

    Attributes:
        url: The repository or the pull request; None after a dry run.
        commit: The commit that holds the files; None after a dry run.
        files: Size in bytes of each file, by name.
        card: The model card.
        left_out: What of the run's folder does not leave the machine.
        changed: Names of files that were sent or removed; empty if the Hub had them all.
        space: The same of its Space, if one was asked for.
        removed: Of the changed, those that are in the repository no more.
    """

    url: str | None
    commit: str | None
    files: dict[str, int]
    card: str
    left_out: list[str]
    changed: list[str]
    space: "Publication | None" = None
    removed: list[str] = field(default_factory=list)


def publish(
    run: str | os.PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    include_pretraining: bool = False,
    license: str | None = None,
    space: bool = False,
    space_images: str | os.PathLike | None = None,
) -> Publication:
    """Publish a run's folder, or a fine-tuned one, on the Hub. The token is the stored login's, or `HF_TOKEN`'s.

    Nothing is sent before the folder loads with and without this package and gives the run's features bit for bit. Run
    again it sends what has changed: nothing after an undisturbed run, the rest after an interrupted one.

    Args:
        run: The folder, which is only read.
        repo: The repository's id, OWNER/NAME; made if there is none.
        private: Make it a private one; default: public, or what the organisation has set for new ones.
        revision: Branch to publish to, made if there is none; default: `main`.
        create_pr: Open a pull request instead.
        dry_run: Stage and check, and send nothing; no network is needed.
        include_pretraining: Publish `pretraining/` as well, the encoder with its expander.
        license: Of the weights, by the Hub's short name for it, as `apache-2.0`; default: the card names none, and
            one that the repository's card has already stays.
        space: Publish a Space of the same id as well, an app that shows features, neighbours and attention.
        space_images: Folder of images to publish with the Space, small, numbered and without metadata; default: none
            of yours, patterns are drawn.

    Raises:
        InputError: A folder that cannot be published, something secret in it, or anything that went wrong on the way
            to the Hub; the branch is then as it was, unless the line says that a download differs.
    """
    if not HUB_ID.fullmatch(repo):
        raise InputError(f"`repo`: expected OWNER/NAME, got {repo!r}.")
    with blamed_on("repo", f"expected OWNER/NAME, got {repo!r}"):
        validate_repo_id(repo)
    if create_pr and revision is not None:
        raise InputError("`create_pr`, `revision`: expected one of the two, got both; pull requests are for `main`.")
    if space and create_pr:
        raise InputError("`space`, `create_pr`: expected one of the two; the Space shows a model that is published.")
    if space_images is not None and not space:
        raise InputError("`space_images`: expected `space` beside it; no image is published without.")
    run, api = Path(run), HfApi()
    with tempfile.TemporaryDirectory(prefix="hf_vicreg_") as scratch, patience(TIMEOUT_S):
        into = Path(scratch) / "staged"
        into.mkdir()
        try:
            staged = stage(run, into, repo=repo, include_pretraining=include_pretraining, license=license)
        except FileError as error:
            raise InputError(str(error)) from None
        except StrictDataclassError as error:
            raise InputError(f"`config.json`: {str(error).strip().splitlines()[-1].strip()}") from None
        staged_space = None
        if space:
            (Path(scratch) / "space").mkdir()
            images = None if space_images is None else Path(space_images)
            staged_space = stage_space(staged, Path(scratch) / "space", images=images, endpoint=api.endpoint)
        if dry_run:
            check_loads(staged, run)
            if staged_space is not None:
                check_space(staged_space, staged.folder)
            told = None if staged_space is None else _publication(staged_space)
            return _publication(staged, None, told)
        check_account(api, repo, create_pr=create_pr)
        remote = read_remote(api, repo, revision=revision, private=private)
        if not create_pr:  # there the owner sees what would go
            refuse_another(remote)
        bring_up_to_date(staged, remote)
        refuse_secrets(staged.folder, ["README.md"])
        if staged_space is not None:
            private = private or remote.private  # a private model is not told of by a public Space
            remote_space = read_remote(api, repo, revision=None, private=private, kind="space")
            staged_space.refuse_another(remote_space)
            staged_space.keep_card(remote_space.card)
            refuse_secrets(staged_space.folder, ["README.md"])
        logger.info("checking that %s loads with and without the package", run)
        reference = check_loads(staged, run)
        if staged_space is not None:
            logger.info("checking that the app of the Space runs from its own files")
            check_space(staged_space, staged.folder)
        logger.info("publishing %d files, %s bytes", len(staged.names), f"{sum(staged.sizes.values()):,}")
        pushed = push(api, staged, remote, private=private, create_pr=create_pr)
        logger.info("downloading commit %s again", pushed.commit[:8])
        again = Path(scratch) / "downloaded"
        download(api, repo, pushed.commit, staged, again)
        check_loads_without_package(staged, again, reference)
        shown = None
        if staged_space is not None:
            staged_space.pin(pushed.commit)
            shown = _push_space(api, staged_space, remote_space, private=private or pushed.private)
        return _publication(staged, pushed, shown)


def _push_space(api: HfApi, space: StagedSpace, remote: Remote, *, private: bool) -> Publication:
    """Push a Space and download it again."""
    logger.info("publishing the Space, %d files, %s bytes", len(space.names), f"{sum(space.sizes.values()):,}")
    pushed = push(api, space, remote, private=private, create_pr=False)
    with tempfile.TemporaryDirectory(prefix="hf_vicreg_") as again:
        download(api, space.repo, pushed.commit, space, Path(again), "space")
    return _publication(space, pushed)


def report(publication: Publication) -> str:
    """Return what `hf-vicreg publish` prints at its end."""
    return printable(_report(publication))


def _report(publication: Publication) -> str:
    if publication.space is not None:
        parts = (replace(publication, space=None), publication.space)
        model, space = (_report(part) for part in parts)
        return f"{model}\n\nits Space:\n{space}"
    lines = [f"{size:>12,}  {name}" for name, size in publication.files.items()]
    lines.append(f"{sum(publication.files.values()):>12,}  bytes in {len(lines)} files")
    if publication.left_out:
        lines.append(f"left out: {', '.join(publication.left_out)}")
    if publication.commit is None:
        return "\n".join([*lines, "", publication.card, "", "dry run: loads and is complete; nothing was sent"])
    if publication.removed:
        lines.append(f"removed from the repository: {', '.join(publication.removed)}")
    changed = f"{len(publication.changed)} files sent or removed" if publication.changed else "nothing had changed"
    lines.append(f"{publication.url} at {publication.commit[:8]}: {changed}; downloaded again, and the same")
    return "\n".join(lines)


def _publication(
    staged: Staged | StagedSpace, pushed: Pushed | None = None, space: Publication | None = None
) -> Publication:
    left_out = staged.left_out if isinstance(staged, Staged) else []
    if pushed is None:
        return Publication(None, None, staged.sizes, staged.card, left_out, [], space)
    changed = pushed.added + pushed.removed
    return Publication(pushed.url, pushed.commit, staged.sizes, staged.card, left_out, changed, space, pushed.removed)
