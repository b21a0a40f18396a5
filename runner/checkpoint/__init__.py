"""Checkpoints that cannot be lost. Without torch; nothing here starts a trainer.

files          one checkpoint as a folder: sealed, published, verified
place          an address becomes a store
store          the seam to object stores; s3, folder and memory (a fake) are behind it
head           what a store holds besides blobs, as data
lease          who owns a run: `HEAD`, by compare-and-swap
commit         from a published folder to a committed checkpoint
restore        and back
collect        what is not retained any more
ship           the threads that do this while training goes on
adapter_file   an adapter out of a checkpoint
"""
