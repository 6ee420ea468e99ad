"""What the weights and sizes of the reference models are called elsewhere, as tables: one Layout a model and a source.

tfkern.models.pretrained reads and writes files by these tables.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from tfkern.models.bert import BERT, Classifier, MaskedLM
from tfkern.models.gpt import GPT


@dataclass(frozen=True)
class Layout:
    """Names of one model's weights in the checkpoints of one source.

    Args:
        source: whose checkpoints these are.
        names: ours -> theirs. A layer stands for its .weight and its .bias, `*` for the number of a block. Of several names,
            joined by " + ", the tensors stand behind each other in ours.
        architecture: the class that their config.json names; "" where they have none.
        sizes: field of our config -> key of their config.json.
        choices: field of our config -> (key of their config.json, what its values are in ours). A value that is not there is
            refused. Of several that mean the same the first is written.
        settings: key of their config.json -> the values that mean what our model computes; a file that says another is
            refused. The first is written.
        fixed: field of our config -> its value in all their models.
        prefix: what stands before all their names when written. When read it may be missing.
        transposed: ours whose matrices are stored as (in, out).
        skipped: a pattern of their names that hold nothing that the model needs.
        tied: their name of a second copy of a tensor -> their name by which it is read.
    """

    source: str
    names: dict[str, str]
    architecture: str = ""
    sizes: dict[str, str] = field(default_factory=dict)
    choices: dict[str, tuple[str, dict]] = field(default_factory=dict)
    settings: dict[str, tuple] = field(default_factory=dict)
    fixed: dict[str, object] = field(default_factory=dict)
    prefix: str = ""
    transposed: tuple[str, ...] = ()
    skipped: str = "(?!)"
    tied: dict[str, str] = field(default_factory=dict)

    def theirs(self, ours: str) -> tuple[list[str], bool]:
        """Their names, without prefix, of one of our weights, and whether they store it transposed."""
        for row, names in self.names.items():
            pattern = re.escape(row).replace(r"\*", r"(?P<block>\d+)") + r"(?P<end>\.weight|\.bias)?"
            if found := re.fullmatch(pattern, ours):
                end, block = found["end"] or "", found.groupdict().get("block") or ""
                matrix = end == ".weight" and row in self.transposed
                return [name.replace("*", block) + end for name in names.split(" + ")], matrix
        raise KeyError(f"{self.source}'s layout has no name for {ours}")

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
BERT_SETTINGS = {"model_type": ("bert",), "hidden_act": ("gelu",), "position_embedding_type": ("absolute",)}
BERT_BUFFERS = r"(bert\.)?embeddings\.(position_ids|token_type_ids)"

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
            choices={"gelu": ("activation_function", {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"})},
            settings={
                "model_type": ("gpt2",), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,), "tie_word_embeddings": (True,),
            },
            prefix="transformer.",
            transposed=GPT2_MATRICES,
            skipped=GPT2_MASKS,
            tied={"lm_head.weight": "wte.weight"},
        ),
        Layout(
            source="nanoGPT",
            names=GPT2,
            sizes={
                "vocab_size": "vocab_size", "context": "block_size", "layers": "n_layer", "heads": "n_head", "width": "n_embd",
            },
            fixed={"gelu": "none"},
            prefix="transformer.",
            skipped=GPT2_MASKS,
            tied={"lm_head.weight": "wte.weight"},
        ),
    ),
    BERT: (
        Layout(
            source="transformers",
            names=BERT_BODY,
            architecture="BertModel",
            sizes=BERT_SIZES,
            settings=BERT_SETTINGS,
            prefix="bert.",
            skipped=rf"{BERT_BUFFERS}|cls\..*|classifier\..*",
        ),
    ),
    MaskedLM: (
        Layout(
            source="transformers",
            names={
                **_under("bert.", "bert.", BERT_BODY),
                "transform.0": "cls.predictions.transform.dense",
                "transform.2": "cls.predictions.transform.LayerNorm",
                "bias": "cls.predictions.bias",
            },
            architecture="BertForMaskedLM",
            sizes=BERT_SIZES,
            settings=BERT_SETTINGS,
            skipped=rf"{BERT_BUFFERS}|bert\.pooler\..*|cls\.seq_relationship\..*",
            tied={
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
    ),
    Classifier: (
        Layout(
            source="transformers",
            names={**_under("bert.", "bert.", BERT_BODY), "head": "classifier"},
            architecture="BertForSequenceClassification",
            sizes={**BERT_SIZES, "classes": "num_labels"},
            settings=BERT_SETTINGS,
            skipped=rf"{BERT_BUFFERS}|cls\..*",
        ),
    ),
}  # fmt: skip

# Endings of old files -> today's.
OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}
