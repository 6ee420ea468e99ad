"""Any model of transformers, made small from its config alone, and inputs for it by the names of its arguments. Importing this
imports no transformers."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields

import torch
from torch import nn

VOCAB, IMAGE = 99, 32
WORDS = 70  # ids from here on are words, those below may mean something
BATCH, LENGTH, LENGTHS = 3, 11, (11, 8, 5)


@dataclass(frozen=True)
class Sizes:
    """How small a model becomes."""

    width: int = 32
    heads: int = 4
    kv: int = 2
    layers: int = 2
    patch: int = 8
    head: int = 8
    fill: bool = False  # whether numbers that a config leaves open are given


# Configs contradict each other in what they ask of their sizes: the first of these with which a model runs is taken.
SIZES = (
    Sizes(), Sizes(fill=True), Sizes(kv=4), Sizes(layers=4), Sizes(width=64, head=16, kv=4, layers=4, fill=True),
    Sizes(width=128, head=32, kv=4, patch=16, layers=4),
)  # fmt: skip


# What a config's number becomes, by its name: a number, or one of Sizes'. Numbers only ever get smaller.
RULES = [
    (r"(.*_)?num_(key_value|kv)_heads|multi_query_group_num|n_kv_heads|kv_heads", "kv"),
    (r"(linear_|gdn_)num_(key|k)_heads", 2),
    (r"(.*_)?(attention_heads|n_heads?|num_heads|heads|nhead)", "heads"),
    (r"max_window_layers|first_k_dense_replace|attn_layer_offset", 1),
    (r"attn_layer_period|insert_layer_id|.*_interval|layer_group_size", 2),
    (r"upsample_groups", "width"),
    (r"(.*_)?(layers?|depths?|blocks|n_layer|num_block)", "layers"),
    (r"(.*_)?(head_dim|d_kv|head_size|dim_head|dim_per_head)|rotary_dim", "head"),
    (r".*_rank", 16),
    (r"num_experts_per_tok|.*top_?k|moe_k|num_selected_experts|index_topk", 2),
    (r".*(num|n)_.*experts|num_experts.*|n_shared_experts", 4),
    (r"n_group|topk_group|n_groups", 1),
    (r"codebook_size", 64),
    (r"(.*_)?vocab_size.*|.*codes_total|.*num_embeddings|num_centroids", VOCAB),
    (r".*(max_(2d_)?position_embeddings|n_positions|max_seq(uence)?_len(gth)?|context_length|n_ctx|max_source_positions)", 64),
    (r"max_target_positions|max_length|max_text_len|max_pos_emb|num_position_embeddings", 64),
    (r".*(image_size|img_size|crop_size)|resolution", IMAGE),
    (r"(.*_)?patch_size", "patch"),
    (r".*sliding_window.*|attention_window|local_attention|.*chunk_size|block_size|attention_chunk_size", 4),
    (r".*(intermediate_size|ffn_dim|d_ff|n_inner|dff|mlp_dim|feedforward_dim|dim_feedforward|inner_size|d_inner)", 48),
    (r"num_queries|num_latents|.*query_tokens|.*latent_query_num", 6),
    (r".*channels|.*hidden_channels", 32),
    (r"conv_dim|tdnn_dim|.*num_filters|num_conv_pos_embeddings|num_codevectors_per_group|num_buckets", 16),
    (r"(.*_)?(hidden_size.*|d_model|n_embd|width|embedding_dim|.*_size|.*_?dims?)|embedding_size|dim", "width"),
]  # fmt: skip
KEPT = r".*(kernel|stride|conv_size|window_size|patch_size_|in_channels|num_channels|group_size|bin_size|mel|pool|merge_size|dilation).*"


def _number(name: str, value: int, sizes: Sizes) -> int:
    if re.fullmatch(r".*_(token_)?(id|index)", name):
        return value if value < WORDS else 3 + sum(map(ord, name)) % (WORDS - 3)
    if re.fullmatch(KEPT, name):
        return value
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return min(value, small if isinstance(small, int) else getattr(sizes, small))
    return value


def _numbers(name: str, values, sizes: Sizes):
    """A list: of stages, of sizes, or of indices of layers."""
    if name == "out_indices":
        return type(values)(min(x, 1 + i * sizes.layers // len(values)) for i, x in enumerate(values))
    if re.fullmatch(r".*(indexes|indices|index|_layers|layers|feature_layer)", name):
        return type(values)(min(x, i % sizes.layers) for i, x in enumerate(values))
    if re.fullmatch(r".*(depths|num_layers|layers_per_block|block_repeats)", name):
        return type(values)(1 for _ in values)
    if re.fullmatch(r".*(hidden_sizes|embed_dims?|channels|dims|conv_dim|tdnn_dim|.*filters)", name):
        factor = max(1, min(values) // 16)
        return type(values)(max(1, x // factor) for x in values)
    if re.fullmatch(r".*heads", name):
        return values
    return type(values)(_number(name, x, sizes) for x in values)


def _small(name: str, value, sizes: Sizes):
    if name == "per_layer_config":
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _number(name, value, sizes)
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        return _numbers(name, value, sizes)
    if name == "out_features" and isinstance(value, list | tuple):
        return type(value)(
            f"stage{1 + i * sizes.layers // len(value)}" if x.startswith("stage") else x for i, x in enumerate(value)
        )
    return value


# What numbers that a config leaves open become: always, and where Sizes.fill asks for it.
OPEN = dict(
    vocab_size=VOCAB, head_dim="head", num_key_value_heads="kv", num_experts_per_tok=2, n_routed_experts=4, num_experts=4, n_group=1,
    topk_group=1, prediction_length=4, moe_intermediate_size="width", decoder_hidden_size="width", num_attention_heads="heads",
)  # fmt: skip
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)


# What no rule tells.
OVERRIDES = dict(
    BambaConfig=dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16),
    GraniteMoeHybridConfig=dict(layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, position_embedding_type="rope"),
    GPTNeoConfig=dict(attention_types=[[["global", "local"], 1]], num_layers=2),
    Mamba2Config=dict(num_heads=8, head_dim=8, n_groups=1),
    MusicgenDecoderConfig=dict(num_codebooks=1), MusicgenMelodyDecoderConfig=dict(num_codebooks=1),
    JambaConfig=dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    ZambaConfig=dict(layers_block_type=["mamba", "hybrid"], layer_types=None),
)  # fmt: skip


def kwargs_of(config_class, sizes: Sizes, given: dict | None = None) -> dict:
    """What to make a config with: its defaults, smaller."""
    specs = config_class.sub_configs_defaults or {}
    found = {name: _small(name, value, sizes) for name, value in (given or {}).items()}
    found |= OVERRIDES.get(config_class.__name__, {})
    for field in fields(config_class):
        value = field.default if field.default_factory is MISSING else field.default_factory()
        value = found.get(field.name, value)
        if field.name in specs or value is MISSING:
            continue
        small = _small(field.name, value, sizes)
        if small != value and field.name not in OVERRIDES.get(config_class.__name__, {}):
            found[field.name] = small
        if value is None and (field.name in SPECIAL or (sizes.fill and field.name in OPEN)):
            value = SPECIAL.get(field.name, OPEN.get(field.name))
            found[field.name] = getattr(sizes, value) if isinstance(value, str) else value
    for name, spec in specs.items():
        found[name] = _sub(spec, sizes)
    return found


def _sub(spec, sizes: Sizes) -> dict:
    from transformers import PreTrainedConfig

    cls = spec.config_class
    if not issubclass(cls, PreTrainedConfig):
        cls = spec.get_config_class(spec.model_type)
    return {**kwargs_of(cls, sizes, spec.init_kwargs), "model_type": cls.model_type}


def config_of(cls, sizes: Sizes):
    """A small config for a model class."""
    config = cls.config_class(**kwargs_of(cls.config_class, sizes))
    for sub in _within(config):
        rope = getattr(sub, "rope_parameters", None)
        if isinstance(rope, dict) and "rope_theta" in rope and getattr(sub, "num_attention_heads", None):
            half = (getattr(sub, "head_dim", None) or sub.hidden_size // sub.num_attention_heads) // 2
            sub.rope_parameters = {**rope, "mrope_section": [half - 2, 1, 1]}
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = SPECIAL["decoder_start_token_id"]
    return config


def set_weights(model: nn.Module, seed: int = 0) -> None:
    """Weights that make a difference: far from uniform attention, and outputs of a size of one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=generator)
            if p.dim() < 2:
                p.copy_(1 + 0.1 * x if name.endswith("weight") else 0.1 * x)
            else:
                p.copy_(x * (0.5 if "embed" in name else 1.2 * (p.numel() / p.shape[0]) ** -0.5))


