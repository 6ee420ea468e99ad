"""What the weights and sizes of the reference models are called elsewhere, as tables: one Layout a model and a source.

tfkern.models.pretrained reads and writes files by these tables.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from torch import Tensor, nn

from tfkern.models.bert import BERT, Classifier, MaskedLM
from tfkern.models.files import WeightsError
from tfkern.models.gpt import GPT
from tfkern.models.llama import Llama
from tfkern.models.mixer import Mixer
from tfkern.models.vit import ViT


@dataclass(frozen=True)
class Layout:
    """Names of one model's weights in the checkpoints of one source.

    Args:
        source: whose checkpoints these are. timm's don't tell sizes: config.json beside them has our own names.
        names: ours -> theirs. A layer stands for its .weight and its .bias, `*` for the number of a block. Of several names,
            joined by " + ", the tensors stand behind each other in ours.
        architecture: the class that their config.json names; "" where they have none.
        sizes: field of our config -> key of their config.json.
        defaults: key of their config.json -> what it means if the file lacks it.
        choices: field of our config -> (key of their config.json, what its values are in ours). A value that is not there is
            refused. Of several that mean the same the first is written.
        settings: key of their config.json -> the values that mean what our model computes; a file that says another is
            refused. The first is written.
        fixed: field of our config -> its value in all their models.
        prefix: what stands before all their names when written. When read it may be missing.
        body: what the names of the model without its head begin with. A file of that model alone lacks it.
        old_endings: endings of names in old files -> today's.
        transposed: ours whose matrices are stored as (in, out).
        may_lack_biases: a file may have no biases at all; then they are 0.
        skipped: a pattern of their names that hold nothing that the model needs.
        tied: their name of a second copy of a tensor -> their name by which it is read.
    """

    source: str
    names: dict[str, str]
    architecture: str = ""
    sizes: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, object] = field(default_factory=dict)
    choices: dict[str, tuple[str, dict]] = field(default_factory=dict)
    settings: dict[str, tuple] = field(default_factory=dict)
    fixed: dict[str, object] = field(default_factory=dict)
    prefix: str = ""
    body: str = ""
    old_endings: dict[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    may_lack_biases: bool = False
    skipped: str = "(?!)"  # matches nothing
    tied: dict[str, str] = field(default_factory=dict)

    def theirs(self, ours: str) -> tuple[list[str], bool]:
        """Their names, without prefix, of one of our weights, and whether they store it transposed."""
        for row, names in self.names.items():
            pattern = re.escape(row).replace(r"\*", r"(?P<block>\d+)") + r"(?P<end>\.weight|\.bias)?"
            if found := re.fullmatch(pattern, ours):
                end, block = found["end"] or "", found.groupdict().get("block") or ""
                matrix = end == ".weight" and row in self.transposed
                return [name.replace("*", block) + end for name in names.split(" + ")], matrix
        raise WeightsError(f"the layout of {self.source} has no name for {ours}; choose another source")

    def rows(self, model: nn.Module) -> Iterator[tuple[str, Tensor, list[str], bool]]:
        """(our name, our tensor, their names, transposed) of every weight of a model."""
        for ours, tensor in model.state_dict().items():
            yield ours, tensor, *self.theirs(ours)


def _under(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    """The same names within a part of a larger model."""
    return {ours + k: " + ".join(theirs + name for name in v.split(" + ")) for k, v in names.items()}


GPT2 = {
    "tokens": "wte",
    "positions": "wpe",
    "blocks.*.norm_1": "h.*.ln_1",
    "blocks.*.attn.qkv": "h.*.attn.c_attn",
    "blocks.*.attn.proj": "h.*.attn.c_proj",
    "blocks.*.norm_2": "h.*.ln_2",
    "blocks.*.mlp.0": "h.*.mlp.c_fc",
    "blocks.*.mlp.2": "h.*.mlp.c_proj",
    "norm": "ln_f",
}
GPT2_MASKS = r"h\.\d+\.attn\.(masked_)?bias"  # buffers of the causal mask
GPT2_MATRICES = ("blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.0", "blocks.*.mlp.2")

LLAMA = {
    "tokens": "model.embed_tokens",
    "blocks.*.norm_1": "model.layers.*.input_layernorm",
    "blocks.*.attn.q": "model.layers.*.self_attn.q_proj",
    "blocks.*.attn.k": "model.layers.*.self_attn.k_proj",
    "blocks.*.attn.v": "model.layers.*.self_attn.v_proj",
    "blocks.*.attn.proj": "model.layers.*.self_attn.o_proj",
    "blocks.*.norm_2": "model.layers.*.post_attention_layernorm",
    "blocks.*.mlp.gate": "model.layers.*.mlp.gate_proj",
    "blocks.*.mlp.up": "model.layers.*.mlp.up_proj",
    "blocks.*.mlp.down": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
LLAMA_GGUF = {
    "tokens": "token_embd",
    "blocks.*.norm_1": "blk.*.attn_norm",
    "blocks.*.attn.q": "blk.*.attn_q",
    "blocks.*.attn.k": "blk.*.attn_k",
    "blocks.*.attn.v": "blk.*.attn_v",
    "blocks.*.attn.proj": "blk.*.attn_output",
    "blocks.*.norm_2": "blk.*.ffn_norm",
    "blocks.*.mlp.gate": "blk.*.ffn_gate",
    "blocks.*.mlp.up": "blk.*.ffn_up",
    "blocks.*.mlp.down": "blk.*.ffn_down",
    "norm": "output_norm",
    "head": "output",
}

BERT_BODY = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "blocks.*.attn.qkv": (
        "encoder.layer.*.attention.self.query + encoder.layer.*.attention.self.key + encoder.layer.*.attention.self.value"
    ),
    "blocks.*.attn.proj": "encoder.layer.*.attention.output.dense",
    "blocks.*.norm_1": "encoder.layer.*.attention.output.LayerNorm",
    "blocks.*.mlp.0": "encoder.layer.*.intermediate.dense",
    "blocks.*.mlp.2": "encoder.layer.*.output.dense",
    "blocks.*.norm_2": "encoder.layer.*.output.LayerNorm",
    "pooler": "pooler.dense",
}
BERT_SIZES = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "segments": "type_vocab_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "eps": "layer_norm_eps",
}
BERT_SETTINGS = {
    "model_type": ("bert",),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "is_causal": (False,),
}
BERT_DEFAULTS = {"type_vocab_size": 2, "layer_norm_eps": 1e-12}
BERT_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}
BERT_BUFFERS = r"(bert\.)?embeddings\.(position_ids|token_type_ids)"

VIT_EMBEDDINGS = {
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
VIT_QKV = (
    "encoder.layer.*.attention.attention.query + encoder.layer.*.attention.attention.key + "
    "encoder.layer.*.attention.attention.value"
)
VIT_BODY = {  # in files of transformers
    **VIT_EMBEDDINGS,
    "blocks.*.norm_1": "encoder.layer.*.layernorm_before",
    "blocks.*.attn.qkv": VIT_QKV,
    "blocks.*.attn.proj": "encoder.layer.*.attention.output.dense",
    "blocks.*.norm_2": "encoder.layer.*.layernorm_after",
    "blocks.*.mlp.0": "encoder.layer.*.intermediate.dense",
    "blocks.*.mlp.2": "encoder.layer.*.output.dense",
}
VIT_LIVE = {  # in state_dict() of transformers 5
    **VIT_EMBEDDINGS,
    "blocks.*.norm_1": "layers.*.layernorm_before",
    "blocks.*.attn.qkv": "layers.*.attention.q_proj + layers.*.attention.k_proj + layers.*.attention.v_proj",
    "blocks.*.attn.proj": "layers.*.attention.o_proj",
    "blocks.*.norm_2": "layers.*.layernorm_after",
    "blocks.*.mlp.0": "layers.*.mlp.fc1",
    "blocks.*.mlp.2": "layers.*.mlp.fc2",
}
DINOV2 = {
    **VIT_EMBEDDINGS,
    "blocks.*.norm_1": "encoder.layer.*.norm1",
    "blocks.*.attn.qkv": VIT_QKV,
    "blocks.*.attn.proj": "encoder.layer.*.attention.output.dense",
    "blocks.*.scale_1.weight": "encoder.layer.*.layer_scale1.lambda1",
    "blocks.*.norm_2": "encoder.layer.*.norm2",
    "blocks.*.mlp.0": "encoder.layer.*.mlp.fc1",
    "blocks.*.mlp.2": "encoder.layer.*.mlp.fc2",
    "blocks.*.scale_2.weight": "encoder.layer.*.layer_scale2.lambda1",
}
VIT_SIZES = {
    "image": "image_size",
    "patch": "patch_size",
    "channels": "num_channels",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "width": "hidden_size",
    "eps": "layer_norm_eps",
}
VIT_SETTINGS = {"model_type": ("vit",), "hidden_act": ("gelu",), "qkv_bias": (True,), "is_causal": (False,)}
TIMM_VIT = {
    "class_token": "cls_token",
    "positions": "pos_embed",
    "embed": "patch_embed.proj",
    "blocks.*.norm_1": "blocks.*.norm1",
    "blocks.*.attn.qkv": "blocks.*.attn.qkv",
    "blocks.*.attn.proj": "blocks.*.attn.proj",
    "blocks.*.scale_1.weight": "blocks.*.ls1.gamma",
    "blocks.*.norm_2": "blocks.*.norm2",
    "blocks.*.mlp.0": "blocks.*.mlp.fc1",
    "blocks.*.mlp.2": "blocks.*.mlp.fc2",
    "blocks.*.scale_2.weight": "blocks.*.ls2.gamma",
    "norm": "norm",
    "head": "head",
}
TIMM_MIXER = {
    "embed": "stem.proj",
    "blocks.*.norm_1": "blocks.*.norm1",
    "blocks.*.mlp_tokens.0": "blocks.*.mlp_tokens.fc1",
    "blocks.*.mlp_tokens.2": "blocks.*.mlp_tokens.fc2",
    "blocks.*.norm_2": "blocks.*.norm2",
    "blocks.*.mlp_channels.0": "blocks.*.mlp_channels.fc1",
    "blocks.*.mlp_channels.2": "blocks.*.mlp_channels.fc2",
    "norm": "norm",
    "head": "head",
}


def _bert(names: dict[str, str], architecture: str, sizes: dict[str, str] = BERT_SIZES, **others) -> Layout:
    return Layout(
        source="transformers",
        names=names,
        architecture=architecture,
        sizes=sizes,
        defaults=BERT_DEFAULTS,
        settings=BERT_SETTINGS,
        old_endings=BERT_ENDINGS,
        **others,
    )


def _vit_of_transformers(source: str, body: dict[str, str]) -> Layout:
    return Layout(
        source=source,
        names={**_under("", "vit.", body), "head": "classifier"},
        architecture="ViTForImageClassification",
        sizes={**VIT_SIZES, "hidden": "intermediate_size", "classes": "num_labels"},
        defaults={"num_channels": 3, "layer_norm_eps": 1e-12},
        settings=VIT_SETTINGS,
        fixed={"antialias": False},
        body="vit.",
        skipped=r"vit\.pooler\..*|vit\.embeddings\.mask_token",
    )


LAYOUTS: dict[type[nn.Module], tuple[Layout, ...]] = {
    GPT: (
        Layout(
            source="transformers",
            names=GPT2,
            architecture="GPT2LMHeadModel",
            sizes={
                "vocab_size": "vocab_size", "context": "n_positions", "layers": "n_layer", "heads": "n_head", "width": "n_embd",
                "hidden": "n_inner", "eps": "layer_norm_epsilon",
            },
            defaults={"layer_norm_epsilon": 1e-5},
            choices={"gelu": ("activation_function", {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"})},
            settings={
                "model_type": ("gpt2",), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,), "tie_word_embeddings": (True,), "is_causal": (True,),
            },
            prefix="transformer.",
            transposed=GPT2_MATRICES,
            skipped=GPT2_MASKS,
            tied={"lm_head.weight": "wte.weight"},
        ),
        Layout(
            source="nanoGPT",
            names=GPT2,
            architecture="nanoGPT",
            sizes={
                "vocab_size": "vocab_size", "context": "block_size", "layers": "n_layer", "heads": "n_head", "width": "n_embd",
            },
            settings={"bias": (True, False)},
            fixed={"gelu": "none", "hidden": None, "eps": 1e-5},
            may_lack_biases=True,
            prefix="transformer.",
            skipped=GPT2_MASKS,
            tied={"lm_head.weight": "wte.weight"},
        ),
    ),
    Llama: (
        Layout(
            source="transformers",
            names=LLAMA,
            architecture="LlamaForCausalLM",
            sizes={
                "vocab_size": "vocab_size", "context": "max_position_embeddings", "layers": "num_hidden_layers",
                "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "width": "hidden_size",
                "hidden": "intermediate_size", "theta": "rope_theta", "eps": "rms_norm_eps", "tied": "tie_word_embeddings",
            },
            defaults={"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
            settings={
                "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
                "rope_scaling": (None,), "rope_type": ("default",), "partial_rotary_factor": (1.0,), "is_causal": (True,),
            },
            skipped=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
            tied={"lm_head.weight": "model.embed_tokens.weight"},
        ),
        Layout(
            source="gguf",
            names=LLAMA_GGUF,
            architecture="llama.cpp",
            sizes={
                "vocab_size": "llama.vocab_size", "context": "llama.context_length", "layers": "llama.block_count",
                "heads": "llama.attention.head_count", "kv_heads": "llama.attention.head_count_kv",
                "width": "llama.embedding_length", "hidden": "llama.feed_forward_length", "theta": "llama.rope.freq_base",
                "eps": "llama.attention.layer_norm_rms_epsilon", "tied": "tied",
            },
            settings={
                "llama.rope.scaling.type": ("none",), "llama.rope.scale_linear": (1.0,), "llama.attention.causal": (True,),
            },
        ),
    ),
    BERT: (_bert(BERT_BODY, "BertModel", prefix="bert.", skipped=rf"{BERT_BUFFERS}|cls\..*|classifier\..*"),),
    MaskedLM: (
        _bert(
            {
                **_under("bert.", "bert.", BERT_BODY),
                "transform.0": "cls.predictions.transform.dense",
                "transform.2": "cls.predictions.transform.LayerNorm",
                "bias": "cls.predictions.bias",
            },
            "BertForMaskedLM",
            body="bert.",
            skipped=rf"{BERT_BUFFERS}|bert\.pooler\..*|cls\.seq_relationship\..*",
            tied={
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
    ),
    Classifier: (
        _bert(
            {**_under("bert.", "bert.", BERT_BODY), "head": "classifier"},
            "BertForSequenceClassification",
            sizes={**BERT_SIZES, "classes": "num_labels"},
            body="bert.",
            skipped=rf"{BERT_BUFFERS}|cls\..*",
        ),
    ),
    ViT: (
        _vit_of_transformers("transformers", VIT_BODY),
        _vit_of_transformers("transformers-5", VIT_LIVE),
        Layout(
            source="dinov2",
            names=DINOV2,
            architecture="Dinov2Model",
            sizes=VIT_SIZES,
            settings={
                "model_type": ("dinov2",), "hidden_act": ("gelu",), "qkv_bias": (True,), "mlp_ratio": (4,),
                "use_swiglu_ffn": (False,), "use_mask_token": (False, True), "is_causal": (False,),
            },
            defaults={"num_channels": 3, "layer_norm_eps": 1e-6},
            fixed={"layer_scale": True, "classes": 0, "hidden": None, "antialias": False},
            prefix="dinov2.",
            skipped=r"embeddings\.mask_token",
        ),
        Layout(
            source="timm",
            names=TIMM_VIT,
            sizes={f.name: f.name for f in fields(ViT.config_class)},
        ),
    ),
    Mixer: (
        Layout(
            source="timm",
            names=TIMM_MIXER,
            sizes={f.name: f.name for f in fields(Mixer.config_class)},
        ),
    ),
}  # fmt: skip
