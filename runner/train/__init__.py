"""The training half: one process per GPU, started by `runner.launch` as `python -m runner.train PLAN`.

The only folder that may import torch. Nothing outside imports it; a plan goes in, events, checkpoints
and an outcome come out.
"""
