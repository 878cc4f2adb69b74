"""`hf-vicreg pretrain` as it is typed on each of several machines: on some of them with another flag at its end."""

import os
import sys

from hf_vicreg.training.command import main

if __name__ == "__main__":
    others, flag, *flags = sys.argv[1:]  # ranks, by commas
    sys.exit(main([*flags, *([flag] if os.environ["RANK"] in others.split(",") else [])]))
