"""Each pass over a graph does its one thing, and nothing where there is nothing to do."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from mlframework.quantization.export import engine_passes
from mlframework.quantization.export.onnx_graph import UnusedNames, name_values_after_modules, remove_unread

CONSTANTS = {
    "s": np.float32(0.5),
    "s2": np.float32(0.25),
    "z": np.uint8(3),
    "signed": np.int8(-7),
    "w": np.ones((2, 3, 1, 1), np.float32),
    "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2]),
    "channel_pads": np.array([0, 1, 1, 0, 0, 0, 0, 2]),
    "large": np.array([[65, -127]], np.int8),
    "other": np.array([[-65, 0]], np.int8),
    "small": np.array([[64, -64]], np.int8),
    "none": np.zeros(1, np.int8),
    "zero": np.float32(0),
    "one": np.float32(1),
}


def graph(text: str, outputs: str = "float[n] y") -> ir.Model:
    """A graph from nodes in ONNX's textual syntax; the constants above are initializers where they are read."""
    parsed = onnx.parser.parse_graph(f"g (float[n, 3, 4, 4] x) => ({outputs}) {{ {text} }}")
    read = {name for node in parsed.node for name in node.input}
    parsed.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in CONSTANTS.items() if name in read
    )
    return ir.from_proto(onnx.helper.make_model(parsed))


def texts(parsed: ir.Model) -> list[str]:
    """The nodes as a file has them."""
    nodes = ir.to_proto(parsed).graph.node
    return [f"{', '.join(node.output)} = {node.op_type} ({', '.join(node.input)})" for node in nodes]


def kinds(parsed: ir.Model) -> list[str]:
    return [node.op_type for node in parsed.graph]


def array(parsed: ir.Model, name: str) -> np.ndarray:
    constant = parsed.graph.initializers[name].const_value
    assert constant is not None
    return constant.numpy()


def test_idle_pairs_go() -> None:
    parsed = graph(
        """q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) q2 = QuantizeLinear (d, s, z)
        d2 = DequantizeLinear (q2, s, z) q3 = QuantizeLinear (d2, s, z) y = DequantizeLinear (q3, s, z)"""
    )
    engine_passes.remove_idle_pairs(parsed)
    assert texts(parsed) == ["q = QuantizeLinear (x, s, z)", "y = DequantizeLinear (q, s, z)"]


def test_pairs_of_different_grids_stay() -> None:
    parsed = graph(
        "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) q2 = QuantizeLinear (d, s2, z)"
        " y = DequantizeLinear (q2, s2, z)"
    )
    before = texts(parsed)
    engine_passes.remove_idle_pairs(parsed)
    assert texts(parsed) == before


def test_every_consumer_gets_a_dequantize_node() -> None:
    parsed = graph("q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) a = Add (d, d) y = Mul (a, d)")
    engine_passes.give_consumers_their_own_dequantize(parsed)
    assert texts(parsed)[1:] == [
        "d = DequantizeLinear (q, s, z)",
        "d_1 = DequantizeLinear (q, s, z)",
        "d_2 = DequantizeLinear (q, s, z)",
        "a = Add (d, d_1)",
        "y = Mul (a, d_2)",
    ]


def test_a_result_keeps_the_name_of_its_dequantize_node() -> None:
    parsed = graph("q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) a = Relu (y)")
    engine_passes.give_consumers_their_own_dequantize(parsed)
    assert texts(parsed)[1:] == [
        "y = DequantizeLinear (q, s, z)",
        "y_1 = DequantizeLinear (q, s, z)",
        "a = Relu (y_1)",
    ]


def test_a_sum_gets_a_quantize_node_where_others_read_its_operand() -> None:
    parsed = graph(
        """q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) e = DequantizeLinear (q, s, z)
        p = QuantizeLinear (x, s2, z) f = DequantizeLinear (p, s2, z) c = Relu (d) y = Add (e, f)"""
    )
    engine_passes.give_sums_their_own_quantize(parsed)
    assert texts(parsed)[:4] == [
        "q = QuantizeLinear (x, s, z)",
        "q_1 = QuantizeLinear (x, s, z)",
        "d = DequantizeLinear (q, s, z)",
        "e = DequantizeLinear (q_1, s, z)",
    ]
    assert not any("p_1" in text for text in texts(parsed))  # nothing else reads the other operand


