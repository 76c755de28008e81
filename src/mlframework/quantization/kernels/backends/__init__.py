"""Ways to compute integer layers, each one file behind one protocol (:mod:`.backend`); :mod:`..plan` chooses."""
