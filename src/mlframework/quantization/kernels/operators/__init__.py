"""Every operator, declared once (:mod:`.declaration`): schema, reference in PyTorch's operations, fake form."""
