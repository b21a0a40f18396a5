"""Whether the model got better: generation, log-probabilities of pairs, and their metrics."""
