"""PyTorch's encoder layers without their fused inference, which bypasses the attention layer in them.

Both classes decide on fused inference by an attribute. Here the attribute refuses it, whatever was set, so that every call
reaches `self_attn`. The rest is PyTorch's: an instance of one class becomes one of the other when its __class__ changes.
"""

import functools

from torch import nn

from tfkern import tracing


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer with its arguments and state dict. Its `self_attn` is called in inference as well."""

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
    """torch.nn.TransformerEncoder with its arguments and state dict. Its layers get padded tensors in inference as well, and
    their results for padding stay. PyTorch's encoder returns 0 there if all of its conditions for nested tensors are met."""

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
