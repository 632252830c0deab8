"""Programs of ``benchmarks/``, loaded as modules, and the figures that are kept there."""

import importlib.util
import sys
from types import ModuleType

from tests.support.runs import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> ModuleType:
    """A program of the benchmarks as a module.

    Args:
        name: Its file without the ending.
    """
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
