"""The models of `tests.zoo`, small ones of their kind, with the counts that their papers tell."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo import Case, Inputs

_BRANCHES = "has branches, loops or assignments to attributes"


def tokens(**others: Any) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, 90, (2, 16), generator=generator), **others}


def decoder_tokens() -> Inputs:
    return tokens(decoder_input_ids=tokens()["input_ids"].flip(1))


def noise(name: str, *sizes: int) -> Inputs:
    return {name: torch.randn(sizes, generator=torch.Generator().manual_seed(0))}


def images() -> Inputs:
    return noise("pixel_values", 2, 3, 32, 32)


def transformer(name: str) -> Any:
    """A model of `transformers` from a configuration of its own, made without a network."""
    import transformers as t

    common = {"vocab_size": 99, "use_cache": False}
    if name == "OPT":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"ffn_dim": 64, "max_position_embeddings": 32, "word_embed_proj_dim": 32}
        return t.OPTModel(t.OPTConfig(**common, **sizes))
    if name == "T5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        return t.T5Model(t.T5Config(**common, **sizes))
    if name == "CTRL":
        sizes = {"n_embd": 32, "dff": 64, "n_layer": 3, "n_head": 2, "n_positions": 32}
        return t.CTRLModel(t.CTRLConfig(**common, **sizes))
    if name == "FastSpeech2":
        sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        sizes |= dict.fromkeys(("encoder_linear_units", "decoder_linear_units"), 24)
        sizes |= dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 2)
        predictors = ("duration", "energy", "pitch")
        sizes |= dict.fromkeys((f"{p}_predictor_channels" for p in predictors), 12)
        sizes |= {"hidden_size": 16, "num_mel_bins": 8, "speech_decoder_postnet_units": 12}
        return t.FastSpeech2ConformerModel(t.FastSpeech2ConformerConfig(vocab_size=99, **sizes))
    if name == "EnCodec":
        sizes = {"num_filters": 2, "hidden_size": 12, "codebook_dim": 12, "codebook_size": 8}
        return t.EncodecModel(t.EncodecConfig(**sizes, upsampling_ratios=[4, 2]))
    if name == "RegNet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4}
        return t.RegNetModel(t.RegNetConfig(**sizes))
    kinds = {"ResNet basic": "basic", "ResNet bottleneck": "bottleneck"}
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}
    return t.ResNetForImageClassification(t.ResNetConfig(**sizes, layer_type=kinds[name]))


def network(name: str) -> Any:
    """A network of MONAI, written like those of torchvision."""
    from monai.networks import nets

    options = {"spatial_dims": 2, "num_classes": 5}
    if name == "DenseNet":
        return nets.DenseNet(2, 3, 5, init_features=8, growth_rate=4, block_config=(2, 3))
    if name == "SE-ResNet":
        return nets.SEResNet50(in_channels=3, layers=(1, 1, 1, 1), **options)
    return nets.ResNet("basic", [1, 1, 1, 1], [8, 8, 16, 16], n_input_channels=3, **options)


def _of_transformers(name: str, inputs: Any, runs: Any, fused: Any = None, **more: Any) -> Case:
    fused = runs if fused is None else fused
    return Case(lambda: transformer(name), inputs, runs, fused, **more)


def _of_monai(name: str, runs: Any, fused: Any = None, **more: Any) -> Case:
    inputs = {"x": images()["pixel_values"]}
    fused = runs if fused is None else fused
    return Case(lambda: network(name), lambda: inputs, runs, fused, **more)


CASES = {
    # A feed-forward network in each layer, of the decoder and, in T5, of the encoder.
    "OPT": _of_transformers("OPT", tokens, {"linear_relu": 2}, {}, reason=_BRANCHES),
    "T5": _of_transformers("T5", decoder_tokens, {"linear_relu": 2}, {}, reason=_BRANCHES),
    "CTRL": _of_transformers("CTRL", tokens, {"linear_relu": 3}),
    # Two convolutions with a ReLU around the attention of its layer, five that predict pitch.
    "FastSpeech2": _of_transformers(
        "FastSpeech2",
        tokens,
        {"conv_relu": 7},
        call=lambda model, inputs: model.pitch_predictor(model.encoder(inputs["input_ids"])[0]),
    ),
    # Two LSTMs, of two layers each.
    "EnCodec": _of_transformers(
        "EnCodec",
        lambda: noise("x", 2, 1, 64),
        {"lstm": 2},
        {"lstm": 4},
        call=lambda model, inputs: model.decoder(model.encoder(inputs["x"])),
    ),
    # The stem, and two convolutions and one for the squeezed image in each of three blocks.
    "RegNet": _of_transformers("RegNet", images, {"conv_relu": 1 + 3 * 3}),
    # The stem, and all convolutions of four blocks but the last of each.
    "ResNet basic": _of_transformers("ResNet basic", images, {"conv_relu": 1 + 4}),
    "ResNet bottleneck": _of_transformers("ResNet bottleneck", images, {"conv_relu": 1 + 4 * 2}),
    # As the one before, with branches for shortcuts that a block may not have; and in the network.
    "ResNet": _of_monai("ResNet", {"conv_relu": 1 + 4}, {"conv_relu": 4}, reason=_BRANCHES),
    # The stem, and one for each layer in blocks of two and three.
    "DenseNet": _of_monai("DenseNet", {"conv_relu": 1 + 2 + 3}),
    # As a bottleneck ResNet, in nested Sequentials; a Linear for the squeezed image in each block.
    "SE-ResNet": _of_monai("SE-ResNet", {"conv_relu": 1 + 4 * 2, "linear_relu": 4}),
}
