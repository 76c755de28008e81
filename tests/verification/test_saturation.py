"""What is said of a file where ONNX Runtime's own products saturate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mlframework.quantization import (
    QATConfig,
    VerificationError,
    calibrate,
    compare_outputs,
    convert,
    export_onnx,
    prepare,
    verify,
)
from mlframework.quantization.export import engine_passes
from mlframework.quantization.verification import onnx_session
from mlframework.quantization.verification.onnx_session import OnnxSession
from mlframework.quantization.verification.saturation import EXACT_PRODUCTS, plain_sessions_saturate

INPUTS = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MAY_SATURATE = pytest.mark.filterwarnings("ignore:ONNX Runtime's plain session differs:UserWarning")


class Exported:
    """A prepared model and its file."""

    def __init__(self, folder: Path, **options: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)]
        self.model = prepare(nn.Sequential(*layers), QATConfig(**options), (INPUTS,))
        calibrate(self.model, [INPUTS])
        self.path = folder / "model.onnx"
        export_onnx(self.model, (INPUTS,), self.path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def saturating(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for a processor that saturates: only with exact products are its weights the model's."""
    model = onnx.load(str(exported.path))
    (weight,) = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [8, 16, 3, 3]]
    weight.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(weight) // 2).astype(np.int8), weight.name))
    onnx.save(model, str(tmp_path / "saturating.onnx"))
    monkeypatch.setattr(OnnxSession, "saturates", True)
    monkeypatch.setattr(
        OnnxSession, "with_exact_products", lambda session: OnnxSession(exported.path, session.layers, exact_options())
    )
    return tmp_path / "saturating.onnx"


def exact_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(EXACT_PRODUCTS, "1")
    return options


@pytest.fixture
def _fresh_probe() -> Iterator[None]:
    plain_sessions_saturate.cache_clear()
    yield
    plain_sessions_saturate.cache_clear()


@pytest.mark.usefixtures("_fresh_probe")
def test_the_answer_is_kept() -> None:
    assert plain_sessions_saturate() is plain_sessions_saturate()
    assert plain_sessions_saturate.cache_info().misses == 1


