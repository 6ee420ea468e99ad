"""PyTorch's encoder layers without the fused inference of their own, which goes past the attention layer in them.

Both decide on that by an attribute. Here it says no, whatever was set, so that every call reaches `self_attn`; the rest is
PyTorch's, and an instance of the one class becomes one of the other by changing its __class__.
"""

import functools

from torch import nn

from tfkern import tracing


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, its arguments and state dict. Its `self_attn` attends in inference, too."""

    __prepare_scriptable__ = tracing.unscriptable

    @functools.wraps(nn.TransformerEncoderLayer.forward)
    def forward(self, src, *args, **kwargs):
        if tracing.proxied(src):
            return tracing.leaf(self, src, *args, **kwargs)
        return nn.TransformerEncoderLayer.forward(self, src, *args, **kwargs)

    @property
    def activation_relu_or_gelu(self) -> int:
        """0: an activation that the fused inference doesn't know."""
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder, its arguments and state dict. In inference, too, its layers get padded tensors: what they
    put into padding stays there, where PyTorch's encoder returns 0 if all of its conditions for nested tensors are met."""

    __prepare_scriptable__ = tracing.unscriptable

    @functools.wraps(nn.TransformerEncoder.forward)
    def forward(self, src, *args, **kwargs):
        if tracing.proxied(src):
            return tracing.leaf(self, src, *args, **kwargs)
        return nn.TransformerEncoder.forward(self, src, *args, **kwargs)

    @property
    def use_nested_tensor(self) -> bool:
        """False: padding stays."""
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value
