"""The model of a job: loaded, quantized, frozen, with its adapter."""
