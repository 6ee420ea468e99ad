"""Weights from elsewhere and back: GPT in the layouts of transformers and nanoGPT, what does not fit, and what is written."""

import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkern.extras import MissingExtraError
from tfkern.models import files, from_pretrained, save_pretrained
from tfkern.models.bert import BERT, BERTConfig, Classifier
from tfkern.models.files import WeightsError
from tfkern.models.gpt import GPT, GPTConfig

sys.path.append(str(Path(__file__).resolve().parent))
from small_gpt import TINY, gpt, same, save_bin, saved

TRANSFORMERS = pytest.mark.needs("transformers", importlib.util.find_spec("transformers") is not None)
SIZES = {"plain": TINY, "odd": replace(TINY, vocab_size=17, heads=2, width=26, hidden=31, gelu="none", eps=1e-3)}
IDS = torch.arange(12).view(2, 6) % 11


# ---- transformers ----


def theirs(config: GPTConfig):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    gelu = {"tanh": "gelu_new", "none": "gelu"}[config.gelu]
    sizes = dict(vocab_size=config.vocab_size, n_positions=config.context, n_layer=config.layers, n_head=config.heads)
    model = GPT2LMHeadModel(
        GPT2Config(
            **sizes, n_embd=config.width, n_inner=config.hidden, activation_function=gelu, layer_norm_epsilon=config.eps,
            bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("ln_" in name and "weight" in name), std=0.2)
    return model


@TRANSFORMERS
@pytest.mark.parametrize("sizes", SIZES)
def test_from_transformers_and_back(sizes, tmp_path):
    """Logits of both ways, and the same bits after the way back."""
    from transformers import GPT2LMHeadModel

    config, model = SIZES[sizes], theirs(SIZES[sizes])
    model.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert ours.config == config
    assert not ours.training
    with torch.no_grad():
        wanted = model(IDS).logits
        assert (ours(IDS) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    save_pretrained(ours, tmp_path / "ours")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert {n: x.tolist() for n, x in again.state_dict().items()} == {n: x.tolist() for n, x in model.state_dict().items()}
    assert again.config.activation_function == model.config.activation_function
    assert same(from_pretrained(tmp_path / "ours"), ours)


@TRANSFORMERS
def test_shards_and_half_precision_of_transformers(tmp_path):
    model = theirs(TINY)
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.tokens.weight, model.transformer.wte.weight.float())
    half = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.blocks[1].mlp[0].weight, model.transformer.h[1].mlp.c_fc.weight.t())


# ---- nanoGPT ----


