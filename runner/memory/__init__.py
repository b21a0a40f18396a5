"""How many bytes a job takes on one device, before it runs. Pure: no torch, no file, no GPU.

stacks        activations of one stack of layers, per token
subject       a job on a device, as the terms see it
terms         what there is in memory, one term at a time, each with low, high and source
estimate      the terms of a job on a device: an interval
devices       what the GPUs that clouds rent have
levers        what would make a job fit, and the strategy that `launch.strategy: auto` takes

It is a model of the worst micro-batch that the data can make, in training: evaluation by generation is not in
it. How far it is from what was measured stands in docs/memory-model.md.
"""

from runner.memory.devices import GPUS, Gpu
from runner.memory.estimate import Estimate, Term, Verdict, estimate
from runner.memory.levers import Choice, Lever, choose, levers
from runner.memory.subject import Subject

__all__ = [
    "GPUS",
    "Choice",
    "Estimate",
    "Gpu",
    "Lever",
    "Subject",
    "Term",
    "Verdict",
    "choose",
    "estimate",
    "levers",
]
