"""Quantization-aware training for PyTorch that ends in true int8."""

from .analysis.bit_assignment import BitAssignment, assign_bits
from .analysis.explain import explain
from .analysis.explanation import Explanation
from .analysis.history import QuantizationHistory
from .analysis.report.plots import plots
from .analysis.report.report import report
from .analysis.sensitivity import analyze_sensitivity
from .analysis.sensitivity_report import SensitivityReport
from .calibration.batch_norm import reestimate_batch_norm
from .calibration.bias_correction import correct_bias
from .calibration.calibrate import calibrate
from .calibration.equalization import equalize
from .calibration.report import MethodReport
from .calibration.rounding import round_weights
from .calibration.smoothing import smooth_activations
from .conversion.convert import convert
from .export.export import export, export_program
from .export.export_encodings import export_encodings
from .export.export_onnx import export_onnx
from .export.program import NotExportableError
from .integrations.quantization_metrics import log_quantization, quantization_metrics
from .parameters import QuantizationParameters, dequantize, quantize, requantize
from .preparation.float_state import float_state_dict, load_float_state_dict
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
from .saving.save_load import load, save
from .scheme import QuantizationScheme
from .state_check import check_state
from .training.distillation import FeatureMatching, distillation_loss
from .training.finetune import History, finetune
from .training.oscillation import OscillationFreezer, dampening_loss
from .training.recipe import Recipe
from .training.recipes import recommended_recipe
from .verification.compare import VerificationError, compare_outputs, verify
from .verification.report import ComparisonReport

__all__ = [
    "ActivationObserver",
    "BitAssignment",
    "ComparisonReport",
    "Explanation",
    "FakeQuantizeLayer",
    "FeatureMatching",
    "HistogramObserver",
    "History",
    "MethodReport",
    "MinMaxObserver",
    "MovingAverageObserver",
    "MovingAverageStatistics",
    "NotExportableError",
    "OscillationFreezer",
    "PercentileObserver",
    "PreparationReport",
    "QATConfig",
    "QATModuleWrapper",
    "QATSchedule",
    "QuantizationHistory",
    "QuantizationParameters",
    "QuantizationScheme",
    "Recipe",
    "SensitivityReport",
    "StraightThroughEstimator",
    "VerificationError",
    "analyze_sensitivity",
    "assign_bits",
    "calibrate",
    "check_state",
    "compare_outputs",
    "convert",
    "correct_bias",
    "dampening_loss",
    "dequantize",
    "distillation_loss",
    "equalize",
    "explain",
    "export",
    "export_encodings",
    "export_onnx",
    "export_program",
    "fake_quantize",
    "finetune",
    "float_state_dict",
    "load",
    "load_float_state_dict",
    "log_quantization",
    "parameter_groups",
    "plots",
    "preparation_report",
    "prepare",
    "quantization_metrics",
    "quantization_parameters",
    "quantize",
    "recommended_recipe",
    "reestimate_batch_norm",
    "report",
    "requantize",
    "round_weights",
    "save",
    "smooth_activations",
    "verify",
]