class NanoGPT(nn.Module):
    """A GPT with the parameters of nanoGPT and its formulas: exact GELU, weights (out, in), tied head, biases or none."""

    def __init__(self, c):
        super().__init__()
        norm = lambda: nn.LayerNorm(c.n_embd, bias=c.bias)  # noqa: E731
        linear = lambda a, b: nn.Linear(a, b, bias=c.bias)  # noqa: E731
        blocks = []
        for _ in range(c.n_layer):
            attn = nn.ModuleDict(dict(c_attn=linear(c.n_embd, 3 * c.n_embd), c_proj=linear(c.n_embd, c.n_embd)))
            if c.masks:  # where PyTorch has no fused attention
                attn.register_buffer("bias", torch.ones(c.block_size, c.block_size).tril()[None, None])
            mlp = nn.ModuleDict(dict(c_fc=linear(c.n_embd, 4 * c.n_embd), c_proj=linear(4 * c.n_embd, c.n_embd)))
            blocks.append(nn.ModuleDict(dict(ln_1=norm(), attn=attn, ln_2=norm(), mlp=mlp)))
        wte, wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.transformer = nn.ModuleDict(dict(wte=wte, wpe=wpe, h=nn.ModuleList(blocks), ln_f=norm()))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.heads = c.n_head
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, ids):
        t = self.transformer
        x = t.wte(ids) + t.wpe.weight[: ids.shape[1]]
        for block in t.h:
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in block.attn.c_attn(block.ln_1(x)).chunk(3, -1))
            hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
            weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            x = x + block.attn.c_proj((weights @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(t.ln_f(x))


ALL = list(itertools.product([True, False], repeat=3))
MORE = [pytest.param(*each, marks=pytest.mark.slow) for each in ALL[1:-1]]


@pytest.mark.parametrize(("compiled", "bias", "masks"), [ALL[0], *MORE, ALL[-1]])
def test_from_nanogpt_and_back(compiled, bias, masks, tmp_path):
    """A checkpoint as its train.py writes it: compiled names, optimizer and settings beside, biases or none."""
    args = dict(n_layer=2, n_head=3, n_embd=24, block_size=12, bias=bias, vocab_size=11, dropout=0.1)
    torch.manual_seed(2)
    model = NanoGPT(SimpleNamespace(**args, masks=masks))
    state = {("_orig_mod." if compiled else "") + name: x for name, x in model.state_dict().items()}
    held = dict(model=state, optimizer={"state": {}}, model_args=args, iter_num=3, best_val_loss=torch.tensor(1.0))
    torch.save(held, tmp_path / "ckpt.pt")
    ours = from_pretrained(tmp_path)
    assert ours.config == replace(TINY, gelu="none")
    with torch.no_grad():
        wanted = model(IDS)
        assert (ours(IDS) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    save_pretrained(ours, tmp_path / "ours", source="nanoGPT")
    written = torch.load(tmp_path / "ours" / "ckpt.pt", weights_only=True)
    again = NanoGPT(SimpleNamespace(**written["model_args"], masks=False))
    again.load_state_dict(written["model"])  # every name, none else
    with torch.no_grad():
        assert (again(IDS) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert same(from_pretrained(tmp_path / "ours"), ours)


def test_the_shape_of_c_attn_tells_the_layout(tmp_path):
    """A state dict alone, of either kind; square matrices don't tell."""
    model = gpt(replace(TINY, gelu="none"))
    for source, other in (("transformers", "nanoGPT"), ("nanoGPT", "transformers")):
        save_pretrained(model, tmp_path / source, source)
        file = tmp_path / source / ("ckpt.pt" if source == "nanoGPT" else "model.safetensors")
        state = files.read(file)[0]
        torch.save({name.removeprefix("transformer."): x for name, x in state.items()}, tmp_path / "model.bin")
        assert same(from_pretrained(tmp_path / "model.bin", GPT, config=model.config), model)
        with pytest.raises(WeightsError, match=r"c_attn.weight \((24, 72|72, 24)\) instead of \((24, 72|72, 24)\)"):
            from_pretrained(tmp_path / "model.bin", GPT, config=model.config, source=other)


@pytest.mark.parametrize("before", ["module.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models(before, tmp_path):
    """As torch.compile and DistributedDataParallel leave them; a block may be compiled alone."""
    model = saved(tmp_path)
    state = files.read(tmp_path / "model.safetensors")[0]
    for inner in ("h.1.", "h.1._orig_mod."):
        torch.save({before + name.replace("h.1.", inner): x for name, x in state.items()}, tmp_path / "a.bin")
        assert same(from_pretrained(tmp_path / "a.bin"), model)
    torch.save({**state, before + "transformer.wte.weight": torch.ones(11, 24)}, tmp_path / "a.bin")
    with pytest.raises(WeightsError, match="must hold each weight once"):
        from_pretrained(tmp_path / "a.bin")


def test_nanogpt_beside_other_weights(tmp_path):
    """A folder whose model.safetensors would be read in place of what is written."""
    model = saved(tmp_path, replace(TINY, gelu="none"))
    with pytest.raises(WeightsError, match=r"has model.safetensors, which would be read in place of ckpt.pt; choose another"):
        save_pretrained(model, tmp_path, "nanoGPT")
    assert not (tmp_path / "ckpt.pt").exists()


def test_a_hidden_width_told_in_full(tmp_path):
    """4 * width is what a config without one has, in every layout."""
    model = gpt(replace(TINY, gelu="none", hidden=96))
    for source in ("transformers", "nanoGPT"):
        save_pretrained(model, tmp_path / source, source)
        assert from_pretrained(tmp_path / source).config == replace(TINY, gelu="none")
    assert files.read_json(tmp_path / "transformers" / "config.json")["n_inner"] == 96


def test_nanogpt_has_no_other_gelu(tmp_path):
    with pytest.raises(WeightsError, match="gelu must be 'none' in the layout of nanoGPT, but is 'tanh'"):
        save_pretrained(gpt(), tmp_path / "new", source="nanoGPT")
    with pytest.raises(WeightsError, match="source must be one of transformers, nanoGPT for GPT, but is 'keras'"):
        save_pretrained(gpt(), tmp_path / "new", source="keras")
    with pytest.raises(WeightsError, match=r"model must be one of GPT, .*, but is <class .*Sequential'>; unwrap it"):
        save_pretrained(nn.Sequential(gpt()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- what does not fit ----


def altered(tmp_path, change) -> None:
    """A checkpoint of which `change` makes another: it takes the state dict and the config."""
    saved(tmp_path)
    state, told = files.read(tmp_path / "model.safetensors")[0], files.read_json(tmp_path / "config.json")
    change(state, told)
    files.write_safetensors(tmp_path / "model.safetensors", state)
    files.write_json(tmp_path / "config.json", told)


def three_faults(state, told):
    del state["transformer.h.1.ln_2.bias"], state["transformer.wpe.weight"]
    state["transformer.h.2.ln_1.weight"] = torch.ones(24)
    state["transformer.h.0.mlp.c_fc.weight"] = torch.ones(96, 24)
    state["transformer.h.0.mlp.c_fc.bias"] = torch.ones(96, dtype=torch.int64)
    state["lm_head.weight"] = torch.ones(11, 24)


def test_what_does_not_fit_is_listed_at_once(tmp_path):
    altered(tmp_path, three_faults)
    with pytest.raises(WeightsError) as error:
        from_pretrained(tmp_path)
    assert str(error.value).splitlines() == [
        f"the weights of {tmp_path}/model.safetensors don't fit GPT in the layout of transformers:",
        "missing (2): transformer.wpe.weight, transformer.h.1.ln_2.bias",
        "unexpected (1): transformer.h.2.ln_1.weight",
        "of another shape or kind (2): transformer.h.0.mlp.c_fc.weight (96, 24) instead of (24, 96), "
        "transformer.h.0.mlp.c_fc.bias (96,) torch.int64 instead of (96,)",
        "not a copy of the weight it is tied to (1): lm_head.weight",
    ]


def test_not_strict(tmp_path):
    """What fits is loaded, the rest keeps what a new model draws, and a warning tells it."""
    altered(tmp_path, three_faults)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=r"not used, or keep their first values:\nmissing \(2\): transformer.wpe.weight"):
        found = from_pretrained(tmp_path, strict=False, dropout=0.25)
    torch.manual_seed(5)
    new, whole = GPT(TINY).state_dict(), gpt().state_dict()
    kept = {"positions.weight", "blocks.1.norm_2.bias", "blocks.0.mlp.0.weight", "blocks.0.mlp.0.bias"}
    for name, x in found.state_dict().items():
        assert torch.equal(x, (new if name in kept else whole)[name]), name
    assert found.config == replace(TINY, dropout=0.25)
    assert found(IDS).isfinite().all()
    with pytest.warns(UserWarning, match="not used"):
        half = from_pretrained(tmp_path, strict=False, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_copy_of_another_dtype_is_none(tmp_path):
    altered(tmp_path, lambda state, told: state.update({"lm_head.weight": state["transformer.wte.weight"].clone()}))
    from_pretrained(tmp_path)
    altered(tmp_path, lambda state, told: state.update({"lm_head.weight": state["transformer.wte.weight"].half()}))
    with pytest.raises(WeightsError, match="not a copy"):
        from_pretrained(tmp_path)


def test_many_names_are_cut(tmp_path):
    altered(tmp_path, lambda state, told: [state.pop(name) for name in list(state)])
    with pytest.raises(WeightsError, match="2 layers, but there are 0 weights"):
        from_pretrained(tmp_path)
    altered(tmp_path, lambda state, told: [state.pop(name) for name in list(state) if "h.0" in name])
    with pytest.raises(WeightsError, match=r"missing \(12\): .* and 4 more$"):
        from_pretrained(tmp_path)


def test_one_weight_by_two_names(tmp_path):
    altered(tmp_path, lambda state, told: state.update({"wte.weight": torch.ones(11, 24)}))
    with pytest.raises(WeightsError, match=r"unexpected \(1\): (transformer.)?wte.weight$"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_head", 0, "must tell n_head, a whole number from 1 to 2.31, for GPT, but it is 0"),
        ("n_head", -2, "must tell n_head, a whole number from 1 to 2.31, for GPT, but it is -2"),
        ("n_head", "2", "must tell n_head, a whole number from 1 to 2.31, for GPT, but it is '2'"),
        ("n_head", 5, "the config can't be that of a GPT: embed_dim must be a multiple"),
        ("n_head", True, "must tell n_head, a whole number .* but it is True"),
        ("n_head", 1.5, "must tell n_head"),
        ("n_embd", 0, "must tell n_embd"),
        ("n_embd", 2**31 - 3, "the config can't be that of a GPT: "),
        ("n_embd", 10**30, "must tell n_embd"),
        ("n_embd", [24], "must tell n_embd"),
        ("n_embd", 48, r"c_attn.weight \(24, 72\) instead of \(48, 144\)"),
        ("n_layer", 10**9, "the config tells 1000000000 layers, but there are 28 weights"),
        ("n_layer", None, "must tell n_layer"),
        ("n_layer", 1, r"unexpected \(12\)"),
        ("n_inner", "x", "must tell n_inner"),
        ("layer_norm_epsilon", "small", "must tell layer_norm_epsilon, a number of 0 or more, for GPT, but it is 'small'"),
        ("layer_norm_epsilon", float("nan"), "must tell layer_norm_epsilon, a number of 0 or more, for GPT, but it is nan"),
        ("layer_norm_epsilon", float("inf"), "must tell layer_norm_epsilon, a number of 0 or more, for GPT, but it is inf"),
        ("activation_function", "relu", "activation_function must be 'gelu_new' or 'gelu_pytorch_tanh' or 'gelu' for GPT"),
        ("activation_function", ["gelu"], "activation_function must be 'gelu_new' or"),
        ("is_causal", False, "is_causal must be True for GPT, but is False"),
        ("scale_attn_weights", False, "scale_attn_weights must be True for GPT, but is False"),
        ("architectures", ["T5Model"], r"config.json must name one of .*GPT2LMHeadModel.* but has \['T5Model'\]; give model="),
        ("architectures", "GPT2LMHeadModel", "must name one of"),
        ("architectures", 5, "must name one of"),
        ("architectures", [["x"], {}], "must name one of"),
    ],
)
def test_configs_that_are_wrong(key, value, message, tmp_path):
    altered(tmp_path, lambda state, told: told.update({key: value}))
    with pytest.raises(WeightsError, match=message):
        from_pretrained(tmp_path)


def test_configs_that_tell_less_or_otherwise(tmp_path):
    model = saved(tmp_path)
    told = files.read_json(tmp_path / "config.json")
    del told["n_inner"], told["layer_norm_epsilon"], told["activation_function"]
    files.write_json(tmp_path / "config.json", told | {"n_ctx": 3})
    assert same(from_pretrained(tmp_path), model)
    assert from_pretrained(tmp_path, config=TINY, model=GPT, dropout=0.5).config == replace(TINY, dropout=0.5)
    with pytest.raises(TypeError, match="dropuot"):
        from_pretrained(tmp_path, dropuot=0.5)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"7", b"\xff\xfe{}", b"[" * 100_000, b'{"n_head": ' + b"9" * 5000 + b"}", None]
)
def test_what_is_no_config(content, tmp_path):
    saved(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    for model in (None, GPT):
        with pytest.raises(WeightsError, match=r"config.json") as error:
            from_pretrained(tmp_path, model)
        assert "\n" not in str(error.value)


def test_paths(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no .*nowhere; name a folder with model.safetensors"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"has none of model.safetensors, .*; name the file itself"):
        from_pretrained(tmp_path)
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.onnx")
    with pytest.raises(WeightsError, match=r"must end in one of .safetensors, .gguf, .bin, .pt, .*but ends in '.onnx'"):
        from_pretrained(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").rename(tmp_path / "model.bin")
    with pytest.raises(WeightsError, match=r"model.bin is n"):
        from_pretrained(tmp_path / "model.bin")
    with pytest.raises(WeightsError, match=r"model must be one of .*GPT.*, but is <class"):
        from_pretrained(save_bin(tmp_path, {"a": torch.ones(1)}), nn.Linear)


# ---- writing, memory, imports ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_bit_by_bit(dtype, tmp_path):
    model = gpt().to(dtype)
    save_pretrained(model, tmp_path)
    assert {x.dtype for x in files.read(tmp_path / "model.safetensors")[0].values()} == {dtype}
    assert same(from_pretrained(tmp_path, dtype=dtype), model)


@pytest.mark.parametrize("source", ["transformers", "nanoGPT"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(source, tmp_path, monkeypatch):
    old = gpt(replace(TINY, gelu="none"))
    save_pretrained(old, tmp_path, source)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as context:
        context.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            save_pretrained(gpt(replace(TINY, gelu="none", layers=1)), tmp_path, source)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert same(from_pretrained(tmp_path), old)


@pytest.mark.parametrize("source", ["transformers", "nanoGPT"])
def test_others_may_read_what_is_written(source, tmp_path):
    """As far as the umask allows."""
    save_pretrained(gpt(replace(TINY, gelu="none")), tmp_path, source)
    (plain := tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {plain.stat().st_mode}


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_pretrained(gpt(), tmp_path / "file")


def test_a_loaded_model_owns_its_memory(tmp_path):
    """No weight holds the file or another weight alive, and training changes neither."""
    saved(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    model = from_pretrained(tmp_path)
    for name, p in model.named_parameters():
        assert p.untyped_storage().nbytes() == p.nbytes, name
        assert p.is_contiguous(), name
        assert p.requires_grad, name
    model(IDS).sum().backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_nothing_is_drawn_for_weights_that_are_read(tmp_path):
    saved(tmp_path)
    before = torch.get_rng_state()
    from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:of the weights")
@pytest.mark.parametrize("change", [lambda state, told: None, three_faults])
def test_on_the_cpu_whatever_the_default_device(change, tmp_path):
    altered(tmp_path, change)
    with torch.device("meta"):
        model = from_pretrained(tmp_path, strict=False)
        assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_classes_by_their_table(tmp_path):
    model = Classifier(BERTConfig(vocab_size=11, context=8, layers=1, heads=1, width=8, classes=5)).eval()
    save_pretrained(model, tmp_path)
    told = files.read_json(tmp_path / "config.json")
    del told["num_labels"]
    files.write_json(tmp_path / "config.json", told | {"id2label": {str(i): f"L{i}" for i in range(5)}})
    assert same(from_pretrained(tmp_path), model)
    files.write_json(tmp_path / "config.json", told | {"id2label": 7})
    with pytest.raises(WeightsError, match=r"classifier.weight \(5, 8\) instead of \(2, 8\)"):
        from_pretrained(tmp_path)


def test_the_attention_given_is_used(tmp_path):
    calls = []

    def spy(q, k, v, **options):
        calls.append(options["is_causal"])
        return F.scaled_dot_product_attention(q, k, v, is_causal=options["is_causal"])

    saved(tmp_path)
    from_pretrained(tmp_path, attention=spy)(IDS)
    assert calls == [True] * 2
    bert = BERT(BERTConfig(vocab_size=11, context=8, layers=1, heads=1, width=8))
    save_pretrained(bert, tmp_path)
    from_pretrained(tmp_path, attention=spy)(IDS)
    assert calls == [True, True, False]


def test_packages_are_imported_where_they_are_needed(python_without, tmp_path):
    """PyTorch's compiler, which takes seconds, for no model."""
    code = """
import tfkern
assert "tfkern.models" not in sys.modules
from tfkern.models import from_pretrained, save_pretrained
from tfkern.models.gpt import GPT, GPTConfig
from tfkern.extras import MissingExtraError
try:
    save_pretrained(GPT(GPTConfig(5, 4, 1, 1, 4)), "/nowhere")
except MissingExtraError as error:
    print(error)
save_pretrained(GPT(GPTConfig(5, 4, 1, 1, 4, gelu="none")), sys.argv[1], "nanoGPT")
from_pretrained(sys.argv[1])
assert "torch._dynamo" not in sys.modules
"""
    missing = "safetensors", "tokenizers", "gguf", "transformers"
    told = subprocess.run([*python_without(code, *missing), tmp_path], capture_output=True, text=True, check=True).stdout
    assert told.startswith("this needs safetensors, which is not installed")


@pytest.mark.needs("no gguf", importlib.util.find_spec("gguf") is None)
def test_gguf_is_an_extra(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(MissingExtraError, match=r"needs gguf.*\[weights\]"):
        from_pretrained(tmp_path / "a.gguf")
