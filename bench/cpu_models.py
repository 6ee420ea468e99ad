"""Whole models on a CPU: a training step, unpatched against `tfkern.patch(model)`, with and without padding."""

import copy
from collections.abc import Callable, Iterator

import torch

import tfkern
from tfkern.bench.cpu import in_turn

LAYERS, BATCH, LENGTH = 2, 4, 256


def run(seconds: float) -> Iterator[dict]:
    """A row for each model, with and without padding: the medians of both in ms, and their ratio."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        try:
            model, inputs = make()
        except ImportError as error:
            yield dict(model=name, skipped=str(error))
            continue
        patched = copy.deepcopy(model)
        tfkern.patch(patched)
        for padding in (False, True) if inputs.dtype == torch.int64 else (False,):
            calls = {who: _step(m, inputs, padding) for who, m in (("unpatched", model), ("patched", patched))}
            errors = _differ(*(call() for call in calls.values()))
            if errors > 1e-3:
                yield dict(model=name, padding=padding, problem=f"gradients differ by {errors:.1e} of the largest entry")
                continue
            times = {who: sorted(found) for who, found in in_turn(calls, seconds).items()}
            row = {who: found[len(found) // 2] for who, found in times.items()}
            yield dict(model=name, padding=padding, **row, ratio=row["patched"] / row["unpatched"])


def _bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(num_hidden_layers=LAYERS), add_pooling_layer=False).train(), _tokens(30522)


def _gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_layer=LAYERS)).train(), _tokens(50257)


def _vit():
    import timm

    return timm.create_model("vit_base_patch16_224", depth=LAYERS).train(), torch.randn(BATCH, 3, 224, 224)


MODELS: dict[str, Callable] = {"BERT-base": _bert, "GPT-2": _gpt2, "ViT-B/16": _vit}


def _tokens(words: int) -> torch.Tensor:
    return torch.randint(words, (BATCH, LENGTH))


def _step(model, inputs: torch.Tensor, padding: bool) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward of one batch, without dropout, whose bits are not the same in both; rows of it are a quarter, a
    half, … full if padded."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attn_dropout") and isinstance(module.attn_dropout, float):
            module.attn_dropout = 0.0
    if hasattr(model, "config"):
        for name in ("attention_probs_dropout_prob", "attn_pdrop"):
            if hasattr(model.config, name):
                setattr(model.config, name, 0.0)
    options = {}
    if padding:
        lengths = LENGTH * torch.arange(1, BATCH + 1) // BATCH
        options["attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
    parameters = list(model.parameters())

    def step() -> list[torch.Tensor]:
        out = model(inputs, **options)
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        if padding:
            out = out * options["attention_mask"][..., None]
        return [g for g in torch.autograd.grad(out.square().mean(), parameters, allow_unused=True) if g is not None]

    return step


def _differ(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    largest = max(float(x.abs().max()) for x in wanted)
    return max(float((x - y).abs().max()) for x, y in zip(found, wanted, strict=True)) / largest


def table(rows: list[dict]) -> str:
    """In Markdown."""
    lines = ["| model | padding | unpatched, ms | patched, ms | ratio |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if "ratio" in row:
            cells = f"{row['unpatched']:.1f} | {row['patched']:.1f} | {row['ratio']:.2f}"
            lines.append(f"| {row['model']} | {'yes' if row['padding'] else 'no'} | {cells} |")
        else:
            lines.append(f"| {row['model']} | | {row.get('problem') or row['skipped']} | | |")
    return "\n".join(lines)
