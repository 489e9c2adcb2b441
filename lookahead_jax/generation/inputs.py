"""Checks and encodes the arguments of `generate`: token rows, end tokens, drafts."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.device_drafter import DeviceDrafter
from lookahead_jax.decoding.grammar import CompiledGrammar, Grammar
from lookahead_jax.decoding.host_drafter import HostDrafter
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.generation.settings import EvictionSettings
from lookahead_jax.host.integers import check_integer, whole_id
from lookahead_jax.host.warn import warn
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.sharding import place_rows
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.policies.base import Policy, WithDraft
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.policies.snapkv import SnapKV
from lookahead_jax.prefilling.batching import pad_batch, pad_drafts, pin_mask
from lookahead_jax.prompts.speculation import draft_answers, drafted_continuations

DEFAULT_BUDGET = 256
MAX_BUDGET = 2**24  # more than any prompt; sums of budgets stay within int32


def default_policy(lookahead: LookaheadModules | None) -> Policy:
    """LookaheadKV if there are lookahead modules, else SnapKV."""
    return SnapKV() if lookahead is None else LookaheadKV()


def encode_prompts(
    model: Model, prompts: Sequence[str | Sequence[int]], *, behind: bool = False
) -> list[list[int]]:
    """Token rows of texts or of ids; padding (-1) at the end of a row of ids is dropped.

    The tokenizer adds its special tokens (BOS, ...) around a text, unless it comes `behind`
    another one. Raises ValueError for a prompt without text or ids, and for texts without a
    tokenizer.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts and questions are a list: give [text]")
    if not len(prompts):
        raise ValueError("no prompt was given")
    return [
        _encode_prompt(model, prompt, behind=behind, index=i) for i, prompt in enumerate(prompts)
    ]


