"""Lets timm know the models of the benchmark, in every process that has this folder in its PYTHONPATH.

Python runs this file at each start; it waits until something imports timm.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec


class _ThenModels(Loader):
    """Loads a module as its own loader does, and the benchmark's models after it."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        import peer_models  # noqa: F401


class _Timm(MetaPathFinder):
    """Finds timm as the other finders do, whether it is then loaded or only looked for."""

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None:
            spec.loader = _ThenModels(spec.loader)
        return spec


sys.meta_path.insert(0, _Timm())
