"""From a prepared model to one that computes on integers."""
