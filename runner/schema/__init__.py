"""Generated files, and what generates them.

    upstream.json   the fields of the pinned SFTConfig, DPOConfig, LoraConfig and BitsAndBytesConfig
    job.json        the JSON Schema of a job: what `runner.check` judges by, and what editors read

`make schema` writes both, and docs/training-options.md; a test fails when they are stale.
"""