PADDED = """q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) p = Pad (d, {pads}, {value})
    r = QuantizeLinear (p, s, z) e = DequantizeLinear (r, {scale}, z) y = Conv <pads = [1, 1, 1, 1]> (e, w)"""


def test_padding_becomes_the_convolutions() -> None:
    parsed = graph(PADDED.format(pads="pads", value="zero", scale="s"))
    engine_passes.fold_padding_into_convolutions(parsed)
    assert kinds(parsed) == ["QuantizeLinear", "DequantizeLinear", "Conv"]
    assert list(parsed.graph[-1].attributes["pads"].as_ints()) == [2, 1, 1, 3]
    assert set(parsed.graph.initializers) == {"s", "z", "w"}


@pytest.mark.parametrize(
    ("pads", "value", "scale"), [("channel_pads", "zero", "s"), ("pads", "one", "s"), ("pads", "zero", "s2")]
)
def test_other_padding_stays(pads: str, value: str, scale: str) -> None:
    parsed = graph(PADDED.format(pads=pads, value=value, scale=scale))
    before = texts(parsed)
    engine_passes.fold_padding_into_convolutions(parsed)
    assert texts(parsed) == before
    assert list(parsed.graph[-1].attributes["pads"].as_ints()) == [1, 1, 1, 1]


def test_padding_that_others_read_stays() -> None:
    parsed = graph(PADDED.format(pads="pads", value="zero", scale="s") + " a = Relu (p)", "float[n] a, float[n] y")
    engine_passes.fold_padding_into_convolutions(parsed)
    assert kinds(parsed).count("Pad") == 1


def test_padding_that_the_model_returns_stays() -> None:
    parsed = graph(PADDED.format(pads="pads", value="zero", scale="s"), "float[n] e, float[n] y")
    engine_passes.fold_padding_into_convolutions(parsed)
    assert kinds(parsed).count("Pad") == 1


def test_codes_of_concatenations_are_raised() -> None:
    parsed = graph(
        """a = Concat <axis = 1> (x, x) q = QuantizeLinear (a, s, signed) d = DequantizeLinear (q, s, signed)
        p = QuantizeLinear (d, s2, signed) y = DequantizeLinear (p, s2, signed)"""
    )
    engine_passes.make_concatenations_unsigned(parsed)
    assert texts(parsed)[1:3] == [
        "q = QuantizeLinear (a, s, signed_unsigned)",
        "d = DequantizeLinear (q, s, signed_unsigned)",
    ]
    assert texts(parsed)[3] == "p = QuantizeLinear (d, s2, signed)"
    raised = array(parsed, "signed_unsigned")
    assert raised == np.uint8(121)
    assert raised.dtype == np.uint8
    assert raised.shape == ()


def test_large_weights_and_their_zero_points_are_not_shared() -> None:
    """A layer called twice, another of the same zero points, and one whose weights ONNX Runtime leaves as they are."""
    parsed = graph(
        """a = DequantizeLinear <axis = 0> (large, s, none) b = DequantizeLinear <axis = 0> (large, s, none)
        c = DequantizeLinear <axis = 0> (other, s, none) d = DequantizeLinear <axis = 0> (small, s, none)
        e = DequantizeLinear <axis = 0> (small, s, none) q = QuantizeLinear (x, s, signed)
        f = DequantizeLinear (q, s, signed) g = DequantizeLinear (q, s, signed) y = Sum (a, b, c, d, e, f, g)"""
    )
    engine_passes.give_weights_their_own_initializers(parsed)
    assert texts(parsed)[:-1] == [
        "a = DequantizeLinear (large, s, none)",
        "b = DequantizeLinear (large_1, s, none_1)",
        "c = DequantizeLinear (other, s, none_2)",
        "d = DequantizeLinear (small, s, none)",
        "e = DequantizeLinear (small, s, none)",
        "q = QuantizeLinear (x, s, signed)",
        "f = DequantizeLinear (q, s, signed)",
        "g = DequantizeLinear (q, s, signed)",
    ]
    assert array(parsed, "large_1").tolist() == array(parsed, "large").tolist() == [[65, -127]]
    assert array(parsed, "none_1").tolist() == array(parsed, "none_2").tolist() == [0]


