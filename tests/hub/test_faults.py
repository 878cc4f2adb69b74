"""What goes wrong between here and the Hub: one line each, and a repository that is whole."""

import json
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_vicreg.cli import main
from hf_vicreg.publishing.hub_errors import as_one_line
from hf_vicreg.training.errors import InputError

WORKER = Path(__file__).with_name("worker_publishing.py")
HAND_EDITED = """---
license: mit
tags:
- mine
model-index: []
---

# My own title

Words of mine above.

<!-- hf_vicreg:about generated: text up to the next such line is replaced when publishing again -->
What an older version said.
<!-- /hf_vicreg:about -->

Words of mine below.
"""


@pytest.fixture
def closed_port():
    """A port that refuses connections and that nobody else gets meanwhile: bound, and not listened to."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.mark.slow
def test_each_fault_gets_one_line_and_leaves_the_repository_whole(hub, publishing, run_folder, closed_port):
    run = str(run_folder)
    other = {"other.txt": b"somebody's", "pretraining/model.safetensors": b"an older one's"}
    for name in ("public", "stale", "edited", "broken", "cleaned", "requests", "failing"):
        hub.create(f"writer/{name}", files=other | {"README.md": b"# Words\n"})
    hub.commit("writer/edited", {"README.md": HAND_EDITED.encode()})
    hub.commit("writer/broken", {"README.md": b"---\ntags: [\n---\n\n# Words\n"})
    before = {name: dict(one.branches) for name, one in hub.repositories.items()}
    hub.fault("POST", "writer/retried/preupload", 500, times=1)
    hub.fault("PUT", "large/.*/writer/busy", 503, times=1)
    hub.fault("POST", "writer/failing/commit", 500, times=1)
    hub.fault("PUT", "large/.*/lab/refused", 403)
    hub.fault("POST", "writer/silent/commit", "hang", times=1)
    hub.fault("GET", "writer/altered/resolve/.*/results.json", "corrupt")

    def at(repo, **more):
        return {"push": run, "repo": repo} | more

    stranger, requests = {"HF_TOKEN": "hf_stranger_token_of_the_tests"}, "writer/requests"
    nowhere = f"http://127.0.0.1:{closed_port}"
    steps = [
        (at("writer/none", env={"HF_TOKEN": ""}), r"`HF_TOKEN`: expected a token .*got none; run `hf auth login`"),
        (at("writer/none", env={"HF_TOKEN": "hf_wrong"}), r"`repo`: expected to know the token's account.* 401"),
        (
            at("writer/none", endpoint=nowhere),
            r"account at http://127.*got no answer \(ConnectError\); check the network",
        ),
        (at("nobody/none"), r"`repo`: expected one of the token's owners \['writer', 'lab'\], got 'nobody'; change"),
        (at("writer/public", env=stranger), r"`repo`: expected one of the token's owners \['stranger'\]"),
        (at("writer/public", private=True), r"`private`: expected a private repository, writer/public is public"),
        (at("writer/none", create_pr=True), r"`create_pr`: expected a repository .*writer/none is none"),
        (at("writer/broken"), r"`README.md`: expected a card with YAML metadata in writer/broken"),
        (at("writer/stale", meanwhile=True), r"the Hub answered 412 .*changed meanwhile; run the command again"),
        (at("writer/failing"), r"`repo`: expected to publish the files, the Hub answered 500 .*run the command again"),
        (at("lab/refused"), r"`repo`: expected to publish the files, the Hub answered 403"),
        (
            at("writer/silent", timeout_s=20),
            r"expected to publish the files at .*got no answer \(ReadTimeout\).*run the command again",
        ),
        (
            at("writer/altered"),
            r"`results.json`: expected sha256 \w+ in writer/altered at \w+, downloaded \w+; do not",
        ),
        (at("writer/retried"), None),
        (at("writer/busy"), None),
        (at("writer/failing"), None),
        (at("writer/silent"), None),
        (at("writer/hidden", private=True), None),
        (at("writer/hidden", private=True), None),
        (at("writer/retried", revision="next"), None),
        (at("writer/fresh", revision="next"), None),
        (at(requests, create_pr=True, env=stranger), None),
        (at(requests, create_pr=True, env=stranger), None),
        (at("writer/edited"), None),
        (at("writer/cleaned"), None),
    ]
    found = publishing([step for step, _ in steps])
    assert len(found) == len(steps)
    wrong = []
    for (step, message), answer in zip(steps, found, strict=True):
        error = answer.get("error", "")
        if "\n" in error or (error if message is None else not re.search(message, error)):
            wrong.append((step["repo"], message, answer))
    assert not wrong

    # nothing of what failed is to be seen
    assert not any(name.endswith("/none") for name in hub.repositories)
    for name in ("writer/public", "writer/broken", requests):
        branches = hub.repositories[name].branches
        assert {key: sha for key, sha in branches.items() if not key.startswith("refs/")} == before[name]
    assert set(hub.repositories["lab/refused"].tree()) == {".gitattributes"}
    stale = hub.repositories["writer/stale"].tree()
    assert stale == hub.repositories["writer/public"].tree() | {"other.txt": b"other"}

    # and what went well is complete, in one commit, and not sent again
    answers = {step["repo"]: answer for (step, _), answer in zip(steps, found, strict=True)}
    whole = set(hub.repositories["writer/silent"].tree())
    assert {"README.md", "config.json", "model.safetensors", "modeling_bigbird_vit.py"} < whole
    for name in ("writer/retried", "writer/busy", "writer/hidden"):
        assert set(hub.repositories[name].tree()) == whole, name
    assert len(hub.repositories["writer/hidden"].commits) == 2
    assert hub.repositories["writer/hidden"].private
    assert answers["writer/hidden"]["added"] == []
    for name in ("writer/retried", "writer/fresh"):
        assert set(hub.repositories[name].tree("next")) == whole
    assert set(hub.repositories["writer/fresh"].tree()) == {".gitattributes"}
    assert answers["writer/fresh"]["url"].endswith("/writer/fresh/tree/next")

    # one pull request, found again the second time
    assert len(hub.repositories[requests].requests) == 1
    assert answers[requests]["added"] == []
    assert answers[requests]["url"].endswith("/writer/requests/discussions/1")
    assert whole <= set(hub.repositories[requests].tree("refs/pr/1"))

    # what the run has no more is gone, what others brought is there
    for name in ("writer/cleaned", "writer/failing", "writer/edited"):
        tree = hub.repositories[name].tree()
        assert tree["other.txt"] == b"somebody's"
        assert set(tree) == whole | {"other.txt"}
    card = hub.repositories["writer/edited"].tree()["README.md"].decode()
    assert card.index("# My own title") < card.index("Words of mine above.") < card.index("Words of mine below.")
    assert "What an older version said" not in card
    assert "A `bigbird_vit` encoder" in card
    assert "## How to load it" not in card  # that section had been taken out
    metadata = ModelCard(card).data.to_dict()
    assert metadata["license"] == "mit"
    assert {"mine", "vicreg"} <= set(metadata["tags"])
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"
    words = hub.repositories["writer/cleaned"].tree()["README.md"].decode()
    assert words.index("# Words") < words.index("## How to load it")


def test_another_model_or_a_card_that_is_no_text_is_refused_and_stays(hub, publishing, run_folder):
    bert = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"{}", "vocab.txt": b"x"}
    hub.create("writer/bert", files=bert | {"README.md": b"# My bert\n"})
    hub.create("writer/latin", files={"README.md": "# caf\u00e9\n".encode("latin-1")})
    hub.create("writer/given", files=bert | {"README.md": b"# My bert\n\n<!-- hf_vicreg: replace -->\n"})
    hub.create("writer/asked", files=bert)
    before = {name: one.tree() for name, one in hub.repositories.items()}
    steps = [{"push": str(run_folder), "repo": f"writer/{name}"} for name in ("bert", "latin", "given")]
    steps.append({"push": str(run_folder), "repo": "writer/asked", "create_pr": True})
    *refused, given, asked = publishing(steps)
    bert_line, latin_line = (one["error"] for one in refused)
    assert "found another, whose files would be replaced" in bert_line
    assert latin_line == (
        "`README.md`: expected text in UTF-8 in writer/latin, got another encoding; save it there as UTF-8."
    )
    for name in ("bert", "latin", "asked"):
        assert hub.repositories[f"writer/{name}"].tree() == before[f"writer/{name}"], name
    assert given["removed"] == ["tokenizer.json"]
    assert "vocab.txt" in hub.repositories["writer/given"].tree()
    assert asked["url"].endswith("/discussions/1")


def test_a_new_repository_is_public_or_as_its_owner_has_set(hub, publishing, run_folder):
    hub.private_by_default.add("lab")
    found = publishing([{"push": str(run_folder), "repo": repo} for repo in ("lab/new", "writer/new")])
    assert {repo: one.private for repo, one in hub.repositories.items()} == {"lab/new": True, "writer/new": False}
    assert [one["private"] for one in found] == [True, False]


def test_what_goes_wrong_in_an_upload_by_xet_is_one_line(hub, publishing, run_folder):
    pytest.importorskip("hf_xet")
    for name, action in {"denied": 403, "busy": 503, "silent": "hang"}.items():
        hub.create(f"writer/{name}")
        hub.fault("GET", f"writer/{name}/xet-write-token", action)
    names = ["denied", "busy", "silent"]
    by_xet = {"HF_HUB_DISABLE_XET": "0", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_READ_TIMEOUT": "2s"}
    found = publishing([{"push": str(run_folder), "repo": f"writer/{name}"} for name in names], **by_xet)
    denied, busy, silent = (one["error"] for one in found)
    assert denied == (
        "`repo`: expected to publish the files, the Hub answered 403; the token may not write there; use one with "
        "write access to it."
    )
    assert "the Hub answered 503; run the command again: it goes on where it stopped." in busy
    assert re.fullmatch(r"`repo`: expected to publish the files at .*, got no answer \(ConnectionError\); .*", silent)
    assert all(set(hub.repositories[f"writer/{name}"].tree()) == {".gitattributes"} for name in names)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConnectionResetError(104, "reset by peer"), r"got no answer \(ConnectionResetError\)"),
        (TimeoutError(110, "timed out"), r"got no answer \(TimeoutError\)"),
        (OSError("I/O error: failed to fill whole buffer"), r"got no answer \(OSError\)"),
        (RuntimeError("Data processing error: CAS service error : HTTP status client error (401 X)"), "answered 401"),
        (RuntimeError("Data processing error: CAS service error : Reqwest Error: timeout"), "no answer"),
        (OSError(28, "No space left on device"), None),
        (RuntimeError("of another kind"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_network_are_one_line_and_others_pass(error, line):
    with pytest.raises(InputError if line else type(error), match=line), as_one_line("send", "http://hub"):
        raise error


@pytest.mark.slow
def test_killed_half_way_and_run_again_ends_as_an_undisturbed_one(
    hub, publishing, run_process, environment, run_folder, tmp_path
):
    fault = hub.fault("PUT", "large/.*/writer/killed", "stall", times=1)
    steps = tmp_path / "killed.json"
    steps.write_text(json.dumps([{"push": str(run_folder), "repo": "writer/killed"}]))
    process = run_process.start([sys.executable, WORKER, steps, tmp_path / "never"], **environment)
    sys.modules["loopback_hub"].wait_for(fault.seen, timeout_s=800)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "never").exists()
    assert set(hub.repositories["writer/killed"].tree()) == {".gitattributes"}
    again, undisturbed = publishing(
        [{"push": str(run_folder), "repo": f"writer/{name}"} for name in ("killed", "not")]
    )
    assert again["added"] == undisturbed["added"] != []
    trees = [hub.repositories[f"writer/{name}"].tree() for name in ("killed", "not")]
    trees = [
        {name: content.replace(b"writer/not", b"writer/killed") for name, content in one.items()} for one in trees
    ]
    for before in (b"# ", b"name: ", b"runs/"):  # the card alone says what the repository is called
        trees[1]["README.md"] = trees[1]["README.md"].replace(before + b"not\n", before + b"killed\n")
    assert trees[0] == trees[1]
    assert len(hub.repositories["writer/killed"].commits) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--repo", "no-owner"], "`repo`: expected OWNER/NAME, got 'no-owner'."),
        (["RUN", "--repo", "a/b", "--create_pr", "--revision", "next"], "`create_pr`, `revision`: expected one of"),
        (["RUN", "--repo", "writer/x"], "`HF_HUB_OFFLINE`: expected to reach"),
        (["nowhere", "--repo", "a/b"], "`RUN`: expected the folder of a run, got 'nowhere', which is none."),
        (["RUN/pretraining", "--repo", "a/b"], "`RUN`: expected the folder of a run or a fine-tuned model"),
        (
            ["wrapper", "--repo", "a/b"],
            "`RUN`: expected the run's folder, wrapper is its wrapper; give the folder above",
        ),
        (
            ["photos", "--repo", "a/b"],
            "`RUN`: expected the folder of a run or a fine-tuned model, photos has no config",
        ),
        (["bert", "--repo", "a/b"], "`RUN`: expected a run or a model of type 'bigbird_vit', bert holds a 'bert'."),
        (
            ["unfinished", "--repo", "a/b"],
            "`RUN`: expected a finished run, unfinished has no results.json yet; finish it",
        ),
        (["pickled", "--repo", "a/b"], "`RUN`: expected model.safetensors in pickled, found none; safetensors only."),
        (["damaged", "--repo", "a/b"], "`model.safetensors`: expected safetensors in damaged, cannot be read"),
        (
            ["linked", "--repo", "a/b"],
            "`config.json`: expected a file of linked, got a link out of it; copy it there.",
        ),
        (["shards", "--repo", "a/b"], "`model.safetensors.index.json`: expected names of shards in shards, got"),
        (
            ["alone", "--repo", "a/b", "--include_pretraining"],
            "`include_pretraining`: expected pretraining/config.json",
        ),
        (["no recipe", "--repo", "a/b"], "`recipe.yaml`: expected a mapping of settings in no recipe"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_writer_token_of_the_tests")
    folder = arguments[0].replace("RUN", str(run_folder))
    if not Path(folder).exists() and folder != "nowhere":
        shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("checkpoints", "pretraining"))
        break_folder(Path(folder), run_folder)
    assert main(["publish", folder, *arguments[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def break_folder(folder, run):
    """Make a copy of a run one of the folders that are refused, by its name."""
    if folder.name == "wrapper":
        shutil.copy(run / "pretraining" / "config.json", folder)
        (folder / "recipe.yaml").unlink()
    elif folder.name == "photos":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "holiday.jpg").write_bytes(b"jpeg")
    elif folder.name == "bert":
        (folder / "config.json").write_text('{"model_type": "bert"}')
        (folder / "recipe.yaml").unlink()
    elif folder.name == "unfinished":
        (folder / "results.json").unlink()
    elif folder.name == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif folder.name == "damaged":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif folder.name == "linked":
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(run / "config.json")
    elif folder.name == "shards":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    elif folder.name == "no recipe":
        (folder / "recipe.yaml").write_text("- a\n- list\n")
