"""Test only: kills this process, with a real SIGKILL, inside a named function of the real runner.

Python imports this module at start when its folder is on PYTHONPATH. `KILL_AT` is a list, with semicolons, of
`module:attribute:count:who`: a function, the call that dies (from 1, in this process) and who dies with it:
`self`, or `tree` for this process and its parent, the supervisor of a trainer. `KILLED` is a folder that
keeps a file for every point that has killed; a process arms the first point that has none.
"""

import importlib.abc
import importlib.machinery
import os
import pathlib
import signal
import sys


def _die(mark, who):
    mark.touch()
    if who == "tree":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(module, mark, attribute, count, who):
    owner = module
    *parents, name = attribute.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    calls = 0

    def armed(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            _die(mark, who)
        return original(*args, **kwargs)

    setattr(owner, name, armed)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the module load as ever and arms it right after."""

    def __init__(self, module, *rest):
        self.module, self.rest = module, rest

    def find_spec(self, fullname, path, target=None):
        if fullname != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        execute = spec.loader.exec_module

        def exec_and_arm(module):
            execute(module)
            _arm(module, *self.rest)

        spec.loader.exec_module = exec_and_arm
        return spec


for _number, _point in enumerate(os.environ.get("KILL_AT", "").split(";")):
    _mark = pathlib.Path(os.environ.get("KILLED", ""), str(_number))
    if _point and not _mark.exists():
        _module, _attribute, _count, _who = _point.split(":")
        sys.meta_path.insert(0, _Finder(_module, _mark, _attribute, int(_count), _who))
        break
