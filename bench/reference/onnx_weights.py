"""Read the weights of an ONNX file that torch.onnx.export wrote, by the names that they had in PyTorch.

The exporter folds the transpose of a linear layer's matrix into a new tensor without a name. But the node that multiplies by it
is called after the layer: /encoder/layer.0/mlp/fc1/MatMul multiplies by the transpose of encoder.layer.0.mlp.fc1.weight.
"""

import torch
from torch import Tensor


def named(graph) -> dict[str, Tensor]:
    """The tensors of an onnx.GraphProto by their names in PyTorch. Those of no layer keep the names that the exporter gave
    them."""
    from onnx import numpy_helper

    held = {x.name: torch.from_numpy(numpy_helper.to_array(x).copy()) for x in graph.initializer}
    for node in graph.node:
        layer, _, kind = node.name.rpartition("/")
        if node.op_type == kind == "MatMul" and node.input[1] in held:
            held[f"{layer.removeprefix('/').replace('/', '.')}.weight"] = held.pop(node.input[1]).T
    return held


def dinov2(graph, place: str) -> dict[str, Tensor]:
    """The weights of a DINOv2 by transformers' names. `place` is its prefix in the exported model, such as "backbone.".

    The model interpolates the position embeddings of the patches, but not that of the class token. So the graph has them as two
    constants, the only unnamed ones with three dimensions: (1, patches, C) and (1, 1, C).
    """
    held = named(graph)
    constants = [x for name, x in held.items() if name.startswith("onnx::") and x.dim() == 3]
    state = {name.removeprefix(place): x for name, x in held.items() if name.startswith(place)}
    return {**state, "embeddings.position_embeddings": torch.cat(sorted(constants, key=lambda x: x.shape[1]), 1)}
