"""From the datasets that a job names to batches: read, checked, counted, collated, audited."""
