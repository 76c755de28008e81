"""Layers that compute on integer codes: what evaluation runs, and what a converted model is made of."""
