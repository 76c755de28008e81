"""Why accuracy falls, layer by layer, and which widths the layers should have."""
