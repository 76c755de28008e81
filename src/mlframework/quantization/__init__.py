"""Quantization-aware training for PyTorch that ends in true int8."""

from .parameters import QuantizationParameters, dequantize, quantize, requantize
from .qat.activation_observer import ActivationObserver, MinMaxObserver, MovingAverageObserver
from .qat.config import QATConfig
from .qat.fake_quantize_layer import FakeQuantizeLayer
from .qat.fake_quantize_operation import fake_quantize
from .qat.histogram_observer import HistogramObserver, PercentileObserver
from .qat.moving_average_statistics import MovingAverageStatistics
from .qat.qat_module_wrapper import QATModuleWrapper
from .qat.straight_through_estimator import StraightThroughEstimator
from .scheme import QuantizationScheme

__all__ = [
    "ActivationObserver",
    "FakeQuantizeLayer",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "MovingAverageStatistics",
    "PercentileObserver",
    "QATConfig",
    "QATModuleWrapper",
    "QuantizationParameters",
    "QuantizationScheme",
    "StraightThroughEstimator",
    "dequantize",
    "fake_quantize",
    "quantize",
    "requantize",
]
