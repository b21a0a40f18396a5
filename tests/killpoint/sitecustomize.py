"""Test only: kills this process, with a real SIGKILL, inside a named function of the real trainer.

Python imports this module at start when its folder is on PYTHONPATH. `KILL_AT=module:attribute:count:who`
names a function, the call that dies (from 1) and who dies with it: `self`, or `tree` for this process and its
parent, the supervisor of a trainer. `KILL_ONCE` is a file that the first to come there creates: only it dies.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys


def _die(who):
    try:
        os.close(os.open(os.environ["KILL_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if who == "tree":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(module, attribute, count, who):
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
            _die(who)
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


if "KILL_AT" in os.environ:
    _module, _attribute, _count, _who = os.environ["KILL_AT"].split(":")
    sys.meta_path.insert(0, _Finder(_module, _attribute, int(_count), _who))
