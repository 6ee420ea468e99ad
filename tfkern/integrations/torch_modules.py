"""PyTorch's own layers, for tfkern.patch(model)."""

from torch import nn

from tfkern import nn as ours
from tfkern.integrations.adapters import by_class, full_name, register

_LAYERS = (nn.TransformerEncoderLayer, ours.TransformerEncoderLayer)


def _layer(module: nn.TransformerEncoderLayer) -> str | None:
    if type(module.self_attn) in (nn.MultiheadAttention, ours.MultiheadAttention):
        return None
    return f"its self_attn is a {full_name(type(module.self_attn))}, which may need the layer's fused inference"


def _encoder(module: nn.TransformerEncoder) -> str | None:
    for layer in module.layers:
        if type(layer) not in _LAYERS:
            return f"it has a {full_name(type(layer))}, which may want its nested tensors"
        if reason := _layer(layer):
            return f"its layer was not changed: {reason}"
    return None


register(by_class(nn.MultiheadAttention, ours.MultiheadAttention))
register(by_class(nn.TransformerEncoderLayer, ours.TransformerEncoderLayer, _layer, forward=False))
register(by_class(nn.TransformerEncoder, ours.TransformerEncoder, _encoder, forward=False))
