"""A conversation that keeps one cut cache from turn to turn.

The policy cuts the cache once, after the first message. Later messages and all answers are read
after it and kept. What a turn adds is the chat template's rendering of the whole conversation
after the part that the cache holds, so the model sees what one long prompt would show it.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.drafted import Drafting
from lookahead_jax.decoding.sampling import sampling_rows
from lookahead_jax.decoding.state import DecodeState, seen_tokens, start
from lookahead_jax.generation.generate import decode_rows
from lookahead_jax.generation.inputs import PromptBatch, announce, draft_tokens, encode_batch
from lookahead_jax.generation.memory import check_memory
from lookahead_jax.generation.open_batch import reading
from lookahead_jax.generation.output_text import FinishReason, OutputRow
from lookahead_jax.generation.settings import ContinuationSettings, DraftSettings, EvictionSettings
from lookahead_jax.model.cache import SLOT_MULTIPLE, KVCache, round_up, widened
from lookahead_jax.model.sharding import mesh_in_use
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.prefill import extend
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import read_prompt

ROOM = 1024  # a cache gets slots for this many later tokens at a time; more compile anew
BURST = 4  # steps between two looks at the output, and at Ctrl-C

Message = Mapping[str, str]
Spans = Sequence[tuple[int, int]]


class PositionsUsedUp(ValueError):
    """A message that does not fit into the positions that the model has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One answer, and what it took."""

    text: str
    finish: FinishReason | Literal["interrupted"]
    read: int
    """Tokens that were read before the answer: of the first message, or of what is new."""
    reread: bool
    """Whether earlier turns had to be read, and the cache cut, once more."""
    answer_tokens: int
    limit: int
    """Most tokens the answer could have: the setting, or the positions that were left."""
    first_s: float
    """Seconds to the first token, compilation included."""
    tokens_per_s: float | None
    """Of the tokens after the first, without compilation; None if there were none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptEntries:
    """What the cache of a conversation holds."""

    tokens: int
    """Tokens of the conversation so far."""
    read: int
    """Those of the part that the policy has cut."""
    of_read: float
    """Entries of that part per layer and head, on average."""
    entries: float
    """All entries per layer and head, on average."""
    bytes: int
    """Allocated, empty slots included."""


