"""Runs that are killed hundreds of times, before a real S3 server: `python -m tests.chaos --kills 500`."""
