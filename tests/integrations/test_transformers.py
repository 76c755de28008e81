"""QATTrainerCallback under Hugging Face's Trainer, and what save_pretrained writes of prepared and converted models."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        AutoModelForImageClassification,
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainingArguments,
        ViTConfig,
        ViTForImageClassification,
    )

from export.exported_file import session_of
from mlframework.quantization import QATConfig, calibrate, convert, prepare, quantization_metrics
from mlframework.quantization.integrations.transformers import QATTrainerCallback, load_saved

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

generator = torch.Generator().manual_seed(0)
IMAGES = torch.randn(64, 1, 8, 8, generator=generator)
LABELS = torch.randint(0, 4, (64,), generator=generator)


class Images(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": IMAGES[index], "labels": LABELS[index]}


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs["logits"], labels)


def network() -> Any:
    """A vision transformer whose parameters have other names in files."""
    torch.manual_seed(1)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def prepared_network(learnable: bool = False) -> Any:
    prepared: Any = prepare(network(), QATConfig(learnable=learnable), example_kwargs={"pixel_values": IMAGES[:2]})
    prepared.accepts_loss_kwargs = False
    return prepared


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    loss = options.pop("compute_loss_func", loss_of)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model,
        TrainingArguments(**{**defaults, **options}),
        train_dataset=Images(),
        eval_dataset=Images(),
        compute_loss_func=loss,
        callbacks=list(callbacks),
    )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(pixel_values=IMAGES).logits
    return logits


def test_a_training_validates_in_integers_and_exports_the_best(tmp_path: Path) -> None:
    """Evaluation before any data is in float, with one warning; later ones are of what convert() and the file compute.
    The best checkpoint, by a measure that rewards the loss, is not the last."""
    model, file = prepared_network(), tmp_path / "model.onnx"
    callback = QATTrainerCallback(
        schedule={"observe_until": 3}, export_path=file, example_kwargs={"pixel_values": IMAGES[:2]}
    )
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    training = trainer(
        model,
        tmp_path,
        callback,
        load_best_model_at_end=True,
        greater_is_better=True,
        learning_rate=0.5,
        max_steps=6,
        eval_on_start=True,
        **steps,
    )
    with pytest.warns(UserWarning, match="has seen no data"):
        training.train()
    losses = [entry["eval_loss"] for entry in training.state.log_history if "eval_loss" in entry]
    assert losses[0] == pytest.approx(float(F.cross_entropy(logits_of(network()), LABELS)), abs=1e-4)  # printed so
    best = max(losses[1:])
    assert best != losses[-1]
    integers = logits_of(convert(model))
    # The sum over batches is in another order there; the loss is a mean of one batch.
    assert float(F.cross_entropy(integers, LABELS)) == pytest.approx(best, abs=1e-6)
    assert torch.equal(integers, logits_of(model))
    session = session_of(file.read_bytes())
    (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    # Attention and normalization are float there, too, and in another order of sums.
    torch.testing.assert_close(torch.from_numpy(logits), integers, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("learnable", [False, True], ids=["observed", "learned"])
def test_a_resumed_training_ends_bit_for_bit_where_the_whole_one_does(learnable: bool, tmp_path: Path) -> None:
    def callback() -> QATTrainerCallback:
        return QATTrainerCallback(schedule={"observe_until": 3})

    whole, resumed = prepared_network(learnable), prepared_network(learnable)
    trainer(whole, tmp_path, callback(), save_strategy="steps", save_steps=4).train()
    going_on = callback()
    trainer(resumed, tmp_path / "again", going_on).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert going_on.schedule is not None
    assert going_on.schedule.steps == 8
    assert not going_on.schedule.is_observing
    assert same_state(state_of(whole), state_of(resumed))


def test_gradient_checkpointing_computes_the_same(tmp_path: Path) -> None:
    """And recomputes, in the prepared model: the function that it goes through is called once for each block."""
    plain, checkpointed = prepared_network(), prepared_network()
    trainer(plain, tmp_path, QATTrainerCallback(), max_steps=3).train()
    checkpointed.train()
    training = trainer(checkpointed, tmp_path, QATTrainerCallback(), max_steps=3, gradient_checkpointing=True)
    calls: list[None] = []
    training.add_callback(_counting(calls))
    training.train()
    assert len(calls) == 3
    assert same_state(state_of(plain), state_of(checkpointed))


def _counting(calls: list[None]) -> Any:
    from transformers import TrainerCallback

    class Counting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for module in kwargs["model"].modules():
                if hasattr(module, "_gradient_checkpointing_func"):
                    function = module._gradient_checkpointing_func

                    def count(*values: Any, function: Any = function, **named: Any) -> Any:
                        calls.append(None)
                        return function(*values, **named)

                    module._gradient_checkpointing_func = count

    return Counting()


def test_what_save_pretrained_wrote_loads_into_a_model_prepared_alike(tmp_path: Path) -> None:
    """And from_pretrained gives the float model with the weights as trained."""
    model = prepared_network()
    trainer(model, tmp_path, QATTrainerCallback(), max_steps=2).train()
    model.save_pretrained(tmp_path / "saved")
    again = prepared_network()
    load_saved(again, tmp_path / "saved")
    assert same_state(state_of(model), state_of(again))
    floats = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in floats.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        load_saved(prepared_network(), _saved_float(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"without model.safetensors"):
        load_saved(again, tmp_path / "nothing")
    with pytest.raises(ValueError, match="model must be prepared, got ViTForImageClassification"):
        load_saved(network(), tmp_path / "saved")


def _saved_float(folder: Path) -> Path:
    network().save_pretrained(folder / "float")
    return folder / "float"


def test_tied_parameters_and_shards_load(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        torch.manual_seed(1)
        config = GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=8, bos_token_id=0, eos_token_id=0
        )
        tokens = torch.arange(8)[None]
        prepared = prepare(GPT2LMHeadModel(config), QATConfig(), example_kwargs={"input_ids": tokens})
        calibrate(prepared, [{"input_ids": tokens + shift} for shift in (0, 16)])
        return prepared

    model: Any = tied()
    model.transformer.wte.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again: Any = tied()
    load_saved(again, tmp_path)
    assert same_state(state_of(model), state_of(again))
    assert again.lm_head.weight is again.transformer.wte.weight


def test_the_state_of_another_preparation_is_refused_whatever_the_trainer_would_ignore(tmp_path: Path) -> None:
    """Trainer loads with strict=False."""
    other: Any = prepare(network(), QATConfig(skip=("classifier",)), example_kwargs={"pixel_values": IMAGES[:2]})
    trainer(other, tmp_path, QATTrainerCallback())
    model, before = prepared_network(), state_of(other)
    with pytest.raises(RuntimeError, match=r"must be that of a model prepared alike; not expected: .*classifier"):
        other.load_state_dict(model.state_dict(), strict=False)
    assert same_state(state_of(other), before)
    other.load_state_dict(network().state_dict(), strict=False)  # of the float model, as ever


def converted_network() -> Any:
    model = prepared_network()
    calibrate(model, [{"pixel_values": IMAGES}])
    return convert(model)


def test_a_converted_model_goes_through_save_pretrained(tmp_path: Path) -> None:
    """And what came out of it does again."""
    converted = converted_network()
    expected = logits_of(converted)
    for folder in (tmp_path / "one", tmp_path / "two"):
        converted.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"] == {"quant_method": "mlframework-quantization", "version": 1}
        converted = AutoModelForImageClassification.from_pretrained(folder)
        assert isinstance(converted, ViTForImageClassification)
        assert not converted.training
        assert converted.classifier.weight.dtype is torch.int8
        assert torch.equal(logits_of(converted), expected)


def test_another_process_loads_it_in_one_line_with_the_integration_and_not_as_a_float_model(tmp_path: Path) -> None:
    """Without, from_pretrained would take integer codes for weights."""
    converted = converted_network()
    converted.save_pretrained(tmp_path)
    torch.save((IMAGES, logits_of(converted)), tmp_path / "expected.pt")
    script = f"""
