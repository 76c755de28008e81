"""From a float model to a prepared one: where the nodes go, and what they see before training."""
