"""Inputs for a Case, with NaN (poison) in every place that no result may depend on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tfkern import reference
from tfkern.testing.cases import Case

# Differentiable arguments of tfkern.attention, and what their gradients are called.
GRADIENTS = {
    "query": "dq", "key": "dk", "value": "dv", "attn_mask": "dbias", "alibi_slopes": "dslopes", "sinks": "dsinks",
}  # fmt: skip


@dataclass
class Inputs:
    """tensors: differentiable arguments by name. do and dlse: the gradients of out and lse. options: attention's other keyword
    arguments. Places that no result may depend on (keys that no query sees, queries that see no key, biases of hidden places)
    are NaN in `tensors`, do and dlse, and 0 in `clean`, clean_do and clean_dlse."""

    tensors: dict[str, Tensor]
    do: Tensor
    dlse: Tensor
    clean: dict[str, Tensor]
    clean_do: Tensor
    clean_dlse: Tensor
    options: dict

    def cast(self, dtype: torch.dtype) -> "Inputs":
        """The clean inputs in another dtype, for an oracle."""
        clean = {name: x.to(dtype) for name, x in self.clean.items()}
        do, dlse = self.clean_do.to(dtype), self.clean_dlse.to(dtype)
        options = {k: v.to(dtype) if k == "scale" and isinstance(v, Tensor) else v for k, v in self.options.items()}
        return Inputs(clean, do, dlse, clean, do, dlse, options)


def make_inputs(case: Case, dtype: torch.dtype, device="cpu", seed: int = 0) -> Inputs:
    """Normal random inputs in the case's memory layout, with the poison."""
    return _Maker(case, dtype, torch.device(device), seed).inputs()


