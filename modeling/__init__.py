"""Models, loss and image processors. Flat on purpose: this folder is also the Hub's custom code."""

import transformers  # noqa: F401 - first: its import may bring in the modules here, and none may be half imported then