import torch
from transformers import AutoModelForImageClassification
try:
    AutoModelForImageClassification.from_pretrained({str(tmp_path)!r})
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error), error
else:
    raise AssertionError("loaded as a float model")
import mlframework.quantization.integrations.transformers
model = AutoModelForImageClassification.from_pretrained({str(tmp_path)!r})
images, expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    assert torch.equal(model(pixel_values=images).logits, expected)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_save_pretrained_of_a_converted_model_cannot_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = converted_network()
    with pytest.raises(ValueError, match="belongs to no model which prepare"):
        converted.vit.save_pretrained(tmp_path / "part")
    with pytest.raises(ValueError, match="variant must be left out for a converted model, got 'int8'"):
        converted.save_pretrained(tmp_path, variant="int8")
    monkeypatch.setattr("mlframework.quantization.conversion.save_pretrained._writers", [])
    for model in (converted, copy.deepcopy(converted)):
        with pytest.raises(NotImplementedError, match=r"import mlframework.quantization.integrations.transformers"):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_from_pretrained_of_a_converted_model_takes_one_device(tmp_path: Path) -> None:
    converted = converted_network()
    converted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map must name one device for a converted model, got auto"):
        ViTForImageClassification.from_pretrained(tmp_path, device_map="auto")
    loaded = ViTForImageClassification.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(logits_of(loaded), logits_of(converted))


def test_labels_in_the_models_call_are_refused(tmp_path: Path) -> None:
    """Trainer's default: the call would run the model's own code, without the nodes that it has in the graph."""
    model: Any = prepare(network(), QATConfig(), example_kwargs={"pixel_values": IMAGES[:2]})
    with pytest.raises(TypeError, match=r"must be called in training as in the example .*labels, num_items_in_batch"):
        trainer(model, tmp_path, QATTrainerCallback(), compute_loss_func=None).train()


def test_a_float_model_is_refused_as_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be prepared, got ViTForImageClassification: call prepare"):
        trainer(network(), tmp_path, QATTrainerCallback())
    with pytest.raises(ValueError, match="writer and log_every_n_steps must be given together"):
        QATTrainerCallback(log_every_n_steps=3)


def test_weight_decay_of_learned_scales_is_warned_of(tmp_path: Path) -> None:
    training = trainer(prepared_network(learnable=True), tmp_path, QATTrainerCallback(), weight_decay=0.1, max_steps=1)
    with pytest.warns(UserWarning, match="weight decay pulls the model's learned scales to zero: .* parameter_groups"):
        training.train()


def test_figures_go_to_the_writer_and_change_nothing(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.steps: dict[str, list[int]] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.steps.setdefault(tag, []).append(global_step)

    writer, plain, logged = Writer(), prepared_network(), prepared_network()
    trainer(plain, tmp_path, QATTrainerCallback()).train()
    callback = QATTrainerCallback(writer=writer, log_every_n_steps=3)
    trainer(logged, tmp_path, callback, gradient_accumulation_steps=2, max_steps=4).train()
    again = prepared_network()
    trainer(again, tmp_path, QATTrainerCallback(writer=writer, log_every_n_steps=3)).train()
    assert same_state(state_of(plain), state_of(again))
    assert writer.steps.keys() == quantization_metrics(logged, {"pixel_values": IMAGES[:2]}).keys()
    assert set(map(tuple, writer.steps.values())) == {(3, 3, 6)}
