"""Build the training text and the tokenizer of the embedded model.

The text consists of the Python sources of the standard library and of installed, permissively
licensed packages. Near-duplicates are found by content (MinHash over line shingles), so that no
held-out file has an edited copy in the training split.

    python -m lookahead_jax.train.embedded.corpus --out DIR
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
import sysconfig
from collections.abc import Sequence

import numpy as np
import tokenizers
import tyro

from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.host.files import atomic_write, make_folder
from lookahead_jax.train.progress import say

BOS, EOS, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
BANDS, ROWS = 32, 3  # of a MinHash signature; see `near_duplicates` for the pairs they find
SPECIAL = (BOS, EOS, USER, ASSISTANT)
PACKAGES = (
    "numpy",
    "scipy",
    "jax",
    "networkx",
    "flax",
    "optax",
    "rich",
    "click",
    "jinja2",
    "pydantic",
    "packaging",
    "tyro",
    "fsspec",
    "orbax",
    "pandas",
    "sympy",
    "anyio",
    "httpcore2",
    "absl",
    "etils",
    "markdown_it",
    "dateutil",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Contents and folder of the corpus."""

    out: pathlib.Path
    """Folder for train.npy, valid.npy, tokenizer.json, valid.jsonl and manifest.json."""
    packages: tuple[str, ...] = PACKAGES
    """Installed packages to read besides the standard library; missing ones are skipped."""
    package_bytes: int = 4_000_000
    """Maximum bytes of text per package; files are taken in the order of their content hash."""
    file_bytes: tuple[int, int] = (400, 120_000)
    """Smallest and largest size of a file, in bytes."""
    vocab_size: int = 4096
    """Size of the tokenizer's vocabulary, special tokens included."""
    holdout: float = 0.03
    """Fraction of the near-duplicate clusters to hold out."""
    seed: int = 0
    """Seed of the MinHash permutations, the held-out clusters and the order of the documents."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One file: its source, its path in that source, and its text."""

    source: str
    path: str
    text: str


def package_root(name: str) -> pathlib.Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def is_source(text: str) -> bool:
    """False for data tables and minified or generated files."""
    lines = text.splitlines()
    digits = sum(c.isdigit() for c in text)
    return (
        bool(lines) and len(text) < 80 * len(lines) and digits < 0.1 * len(text) and text.isascii()
    )


def read_documents(
    source: str, root: pathlib.Path, config: CorpusConfig, limit: int | None
) -> list[Document]:
    """The usable files under `root`, in the order of their content hash, up to `limit` bytes."""
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if {"test", "tests", "site-packages", "idlelib", "__pycache__", "_vendor"} & set(parts):
            continue
        if not config.file_bytes[0] <= path.stat().st_size <= config.file_bytes[1]:
            continue
        try:
            text = path.read_text("utf-8").replace("\r\n", "\n").expandtabs(4)
        except UnicodeDecodeError:
            continue
        if is_source(text):
            found.append(Document(source, "/".join(parts), text.strip() + "\n"))
    found.sort(key=lambda d: hashlib.sha256(d.text.encode()).digest())
    total, kept = 0, []
    for document in found:
        total += len(document.text)
        if limit is not None and total > limit:
            break
        kept.append(document)
    return kept


