"""Options that several commands share, and what they stand for."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from lookahead_jax.cli.tokens import read_tokens
from lookahead_jax.host.config_files import UsageError


def option(metavar: str):
    """Shows `metavar` in the help instead of the type, and no default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Folder = Annotated[Path | None, option("DIR")]
File = Annotated[Path | None, option("FILE")]
TokenFile = Annotated[Path, option("FILE")]
OutFile = Annotated[Path, option("FILE")]
Text = Annotated[str | None, option("TEXT")]
OneSource = tyro.conf.create_mutex_group(required=True, title="prompt")
Repeated = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], option("TEXT")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    model: Folder = None
    """Folder of a Hugging Face checkpoint; left out, the embedded model."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, option("DTYPE")] = None
    """float32, bfloat16 or float16; left out, what the checkpoint is stored in."""

    def load(self):
        """The model these options name."""
        import lookahead_jax as lk

        return lk.load(self.model or lk.EMBEDDED_MODEL, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    prompt: Annotated[Text, OneSource] = None
    """The prompt itself."""
    prompt_file: Annotated[File, OneSource] = None
    """A text file (UTF-8) as the prompt; - is the standard input."""
    tokens: Annotated[File, OneSource] = None
    """Token ids as int32 [rows, tokens] in .npy, rows padded on the right with -1."""

    def read(self, model) -> list[str] | list[list[int]]:
        """The prompts: one text, or the rows of a token file."""
        if self.tokens is not None:
            return [row[row >= 0].tolist() for row in read_tokens(self.tokens, model.config)]
        text = self.prompt if self.prompt_file is None else read_text(self.prompt_file)
        if not text:
            raise ValueError("the prompt is empty")
        return [text]


class Eviction(NamedTuple):
    """What the eviction options come to for one model."""

    name: str
    policy: Any
    folder: Path | None  # of the lookahead modules

    def modules(self, model):
        """The lookahead modules, if there is a folder of them."""
        import lookahead_jax as lk

        if self.folder is None:
            return None
        return lk.load_modules(self.folder, params=model.params, config=model.config)


@dataclass(frozen=True, kw_only=True)
class EvictionOptions:
    policy: Annotated[Text, option("NAME")] = None
    """How prompt entries are chosen; `full` keeps all. Left out, lookaheadkv where there are
    lookahead modules (--lookahead, or the embedded model's own), else snapkv."""
    policy_arg: Annotated[Repeated, option("NAME=VALUE")] = ()
    """A setting of the policy, as name=value."""
    budget: int = 256
    """Prompt entries kept per layer and KV head."""
    lookahead: Folder = None
    """Folder of trained lookahead modules; left out, those of the embedded model are for it."""

    def resolve(self, source: ModelOptions) -> Eviction:
        """The policy with its settings, and where the modules it reads are."""
        import lookahead_jax as lk
        from lookahead_jax.policies.base import WithModules

        if self.budget < 1:
            raise ValueError(f"the budget must be at least 1, not {self.budget}")
        settings = {}
        for pair in self.policy_arg:
            name, equals, value = pair.partition("=")
            if not name or not equals:
                raise UsageError(f"--policy-arg takes NAME=VALUE, not {pair!r}")
            settings[name] = value
        own = lk.EMBEDDED_MODULES if source.model is None else None
        folder = self.lookahead or own
        name = self.policy or ("lookaheadkv" if folder else "snapkv")
        policy = lk.make_policy(name, **settings)
        reads_modules = isinstance(policy.reading, WithModules)
        return Eviction(name, policy, folder if reads_modules else self.lookahead)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    temperature: float = 0.0
    """Randomness of the choice; 0 takes the likeliest token."""
    top_k: Annotated[int | None, option("INT")] = None
    """Choose among the k likeliest tokens."""
    top_p: Annotated[float | None, option("FLOAT")] = None
    """Choose among the likeliest tokens that together have this probability."""
    min_p: Annotated[float | None, option("FLOAT")] = None
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the score of tokens already seen; 1 is none."""


@dataclass(frozen=True, kw_only=True)
class DraftingOptions:
    drafter: Annotated[str, option("NAME")] = "none"
    """What drafts several tokens a step: trie, suffix, both as trie+suffix, prompt_lookup,
    recycling, both as prompt_lookup+recycling, draft_model or drawn_model."""
    draft_nodes: Annotated[int | None, option("INT")] = None
    """Nodes of a step's tree: 1, 8, 16, 32, 64 or 128; left out, as many as pay."""
    draft_model: Folder = None
    """Folder of the smaller checkpoint that draft_model and drawn_model read."""

    def make(self, dtype: str | None):
        """The drafter these options name."""
        from lookahead_jax.drafters.registry import make_drafter

        reads = self.drafter in ("draft_model", "drawn_model")
        if reads != (self.draft_model is not None):
            raise UsageError(
                "--draft-model DIR goes together with --drafter draft_model or drawn_model"
            )
        if self.draft_model is None:
            return make_drafter(self.drafter)
        import lookahead_jax as lk

        return make_drafter(self.drafter, model=lk.load(self.draft_model, dtype=dtype))


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `generate` and `inspect` share: a model, a prompt, and how to continue it."""

    source: ModelOptions = field(default_factory=ModelOptions)
    input: PromptOptions = field(default_factory=PromptOptions)
    eviction: EvictionOptions = field(default_factory=EvictionOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    drafting: DraftingOptions = field(default_factory=DraftingOptions)
    max_new_tokens: int = 128
    """Tokens to generate at most, per row."""
    evict_every: Annotated[int | None, option("INT")] = None
    """Cut the cache back to the budget again every so many tokens: constant memory, however long
    the text. With policy streaming_llm, keydiff, h2o or lookaheadkv."""
    stop: Repeated = ()
    """Ends the text before this string."""
    seed: int = 0
    """Seed of the sampling, for every row: a row comes out the same alone and among others."""

    def run(self, model, prompts, eviction: Eviction, drafter, **arguments):
        """Continues the prompts with `lk.generate`, which `arguments` are handed to."""
        import lookahead_jax as lk

        return lk.generate(
            model,
            prompts,
            policy=eviction.policy,
            budget=self.eviction.budget,
            lookahead=eviction.modules(model),
            sampling=lk.Sampling(**asdict(self.sampling)),
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            seeds=[self.seed] * len(prompts),
            drafter=drafter,
            draft_nodes=self.drafting.draft_nodes,
            evict_every=self.evict_every,
            **arguments,
        )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of the standard input if `path` is -."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def megabytes(count: int) -> str:
    """A number of bytes for people, in decimal megabytes."""
    return f"{count / 1e6:,.1f} MB"
