"""Secrets of many kinds, planted wherever a file leaves the machine: none does, and none is shown."""

import base64
import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from hf_vicreg.cli import main
from hf_vicreg.publishing.secret_patterns import KINDS, secret_in, secret_under
from hf_vicreg.publishing.secret_scan import refuse_secrets
from hf_vicreg.publishing.staging import stage

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
A, N, X = "aB3dE5gH7jK9mN1pQ" * 4, "1234567890" * 2, "0123456789abcdef" * 4
SLACK, STRIPE = "xo" + "xb-", "sk" + "_live_"  # in parts, or this file would be held back for its secrets
SECRETS = {
    "hub": f"hf_{A[:34]}",
    "github": f"ghp_{A[:36]}",
    "github fine": f"github_pat_{A[:50]}",
    "gitlab": f"glpat-{A[:20]}",
    "aws": "AKIA" + "ABCD1234" * 2,
    "google key": f"AIza{A[:35]}",
    "google oauth": f"ya29.{A[:40]}",
    "google client": f"GOCSPX-{A[:28]}",
    "slack": f"{SLACK}{N[:12]}-{A[:24]}",
    "slack hook": f"https://hooks.slack.com/services/T{N[:8]}/B{N[:8]}/{A[:24]}",
    "discord hook": f"https://discord.com/api/webhooks/{N[:18]}/{A[:60]}",
    "openai": f"sk-proj-{A[:40]}",
    "anthropic": f"sk-ant-api03-{A[:40]}",
    "stripe": f"{STRIPE}{A[:24]}",
    "wandb": f"WANDB_API_KEY={X[:40]}",
    "wandb words": f"wandb login {X[:40]}",
    "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{A[:40]}",
    "twilio": f"SK{X[:32]}",
    "sendgrid": f"SG.{A[:22]}.{A[:43]}",
    "mailgun": f"key-{X[:32]}",
    "telegram": f"{N[:9]}:AA{A[:33]}",
    "npm": f"npm_{A[:36]}",
    "pypi": f"pypi-{A[:60]}",
    "docker": f"dckr_pat_{A[:27]}",
    "digitalocean": f"dop_v1_{X[:64]}",
    "databricks": f"dapi{X[:32]}",
    "azure": f"AccountName=x;AccountKey={A[:60]}==",
    "azure sas": f"https://x.blob.core.windows.net/c/y?se=2030&sig={A[:40]}%3D",
    "signed": f"https://b.s3.amazonaws.com/x?X-Amz-Signature={X[:64]}",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "url": "https://alice:wonderland@data.example.org/x.tar",
    "url token": f"https://{A[:24]}@git.example.org/x.git",
    "ftp": "ftp://bob:pw@host/x",
    "basic": "Authorization: Basic " + base64.b64encode(b"alice:wonderland").decode(),
    "bearer": f"Bearer {A[:30]}",
    "netrc": "machine data.example.org login alice password wonderland",
    "password": "password=wonderland7",
    "token": f"access_token: {A[:24]}",
    "home": "/home/alice/photos",
}
HARMLESS = [
    "8bb8294c7af9412a",
    "0123456789abcdef" * 4,  # a hash
    "fbf1fd1c-2b65-4c5e-9c2b-9f7e2c1a8d10",
    "12345678901234567890",
    "2026-11-25T15:44:50+00:00",
    "https://arxiv.org/abs/2105.04906",
    "ssh://git@github.com/lab/demo",
    "https://github.com/lab/demo?tab=readme#token",
    "tokens: 196 of 14x14 patches",
    "basic augmentation of images",
    "Basic augmentation",
    "the key-value pairs",
    "class_token",
    "task-12 risk-based desk-top",
    "lab/sk-learn-demo",
    "BigBirdViTImageProcessor",
    "2 CPU cores (x86_64)",
    "hf-vicreg evaluate knn MODEL --dataset_name digits --learning_rate 0.001",
    "mask_token: <mask>",
    "wandb 0.19.1",
]


def set_field(file, *path):
    """Returns a function that puts a value at a path of a JSON or YAML file."""

    def plant(run, secret):
        is_yaml = file.endswith(".yaml")
        content = (yaml.safe_load if is_yaml else json.loads)((run / file).read_text())
        inside = content
        for key in path[:-1]:
            inside = inside.setdefault(key, {}) if isinstance(inside, dict) else inside[key]
        inside[path[-1]] = secret
        (run / file).write_text((yaml.safe_dump if is_yaml else json.dumps)(content))

    return plant


