"""Networks for tests and benchmarks: ``NETWORKS`` at a size to test with, ``FULL_SIZE`` as published.

>>> network = NETWORKS["resnet20"]
>>> model = network.make(seed=0)
>>> losses = train_steps(model, network, steps=2)
>>> model.eval()(*network.example_inputs(4)).shape
torch.Size([4, 10])
"""

from __future__ import annotations

from functools import partial

from . import transformers_models
from .batch_norms import roughen_batch_norms, zero_some_gammas
from .data import Batch, pictures, pictures_to_segment, sentences, text
from .gpt import GPT
from .mlp import MLP
from .mobilenet_v2 import MobileNetV2
from .network import Network, logits_of, loss_of, train_steps
from .resnet import ResNet, resnet18, resnet20, resnet50
from .unet import UNet
from .vit import ViT

__all__ = [
    "FULL_SIZE",
    "GPT",
    "MLP",
    "NETWORKS",
    "Batch",
    "MobileNetV2",
    "Network",
    "ResNet",
    "UNet",
    "ViT",
    "logits_of",
    "loss_of",
    "resnet18",
    "resnet20",
    "resnet50",
    "roughen_batch_norms",
    "train_steps",
    "zero_some_gammas",
]

_small = partial(pictures, image_size=16, classes=10)
_small_text = partial(text, length=16, vocabulary=64)
_cifar = partial(pictures, image_size=32, classes=10)
_imagenet = partial(pictures, image_size=224, classes=1000)

_few_stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 1, 2))
_small_gpt = partial(GPT, vocabulary=64, context=16, width=32, layers=2, heads=2)

NETWORKS: dict[str, Network] = {
    "resnet20": Network(partial(resnet20, width=8), _small, fully_integer=True),
    "resnet18": Network(partial(resnet18, width=8, classes=10, small_images=True), _small, fully_integer=True),
    "mobilenet_v2": Network(
        partial(MobileNetV2, width=0.25, classes=10, stages=_few_stages, small_images=True), _small, fully_integer=True
    ),
    "unet": Network(
        partial(UNet, width=8, depth=2, classes=3),
        partial(pictures_to_segment, image_size=16, classes=3),
        fully_integer=True,
    ),
    "mlp": Network(partial(MLP, inputs=3 * 16 * 16, hidden=(64, 64)), _small, fully_integer=True),
    "gpt": Network(_small_gpt, _small_text),
    "gpt_tied": Network(partial(_small_gpt, tied=True), _small_text),
    "vit": Network(partial(ViT, image_size=16, patch_size=4, width=32, layers=2, heads=2, classes=10), _small),
    "transformers_resnet": Network(partial(transformers_models.resnet, classes=10), _cifar, fully_integer=True),
    "transformers_mobilenet_v2": Network(
        partial(transformers_models.mobilenet_v2, classes=10), _cifar, fully_integer=True
    ),
    "transformers_convnext": Network(partial(transformers_models.convnext, classes=10), _cifar),
    "transformers_vit": Network(partial(transformers_models.vit, image_size=32, classes=10), _cifar),
    "transformers_bert": Network(
        partial(transformers_models.bert, vocabulary=64, length=16, classes=3),
        partial(sentences, length=16, vocabulary=64, classes=3),
    ),
    "transformers_gpt2": Network(partial(transformers_models.gpt2, vocabulary=64, length=16), _small_text),
}

FULL_SIZE: dict[str, Network] = {
    "resnet20": Network(resnet20, _cifar, fully_integer=True),
    "resnet18_cifar": Network(partial(resnet18, classes=10, small_images=True), _cifar, fully_integer=True),
    "resnet18": Network(resnet18, _imagenet, fully_integer=True),
    "resnet50": Network(resnet50, _imagenet, fully_integer=True),
    "mobilenet_v2": Network(MobileNetV2, _imagenet, fully_integer=True),
    "unet": Network(UNet, partial(pictures_to_segment, image_size=256, classes=2), fully_integer=True),
    "mlp": Network(partial(MLP, inputs=3 * 32 * 32), _cifar, fully_integer=True),
    "gpt": Network(partial(GPT, vocabulary=256, context=256), partial(text, length=256, vocabulary=256)),
    "vit": Network(ViT, _imagenet),
}
