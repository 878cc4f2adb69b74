"""Models, loss and image processors. Flat on purpose: this folder is also the Hub's custom code."""