@pytest.mark.usefixtures("_fresh_probe")
@pytest.mark.parametrize("wrong", [0, 1, 64 * 64])
def test_one_wrong_sum_is_enough(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            sums = np.full(64 * 64, 255 * 127 * 64, np.int32)
            sums[:wrong] -= 1
            return [sums]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert plain_sessions_saturate() == (wrong > 0)


@pytest.mark.slow
def test_the_exact_session_decides_and_the_plain_one_is_told_of(exported: Exported, saturating: Path) -> None:
    with pytest.warns(UserWarning, match=r"differs in [0-9]+ of [0-9]+ codes.*reduce_range=True.*x64quantprecision=1"):
        report = verify(exported.model, [INPUTS, INPUTS], path=saturating)
    assert report.agrees
    assert report.saturates
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["2"].saturates
    plain = by_name["2"].exported_saturating
    assert plain is not None
    assert plain.elements == 2 * 64 * 8 * 4
    assert 0 < plain.differing < plain.elements
    assert "the same, saturating" in str(report).splitlines()[0]
    assert str(report).splitlines()[-2] == "nothing differs"
    assert "saturation" in str(report).splitlines()[-1]
    plain_data = report.to_dict()
    assert plain_data["saturation"] == report.saturation
    assert plain_data["layers"][2]["exported_saturating"]["differing"] == plain.differing


@pytest.mark.slow
def test_where_exact_products_differ_the_error_tells_both(exported: Exported, saturating: Path) -> None:
    converted = convert(exported.model)
    state = converted.state_dict()
    state["0.bias"] += 1000
    converted.load_state_dict(state)
    with pytest.raises(VerificationError, match=r"the models part at 0\n.*by saturation of 16-bit sums"):
        verify(exported.model, [INPUTS], converted=converted, path=saturating)


@pytest.mark.slow
def test_only_verify_warns(exported: Exported, saturating: Path) -> None:
    assert compare_outputs(exported.model, [INPUTS], path=saturating).saturates  # a warning would be an error


@pytest.mark.slow
def test_this_processor(exported: Exported) -> None:
    """What is found out of it, and nothing else, decides how many sessions there are."""
    report = compare_outputs(exported.model, [INPUTS], path=exported.path)
    assert report.agrees
    beside = [layer.exported_saturating is not None for layer in report.layers if layer.exported is not None]
    assert set(beside) == {plain_sessions_saturate()}
    assert report.saturates == plain_sessions_saturate()
    assert ("saturation" in str(report)) == plain_sessions_saturate()


@pytest.mark.slow
@pytest.mark.parametrize("saturates", [False, True])
def test_weights_within_seven_bits_agree_in_one_session_and_in_two(
    saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "plain_sessions_saturate", lambda: saturates)
    exported = Exported(tmp_path, reduce_range=True)
    report = verify(exported.model, [INPUTS], path=exported.path)
    assert not report.saturates
    if saturates:
        assert all(layer.exported_saturating == layer.exported for layer in report.layers)
        assert str(report).endswith("these batches met none")
    else:
        assert all(layer.exported_saturating is None for layer in report.layers)
        assert report.to_dict()["saturation"] is None


@pytest.mark.slow
@MAY_SATURATE
def test_options_are_kept_for_both_sessions_and_left_alone(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "plain_sessions_saturate", lambda: True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # that such a file is for this machine alone
    session = OnnxSession(exported.path, ["2"], options)
    written = (tmp_path / "optimized.onnx").read_bytes()
    exact = session.with_exact_products()
    changed = exact.session.get_session_options()
    assert changed.get_session_config_entry(EXACT_PRODUCTS) == "1"
    assert changed.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert changed.intra_op_num_threads == 1
    assert (tmp_path / "optimized.onnx").read_bytes() == written
    assert session.saturates
    assert not exact.saturates
    verify(exported.model, [INPUTS], path=exported.path, session_options=options)
    with pytest.raises(RuntimeError, match="does not have configuration with key"):
        options.get_session_config_entry(EXACT_PRODUCTS)
    assert options.get_session_config_entry("session.qdqisint8allowed") == "1"
    assert options.optimized_model_filepath == str(tmp_path / "optimized.onnx")


@pytest.mark.slow
def test_options_that_ask_for_exact_products_leave_nothing_to_tell(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "plain_sessions_saturate", lambda: True)
    report = verify(exported.model, [INPUTS], path=exported.path, session_options=exact_options())
    assert all(layer.exported_saturating is None for layer in report.layers)
    assert report.saturation is None


@pytest.mark.slow
@MAY_SATURATE
@pytest.mark.parametrize("providers", [["CPUExecutionProvider"], [("CPUExecutionProvider", {"use_arena": "0"})]])
def test_providers_of_the_cpu(providers: Any, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "plain_sessions_saturate", lambda: True)
    report = verify(exported.model, [INPUTS], path=exported.path, providers=providers)
    assert report.layers[-1].exported_saturating is not None


@pytest.mark.slow
def test_other_providers_are_not_asked(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_session, "plain_sessions_saturate", lambda: True)
    session = OnnxSession(exported.path, [])
    monkeypatch.setattr(session.session, "get_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert not session.saturates


@pytest.mark.slow
def test_a_file_that_does_not_load_with_exact_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files were before each layer had zero points of its own."""
    monkeypatch.setattr(onnx_session, "plain_sessions_saturate", lambda: True)
    monkeypatch.setattr(engine_passes, "give_weights_their_own_initializers", lambda graph: None)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)]
    model = prepare(nn.Sequential(*layers), QATConfig(), (INPUTS,))
    calibrate(model, [INPUTS])
    export_onnx(model, (INPUTS,), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"path must load with session\.x64quantprecision=1"):
        compare_outputs(model, [INPUTS], path=tmp_path / "model.onnx")
