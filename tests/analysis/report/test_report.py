"""The page opens without trouble and without the network, sorts, and shows what was measured."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from headless_browser import run_in_page
from mlframework.quantization import (
    MinMaxObserver,
    QATConfig,
    QuantizationHistory,
    analyze_sensitivity,
    calibrate,
    explain,
    plots,
    prepare,
    report,
)
from mlframework.quantization.analysis.report.collect import collected
from mlframework.quantization.analysis.report.rows import rows_of
from zoo import NETWORKS, loss_of

CONFIG = QATConfig(weight_bits=4, activation_observer=MinMaxObserver)


class Named(nn.Module):
    """With a name that would be markup if it were not escaped."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("</script><b>", nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.get_submodule("</script><b>")(x))))


def prepared_named(inputs: Tensor) -> nn.Module:
    prepared = prepare(Named(), CONFIG, (inputs,))
    calibrate(prepared, [inputs])
    return prepared


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network with integer and float parts that was trained, with everything that a page can show."""
    torch.manual_seed(0)
    made = NETWORKS["vit"]
    model = made.make()
    prepared = prepare(model, CONFIG, made.example_inputs(4))
    history = QuantizationHistory(prepared)
    optimizer = torch.optim.AdamW(prepared.parameters(), 1e-3)
    for step in range(4):
        batch = made.batch(4, step)
        loss_of(prepared(*batch.inputs), batch.targets).backward()
        optimizer.step()
        history.step()
    batches = [made.example_inputs(4)]
    sensitivity = analyze_sensitivity(prepared, batches, bits=(8, 4))
    path = tmp_path_factory.mktemp("report") / "folder" / "report.html"
    return report(prepared, batches, path, sensitivity=sensitivity, history=history, title="A <small> ViT")


@pytest.fixture(scope="module")
def seen(full_page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser makes of that page: as it opens, after clicks on headers, and after one on a layer."""
    script = """
        const sections = [...document.querySelectorAll("section[id]")];
        const figures = sections.map(section => [section.id, section.querySelectorAll(".main-svg").length]);
        const headers = [...document.querySelectorAll("#layers th")];
        const ratio = headers.findIndex(header => header.textContent === "dB");
        const rows = () => [...document.querySelectorAll("#layers tbody tr")];
        const column = index => rows().map(row => row.cells[index].textContent);
        const before = column(ratio);
        headers[ratio].click();
        const up = column(ratio), way = headers[ratio].getAttribute("aria-sort");
        headers[ratio].click();
        const down = column(ratio);
        headers[1].click();
        const names = column(1);
        document.querySelector('td.layer[data-value="blocks.1.mlp.2"]').click();
        const tensor = document.querySelector("#tensors select").value;
        const title = document.querySelector("#tensors .gtitle").textContent;
        return { figures, before, up, way, down, names, tensor, title };
    """
    return run_in_page(full_page, script, tmp_path_factory.mktemp("browser"))


def test_it_opens_without_trouble_and_draws_every_figure(seen: dict[str, Any]) -> None:
    assert seen["troubles"] == []
    drawn = dict(seen["result"]["figures"])
    sections = ["layers", "network", "sensitivity", "activations", "tensors", "ranges", "oscillation", "flips"]
    sections += ["outputs", "graph"]
    assert list(drawn) == sections
    assert all(count > 0 for name, count in drawn.items() if name not in ("layers", "graph"))


def test_a_click_on_a_header_sorts_and_another_one_turns_it_round(seen: dict[str, Any]) -> None:
    result = seen["result"]
    measured = [float(text) for text in result["up"] if text]
    assert measured == sorted(measured)
    assert measured != [float(text) for text in result["before"] if text]
    assert [float(text) for text in result["down"] if text] == sorted(measured, reverse=True)
    assert result["way"] == "ascending"
    assert result["names"] == sorted(result["names"], key=str.lower)


def test_a_click_on_a_layer_shows_its_values(seen: dict[str, Any]) -> None:
    assert seen["result"]["tensor"] == "blocks.1.mlp.2: weight"
    assert re.fullmatch(r"int\d \[-\d+, \d+\] .*; (nothing|[\d.]+%) clipped", seen["result"]["title"])


