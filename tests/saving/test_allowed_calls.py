"""The graph of a file calls what is in a list of ordinary computation: nothing in it writes elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from example_effects import EFFECTS, WIDTH, Block, Model
from mlframework.quantization import QATConfig, load, prepare, save
from mlframework.quantization.saving.saved_file import SavedFileError
from mlframework.quantization.saving.vocabulary import NotAllowedError, function_named, is_method
from saved_files import VALUE, Change, Network, call, call_method, rewritten, set_node, written


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("saved") / "model.safetensors")


FUNCTIONS = (
    "torch:ctc_loss", "torch:segment_reduce", "torch:native_batch_norm", "torch:native_layer_norm",
    "torch:batch_norm_elemt", "torch:batch_norm_gather_stats", "torch:fused_moving_avg_obs_fake_quant",
    "torch:fbgemm_linear_fp16_weight", "torch:quantize_per_channel", "torch:quantized_lstm_cell",
    "torch:embedding_bag", "torch:view_copy", "torch:unsafe_split", "torch:as_strided", "torch:sparse_coo_tensor",
    "torch:spmm", "torch:mkldnn_convolution", "torch:lstm", "torch:from_file", "torch:frombuffer",
    "torch:searchsorted", "F:ctc_loss", "F:embedding_bag", "F:fractional_max_pool2d", "F:max_unpool2d",
    "F:multilabel_margin_loss", "nn:slow_conv3d", "nn:mkldnn_linear", "nn:col2im", "nn:rrelu_with_noise",
    "linalg:lu_solve", "linalg:ldl_solve",
)  # fmt: skip
METHODS = (
    "to_sparse", "to_sparse_csr", "to_sparse_bsr", "to_dense", "to_mkldnn", "indices_", "_indices", "crow_indices",
    "col_indices", "set_", "resize_", "as_strided", "as_strided_", "data_ptr", "storage", "sparse_resize_",
    "unsafe_chunk", "t_", "squeeze_", "narrow_copy", "put_", "map_", "lu_solve", "ormqr", "share_memory_",
    "requires_grad_",
)  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_trust_their_arguments_are_not_in_the_list(name: str) -> None:
    with pytest.raises(NotAllowedError, match=f"{name} is no function that a file may call"):
        function_named(name)


def test_methods_that_show_or_change_how_elements_lie_in_memory_are_not_in_the_list() -> None:
    assert [name for name in METHODS if is_method(name)] == []


NOT_SAID = "says what a file may not say: "
REFUSED: dict[str, tuple[Change, str]] = {
    "sparse tensor": (call_method("to_sparse", VALUE), "a graph may not call the method to_sparse"),
    "sparse layout": (
        call("torch:ones", [64], layout={"layout": "sparse_coo"}),
        "'sparse_coo' is no layout that a file may name",
    ),
    "quantized dtype": (call("torch:ones", [64], dtype={"dtype": "qint8"}), "qint8 is no dtype that a file may name"),
    "result elsewhere": (call("torch:relu", VALUE, out=VALUE), "a graph may not call relu with the argument out"),
    "text to a module": (set_node(4, "layer", [VALUE], {"path": "x"}), "a graph may not give text to the module layer"),
    "text in a collection": (
        set_node(4, "layer", [{"t": [["x"]]}], {}),
        "a graph may not give text to the module layer",
    ),
    "text made a value": (call("operator:getitem", ["x"], 0), "a graph may not give text to getitem"),
    "text that is a default": (call_method("get", VALUE, "x", "y"), "a graph may not give text to get"),
    "trusting": (call("torch:cat", [VALUE], unsafe=True), "a graph may not call cat with the argument unsafe"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_calls_them_is_refused(change: Change, message: str, path: Path, tmp_path: Path) -> None:
    with pytest.raises(SavedFileError, match=NOT_SAID + message):
        load(rewritten(path, tmp_path / "changed.safetensors", change), Network())


class Calling(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = nn.Linear(4, 4), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer(x))


SAVED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "function": (torch.special.bessel_j0, "it calls torch.special_bessel_j0, which a file cannot hold"),
    "method": (
        lambda x: x.put(torch.tensor([0]), torch.zeros(1)),
        "it calls the method put of a tensor, which a file cannot hold",
    ),
}


@pytest.mark.parametrize(("function", "message"), SAVED.values(), ids=SAVED)
def test_saving_names_what_a_file_cannot_hold(
    function: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    model = prepare(Calling(function), QATConfig(), (torch.randn(2, 4),))
    with pytest.raises(ValueError, match=f"the forward of the model cannot be kept in a file: .*{message}"):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_names_the_module_that_the_network_gives_text(tmp_path: Path) -> None:
    effect = EFFECTS["has_items_written"]
    model = prepare(Model([Block(effect)]), QATConfig(), (torch.randn(6, WIDTH),))
    with pytest.raises(ValueError, match="a graph may not give text to the module helper, which a file cannot hold"):
        save(model, tmp_path / "model.safetensors")