def _encode_prompt(
    model: Model, prompt: str | Sequence[int], *, behind: bool, index: int
) -> list[int]:
    if not isinstance(prompt, str):
        row = [whole_id(token, f"a token of prompt {index}") for token in prompt]
        while row and row[-1] == -1:
            row.pop()
    elif model.tokenizer is None:
        raise ValueError("this model has no tokenizer.json: give token ids")
    else:
        # An empty text stays empty, although its special tokens would make a row.
        encode = model.tokenizer.encode_behind if behind else model.tokenizer.encode
        row = encode(prompt) if prompt else []
    if not row:
        raise ValueError(f"prompt {index} is empty")
    return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts, and questions after them if there are any, as token rows and padded arrays.

    With several questions for each prompt there are more rows R than prompts B.
    """

    prompts: list[list[int]]
    texts: list[list[int]]
    """Prompt and question of every row."""
    tokens: jax.Array  # [B, T] int32 prompts, -1 padded, placed for the model
    question_tokens: jax.Array | None  # [R, Q] int32
    text_tokens: jax.Array  # [R, T'] int32 prompts and questions
    pinned: jax.Array | None = None  # [B, T] bool prompt positions that are always kept

    @property
    def copies(self) -> int:
        """Rows of each prompt."""
        return len(self.texts) // len(self.prompts)

    @property
    def row_prompts(self) -> list[list[int]]:
        """The prompt of every row."""
        return [prompt for prompt in self.prompts for _ in range(self.copies)]

    @property
    def question_width(self) -> int:
        """Padded length of the questions, 0 without any."""
        return 0 if self.question_tokens is None else self.question_tokens.shape[1]

    @property
    def question_lengths(self) -> jax.Array:
        """Tokens of each prompt's longest question, int32 [B]."""
        lengths = [len(t) - len(p) for t, p in zip(self.texts, self.row_prompts, strict=True)]
        return jnp.asarray(lengths, jnp.int32).reshape(-1, self.copies).max(1)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and question."""
        return max(map(len, self.texts))


def encode_batch(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    questions: Sequence[str | Sequence[int]] | None,
    pin: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> PromptBatch:
    """Prompts and as many questions for each, if given, ready to be read; `pin` as in `generate`.

    Raises ValueError for empty ones, ids out of range, spans outside of their prompt, and a number
    of questions or pins that does not fit.
    """
    config, place = model.config, model.params["embed"].sharding
    rows = encode_prompts(model, prompts)
    padded = pad_batch(rows, config=config)
    tokens = place_rows(padded, place)
    pinned = None if pin is None else place_rows(pin_mask(pin, padded), place)
    if questions is None:
        return PromptBatch(
            prompts=rows, texts=rows, tokens=tokens, question_tokens=None, text_tokens=tokens,
            pinned=pinned,
        )  # fmt: skip
    asked = encode_questions(model, questions, len(rows))
    copies = len(asked) // len(rows)
    texts = [rows[i // copies] + question for i, question in enumerate(asked)]
    return PromptBatch(
        prompts=rows,
        texts=texts,
        tokens=tokens,
        question_tokens=jnp.asarray(pad_batch(asked, config=config)),
        text_tokens=jnp.asarray(pad_batch(texts, config=config)),
        pinned=pinned,
    )


def row_seeds(seeds: Sequence[int] | None, rows: int) -> list[int]:
    """One seed per row, 0 for all by default.

    Raises ValueError for another number of seeds, and for one that is no integer.
    """
    seeds = [0] * rows if seeds is None else list(seeds)
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} rows")
    for i, seed in enumerate(seeds):
        check_integer(f"the seed of row {i}", seed)
    return seeds


def check_eviction(eviction: EvictionSettings, *, by_reader: bool, questions: bool) -> None:
    """Raises ValueError if a batch that is read like this cannot follow the settings."""
    if by_reader and eviction.cache_dtype is not None:
        raise ValueError("a reader chooses the type of its cache: leave cache_dtype out")
    if by_reader and eviction.evict_every is not None:
        raise ValueError("a reader evicts nothing: leave evict_every out")
    decode_eviction = eviction.while_decoding()
    if questions and decode_eviction is not None and decode_eviction.adds_up:
        raise ValueError(
            f"policy {type(eviction.policy).__name__} adds up scores and would miss those of "
            "questions: leave evict_every out, or put the question into the prompt"
        )


def draft_tokens(
    policy: Policy,
    drafts: Sequence[Sequence[int]] | Model | None,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: Sequence[int],
    drafter: HostDrafter | DeviceDrafter | None = None,
) -> jax.Array | None:
    """The drafts of a policy that observes with them, int32 [B, draft tokens], -1 padded.

    `drafts` are one per prompt, or the small model to make them with. Those that a drafter supplies
    are of `drafter` if it runs on the host, or else of a trie that knows the prompt alone. None for
    other policies. Raises ValueError unless there is one draft per prompt, of ids.
    """
    reading = policy.reading
    if drafts is None and isinstance(reading, WithDraft) and reading.by_drafter:
        source = drafter if isinstance(drafter, HostDrafter) else make_drafter("trie")
        drafts = drafted_continuations(source, prompts, tokens=reading.tokens)
    if isinstance(drafts, Model):
        drafts = draft_answers(drafts, prompts, policy=policy, eos_ids=eos_ids)
    return pad_drafts(policy, drafts, len(prompts))


def encode_questions(
    model: Model, questions: Sequence[str | Sequence[int]], prompts: int
) -> list[list[int]]:
    """Token rows of questions, as many for each prompt, as `encode_prompts` after them."""
    rows = encode_prompts(model, questions, behind=True)
    if len(rows) % prompts:
        raise ValueError(
            f"{len(rows)} questions for {prompts} prompts: give one, or equally many, for each"
        )
    return rows


def token_ids(model: Model, tokens: Sequence[int | str]) -> tuple[int, ...]:
    """Ids of tokens that are given by id or by content ("<|im_end|>").

    Raises ValueError for a text that is not one token of the tokenizer, and for a number that
    cannot be an id. Ids beyond the vocabulary are allowed: they never occur.
    """
    if isinstance(tokens, str):
        raise ValueError(f"tokens are a list: give [{tokens!r}]")
    ids = []
    for token in tokens:
        if isinstance(token, str):
            if model.tokenizer is None:
                raise ValueError(
                    f"token {token!r} needs a tokenizer, and this model has no tokenizer.json: "
                    "give its id"
                )
            if (id := model.tokenizer.token_id(token)) is None:
                raise ValueError(
                    f"{token!r} is not one token of this model's tokenizer: give one token or its "
                    "id, or use stop= for text"
                )
            ids.append(id)
        elif not 0 <= (id := whole_id(token, "an end token")) < 2**31:
            raise ValueError(f"{token} is not a token id: ids are 0 to 2**31 - 1")
        else:
            ids.append(id)
    return tuple(ids)


def end_ids(
    model: Model, eos_ids: Sequence[int | str] | None, stop_token_ids: Sequence[int | str] = ()
) -> tuple[int, ...]:
    """Ids of the tokens that end a row, each once: `eos_ids`, then `stop_token_ids`.

    `eos_ids` None stands for the checkpoint's own (generation_config.json). If these lack the
    tokenizer's own eos_token, which chat models may emit instead, a warning says so. Raises
    ValueError as `token_ids`.
    """
    extra = token_ids(model, stop_token_ids)
    if eos_ids is not None:
        return tuple(dict.fromkeys((*token_ids(model, eos_ids), *extra)))
    ends = tuple(dict.fromkeys((*model.generation.eos_ids, *extra)))
    if model.tokenizer is not None:
        token = model.tokenizer.special_tokens.get("eos_token")
        id = None if token is None else model.tokenizer.token_id(token)
        if id is not None and id not in ends:
            warn(
                f"the tokenizer's eos_token {token!r} (id {id}) does not end a row: the checkpoint "
                f"names only {list(ends)} as end tokens. To stop there too, give "
                f"stop_token_ids=[{token!r}] (--eos {token!r})"
            )
    return ends


def announce(policy: Policy, budget: int, length: int, config: ModelConfig) -> None:
    """Warns if a policy changes its settings, or `length` tokens exceed the model's positions.

    Raises ValueError for a budget outside 1 to `MAX_BUDGET`.
    """
    if not 1 <= budget <= MAX_BUDGET:
        raise ValueError(
            f"budget must be 1 to {MAX_BUDGET} entries, not {budget}; a budget of the prompt's "
            "length keeps all of it"
        )
    if (notice := policy.notice(budget)) is not None:
        warn(notice)
    if length > config.max_position:
        warn(
            f"{length} tokens exceed the {config.max_position} positions this model was trained "
            "for; output beyond them is unreliable"
        )


def compiled_grammar(
    model: Model, grammar: Grammar | None, ends: Sequence[int]
) -> CompiledGrammar | None:
    """A grammar over the model's tokens, for rows that `ends` end; errors as `Grammar.compile`."""
    if grammar is None:
        return None
    return grammar.compile(model.tokenizer, vocab_size=model.config.vocab_size, end_ids=ends)
