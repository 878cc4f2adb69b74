"""What patches mean to an encoder: the first three principal components of their tokens as red, green and blue."""

import torch
from PIL import Image

CUT = 0.02  # share of the tokens whose colour is cut off at either end


class PatchColours:
    """Colours of patches in one space for all sizes: principal components of the tokens that it is made from."""

    def __init__(self, tokens: torch.Tensor):
        """Find the components of tokens `(..., hidden_size)`."""
        flat = tokens.flatten(0, -2).double()
        self.mean = flat.mean(0)
        components = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:3]
        # a component's sign is arbitrary; here its largest entry is positive, whatever the library
        largest = components.abs().argmax(1, keepdim=True)
        self.components = components * components.gather(1, largest).sign()
        projected = (flat - self.mean) @ self.components.T
        self.low, self.high = (projected.quantile(at, dim=0) for at in (CUT, 1 - CUT))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return colours `(..., 3)` in [0, 1] of tokens `(..., hidden_size)`; of fewer components than 3, grey."""
        projected = (tokens.double() - self.mean) @ self.components.T
        colours = ((projected - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)
        missing = 3 - colours.shape[-1]
        return torch.nn.functional.pad(colours, (0, missing), value=0.5)


def colour_images(colours: torch.Tensor) -> list[Image.Image]:
    """Return an image of a pixel a patch of colours `(batch, rows, columns, 3)`."""
    return [Image.fromarray(one.mul(255).round().to(torch.uint8).numpy()) for one in colours]