def test_nothing_is_loaded_from_anywhere(full_page: Path) -> None:
    text = full_page.read_text(encoding="utf-8")
    ours = re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.DOTALL)  # Plotly itself names addresses
    assert len(ours) < len(text) / 2
    assert not re.search(r"(src|href)=\"(?!#)", ours)
    assert "http" not in re.sub(r"plotlyServerURL\": \"https://plot.ly", "", ours)


def test_names_are_escaped(tmp_path: Path) -> None:
    inputs = torch.randn(16, 8)
    page = report(prepared_named(inputs), [inputs], tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    assert "</script><b>" not in text
    script = "return document.querySelector('#tensors select').options.length"
    found = run_in_page(page, script, tmp_path)
    assert found == {"result": 4, "troubles": []}  # the input, the norm's output, and two weights


def test_it_says_what_explain_says(tmp_path: Path) -> None:
    inputs = torch.randn(32, 8)
    model = Named()
    prepared = prepare(model, QATConfig(weight_bits=2, activation_observer=MinMaxObserver), (inputs,))
    calibrate(prepared, [inputs])
    explanation = explain(model, prepared, [inputs])
    text = report(prepared, [inputs], tmp_path / "report.html").read_text(encoding="utf-8")
    assert explanation.first_break is not None
    assert f"{explanation.outputs.snr:.1f} dB" in text
    assert "the first layer that breaks is" in text
    assert "more bits for it (weight_bits=4), or AdaRound" in text


def test_the_model_is_left_as_it_was_and_may_have_been_trained(tmp_path: Path) -> None:
    inputs = torch.randn(16, 8)
    model = Named()
    float_model = copy.deepcopy(model)
    prepared = prepare(model, CONFIG, (inputs,))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        prepared(inputs).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy(prepared.state_dict())
    report(prepared, [inputs], tmp_path / "report.html", float_model=float_model)
    assert prepared.training
    for name, value in prepared.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(value, before[name]), name
    assert "Weights were trained since" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_account_finds_what_was_measured_of_it(tmp_path: Path) -> None:
    class Functions(nn.Module):
        """Layers as functions, twice in one module, and operations of one kind."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = OwnConvolution(3, 4, 3)
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x)).mean((2, 3))
            x = torch.relu(functional.linear(x, self.weight)) + x
            return functional.linear(x + functional.linear(x, self.weight), self.weight)

    inputs = torch.randn(8, 3, 6, 6)
    prepared = prepare(Functions(), CONFIG, (inputs,))
    calibrate(prepared, [inputs])
    rows = rows_of(collected(prepared, [inputs], None, None, None, None, None, None))
    assert [row.name for row in rows if row.is_integer and row.measured is None] == []
    assert len(rows) == len(prepared.preparation_report.entries)  # type: ignore[union-attr,arg-type]


class OwnConvolution(nn.Conv2d):
    """Calls the function itself, as EfficientNet's do."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias)


def test_labels_beside_inputs_are_left_out(tmp_path: Path) -> None:
    inputs = torch.randn(16, 8)
    batches = [(inputs, torch.zeros(16))]
    assert report(prepared_named(inputs), batches, tmp_path / "r.html", inputs=lambda batch: batch[0]).exists()


def test_infinite_outputs_and_errors_are_drawn(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return torch.where(y > 0, y, float("-inf"))

    inputs = torch.randn(64, 8)
    prepared = prepare(Masked(), QATConfig(), (inputs,))
    calibrate(prepared, [inputs])
    sensitivity = analyze_sensitivity(prepared, [inputs], bits=(2,))
    assert any(layer.alone.relative_error == float("inf") for layer in sensitivity.layers)  # masked at other places
    data = collected(prepared, [inputs], None, sensitivity, None, None, None, None)
    assert data.outputs
    assert all(abs(value) < float("inf") for pair in data.outputs for value in pair)
    assert report(prepared, [inputs], tmp_path / "page.html", sensitivity=sensitivity).exists()
    assert plots(prepared, [inputs], tmp_path, sensitivity=sensitivity)


def test_bad_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, path = torch.randn(16, 8), tmp_path / "report.html"
    prepared = prepared_named(inputs)
    with pytest.raises(TypeError, match="model must be a prepared model"):
        report(Named(), [inputs], path)
    with pytest.raises(TypeError, match="sensitivity must be a SensitivityReport, got int"):
        report(prepared, [inputs], path, sensitivity=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        report(prepared, [], path)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"mlframework-quantization\[analysis\]"):
        report(prepared, [inputs], path)
    assert not path.exists()
