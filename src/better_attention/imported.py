"""To do something as soon as another library is imported, without importing it.

Custom operators have to be known to torch once both it and this package are imported, in whichever order; and formulas
for counting FLOPs to ``torch.utils.flop_counter``, whose import takes half a second where Triton is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` now if the module called ``name`` is imported, or else right after it will have been.

    >>> when_imported("sys", lambda: print("is imported"))
    is imported
    """
    if name in sys.modules:
        action()
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Watch) and finder.name == name:
            finder.actions.append(action)
            return
    sys.meta_path.insert(0, _Watch(name, action))


def when_settled(package: str, action: Callable[[], None]) -> None:
    """Call ``action`` now, unless a module inside ``package`` is half imported: then at the next import after that.

    A module that imports torch sees what waits for torch happen in the middle of its own import, and what then imports
    that module would find half of it.

    >>> when_settled("better_attention", lambda: print("is settled"))
    is settled
    """
    if _is_settled(package):
        action()
    else:
        sys.meta_path.insert(0, _Later(package, action))


def _is_settled(package: str) -> bool:
    inside = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.")]
    return not any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in inside)


class _Later(MetaPathFinder):
    """Finds nothing: it is asked at every import, and acts at the first one at which the package is settled."""

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self.package, self.action = package, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self.package) and _is_settled(self.package):
            sys.meta_path.remove(self)
            self.action()
        return None


class _Watch(MetaPathFinder):
    """Finds nothing by itself: it lets the others find the module, and adds the actions to what executes it."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.actions = name, [action]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # before the others are asked, and because once is enough
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        execute = loader.exec_module

        def and_then(module: ModuleType) -> None:
            del loader.exec_module  # the method of its class again
            execute(module)
            for action in self.actions:
                action()

        loader.exec_module = and_then  # type: ignore[method-assign]
        return spec
