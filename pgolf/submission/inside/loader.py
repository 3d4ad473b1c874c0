"""The first part of a script: it imports modules from `parts`, its other parts, name and source by
turns. Not imported: its text runs in the script's own namespace, where `settings` is too.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec


class Bundle(importlib.abc.SourceLoader):
    """Finds and loads the bundled modules; their files seem to lie in a folder named as the script.

    Modules outside the bundle are not found elsewhere: every module has an empty search path. A
    module of the package that is not bundled is an empty one in which every name is None. So a
    bundled module may import from one that is left out, for what a script never does.
    """

    sources = dict(zip(parts[1::2], parts[2::2], strict=True))  # noqa: F821

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name in self.sources or name.startswith("pgolf."):
            return importlib.util.spec_from_file_location(
                name, self.get_filename(name), loader=self, submodule_search_locations=[]
            )

    def get_filename(self, name: str) -> str:
        return f"{__file__}/{name}"

    def get_data(self, path: str) -> bytes:
        return self.get_source(path.rpartition("/")[2]).encode()

    def get_source(self, name: str) -> str:
        return self.sources.get(name, "__getattr__ = lambda name: None")


sys.meta_path.insert(0, Bundle())

if __name__ == "__main__":
    from pgolf.submission.entry import main

    sys.exit(main(settings))  # noqa: F821
