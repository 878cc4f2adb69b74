"""A staged folder into a repository on the Hub: what differs, in one commit, on top of what was read before."""

import hashlib
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_vicreg.model_cards.merging import merged_card
from hf_vicreg.publishing.hub_errors import as_one_line
from hf_vicreg.publishing.space import StagedSpace
from hf_vicreg.publishing.staging import Staged
from hf_vicreg.training.errors import InputError

MESSAGE = "Publish with hf-vicreg"
MARK = "<!-- hf_vicreg:"
MODEL_FILE = re.compile(r"config\.json|[^/]+\.(safetensors|bin|gguf|onnx|pt|pth)")


@dataclass(frozen=True)
class Remote:
    """A repository as it stands.

    Attributes:
        repo: Its id.
        branch: The branch that is published to.
        head: Its commit, or that of `main` where there is no such branch yet; None: no repository.
        has_branch: Whether it is there.
        files: Hash of each file, by name.
        card: Its card, if it has one.
        kind: `model` or `space`.
        private: Whether others cannot see it.
    """

    repo: str
    branch: str
    head: str | None = None
    has_branch: bool = False
    files: dict[str, str] = field(default_factory=dict)
    card: str | None = None
    kind: str = "model"
    private: bool = False


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        commit: The commit that holds the staged files.
        url: Where people find it.
        added: Names of files that are new or changed.
        removed: Names of generated files that the run has no more.
        private: Whether others cannot see it.
    """

    commit: str
    url: str
    added: list[str]
    removed: list[str]
    private: bool


def check_account(api: HfApi, repo: str, *, create_pr: bool) -> None:
    """Raise InputError without a token that is accepted, or if its account may not own the repository."""
    with as_one_line("know the token's account", api.endpoint):
        account = api.whoami()
    owners = [account["name"], *(one["name"] for one in account.get("orgs", []))]
    owner = repo.partition("/")[0]
    if owner not in owners and not create_pr:
        raise InputError(
            f"`repo`: expected one of the token's owners {owners}, got {owner!r}; change OWNER in OWNER/NAME, or open "
            "a pull request with --create_pr."
        )


def read_remote(api: HfApi, repo: str, *, revision: str | None, private: bool, kind: str = "model") -> Remote:
    """Return the state of a repository of a kind, `model` or `space`.

    Raises:
        InputError: The Hub does not answer, the repository is public and was to be private, or its card is not UTF-8.
    """
    branch = revision or "main"
    with as_one_line("read the repository", api.endpoint):
        try:
            info = api.repo_info(repo, repo_type=kind)
            hidden = bool(info.private)
        except RepositoryNotFoundError:
            return Remote(repo, branch, kind=kind)
        if private and not info.private:
            raise _public(repo)
        has_branch = True
        if revision is not None:
            try:
                info = api.repo_info(repo, revision=revision, repo_type=kind)
            except RevisionNotFoundError:
                has_branch = False
        files = _files_at(api, repo, info.sha, kind)
        card = None
        if "README.md" in files:
            with tempfile.TemporaryDirectory() as scratch:
                path = api.hf_hub_download(repo, "README.md", revision=info.sha, local_dir=scratch, repo_type=kind)
                card = _text_of(Path(path), repo)
        return Remote(repo, branch, info.sha, has_branch, files, card, kind, hidden)


def refuse_another(remote: Remote) -> None:
    """Refuse to take the place of a model that was not published by this package.

    Raises:
        InputError: The repository holds a model, and no card with a generated section.
    """
    if MARK not in (remote.card or "") and any(MODEL_FILE.fullmatch(name) for name in remote.files):
        raise InputError(
            f"`repo`: expected no model in {remote.repo}, or one that hf-vicreg published, found another, whose files "
            f"would be replaced; publish under another name, or, if it may go, write `{MARK} replace -->` into its "
            "README.md on the Hub."
        )


def bring_up_to_date(staged: Staged, remote: Remote) -> None:
    """Put what people wrote into the card on the Hub into the staged one.

    Raises:
        InputError: That card's metadata cannot be read.
    """
    if remote.card is None:
        return
    try:
        merged = merged_card(remote.card, staged.card)
    except Exception as error:  # whatever YAML people write
        reason = " ".join(str(error).split())
        raise InputError(f"`README.md`: expected a card with YAML metadata in {remote.repo}: {reason}") from None
    (staged.folder / "README.md").write_text(merged, encoding="utf-8")


def push(api: HfApi, staged: Staged | StagedSpace, remote: Remote, *, private: bool, create_pr: bool) -> Pushed:
    """Make the repository or branch if need be, and commit what differs; nothing if nothing does.

    Large files go first, where nobody sees them; the commit is one request, which holds or does not.

    Args:
        api: A client with the user's token.
        staged: What to publish.
        remote: The repository as it was when the card was brought up to date. If it has changed since, the push fails.
        private: Whether a new repository is private; if not, it is public or what the organisation has set.
        create_pr: Open a pull request instead of a commit to the branch.

    Raises:
        InputError: Anything that went wrong, in one line; the branch is then as it was.
    """
    if private and remote.head is not None and not remote.private:
        raise _public(remote.repo)
    repo, head, files, has_branch, kind = remote.repo, remote.head, remote.files, remote.has_branch, remote.kind
    hidden = remote.private
    if head is None:
        if create_pr:
            raise InputError(f"`create_pr`: expected a repository to open a pull request for, {repo} is none.")
        with as_one_line("create the repository", api.endpoint):
            sdk = "docker" if kind == "space" else None
            # None and not False, which would make public what an organisation keeps private by default
            api.create_repo(repo, private=private or None, exist_ok=True, repo_type=kind, space_sdk=sdk)
            info = api.repo_info(repo, repo_type=kind)
            head, hidden = info.sha, bool(info.private)
            files = _files_at(api, repo, head, kind)
        has_branch = remote.branch == "main"
    if not has_branch:
        with as_one_line("create the branch", api.endpoint):
            api.create_branch(repo, branch=remote.branch, revision=head, exist_ok=True, repo_type=kind)
    below = f"spaces/{repo}" if kind == "space" else repo
    page = f"{api.endpoint}/{below}" + ("" if remote.branch == "main" else f"/tree/{remote.branch}")
    added = [name for name in staged.names if _local_hash(staged.folder / name, files.get(name)) != files.get(name)]
    removed = sorted(name for name in files if staged.generated.fullmatch(name) and name not in staged.names)
    if not added and not removed:
        return Pushed(str(head), page, [], [], hidden)
    if create_pr and isinstance(staged, Staged) and (found := _open_request(api, staged, repo)):
        return found
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(staged.folder / name)) for name in added
    ]
    operations += [CommitOperationDelete(name) for name in removed]
    with as_one_line("publish the files", api.endpoint), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the Hub about metadata: the card's own checks have passed
        commit = api.create_commit(
            repo,
            operations,
            commit_message=MESSAGE,
            revision=remote.branch,
            parent_commit=head,
            create_pr=create_pr,
            repo_type=kind,
        )
    return Pushed(commit.oid, commit.pr_url or page, added, removed, hidden)


def download(
    api: HfApi, repo: str, commit: str, staged: Staged | StagedSpace, into: Path, kind: str = "model"
) -> None:
    """Download a commit's files, of a repository of a kind, and compare them with the staged ones.

    Raises:
        InputError: A file is missing or another.
    """
    with as_one_line("download the files again", api.endpoint):
        for name in staged.names:
            try:
                api.hf_hub_download(repo, name, revision=commit, local_dir=into, repo_type=kind)
            except RemoteEntryNotFoundError:
                raise InputError(f"`{name}`: expected it in {repo} at {commit[:8]}, the Hub has none.") from None
    for name in staged.names:
        expected, found = _sha256(staged.folder / name), _sha256(into / name)
        if expected != found:
            raise InputError(
                f"`{name}`: expected sha256 {expected[:12]} in {repo} at {commit[:8]}, downloaded {found[:12]}; do "
                "not use this commit, and run the command again."
            )


def _open_request(api: HfApi, staged: Staged, repo: str) -> Pushed | None:
    """Return the open pull request that already holds the staged files, if there is one."""
    with as_one_line("list the pull requests", api.endpoint):
        for one in api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open"):
            if one.title == MESSAGE and one.git_reference:
                info = api.model_info(repo, revision=one.git_reference)
                files = _files_at(api, repo, info.sha)
                if all(_local_hash(staged.folder / name, files.get(name)) == files.get(name) for name in staged.names):
                    return Pushed(info.sha, one.url, [], [], bool(info.private))
    return None


def _public(repo: str) -> InputError:
    return InputError(
        f"`private`: expected a private repository, {repo} is public; change its visibility first or choose another."
    )


def _text_of(card: Path, repo: str) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(
            f"`README.md`: expected text in UTF-8 in {repo}, got another encoding; save it there as UTF-8."
        ) from None


def _files_at(api: HfApi, repo: str, commit: str | None, kind: str = "model") -> dict[str, str]:
    tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)
    return {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in tree if isinstance(one, RepoFile)}


def _local_hash(path: Path, like: str | None) -> str:
    """Return a file's hash of the kind that `like` is: sha256 of large files, git's own of others."""
    if like is None or len(like) == 64:
        return _sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
