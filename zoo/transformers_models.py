"""Tiny networks of Hugging Face ``transformers``, from configurations, with random weights: code that nobody here
wrote. Nothing is downloaded, and ``transformers`` is imported only when one is made.

They are called as their users call them, ``model(pixel_values)`` or ``model(input_ids)``, by position or by keyword,
and return dataclasses (``ModelOutput``), as they do by default. Tuples (``config.return_dict = False``) are nobody's
way to train, and not every model has them: ConvNeXt and ViT of version 5.23 fail in their own forward.
"""

from __future__ import annotations

from torch import nn


def resnet(classes: int) -> nn.Module:
    """For images of 32x32 or more."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", num_labels=classes
    )
    return ResNetForImageClassification(config)


def mobilenet_v2(classes: int) -> nn.Module:
    """For images of 32x32 or more; padded as TensorFlow does it, as every published checkpoint is."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=classes, finegrained_output=False)
    return MobileNetV2ForImageClassification(config)


def convnext(classes: int) -> nn.Module:
    """For images of 32x32 or more."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=classes)
    return ConvNextForImageClassification(config)


def vit(image_size: int, classes: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=image_size,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=classes,
    )
    return ViTForImageClassification(config)


def bert(vocabulary: int, length: int, classes: int) -> nn.Module:
    """Classifies sentences: ``model(input_ids, attention_mask)``."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=length,
        num_labels=classes,
    )
    return BertForSequenceClassification(config)


def gpt2(vocabulary: int, length: int) -> nn.Module:
    """Predicts the next token; without the cache that only generating text needs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=32,
        n_layer=2,
        n_head=2,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)
