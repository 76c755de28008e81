"""From a QDQ program to a ``.tflite`` file for LiteRT.

LiteRT computes on images with their channels last, and on tensors that carry their grid. So each value of the program
is kept with the order that its axes lie in (``values.py``), and a layer between dequantize and quantize nodes becomes
one operator on codes (``layers.py``, ``operations.py``, ``moves.py``), of which the file is made (``flat_model.py``).
"""
