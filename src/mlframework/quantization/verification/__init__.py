"""Holding the prepared model, the converted one and an exported file side by side, layer by layer."""
