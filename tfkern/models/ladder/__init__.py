"""From X Xᵀ X to the transformer's block, one file a rung; docs/ladder.md tells the story with a picture a rung.

    a_products              X Xᵀ X                              no parameters
    b_inner_product         (X W Xᵀ) X                          what the inner product looks at
    c_values                Σ_j x_j Wv                          values without scores: it fails
    d_queries_keys_values   1/√D (X Wq) (X Wk)ᵀ (X Wv)          the scale
    e_softmax               softmax(Q Kᵀ / √D) V                weights
    f_head                  the same, D numbers of C            a head
    g_heads                 [head_1 … head_H] Wo                many, dropout, a projection
    h_block                 x + heads(norm), x + mlp(norm)      the block

`sentiment` trains each of them on `sentences`, `measures` has the tables of docs/ladder.md and `pictures` its pictures.
"""

from tfkern.models.ladder.a_products import AllTokens, EachToken, Products
from tfkern.models.ladder.b_inner_product import InnerProduct
from tfkern.models.ladder.c_values import Values
from tfkern.models.ladder.d_queries_keys_values import QueriesKeysValues
from tfkern.models.ladder.e_softmax import SoftmaxAttention
from tfkern.models.ladder.f_head import Head
from tfkern.models.ladder.g_heads import Heads
from tfkern.models.ladder.h_block import Block

__all__ = [
    "RUNGS", "AllTokens", "Block", "EachToken", "Head", "Heads", "InnerProduct", "Products", "QueriesKeysValues",
    "SoftmaxAttention", "Values",
]  # fmt: skip

RUNGS = {
    "a": Products, "b": InnerProduct, "c": Values, "d": QueriesKeysValues, "e": SoftmaxAttention, "f": Head, "g": Heads,
    "h": Block,
}  # fmt: skip
