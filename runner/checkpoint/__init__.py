"""Checkpoints: `files` seals and verifies one folder, `local` keeps the store of a run on this machine."""
