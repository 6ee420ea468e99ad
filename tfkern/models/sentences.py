"""Sentences as vectors whose directions tell their meaning. Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using
Siamese BERT-Networks" (2019).

BERT gives a vector for each token; their mean, or the first, of length 1, stands for the sentence.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tfkern.functional import attention as fused_attention
from tfkern.models.bert import BERT
from tfkern.models.files import WeightsError, read_json
from tfkern.models.pretrained import from_pretrained
from tfkern.models.tokens import Subwords

POOLINGS = ("mean", "cls")
MODULES = {"Transformer", "Pooling", "Normalize"}  # of sentence-transformers, that are computed here


class Sentences:
    """A BERT and its tokenizer, for vectors of sentences.

    Args:
        model: BERT, in evaluation mode.
        tokenizer: its tokenizer, which puts special tokens around a sentence.
        length: how many tokens of a sentence are read, at most the model's context; of a longer one the first and the last.
        pooling: "mean" over all tokens, or "cls", the first one's vector.
    """

    def __init__(self, model: BERT, tokenizer: Subwords, length: int, pooling: str = "mean"):
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, but is {pooling!r}")
        if not 3 <= length <= model.config.context:
            raise ValueError(f"length must be from 3 to {model.config.context}, the model's context, but is {length}")
        self.model, self.tokenizer, self.length, self.pooling = model, tokenizer, length, pooling

    @classmethod
    def from_pretrained(cls, folder: str | Path, attention: Callable[..., Tensor] = fused_attention) -> "Sentences":
        """Read a folder as sentence-transformers writes it: a BERT, tokenizer.json, and if they are there modules.json, the
        config of its Pooling, sentence_bert_config.json and more. WeightsError for what is not computed here."""
        folder = Path(folder)
        pooling = _pooling(_pooling_folder(folder) / "config.json")
        if prompt := _told(folder / "config_sentence_transformers.json", {}).get("default_prompt_name"):
            raise WeightsError(f"{folder} puts its prompt {prompt!r} before each sentence, which is not done here")
        told, settings = (_told(folder / f"{name}_config.json", {}) for name in ("sentence_bert", "tokenizer"))
        if told.get("do_lower_case"):
            raise WeightsError(f"{folder}/sentence_bert_config.json has do_lower_case, which only a tokenizer does here")
        model = from_pretrained(folder, BERT, attention=attention)
        tokenizer = Subwords.read(folder)
        lower, wanted = getattr(tokenizer.tokenizer.normalizer, "lowercase", None), settings.get("do_lower_case")
        if type(lower) is type(wanted) is bool and lower != wanted:  # transformers goes by the settings
            raise WeightsError(
                f"{folder}/tokenizer_config.json has do_lower_case {wanted}, tokenizer.json lowercase {lower}; make them agree"
            )
        length = told.get("max_seq_length") or settings.get("model_max_length") or model.config.context
        if type(length) is not int:
            raise WeightsError(f"{folder} must tell the most tokens of a sentence as a whole number, but tells {length!r:.80}")
        return cls(model, tokenizer, min(length, model.config.context), pooling)

    def ids(self, sentence: str) -> list[int]:
        """All tokens of a sentence, special ones too, however many are read. ValueError if there are only special ones."""
        ids, special = (self.tokenizer.encode(text, special=True) for text in (sentence, ""))
        if len(ids) <= len(special):
            raise ValueError(f"a sentence must have at least one word, but one is {sentence!r}")
        return ids

    @torch.no_grad()
    def embed(self, sentences: Sequence[str], rows: int = 32) -> Tensor:
        """n sentences -> vectors (n, width) of length 1; their inner products are cosine similarities.

        `rows` sentences at a time are computed together. ValueError for a sentence without words.
        """
        if isinstance(sentences, str):
            raise ValueError(f"sentences must be a list of them, but is one: {sentences!r}")
        ids = [self._cut(self.ids(sentence)) for sentence in sentences]
        vectors = [self._pooled(ids[i : i + rows]) for i in range(0, len(ids), rows)]
        return torch.cat(vectors) if vectors else torch.empty(0, self.model.config.width)

    def _cut(self, ids: list[int]) -> list[int]:
        return ids if len(ids) <= self.length else [*ids[: self.length - 1], ids[-1]]

    def _pooled(self, ids: list[list[int]]) -> Tensor:
        device = self.model.tokens.weight.device
        lengths = torch.tensor([len(row) for row in ids], device=device)
        padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)  # nobody sees what the padding is
        for row, tokens in zip(padded, ids, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        x = self.model(padded.to(device), key_lengths=lengths)  # (B, N, C)
        if self.pooling == "cls":
            return F.normalize(x[:, 0], dim=-1)
        there = torch.arange(x.shape[1], device=device) < lengths[:, None]  # (B, N)
        return F.normalize(x.masked_fill(~there[..., None], 0.0).sum(1) / lengths[:, None], dim=-1)


def _told(path: Path, otherwise):
    """The contents of a JSON file, which must have the type of `otherwise`; `otherwise` if there is no file."""
    return read_json(path, type(otherwise)) if path.is_file() else otherwise


def _pooling_folder(folder: Path) -> Path:
    """Where a folder has its Pooling. WeightsError for a module that is not computed here."""
    found = folder / "1_Pooling"
    for module in _told(folder / "modules.json", []):
        told = module if isinstance(module, dict) else {}
        if (kind := str(told.get("type")).rpartition(".")[2]) not in MODULES:
            raise WeightsError(f"{folder} has a module {kind}, but only {', '.join(sorted(MODULES))} are known here")
        if kind == "Pooling":
            found = folder / str(told.get("path", "1_Pooling"))
    return found


def _pooling(path: Path) -> str:
    """The one of POOLINGS that the config.json of a Pooling names; without the file the mean, as in sentence-transformers."""
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    chosen = [key for key, value in _told(path, {"pooling_mode_mean_tokens": True}).items() if value is True and "mode" in key]
    if len(chosen) != 1 or chosen[0] not in names:
        raise WeightsError(f"{path} must choose one of {', '.join(names)}, but has {', '.join(chosen) or 'none'}")
    return names[chosen[0]]
