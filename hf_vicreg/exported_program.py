"""An exported program at work where this package does not exist: a script, run by its path, never imported.

`python exported_program.py PROGRAM INPUTS OUTPUTS`: runs a `.pt2` by torch alone or an `.onnx` by onnxruntime alone on
every array of INPUTS (`.npz`), writes what comes out to OUTPUTS (`.npz`), and prints seconds per image of the largest.
"""

import statistics
import sys
import time

REPEATS = 5


class NoPackage:
    """Makes an installed `hf_vicreg` impossible to import."""

    def find_spec(self, name, path=None, target=None):
        """Raise for the package, leave all else to others."""
        if name.partition(".")[0] == "hf_vicreg":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def loaded(path):
    """Return a function from a NumPy array of pixels to a list of NumPy arrays."""
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda pixels: session.run(None, {name: pixels})
    import torch

    module = torch.export.load(path).module()

    def run(pixels):
        with torch.no_grad():
            return [one.numpy() for one in module(torch.from_numpy(pixels))]

    return run


def main(program, inputs, outputs):
    """Run a program on arrays of pixels."""
    import numpy

    arrays, run = dict(numpy.load(inputs)), loaded(program)
    found = {f"{name}/{index}": one for name, pixels in arrays.items() for index, one in enumerate(run(pixels))}
    numpy.savez(outputs, **found)
    largest = max(arrays.values(), key=len)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run(largest)
        seconds.append(time.perf_counter() - started)
    print(statistics.median(seconds) / len(largest))


if __name__ == "__main__":
    sys.meta_path.insert(0, NoPackage())
    main(*sys.argv[1:])
