"""A process with its own `HF_ENDPOINT`: publishes as asked and says how each went.

`python worker_publishing.py STEPS.json OUT.json`. A step is `{"cli": [...]}`, the command line in full, or
`{"push": RUN, "repo": ID, ...}`: staging, push and download, without loading the model before and after. `"env"`
changes the environment for one step.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path


def command(arguments):
    """Return exit code, output and errors of the command line."""
    from hf_vicreg.cli import main

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(arguments)
    return {"code": code, "out": out.getvalue(), "err": errors.getvalue()}


def push_alone(step):
    """Return what the push did, or the line it failed with."""
    from huggingface_hub import HfApi

    from hf_vicreg.publishing.hub_errors import patience
    from hf_vicreg.publishing.push import bring_up_to_date, check_account, download, push, read_remote, refuse_another
    from hf_vicreg.publishing.staging import stage

    api = HfApi(endpoint=step.get("endpoint"))
    private, create_pr = step.get("private", False), step.get("create_pr", False)
    with tempfile.TemporaryDirectory() as scratch, patience(step.get("timeout_s", 60)):
        (Path(scratch) / "staged").mkdir()
        try:
            staged = stage(Path(step["push"]), Path(scratch) / "staged", repo=step["repo"])
            check_account(api, step["repo"], create_pr=create_pr)
            remote = read_remote(api, step["repo"], revision=step.get("revision"), private=private)
            if not create_pr:
                refuse_another(remote)
            bring_up_to_date(staged, remote)
            if "meanwhile" in step:  # someone else's commit, through the Hub's own front door
                api.upload_file(path_or_fileobj=b"other", path_in_repo="other.txt", repo_id=step["repo"])
            pushed = push(api, staged, remote, private=private, create_pr=create_pr)
            download(api, step["repo"], pushed.commit, staged, Path(scratch) / "again")
        except ValueError as error:
            return {"error": str(error)}
        return vars(pushed)


def main():
    """Do the steps in order."""
    steps, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = []
    for step in steps:
        before = dict(os.environ)
        os.environ.update(step.get("env", {}))
        found.append(command(step["cli"]) if "cli" in step else push_alone(step))
        os.environ.clear()
        os.environ.update(before)
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
