"""Operators with their gradients: straight through the rounding, and whatever each saves for backward."""
