"""Any model of transformers, made small from its config alone. Importing this imports no transformers."""

import re
from dataclasses import MISSING, dataclass, fields

import torch
from torch import nn

VOCAB, IMAGE = 99, 32
WORDS = 70  # ids from here on are words, those below may mean something


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


def _numbers(name: str, values, sizes: Sizes) -> list[int]:
    """Of stages, of sizes, or of indices of layers."""
    if name == "out_indices":  # up to 4 they are stages
        return [x if max(values) <= 4 else 1 + i * sizes.layers // len(values) for i, x in enumerate(values)]
    if re.fullmatch(r".*(indexes|indices|index|_layers|layers|feature_layer)", name):
        return [min(x, i % sizes.layers) for i, x in enumerate(values)]
    if re.fullmatch(r".*(depths|num_layers|layers_per_block|block_repeats)", name):
        return [1 for _ in values]
    if re.fullmatch(r".*(hidden_sizes|embed_dims?|channels|dims|conv_dim|tdnn_dim|.*filters)", name):
        factor = max(1, min(values) // 16)
        return [x if x < 16 else x // factor // 8 * 8 for x in values]
    if re.fullmatch(r".*heads", name):  # Swin's are multiples of 3
        return [x // 3 * 2 if values[0] == 3 else x for x in values]
    return [_number(name, x, sizes) for x in values]


def _small(name: str, value, sizes: Sizes):
    if name == "per_layer_config":
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _number(name, value, sizes)
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        return _numbers(name, value, sizes)
    if name == "out_features" and isinstance(value, list | tuple) and all(re.fullmatch(r"stage\d+", x) for x in value):
        last = max(int(x[5:]) for x in value)
        return [x if last <= 4 else f"stage{1 + i * sizes.layers // len(value)}" for i, x in enumerate(value)]
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
    BarkSemanticConfig=dict(block_size=64), BarkCoarseConfig=dict(block_size=64), BarkFineConfig=dict(block_size=64),
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


def within(config) -> list:
    """A config, and those within it."""
    configs = [config]
    for found in configs:
        configs += [x for name in found.sub_configs if (x := getattr(found, name, None)) is not None]
    return configs


def config_of(cls, sizes: Sizes):
    """A small config for a model class."""
    config = cls.config_class(**kwargs_of(cls.config_class, sizes))
    for sub in within(config):
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
