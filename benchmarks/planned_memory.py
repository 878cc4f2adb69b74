"""Peak memory of a training step on a CPU: told from shapes before the first one, and measured over a few.

python -m benchmarks.planned_memory

Each configuration is planned in a process of its own, on the built-in digits; their pixels do not matter to memory.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.measuring import machine

SMALL = (
    "--model.hidden_size 384 --model.num_hidden_layers 12 --model.num_attention_heads 6 "
    "--model.intermediate_size 1536 --model.image_size 224 --model.patch_size 16"
)
TINY = "--model.hidden_size 192 --model.num_attention_heads 3 --model.intermediate_size 768"
CONFIGURATIONS = {
    "as planned": "",
    "ViT-Tiny, 96 pixels, batch 64": f"{TINY} --model.num_hidden_layers 12 --model.image_size 96 --model.patch_size 8 "
    "--model.tile_size 2 --batch_size 64",
    "ViT-Small, 224 pixels, batch 32": f"{SMALL} --batch_size 32 --vicreg.expander_sizes [2048,2048,2048]",
    "ViT-Small, expander 8192, batch 16": f"{SMALL} --batch_size 16 --vicreg.expander_sizes [8192,8192,8192]",
    "by blocks, 512 pixels, batch 8": f"{TINY} --model.num_hidden_layers 4 --model.image_size 512 "
    "--model.patch_size 8 --model.tile_size 8 --batch_size 8",
    "ResNet, 64 pixels, batch 64": "--model.model_type resnet --model.hidden_sizes [64,128] --model.depths [1,1] "
    "--model.embedding_size 32 --views.image_size 64 --batch_size 64",
}
FIGURES = re.compile(r"([\d.]+) GB predicted, ([\d.]+) GB measured")


def main() -> None:
    """Print a line for each configuration, and store all of them."""
    rows = []
    for name, flags in CONFIGURATIONS.items():
        command = [sys.executable, "-m", "hf_vicreg.cli", "pretrain", "digits", "--plan_only", *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        found = FIGURES.search(done.stdout)
        if found is None:
            raise RuntimeError(f"{name}: {done.stderr}")
        predicted, measured = (float(one) for one in found.groups())
        rows.append({"name": name, "predicted_gb": predicted, "measured_gb": measured})
        print(f"{name:<36} {predicted:6.2f} GB predicted {measured:6.2f} GB measured {predicted / measured:6.2f}")
    path = Path(__file__).parent / "results" / "planned_memory.json"
    path.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