def shingles(text: str, size: int = 3) -> np.ndarray:
    """Hashes of all runs of `size` non-blank, stripped lines: sorted unique uint64 [n], n >= 1."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    hashes = [
        hashlib.blake2b("\n".join(lines[i : i + size]).encode(), digest_size=8).digest()
        for i in range(max(1, len(lines) - size + 1))
    ]
    return np.unique(np.frombuffer(b"".join(hashes), np.uint64))


def near_duplicates(sets: list[np.ndarray], *, seed: int) -> np.ndarray:
    """Cluster label of each shingle set [n]: joined where a band of the MinHash signature agrees.

    Two documents of Jaccard similarity s join with probability 1 - (1 - s^ROWS)^BANDS: 0.5 at
    s = 0.28, 0.98 at s = 0.5.
    """
    rng = np.random.default_rng(seed)
    multipliers = rng.integers(1, 2**63, BANDS * ROWS, dtype=np.uint64)
    multipliers = multipliers * np.uint64(2) + np.uint64(1)
    offsets = rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)
    parent = list(range(len(sets)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[tuple[int, bytes], int] = {}
    for i, values in enumerate(sets):
        mixed = values[:, None] * multipliers + offsets
        signature = (mixed ^ (mixed >> np.uint64(29))).min(axis=0)
        for band, key in enumerate(signature.reshape(BANDS, ROWS)):
            other = seen.setdefault((band, key.tobytes()), i)
            a, b = sorted((find(other), find(i)))
            parent[b] = a
    return np.array([find(i) for i in range(len(sets))])


def split(
    documents: list[Document], *, holdout: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """(train, held out), one document per near-duplicate cluster, cut by cluster.

    A held-out document that still shares more than a fifth of its shingles with the training split
    (a file pasted into a longer one) goes to neither.
    """
    sets = [shingles(d.text) for d in documents]
    labels = near_duplicates(sets, seed=seed)
    keep = [i for i, label in enumerate(labels) if label == i]
    held = [
        i
        for i in keep
        if int(hashlib.sha256(f"{seed}{documents[i].text}".encode()).hexdigest()[:8], 16) / 2**32
        < holdout
    ]
    train = sorted(set(keep) - set(held))
    known = np.unique(np.concatenate([sets[i] for i in train]))
    held = [i for i in held if np.isin(sets[i], known).mean() <= 0.2]
    order = np.random.default_rng(seed).permutation(len(train))
    return [documents[train[i]] for i in order], [documents[i] for i in held]


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE; digits stay single, a leading <s> is added on encoding."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def open_tokenizer(corpus: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of a corpus; FileNotFoundError if the folder is not a corpus."""
    path = corpus / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{corpus} is not a corpus: it has no {path.name}")
    return tokenizers.Tokenizer.from_file(str(path))


def encode(tokenizer: tokenizers.Tokenizer, documents: list[Document]) -> np.ndarray:
    """All documents in one stream, each between <s> and </s>: uint16 [n]."""
    eos = tokenizer.token_to_id(EOS)
    rows = tokenizer.encode_batch([d.text for d in documents])
    return np.concatenate([np.array([*row.ids, eos], np.uint16) for row in rows])


def collect(config: CorpusConfig) -> tuple[list[Document], dict[str, dict]]:
    """Documents of every source, and what each source was (version, licence, files, bytes)."""
    documents = read_documents("python", pathlib.Path(sysconfig.get_path("stdlib")), config, None)
    sources: dict[str, dict] = {
        "python": {"version": sysconfig.get_python_version(), "license": "PSF-2.0"}
    }
    for name in sorted(config.packages):
        root = package_root(name)
        if root is None:
            sources[name] = {"missing": True}
            continue
        documents += read_documents(name, root, config, config.package_bytes)
        owner = importlib.metadata.packages_distributions().get(name, [name])[0]
        meta = importlib.metadata.metadata(owner).json
        labels = [str(c).split(" :: ") for c in meta.get("classifier", [])]
        named = [parts[-1] for parts in labels if parts[0] == "License"]
        licence = meta.get("license_expression") or (named or [str(meta.get("license"))[:40]])[0]
        sources[name] = {"version": meta["version"], "license": licence}
    return documents, sources


def write_corpus(config: CorpusConfig) -> None:
    """Collects, splits and tokenizes the documents, and writes the corpus."""
    make_folder(config.out)
    say("reading sources")
    documents, sources = collect(config)
    for name in sources:
        own = [d for d in documents if d.source == name]
        sources[name] |= {"files": len(own), "bytes": sum(len(d.text) for d in own)}
    say(f"clustering {len(documents)} files")
    train, held = split(documents, holdout=config.holdout, seed=config.seed)
    say("training the tokenizer")
    tokenizer = train_tokenizer([d.text for d in train], config.vocab_size)
    tokenizer.save(str(config.out / "tokenizer.json"))
    streams = {"train": encode(tokenizer, train), "valid": encode(tokenizer, held)}
    for name, stream in streams.items():
        np.save(config.out / f"{name}.npy", stream)
    with open(config.out / "valid.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(d)) + "\n" for d in held)
    manifest = {
        "sources": sources,
        "files_read": len(documents),
        "train": {
            "files": len(train),
            "bytes": sum(len(d.text) for d in train),
            "tokens": len(streams["train"]),
        },
        "valid": {
            "files": len(held),
            "bytes": sum(len(d.text) for d in held),
            "tokens": len(streams["valid"]),
        },
        "config": dataclasses.asdict(config) | {"out": config.out.name},
    }
    atomic_write(config.out / "manifest.json", json.dumps(manifest, indent=1))
    print(json.dumps({k: manifest[k] for k in ("files_read", "train", "valid")}))


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "python -m lookahead_jax.train.embedded.corpus"
    return run_command(
        lambda: tyro.cli(CorpusConfig, args=args, prog=prog), write_corpus, prog=prog
    )


if __name__ == "__main__":
    end_process(main())