class _Maker:
    """The steps of make_inputs. Everything is shaped (B, H, N, D) until the end, packed sequences with B = 1."""

    def __init__(self, case: Case, dtype, device, seed: int):
        self.case, self.dtype, self.device = case, dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        self.kv_heads = case.heads if case.kv_heads is None else case.kv_heads
        self.sequences = len(case.lengths[0]) if case.lengths else case.batch
        if case.lengths:
            self.n_q, self.n_k = map(sum, case.lengths)
            self.longest = tuple(max(lengths, default=0) for lengths in case.lengths)
        else:
            self.n_q, self.n_k = case.n_q, case.n_q if case.n_k is None else case.n_k
            self.longest = self.n_q, self.n_k

    def normal(self, *sizes) -> Tensor:
        """On the device at once: moving a view there would make it dense."""
        return torch.randn(*sizes, generator=self.generator).to(self.device, self.dtype)

    def inputs(self) -> Inputs:
        case, options = self.case, self.options()
        mask = self.mask()
        keep, band = self.visible(options, mask)
        dead_q = ~keep.any(3)
        dead_k = ~keep.any(2)
        if case.heads != self.kv_heads:
            dead_k = dead_k.unflatten(1, (self.kv_heads, -1)).all(2)
        v_head_dim = case.head_dim if case.v_head_dim is None else case.v_head_dim
        shapes = {
            "query": (case.heads, self.n_q, case.head_dim, dead_q), "key": (self.kv_heads, self.n_k, case.head_dim, dead_k),
            "value": (self.kv_heads, self.n_k, v_head_dim, dead_k),
        }  # fmt: skip
        tensors, clean = {}, {}
        for name, (*shape, dead) in shapes.items():
            x = self.in_layout(case.layout, *shape)
            if name != "value" and case.magnitude != 1.0:
                x.mul_(case.magnitude)
            tensors[name], clean[name] = _poison(x, dead[..., None], case.layout != "expanded")
        do, clean_do = _poison(self.normal(*dead_q.shape, v_head_dim), dead_q[..., None])
        dlse = torch.randn(dead_q.shape, generator=self.generator).to(self.device)
        dlse, clean_dlse = _poison(dlse, dead_q & (not case.sinks))
        if case.mask and mask.dtype == torch.bool:
            options["attn_mask"] = mask
        elif case.mask:
            tensors["attn_mask"], clean["attn_mask"] = self.poisoned_bias(mask, band)
        self.add_vectors(tensors, clean)
        if case.lengths:  # (total, H, D), and lse (H, total)
            for some in (tensors, clean):
                some.update({name: some[name].squeeze(0).transpose(0, 1) for name in shapes})
            do, clean_do = (x.squeeze(0).transpose(0, 1) for x in (do, clean_do))
            dlse, clean_dlse = dlse.squeeze(0), clean_dlse.squeeze(0)
        return Inputs(tensors, do, dlse, clean, clean_do, clean_dlse, options)

    def options(self) -> dict:
        options = dict(self.case.options)
        if "key_lengths" in options:
            options["key_lengths"] = torch.tensor(options["key_lengths"], device=self.device)
        if isinstance(options.get("scale"), tuple):
            options["scale"] = torch.tensor(options["scale"][0], device=self.device)
        if self.case.score_mod:
            from tfkern.kernels import score_mods

            options["score_mod"] = tuple(getattr(score_mods, self.case.score_mod + end) for end in ("", "_derivative"))
        if self.case.lengths:
            for name, lengths in zip(("cu_seqlens_q", "cu_seqlens_k"), self.case.lengths, strict=True):
                options[name] = torch.tensor([0, *lengths], device=self.device).cumsum(0).to(torch.int32)
        return options

    def mask(self) -> Tensor | None:
        """The mask. Some places are hidden, among them a whole row and a whole column if the mask has these dims."""
        if self.case.mask is None:
            return None
        kind, dims = self.case.mask.split()
        sizes = dict(zip("bhqk1", (self.sequences, self.case.heads, *self.longest, 1), strict=True))
        shape = [sizes[d] for d in dims]
        hidden = torch.rand(shape, generator=self.generator) < 0.2
        if dims[-1] == "k" and shape[-1] > 4:
            hidden[..., 3] = True
        if dims[-2:-1] == "q" and shape[-2] > 4:
            hidden[..., 2, :] = True
        hidden = hidden.to(self.device)
        if kind == "bool":
            return ~hidden
        values = torch.randn(shape, generator=self.generator).to(self.device, torch.float32 if kind == "float" else self.dtype)
        if dims != "1111":
            values.masked_fill_(hidden, -torch.inf)
        return values

    def visible(self, options: dict, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, H, Nq, Nk) bool: the visible places; and (sequences, 1, longest, longest): those of the band alone."""
        names = ("is_causal", "causal_alignment", "window", "key_lengths")
        band = {name: options[name] for name in names if name in options}
        shape = (self.case.batch, self.case.heads, self.n_q, self.n_k)
        if not self.case.lengths:
            in_band = reference.visible(self.n_q, self.n_k, **band, device=self.device)
            return (in_band & _attended(mask)).expand(shape), in_band
        keep = torch.zeros((1, *shape[1:]), dtype=torch.bool, device=self.device)
        in_band = torch.zeros((self.sequences, 1, *self.longest), dtype=torch.bool, device=self.device)
        row = key = 0
        for b, (n_q, n_k) in enumerate(zip(*self.case.lengths, strict=True)):
            seen = reference.visible(n_q, n_k, **band, device=self.device)
            in_band[b, :, :n_q, :n_k] = seen[0]
            part = reference.of_sequence(mask, b, n_q, n_k)
            keep[:, :, row : row + n_q, key : key + n_k] = seen & _attended(part)
            row, key = row + n_q, key + n_k
        return keep, in_band

    def poisoned_bias(self, bias: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
        seen = band.expand(self.sequences, self.case.heads, -1, -1)
        full = bias[(None,) * (4 - bias.dim())]
        for dim in range(4):
            if full.shape[dim] == 1 and seen.shape[dim] != 1:
                seen = seen.any(dim, keepdim=True)
        return _poison(bias, ~seen.reshape(bias.shape))

    def add_vectors(self, tensors: dict, clean: dict) -> None:
        heads = self.case.heads
        if self.case.slopes:
            shape = (heads,) if self.case.slopes == "h" else (self.sequences, heads)
            tensors["alibi_slopes"] = clean["alibi_slopes"] = torch.rand(shape, generator=self.generator).to(self.device)
        if self.case.sinks:
            tensors["sinks"] = clean["sinks"] = torch.randn(heads, generator=self.generator).to(self.device)

    def in_layout(self, layout: str, h: int, n: int, d: int) -> Tensor:
        """(b, h, n, d) normal numbers: contiguous, as transformers have them, with gaps everywhere, or with stride 0."""
        b = self.case.batch
        if layout == "bhnd":
            return self.normal(b, h, n, d)
        if layout == "bnhd":
            return self.normal(b, n, h, d).transpose(1, 2)
        if layout == "packed":
            return self.normal(b, n, 3, h, d).permute(2, 0, 3, 1, 4)[1]
        if layout == "strided":
            return self.normal(n, d, b + 1, 2 * h).permute(2, 3, 0, 1)[1:, ::2]
        if layout == "expanded":
            return self.normal(1, h, n, d).expand(b, h, n, d)
        raise ValueError(f"layout must be bhnd, bnhd, packed, strided or expanded, but is {layout!r}")


def _attended(mask: Tensor | None):
    if mask is None:
        return True
    return mask if mask.dtype == torch.bool else mask != -torch.inf


def _poison(x: Tensor, dead: Tensor, able: bool = True) -> tuple[Tensor, Tensor]:
    """(x with NaN, x with 0) where dead. x stays as it is unless `able`: with stride 0 one element stands for many places,
    of which some are not dead."""
    if not able:
        return x, x.clone()
    clean = x.masked_fill(dead, 0.0)
    return x.masked_fill_(dead, float("nan")), clean
