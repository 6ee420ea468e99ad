"""The problems that are timed: attention at the sizes of models people train, and what each costs at least."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """Self-attention over (batch, heads, length, head_dim), full or causal."""

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int
    is_causal: bool = False

    def flops(self, direction: str) -> float:
        """Operations of two matrix products forward and five more backward; half of them under a causal mask."""
        forward = 4.0 * self.batch * self.heads * self.length**2 * self.head_dim * (0.5 if self.is_causal else 1.0)
        return forward * {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[direction]

    def exps(self, direction: str) -> float:
        """Exponentials: one a score, forward and again backward."""
        scores = self.batch * self.heads * self.length**2 * (0.5 if self.is_causal else 1.0)
        return scores * (2.0 if direction == "forward+backward" else 1.0)

    def bytes(self, direction: str, itemsize: int) -> float:
        """The least to read and write: q, k, v and out; for the backward these again and four gradients."""
        tensor = self.batch * self.heads * self.length * self.head_dim * itemsize
        return tensor * {"forward": 4, "backward": 8, "forward+backward": 12}[direction]

    def inputs(self, dtype: torch.dtype, device, generator=None):
        """q, k, v requiring grad, and do: views of packed projections, as a model's layer has them."""
        packed = torch.randn(self._packed, device=device, generator=generator)
        q, k, v, do = self._views(packed.to(dtype))
        return q, k, v, do.normal_(generator=generator)

    def memory(self, dtype: torch.dtype, device):
        """Tensors of the same shapes, without values."""
        return self._views(torch.empty(self._packed, dtype=dtype, device=device))

    @property
    def _packed(self) -> tuple[int, ...]:
        return self.batch, self.length, 3, self.heads, self.head_dim

    def _views(self, packed: torch.Tensor):
        q, k, v = (x.detach().requires_grad_() for x in packed.permute(2, 0, 3, 1, 4))
        return q, k, v, torch.empty_like(q, requires_grad=False)


GPU_SHAPES = [
    Shape("vit-b16-197", 64, 12, 197, 64),
    Shape("bert-base-512", 64, 12, 512, 64),
    Shape("gpt2-1024", 8, 12, 1024, 64, is_causal=True),
    Shape("gpt2-2048", 8, 12, 2048, 64, is_causal=True),
    Shape("full-2048", 8, 12, 2048, 64),
    Shape("d128-4096", 2, 16, 4096, 128, is_causal=True),
    Shape("d128-16384", 1, 16, 16384, 128, is_causal=True),
]
CPU_SHAPES = [
    Shape("vit-b16-197", 1, 12, 197, 64),
    Shape("bert-base-512", 1, 12, 512, 64),
    Shape("gpt2-1024", 1, 12, 1024, 64, is_causal=True),
]
DRY_SHAPES = [Shape("dry-40", 1, 2, 40, 16), Shape("dry-33-causal", 1, 2, 33, 16, is_causal=True)]
