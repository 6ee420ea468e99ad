"""Text as token ids and back: by characters, or by the tokenizer that a checkpoint brings.

Special tokens go by what they are for ("mask", "pad", "cls", "sep", "end"), since each tokenizer spells them its own way.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tfkern.extras import require
from tfkern.models import gguf_file

# How tokenizers spell the token for each purpose, the commonest first.
SPELLINGS = {
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "end": ("<|endoftext|>", "<|im_end|>", "</s>"),
}


class TokenizerError(ValueError):
    """A tokenizer that can't be read, or a text that it has no tokens for."""


class Characters:
    """Each character is a token; special tokens come after the characters.

    Args:
        characters: those it knows, each once; the place of a character is its id.
        specials: purposes of special tokens, of "mask", "pad", "cls", "sep" and "end".
    """

    def __init__(self, characters: str, specials: Iterable[str] = ()):
        self.characters, self.specials = characters, tuple(specials)
        if len(set(characters)) != len(characters):
            raise TokenizerError(f"characters must have each character once, but are {characters!r}")
        if unknown := set(self.specials) - set(SPELLINGS):
            raise TokenizerError(f"specials must be of {', '.join(SPELLINGS)}, but have {', '.join(sorted(unknown))}")
        self._ids = {c: i for i, c in enumerate(characters)}
        self._spelled = [*characters, *(SPELLINGS[name][0] for name in self.specials)]

    @classmethod
    def of(cls, text: str, specials: Iterable[str] = ()) -> "Characters":
        """Those that a text has."""
        return cls("".join(sorted(set(text))), specials)

    @property
    def size(self) -> int:
        """How many ids there are, special ones included."""
        return len(self.characters) + len(self.specials)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. TokenizerError for a character that it does not know."""
        if unknown := sorted(set(text) - set(self.characters)):
            raise TokenizerError(f"the text has characters {unknown} that are not known; known are {self.characters!r}")
        return [self._ids[c] for c in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; a special token is written as BERT's tokenizers write it, such as [MASK]."""
        return "".join(self._spelled[int(i)] for i in ids)

    def special(self, purpose: str) -> int | None:
        """The id of the special token for a purpose, or None if there is none."""
        return len(self.characters) + self.specials.index(purpose) if purpose in self.specials else None

    def to_json(self) -> str:
        """What `from_json` makes it from again."""
        return json.dumps(dict(characters=self.characters, specials=self.specials))


class Subwords:
    """A tokenizer of the package `tokenizers`: BPE, WordPiece or Unigram, as it was trained."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @classmethod
    def read(cls, path: str | Path) -> "Subwords":
        """Read a tokenizer.json, the one in a folder, or that of a .gguf. TokenizerError where none can be read."""
        path = Path(path)
        if path.suffix == ".gguf":
            return cls.parsed(_text_of_gguf(path), str(path))
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} can't be read ({error}); name a tokenizer.json, or a folder that has one") from None
        return cls.parsed(text, str(path))

    @classmethod
    def parsed(cls, text: str, path: str = "the tokenizer") -> "Subwords":
        """From the text of a tokenizer.json. What that says of padding and of a largest length is not used."""
        tokenizers = require("tokenizers", "demo")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises a bare Exception
            raise TokenizerError(f"{path} is no tokenizer.json that `tokenizers` can read ({error})") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(tokenizer)

    @property
    def size(self) -> int:
        """How many ids there are, special and added ones included."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; with special=True, between the special tokens that its model was trained with, such as [CLS].
        TokenizerError for a text that is not UTF-8, such as a command's argument may be."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=special).ids
        except TypeError:  # what it makes of lone surrogates
            raise TokenizerError(f"the text must be UTF-8, but is {text[:60]!r}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids])

    def special(self, purpose: str) -> int | None:
        """The id of the special token for a purpose, or None if there is none."""
        found = (self.tokenizer.token_to_id(name) for name in SPELLINGS[purpose])
        return next((i for i in found if i is not None), None)

    def to_json(self) -> str:
        """What `from_json` makes it from again: the text of a tokenizer.json."""
        return self.tokenizer.to_str()


def _text_of_gguf(path: Path) -> str:
    """The tokenizer of a GGUF file as the text of a tokenizer.json."""
    try:
        return gguf_file.tokenizer_json(path)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} has no tokenizer that can be read ({error})") from None


Tokenizer = Characters | Subwords


def from_json(text: str) -> Tokenizer:
    """The tokenizer that gave this by to_json()."""
    told = json.loads(text)
    return Characters(**told) if set(told) == {"characters", "specials"} else Subwords.parsed(text)
