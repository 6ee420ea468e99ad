"""Models of transformers, tiny and with random weights, and what is compared of them. Importing this imports no transformers."""

from dataclasses import dataclass, field

import torch

VOCAB, WIDTH, LAYERS, HEADS = 48, 32, 2, 4
BATCH, LENGTH = 3, 11

_COMMON = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_BERT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64)
_LLAMA = dict(num_key_value_heads=2, max_position_embeddings=64)
_IMAGE = dict(
    hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48, image_size=16, patch_size=4,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5,
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model of the zoo. `dropout`: the config's names of the probabilities of dropout of weights. `calls`: attentions in one
    forward pass."""

    name: str
    cls: str
    config: str
    kind: str  # encoder, decoder, seq2seq, image or clip
    options: dict = field(default_factory=dict)
    calls: int = LAYERS
    dropout: str = ""

    def __str__(self) -> str:
        return self.name

    def make(self, attn: str = "eager", dtype=torch.float32, seed: int = 0, **more):
        """A model with weights that make a difference: far from uniform attention, no weight at 0 or 1."""
        import transformers

        config = getattr(transformers, self.config)(**{**self.options, **more})
        config._experts_implementation = "eager"  # the one that knows float64
        model = getattr(transformers, self.cls)._from_config(config, attn_implementation=attn)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                x = torch.randn(p.shape, generator=generator)
                p.copy_(1 + 0.1 * x if p.dim() == 1 and name.endswith("weight") else 0.2 * x)
        return model.to(dtype).eval()

    def inputs(self, seed: int = 0, pad: str | None = None, length: int = LENGTH) -> dict:
        """Inputs; pad is None, "right" or "left"."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(BATCH, 3, 16, 16, generator=generator)
        if self.kind == "image":
            return dict(pixel_values=images)
        ids = torch.randint(3, VOCAB, (BATCH, length), generator=generator)
        inputs = dict(input_ids=ids)
        if self.kind == "clip":
            inputs["pixel_values"] = images
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (BATCH, length - 2), generator=generator)
        if pad is not None:
            inputs["attention_mask"] = padding(pad, length)
            if self.kind == "seq2seq":
                inputs["decoder_attention_mask"] = padding(pad, length - 2)
        return inputs

    def seen(self, inputs: dict, out: torch.Tensor) -> torch.Tensor:
        """Which rows of the output count: those that are no padding."""
        mask = inputs.get("decoder_attention_mask" if self.kind == "seq2seq" else "attention_mask")
        if mask is None or out.dim() != 3 or mask.dim() != 2:
            return torch.ones(out.shape[:1] if out.dim() == 2 else out.shape[:2], dtype=torch.bool)
        return mask.bool()


def padding(side: str, length: int) -> torch.Tensor:
    """(BATCH, length), 1 = a word."""
    lengths = torch.tensor([length, length - 3, length - 6])[:, None]
    mask = (torch.arange(length) < lengths).long()
    return mask.flip(1) if side == "left" else mask


def _of(name, cls, config, kind, p="", calls=LAYERS, base=_COMMON, **options) -> Model:
    return Model(name, cls, config, kind, {**base, **options}, calls, p)


_SEQ2SEQ = dict(
    vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=HEADS, dropout_rate=0.0, pad_token_id=0,
    eos_token_id=2, decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=16,
)  # fmt: skip
_CLIP = dict(
    text_config={**_COMMON, "max_position_embeddings": 64},
    vision_config={k: v for k, v in _IMAGE.items() if "dropout" not in k and k != "num_labels"},
    projection_dim=16,
)  # fmt: skip
_SWIN = dict(
    image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=5,
    drop_path_rate=0.0, hidden_dropout_prob=0.0,
)  # fmt: skip

MODELS = [
    _of("BERT", "BertForMaskedLM", "BertConfig", "encoder", "attention_probs_dropout_prob", **_BERT),
    _of("RoBERTa", "RobertaForMaskedLM", "RobertaConfig", "encoder", "attention_probs_dropout_prob", **_BERT),
    _of(
        "DistilBERT", "DistilBertForMaskedLM", "DistilBertConfig", "encoder", "attention_dropout",
        base=dict(vocab_size=VOCAB, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48, dropout=0.0,
        attention_dropout=0.0, pad_token_id=0, max_position_embeddings=64),
    ),
    _of(
        "GPT-2", "GPT2LMHeadModel", "GPT2Config", "decoder", "attn_pdrop",
        base=dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    ),
    _of("OPT", "OPTForCausalLM", "OPTConfig", "decoder", "attention_dropout", ffn_dim=48, max_position_embeddings=64,
        word_embed_proj_dim=WIDTH, dropout=0.0),
    _of("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", "decoder", "attention_dropout", max_position_embeddings=64),
    _of("Llama", "LlamaForCausalLM", "LlamaConfig", "decoder", "attention_dropout", **_LLAMA),
    _of("Mistral (sliding window)", "MistralForCausalLM", "MistralConfig", "decoder", "attention_dropout", **_LLAMA,
        sliding_window=4),
    _of("Gemma-2 (softcap, sliding window)", "Gemma2ForCausalLM", "Gemma2Config", "decoder", "attention_dropout", **_LLAMA,
        head_dim=8, query_pre_attn_scalar=4, sliding_window=4, attn_logit_softcapping=2.0),
    _of("gpt-oss (sinks, sliding window)", "GptOssForCausalLM", "GptOssConfig", "decoder", "attention_dropout", **_LLAMA,
        head_dim=8, num_local_experts=2, num_experts_per_tok=2, sliding_window=4),
    _of("BART", "BartForConditionalGeneration", "BartConfig", "seq2seq", "attention_dropout", 3 * LAYERS, _SEQ2SEQ),
    _of("T5 (position bias)", "T5ForConditionalGeneration", "T5Config", "seq2seq", "dropout_rate", 3 * LAYERS, _T5),
    _of("ViT", "ViTForImageClassification", "ViTConfig", "image", "attention_probs_dropout_prob", base=_IMAGE),
    _of("DeiT", "DeiTForImageClassification", "DeiTConfig", "image", "attention_probs_dropout_prob", base=_IMAGE),
    _of("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", "image", "attention_probs_dropout_prob", base=_IMAGE),
    _of("CLIP", "CLIPModel", "CLIPConfig", "clip", "", 2 * LAYERS, _CLIP),
    _of("Swin (window bias)", "SwinForImageClassification", "SwinConfig", "image", "attention_probs_dropout_prob", 3, _SWIN),
    _of("BEiT (position bias)", "BeitForImageClassification", "BeitConfig", "image", "attention_probs_dropout_prob",
        base=_IMAGE, use_relative_position_bias=True, drop_path_rate=0.0),
]  # fmt: skip
NAMED = {m.name.split(" ")[0]: m for m in MODELS}
DECODERS = [m for m in MODELS if m.kind == "decoder"]
TEXT = [m for m in MODELS if m.kind in ("encoder", "decoder", "seq2seq")]

# Models that don't ask for an attention implementation.
IGNORING = [
    _of("MPNet", "MPNetForMaskedLM", "MPNetConfig", "encoder", **_BERT),
    _of("BLOOM", "BloomForCausalLM", "BloomConfig", "decoder", base=dict(
        vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0)),
    _of("DeBERTa-v2", "DebertaV2ForMaskedLM", "DebertaV2Config", "encoder", **_BERT, relative_attention=True,
        pos_att_type=["p2c", "c2p"]),
]  # fmt: skip
