"""vlm-runner: one YAML file fine-tunes a vision-language model, and the run survives its machine."""

__version__ = "0.1.0"