def in_evaluation(run, secret):
    one = {"task": "linear", "data": {"dataset": "x"}, "details": {"samples": [{"written": f"see {secret} there"}]}}
    path = run / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluations": [one]}))


def in_weights(run, secret):
    path = run / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "note": secret})


def in_name_of_field(run, secret):
    set_field("config.json", secret)(run, 1)


def in_log(run, secret):
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 99, "loss": 1.0, "note": secret, secret: 1}) + "\n")


def in_picture(run, secret):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", secret)
    image = Image.new("RGB", (8, 8))
    image.save(run / "neighbours.png", pnginfo=info, icc_profile=secret.encode(), exif=b"Exif\0\0" + secret.encode())


def in_readme(run, secret):
    (run / "README.md").write_text(secret)


PLACES = {
    "results.json, data": set_field("results.json", "dataset"),
    "results.json, hardware": set_field("results.json", "hardware"),
    "results.json, sample": in_evaluation,
    "config.json": set_field("config.json", "note"),
    "config.json, class": set_field("config.json", "id2label", "0"),
    "config.json, name": in_name_of_field,
    "preprocessor_config.json": set_field("preprocessor_config.json", "note"),
    "recipe.yaml": set_field("recipe.yaml", "model", "note"),
    "recipe.yaml, split": set_field("recipe.yaml", "train_split"),
    "model.safetensors": in_weights,
}
LEFT = {"log.jsonl": in_log, "neighbours.png": in_picture, "README.md": in_readme}  # what does not leave, or not whole


@pytest.fixture(scope="module")
def light_run(run_folder, tmp_path_factory):
    """A run without a picture to draw: staging takes no time."""
    folder = tmp_path_factory.mktemp("light") / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("checkpoints", "pretraining"))
    return folder


def staged(run, folder):
    folder.mkdir()
    return stage(run, folder, repo="lab/demo")


@pytest.mark.parametrize("place", PLACES)
def test_no_kind_of_secret_leaves_by_any_file(place, light_run, tmp_path):
    for number, (kind, secret) in enumerate(SECRETS.items()):
        if kind == "home" and not place.startswith(("config", "pre", "model", "results.json, sample")):
            continue  # a path becomes its last name
        run = shutil.copytree(light_run, tmp_path / f"run {number}")
        PLACES[place](run, secret)
        with pytest.raises(ValueError, match="expected") as caught:
            staged(run, tmp_path / f"staged {number}")
        message = str(caught.value)
        shutil.rmtree(run)
        assert message.startswith(f"`{place.partition(',')[0]}`: expected nothing secret, "), (kind, message)
        assert secret not in message
        assert not any(part in message for part in ("wonderland", A[:16], X[:16], N[:8]))
        assert "\n" not in message


@pytest.mark.parametrize("place", LEFT)
def test_nothing_of_them_leaves_with_what_is_made_anew(place, light_run, tmp_path):
    run = shutil.copytree(light_run, tmp_path / "run")
    for secret in SECRETS.values():
        LEFT[place](run, secret)
    found = staged(run, tmp_path / "staged")
    for name in found.names:
        content = (found.folder / name).read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), name


def test_a_field_named_like_a_secret_is_looked_at(light_run, tmp_path, capsys):
    run = shutil.copytree(light_run, tmp_path / "run")
    set_field("recipe.yaml", "views", "db_password")(run, "tulip")
    assert main(["publish", str(run), "--repo", "lab/demo", "--dry_run"]) == 2
    printed = "".join(capsys.readouterr())
    assert printed == (
        "error: `recipe.yaml`: expected nothing secret, `views.db_password` holds a password; take it out.\n"
    )


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_is_no_secret(text):
    assert secret_in(text) is None
    assert secret_in(f"{text}, {text}") is None
    assert secret_under("train_fingerprint", text) is None


def test_every_kind_is_planted():
    found = {secret_in(secret) for secret in SECRETS.values()}
    assert set(KINDS) - found == set()
    assert len(SECRETS) >= 25


@pytest.mark.parametrize("folder", sorted(one.parent for one in CARDS.glob("*/README.md")), ids=lambda one: one.name)
def test_the_evidence_of_every_card_passes(folder):
    refuse_secrets(folder, [one.name for one in folder.iterdir() if one.suffix != ".jsonl"])


def test_names_of_tokens_in_a_model_are_no_secrets():
    for name, value in (
        ("cls_token", "model-00001-of-00002.safetensors"),
        ("num_register_tokens", "4"),
        ("pad_token", "<pad>"),
        ("password", "<your password>"),
    ):
        assert secret_under(name, value) is None
