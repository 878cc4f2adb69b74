"""Package mapping: the rooms at the top level are sub-packages of `hf_vicreg`.

`hf_vicreg/modeling` and its two siblings are committed relative links, so an uninstalled checkout imports as well; the
mapping below is what makes editable installs and wheels hold the real folders once.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("modeling", "training", "model_cards")
CARDS = sorted(path.parent.name for path in Path(__file__).parent.glob("model_cards/*/config.json"))

setup(
    packages=[
        "hf_vicreg",
        "hf_vicreg.publishing",
        "hf_vicreg.report",
        "hf_vicreg.explore",
        "hf_vicreg.hub_space",
        "hf_vicreg.comparison",
        "hf_vicreg.tuning",
    ]
    + [
        f"hf_vicreg.{package}"
        for room in ROOMS
        for package in [room, *(f"{room}.{nested}" for nested in find_packages(room))]
    ]
    # data alone, but setuptools wants every folder named
    + ["hf_vicreg.training.recipes", *(f"hf_vicreg.model_cards.{name}" for name in CARDS)],
    package_dir={"hf_vicreg": "hf_vicreg", **{f"hf_vicreg.{room}": room for room in ROOMS}},
    package_data={
        "hf_vicreg": ["py.typed"],
        "hf_vicreg.report": ["*.css", "*.js"],
        "hf_vicreg.explore": ["*.css", "*.html", "*.js"],
        "hf_vicreg.hub_space": ["*.css", "*.html", "*.js", "Dockerfile"],
        "hf_vicreg.training.recipes": ["*.yaml"],
        "hf_vicreg.training.launch": ["*.yaml", "*.sh"],
        "hf_vicreg.model_cards": ["*.md"],
        **{f"hf_vicreg.model_cards.{name}": ["README.md", "*.json", "*.safetensors"] for name in CARDS},
    },
)