def padding(side: str | None, length: int) -> torch.Tensor:
    """(BATCH, length), 1 = a word."""
    lengths = torch.tensor([-(-length * n // LENGTH) for n in LENGTHS])[:, None]
    mask = (torch.arange(length) < (lengths if side else length)).long().expand(BATCH, length)
    return (mask.flip(1) if side == "left" else mask).contiguous()


def _within(config) -> list:
    """A config, and those within it."""
    configs = [config]
    for found in configs:
        configs += [x for name in found.sub_configs if (x := getattr(found, name, None)) is not None]
    return configs


def _first(config, *names, default=None):
    """The first of these that a config, or one within it, has."""
    for name in names:
        for found in _within(config):
            value = getattr(found, name, None)
            if value is not None and not isinstance(value, dict):
                return value
    return default


def _image(config) -> tuple[int, int, int]:
    size = _first(config, "image_size", "img_size", "crop_size", default=IMAGE)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(_first(config, "num_channels", "in_channels", "in_chans", default=3)), min(height, 512), min(width, 512)


def _value(name: str, config, generator) -> torch.Tensor | None:
    """An argument of a model's forward pass, made up by its name."""

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    ids = torch.randint(WORDS, VOCAB - 1, (BATCH, LENGTH), generator=generator) % (_first(config, "vocab_size") or VOCAB)
    mels = int(_first(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "mel_dim", default=80))
    frames = int(_first(config, "num_frames", "frames_per_clip", default=4))
    channels, height, width = _image(config)
    images = (BATCH, channels, height, width)
    match name:
        case "input_ids" | "decoder_input_ids":
            return ids if name == "input_ids" else ids.flip(1)[:, :-2].contiguous()
        case "pixel_values" | "pixel_values_videos":
            return randn(BATCH, frames, *images[1:]) if name.endswith("videos") else randn(*images)
        case "input_values":
            return randn(BATCH, 6000)
        case "decoder_attention_mask" | "attention_mask" | "input_features_mask" | "qformer_attention_mask":
            return torch.ones(BATCH, LENGTH, dtype=torch.long)
        case "qformer_input_ids":
            return ids
        case "past_values" | "past_observed_mask":
            return randn(
                BATCH, int(_first(config, "context_length", default=32)), int(_first(config, "num_input_channels", default=1))
            )
        case "grid_thw" | "image_grid_thw":
            return torch.tensor([[1, 4, 4]] * BATCH)
        case "input_features" | "audio_values" | "spectrogram":
            return randn(BATCH, 40, mels)
        case "bbox":
            corner = torch.randint(0, 30, (BATCH, LENGTH, 2), generator=generator)
            return torch.cat([corner, corner + 20], 2)
        case "visual_feats":
            return randn(BATCH, 5, int(_first(config, "visual_feat_dim", default=16)))
        case "visual_pos":
            return randn(BATCH, 5, 4)
        case "inputs_embeds" | "hidden_states":
            return randn(BATCH, LENGTH, int(_first(config, "hidden_size", "d_model", default=32)))
    return None


def inputs_of(model: nn.Module, side: str | None) -> Iterator[dict]:
    """Inputs that a model's forward pass may take, the likeliest first."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    ids = ["input_ids"] + [n for n in ("bbox", "decoder_input_ids") if n in parameters]
    for names in (
        [*ids, "pixel_values", "visual_feats", "visual_pos"], ids, ["input_ids"], ["pixel_values"], ["pixel_values_videos"],
        ["input_features", "decoder_input_ids"], ["input_values", "decoder_input_ids"], ["input_features"], ["input_values"],
        ["inputs_embeds"], ["hidden_states"], required,
    ):  # fmt: skip
        names = [n for n in names if n in parameters]
        for shape in _SHAPES:
            generator = torch.Generator().manual_seed(0)
            found = {n: _value(n, config, generator) for n in dict.fromkeys([*names, *required])}
            found = {n: x for n, x in found.items() if x is not None}
            if not found or not shape.fits(found):
                continue
            inputs = _padded(shape.change(found, config), parameters, config, side)
            if "MultipleChoice" in type(model).__name__:
                inputs = {n: torch.stack([x, x.flip(0)], 1) for n, x in inputs.items()}
            yield inputs


@dataclass(frozen=True)
class _Shape:
    """Another shape that an argument may have to have."""

    name: str = ""
    form: object = None

    def fits(self, inputs: dict) -> bool:
        return not self.name or self.name in inputs

    def change(self, inputs: dict, config) -> dict:
        if not self.name:
            return inputs
        return inputs | {self.name: self.form(inputs[self.name], config)}


def _video(x, config):
    frames = int(_first(config, "num_frames", "frames_per_clip", default=4))
    return x[:, None].expand(-1, frames, *x.shape[1:]).contiguous()


def _spectrogram(x, config):
    length, bins = int(_first(config, "max_length", default=40)), int(_first(config, "num_mel_bins", default=16))
    return torch.arange(BATCH * length * bins).reshape(BATCH, length, bins).float().sin()


def _patches(x, config):
    """Of three images of 4 x 4 patches, behind each other."""
    patch = int(_first(config, "patch_size", default=8)) ** 2
    features = patch * int(_first(config, "in_channels", "num_channels", "in_chans", default=3))
    features *= int(_first(config, "temporal_patch_size", default=1))
    return torch.arange(BATCH * 16 * features).reshape(BATCH * 16, features).float().sin()


def _transposed(x, config):
    length = 2 * int(_first(config, "max_source_positions", default=32))
    return torch.nn.functional.pad(x, (0, 0, 0, max(0, length - x.shape[1])))[:, :length].transpose(1, 2).contiguous()


def _channel(x, config):
    return x[:, None]


_SHAPES = (
    _Shape(), _Shape("pixel_values", _video), _Shape("input_features", _transposed), _Shape("input_values", _channel),
    _Shape("input_values", _spectrogram), _Shape("hidden_states", _patches), _Shape("pixel_values", _patches),
)  # fmt: skip


def _padded(inputs: dict, parameters, config, side: str | None) -> dict:
    """Inputs and the masks of them."""
    masks = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
    for mask, of in masks.items():
        if of not in inputs and mask == "attention_mask":
            of = next(
                (n for n in ("input_values", "input_features", "inputs_embeds") if n in inputs and inputs[n].dim() < 4), of
            )
        if mask in parameters and of in inputs and (side or mask == "attention_mask"):
            inputs = inputs | {mask: padding(side, inputs[of].shape[1])}
            if inputs[of].dtype == torch.long and inputs[of].dim() == 2:
                inputs[of] = _spelled(inputs[of], inputs[mask], config)
    if "pixel_mask" in parameters and "pixel_values" in inputs and inputs["pixel_values"].dim() == 4:
        mask = torch.ones(BATCH, *inputs["pixel_values"].shape[2:], dtype=torch.long)
        if side == "right":
            mask[1:, :, IMAGE // 2 :] = 0
        inputs = inputs | {"pixel_mask": mask}
    return inputs


def _spelled(ids: torch.Tensor, mask: torch.Tensor, config) -> torch.Tensor:
    """Ids with an end, and what pads them."""
    end, pad = _first(config, "eos_token_id"), _first(config, "pad_token_id", default=0)
    end = end[0] if isinstance(end, list | tuple) else end
    position = torch.arange(mask.shape[1])
    if end is not None:
        ids = torch.where(position == (position * mask).max(1, keepdim=True).values, end, ids)
    return torch.where(mask.bool(), ids, pad)
