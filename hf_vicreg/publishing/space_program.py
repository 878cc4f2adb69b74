"""The app of a Space where the package cannot be imported: run by its path in a process of its own, never imported.

`python -IB space_program.py PATH [FLAG ...]`: PATH is a list of folders in JSON, the Space first; flags go to the app.
"""

import json
import runpy
import sys


class NoPackage:
    """Makes an installed `hf_vicreg` impossible to import."""

    def find_spec(self, name, path=None, target=None):
        """Raise for the package, leave all else to others."""
        if name.partition(".")[0] == "hf_vicreg":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv.pop(1))
    sys.meta_path.insert(0, NoPackage())
    runpy.run_module("hub_space.app", run_name="__main__", alter_sys=True)
