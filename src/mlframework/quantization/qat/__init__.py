"""Simulating the integer grid while training: estimators, observers, layers."""