def scoped(parsed: ir.Model, *scopes: list[str]) -> ir.Model:
    """As torch.onnx notes in which modules the nodes were made; the last entry is the node's own."""
    for node, scope in zip(parsed.graph, scopes, strict=True):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = str([*scope, node.name])
    return parsed


FLOAT_LAYER = """q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) r = Reshape (d, pads) c = Conv (r, w)
    p = QuantizeLinear (c, s2, z) y = DequantizeLinear (p, s2, z)"""


def test_what_a_float_layer_reads_is_written_out() -> None:
    parsed = scoped(graph(FLOAT_LAYER), *[[""]] * 6)
    engine_passes.keep_floats_float(parsed, ["layer"])
    assert kinds(parsed) == [
        *("QuantizeLinear", "Cast", "Cast", "Sub", "Mul", "Reshape", "Conv", "QuantizeLinear", "DequantizeLinear")
    ]
    assert parsed.graph[4].outputs[0].name == "d"


def test_what_an_integer_layer_reads_is_not() -> None:
    parsed = scoped(graph(FLOAT_LAYER), [""], [""], [""], ["", "layer"], [""], [""])
    before = texts(parsed)
    engine_passes.keep_floats_float(parsed, ["layer"])
    assert texts(parsed) == before


def test_values_are_named_after_modules() -> None:
    parsed = graph("a = Relu (x) layer = Relu (a) b = Relu (layer) inner = Relu (b) y = Relu (inner)")
    scoped(parsed, ["", "layer"], ["", "layer", "layer.part"], [""], ["", "outer", "outer.inner"], ["", "last"])
    name_values_after_modules(parsed, ["layer", "outer", "outer.inner", "last", "unused"])
    assert texts(parsed) == [
        "a = Relu (x)",
        "layer = Relu (a)",
        "b = Relu (layer)",
        "outer = Relu (b)",
        "y = Relu (outer)",  # a result of the model keeps its name
    ]


def test_a_value_that_bears_a_modules_name_makes_way() -> None:
    parsed = graph("layer = Relu (x) a = Relu (layer) y = Relu (a)")
    scoped(parsed, [""], ["", "layer"], [""])
    name_values_after_modules(parsed, ["layer"])
    assert texts(parsed) == ["layer_1 = Relu (x)", "layer = Relu (layer_1)", "y = Relu (layer)"]


def test_what_makes_way_takes_no_other_modules_name() -> None:
    parsed = graph("mean = Relu (x) a = Relu (mean) b = Relu (a) c = Relu (b) y = Relu (c)")
    scoped(parsed, [""], ["", "mean"], ["", "mean_1"], ["", "mean_3"], [""])
    name_values_after_modules(parsed, ["mean", "mean_1", "mean_3"])
    assert texts(parsed) == [
        "mean_2 = Relu (x)",
        "mean = Relu (mean_2)",
        "mean_1 = Relu (mean)",
        "mean_3 = Relu (mean_1)",
        "y = Relu (mean_3)",
    ]


def test_unread_nodes_and_initializers_go() -> None:
    parsed = graph("a = Mul (x, s) b = Mul (a, s2) y = Relu (a)")
    remove_unread(parsed)
    assert texts(parsed) == ["a = Mul (x, s)", "y = Relu (a)"]
    assert list(parsed.graph.initializers) == ["s"]


def test_unused_names() -> None:
    names = UnusedNames(graph("a = Relu (x) a_1 = Relu (a) y = Relu (a_1)").graph)
    assert [names.unused("a"), names.unused("a"), names.unused("b")] == ["a_2", "a_3", "b_1"]