class Conversation:
    """Messages, their answers, and the cache that holds them.

    Args:
      eviction: cuts the cache after the first message; `evict_every` must be None.
      continuation: of every answer, with one seed.
      messages: what stands before the first message, such as a system message.
      pin: gives the spans of the first rendering, in token positions, that are kept whatever their
        score, from its messages.
      draft_model: writes the drafts of a policy that observes with them.
    """

    def __init__(
        self,
        model: Model,
        *,
        eviction: EvictionSettings,
        continuation: ContinuationSettings,
        draft: DraftSettings,
        messages: Sequence[Message] = (),
        pin: Callable[[Sequence[Message]], Spans] | None = None,
        draft_model: Model | None = None,
    ):
        if model.tokenizer is None:
            raise ValueError(f"{model.path} has no tokenizer.json, and a conversation is text")
        announce(eviction.policy, eviction.budget, 0, model.config)
        self.messages = list(messages)
        self._model = model
        self._tokenizer: Tokenizer = model.tokenizer
        self._eviction = eviction
        self._continuation = continuation
        self._draft = draft
        self._pin = pin
        self._draft_model = draft_model
        self._forget()

    def _forget(self) -> None:
        self._cache: KVCache | None = None
        self._ids: list[int] = []  # the tokens that the cache has read
        self._pending: list[int] = []  # the last token of the answer, not yet read
        self._cut_at = 0  # of the ids, those that the policy has cut
        self._cut_end = 0  # the position behind those that it has kept

    def kept(self) -> KeptEntries | None:
        """What the cache holds; None before the first turn."""
        if self._cache is None:
            return None
        pos = np.asarray(self._cache.pos)
        of_read = ((pos >= 0) & (pos < self._cut_end)).sum(-1)
        return KeptEntries(
            tokens=len(self._ids) + len(self._pending),
            read=self._cut_at,
            of_read=float(of_read.mean()),
            entries=float(np.asarray(self._cache.length).mean()),
            bytes=self._cache.bytes,
        )

    def ask(
        self,
        content: str,
        *,
        on_text: Callable[[str], None] | None = None,
        on_read: Callable[[int, bool], None] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Answers one message of the user; message and answer belong to the conversation.

        Args:
          on_text: receives each piece of the answer once it is certain.
          on_read: receives how many tokens will be read, and whether earlier turns are among them,
            before they are.
          interrupted: asked every few tokens; True ends the answer, and what it has stays.

        Raises PositionsUsedUp (a ValueError), with the conversation as it was, for a message that
        leaves no position for an answer; ValueError for pins that do not fit, and where the
        template fails.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        ids = self._tokenizer.encode_chat(messages)
        tail = self._tail(ids)
        whole = ids if tail is None else [*self._ids, *self._pending, *tail]
        limit = self._limit(len(whole))
        reread = tail is None and self._cache is not None
        new = whole if tail is None else whole[len(self._ids) :]
        if on_read is not None:
            on_read(len(new), reread)
        try:
            with mesh_in_use(self._model.params):
                begin = time.perf_counter()
                with reading(len(new), self._model.config):
                    if tail is None:
                        cache, logits = self._read(whole, messages)
                    else:
                        cache, logits = self._extend(new)
                    state = self._start(cache, logits, whole, limit)
                first_s = time.perf_counter() - begin
                output, decode_s = self._answer(state, whole, on_text, interrupted)
        except BaseException:
            self._forget()  # the cache may be gone: the next turn reads everything
            raise
        self.messages = [*messages, {"role": "assistant", "content": output.text}]
        tokens = len(output.tokens)
        cut_short = tokens < limit and output.finish() == "length"
        return Turn(
            text=output.text,
            finish="interrupted" if cut_short else output.finish(),
            read=len(new),
            reread=reread,
            answer_tokens=tokens,
            limit=limit,
            first_s=first_s,
            tokens_per_s=(tokens - 1) / decode_s if tokens > 1 else None,
        )

    def _tail(self, ids: list[int]) -> list[int] | None:
        """What `ids`, a rendering of the whole conversation, has after the tokens of the cache.

        None if the cache is empty, or if its tokens are not how the rendering begins: the template
        has changed earlier turns. The answers' own tokens may spell a text otherwise than the
        tokenizer does; then the texts are compared.
        """
        if self._cache is None:
            return None
        try:
            before = self._tokenizer.encode_chat(
                self.messages, add_generation_prompt=False, continue_final_message=True
            )
        except ValueError:  # the template has dropped or changed the last answer
            return None
        if ids[: len(before)] != before:
            return None
        have = [*self._ids, *self._pending]
        texts = (self._tokenizer.decode(row, skip_special=False) for row in (before, have))
        if before != have and len(set(texts)) > 1:
            return None
        return ids[len(before) :]

    def _limit(self, tokens: int) -> int:
        """Most tokens of an answer after `tokens`; PositionsUsedUp if there is room for none."""
        positions = self._model.config.max_position
        used = tokens + self._eviction.staying
        if used >= positions:
            raise PositionsUsedUp(
                f"with this message the conversation has {tokens:,} tokens, and the model has "
                f"{positions:,} positions"
            )
        return min(self._continuation.max_new_tokens, positions - used)

    def _read(self, ids: list[int], messages: Sequence[Message]) -> tuple[KVCache, jax.Array]:
        """Reads the conversation so far from its beginning, and cuts it."""
        self._forget()
        model, eviction = self._model, self._eviction
        pin = None if self._pin is None else [self._pin(messages)]
        batch = encode_batch(model, [ids], None, pin)
        room = max(ROOM, self._continuation.max_new_tokens)
        check_memory(model, eviction, rows=1, prompt_tokens=len(ids), new_tokens=room)
        ends = self._continuation.eos_ids
        drafts = draft_tokens(
            eviction.policy, self._draft_model, [ids], eos_ids=ends, drafter=self._draft.drafter
        )
        read = read_prompt(
            model.params, batch.tokens, config=model.config, policy=eviction.policy,
            budget=eviction.budget, new_tokens=room, modules=eviction.modules, eos_ids=ends,
            draft=drafts,
            repeat_template=repeat_template(eviction.policy, model.tokenizer),
            pinned=batch.pinned,
        )  # fmt: skip
        self._cut_at = len(ids)
        self._cut_end = min(len(ids), int(read.cache.next_pos[0]) - eviction.staying)
        return read.cache, read.logits

    def _extend(self, new: list[int]) -> tuple[KVCache, jax.Array]:
        """Reads `new` tokens after the cache, in a wider one if need be."""
        cache, self._cache = self._cache, None  # donated
        if cache is None:
            raise ValueError("the conversation has no cache to read after")
        missing = len(new) + self._continuation.max_new_tokens - int(cache.free[0])
        if missing > 0:
            cache = widened(cache, slots=round_up(cache.slots + max(missing, ROOM), SLOT_MULTIPLE))
        config = self._model.config
        return extend(self._model.params, self._padded(new), cache, config=config)

    def _start(self, cache: KVCache, logits: jax.Array, ids: list[int], limit: int) -> DecodeState:
        """Chooses the answer's first token, and waits for it."""
        settings, vocabulary = self._continuation, self._model.config.vocab_size
        rows = sampling_rows([settings.sampling], settings.seeds, vocabulary)
        state = start(
            cache,
            logits,
            sampling=rows,
            limit=jnp.asarray([limit], jnp.int32),
            eos=jnp.asarray(settings.eos_ids, jnp.int32),
            seen=seen_tokens(self._padded(ids), vocabulary) if rows.penalized else None,
            width=settings.max_new_tokens,
        )
        return jax.block_until_ready(state)

    def _padded(self, ids: list[int]) -> jax.Array:
        return jnp.asarray(pad_batch([ids], config=self._model.config))

    def _answer(
        self,
        state: DecodeState,
        ids: list[int],
        on_text: Callable[[str], None] | None,
        interrupted: Callable[[], bool],
    ) -> tuple[OutputRow, float]:
        """Decodes after `ids`; the answer, and the seconds that decoding took."""
        settings, tokens = self._continuation, self._padded(ids)
        batch = PromptBatch(
            prompts=[ids], texts=[ids], tokens=tokens, question_tokens=None, text_tokens=tokens
        )
        drafting = Drafting(
            self._draft.drafter, self._draft.nodes, config=self._model.config, batch=1,
            room=tokens.shape[1] + settings.max_new_tokens,
        )  # fmt: skip
        output = OutputRow(self._tokenizer, prompt=ids, end_ids=settings.eos_ids, on_text=on_text)
        state, seconds = decode_rows(
            self._model, state, batch, drafting, outputs=[output], burst=BURST,
            interrupted=interrupted,
        )  # fmt: skip
        # The cache holds all but the last token. The template writes the end of an answer itself.
        *read, last = output.tokens
        self._cache = state.cache
        self._ids = [*ids, *read]
        self._pending = [] if last in settings.eos_ids else [last]
        return output, seconds
