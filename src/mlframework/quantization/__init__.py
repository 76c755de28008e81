"""Quantization-aware training for PyTorch that ends in true int8."""

from .conversion.convert import convert
from .parameters import QuantizationParameters, dequantize, quantize, requantize
from .preparation.calibrate import calibrate
from .preparation.parameter_groups import parameter_groups, quantization_parameters
from .preparation.prepare import prepare
from .preparation.report import PreparationReport, preparation_report
from .qat.activation_observer import ActivationObserver, MinMaxObserver, MovingAverageObserver
from .qat.config import QATConfig
from .qat.fake_quantize_layer import FakeQuantizeLayer
from .qat.fake_quantize_operation import fake_quantize
from .qat.histogram_observer import HistogramObserver, PercentileObserver
from .qat.moving_average_statistics import MovingAverageStatistics
from .qat.qat_module_wrapper import QATModuleWrapper
from .qat.schedule import QATSchedule
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
    "PreparationReport",
    "QATConfig",
    "QATModuleWrapper",
    "QATSchedule",
    "QuantizationParameters",
    "QuantizationScheme",
    "StraightThroughEstimator",
    "calibrate",
    "convert",
    "dequantize",
    "fake_quantize",
    "parameter_groups",
    "preparation_report",
    "prepare",
    "quantization_parameters",
    "quantize",
    "requantize",
]
