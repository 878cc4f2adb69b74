"""`python -m hf_vicreg` is `hf-vicreg`."""

import sys

from hf_vicreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
