"""other_vocabulary: a smaller model with another tokenizer drafts (OmniDraft, arXiv 2507.02659).

The draft model reads the text in its own tokens and continues it greedily; `VocabularyMap` turns
what it drafts into target tokens. The probabilities that the paper computes for translated tokens
have no use here: drafts are verified by matching the target's own choice. Its training of the draft
model while it serves, and its learned draft length, are not part of this; the latter's place is
taken by the probability of the path.
"""

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.draft_packing import NOTHING
from lookahead_jax.decoding.host_drafter import Draft, id_array
from lookahead_jax.drafters._draft_chain import FirstTokens, draft_chain, read
from lookahead_jax.drafters._draft_text import DraftText
from lookahead_jax.drafters._vocabulary_map import VocabularyMap
from lookahead_jax.drafters.open_requests import OpenRequests
from lookahead_jax.model.cache import KVCache, empty_cache

_BLOCK = 8  # new draft tokens that are read in the program that drafts
_SMALLEST_WINDOW = 128  # many times what is encoded again as a text grows


@dataclass
class _Request:
    text: DraftText
    cache: KVCache
    first: int = 0  # the first token of the text that the model sees
    cached: list[int] = field(default_factory=list)  # draft tokens in the cache


class OtherVocabulary:
    """A host drafter. Safe to share between threads.

    model: the draft model, with its tokenizer.
    tokenizer: that of the target.
    tokens: most draft tokens of a proposal.
    least: smallest probability of a drafted path, which ends the proposal (as for `suffix`).
    capacity: n-grams kept, about 250 bytes each (the paper keeps all, 1 to 5 MB).
    window: draft tokens that the model sees at most, so that memory does not grow with the text;
        when they are used up, it goes on with the last half of them. Each open request has a
        cache for so many.

    Requests are drafted one after the other. Raises ValueError without both tokenizers.
    """

    def __init__(
        self,
        *,
        model: Model,
        tokenizer: Tokenizer | None,
        tokens: int = 8,
        least: float = 0.1,
        capacity: int = 1 << 14,
        window: int = 1024,
    ):
        if model.tokenizer is None or tokenizer is None:
            which = "the target" if tokenizer is None else f"the draft model {model.path}"
            raise ValueError(
                f"{which} has no tokenizer.json, and both models need one: use drafter draft_model "
                "for a draft model of the same vocabulary"
            )
        if tokens < 1 or capacity < 1:
            raise ValueError(f"tokens and capacity must be at least 1, got {tokens} and {capacity}")
        if not 0 < least <= 1:
            raise ValueError(f"least is a probability above 0, not {least}")
        window = min(window, model.config.max_position)
        self._lead = model.tokenizer.encode("")  # what begins every text, such as <s>
        # Half of a full window and a draft must fit.
        smallest = max(_SMALLEST_WINDOW + tokens, 2 * (tokens + len(self._lead)))
        if window < smallest:
            raise ValueError(
                f"window must be at least {smallest} for drafts of {tokens} tokens, and the draft "
                f"model have as many positions; got {window}"
            )
        self._model, self._draft = model, model.tokenizer
        self._tokens, self._window = tokens, window
        self._least = jnp.float32(least)
        self._map = VocabularyMap(
            self._draft, tokenizer, model.config.vocab_size, capacity=capacity
        )
        self._rank, self._shared = jnp.asarray(self._map.rank), jnp.asarray(self._map.direct >= 0)
        place = model.params["embed"].sharding
        on_mesh = isinstance(place, NamedSharding)
        self._place = NamedSharding(place.mesh, PartitionSpec()) if on_mesh else place
        self._requests = OpenRequests[_Request]()
        self._lock = threading.Lock()
        self._compile()

    def begin(self, request: Hashable, prompt: Sequence[int] | np.ndarray) -> None:
        """A request begins; the draft model reads its prompt."""
        ids = id_array(prompt).tolist()
        with self._lock:
            if request in self._requests:
                raise ValueError(f"request {request} has already begun: end it first")
            text = DraftText(self._draft, self._map, ids)
            state = _Request(text, self._empty_cache())
            self._catch_up(state, text.ids, most=1)
            jax.block_until_ready(state.cache)  # else the first step would seem to take so long
            self._requests[request] = state

    def observe(self, request: Hashable, tokens: Sequence[int] | np.ndarray) -> None:
        """Tokens of the target; they are read at the next proposal."""
        ids = id_array(tokens).tolist()
        with self._lock:
            self._requests[request].text.append(ids)

    def propose(self, request: Hashable, nodes: int, depth: int) -> Draft:
        """The likeliest continuation, as a chain."""
        with self._lock:
            state = self._requests[request]
            if min(nodes, depth) < 1:
                return NOTHING
            state.text.read()
            ids, begun = self._opening(state.text)
            low, high = self._map.beginning_with(begun) if begun else (0, -1)
            if low == high or not (self._lead or ids):
                return NOTHING
            new = self._catch_up(state, ids)
            block = np.full((1, _BLOCK), -1, np.int32)
            block[0, : len(new)] = new
            state.cache, drafted = self._continue(state.cache, len(state.cached), block, low, high)
            chain = [token for token in np.asarray(drafted)[0].tolist() if token >= 0]
            state.cached += new + chain[:-1]
            tokens = self._map.translate(chain, len(begun))[: min(nodes, depth)]
        return Draft(np.array(tokens, np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32))

    def end(self, request: Hashable) -> None:
        """The request ends; what it taught about the vocabularies is kept."""
        with self._lock:
            del self._requests[request]

    def _empty_cache(self) -> KVCache:
        span = jnp.full(1, self._window, jnp.int32)
        dtype = self._model.params["embed"].dtype
        cache = empty_cache(self._model.config, 1, self._window, dtype, span)
        # On the devices of the weights from the start: else programs are compiled twice.
        return jax.device_put(cache, self._place)

    def _compile(self) -> None:
        """Compiles both programs, so that no request has to wait for it."""
        cache = self._read(self._empty_cache(), 0, np.full((1, self._window), -1, np.int32))
        block = np.full((1, _BLOCK), -1, np.int32)
        block[0, 0] = 0
        jax.block_until_ready(self._continue(cache, 0, block, 0, -1))

    def _read(self, cache: KVCache, keep: int, tokens: np.ndarray) -> KVCache:
        """The cache with its first `keep` entries and those of `tokens`, padded with -1."""
        at, padded = jax.device_put((np.array([keep], np.int32), tokens))
        return read(self._model.params, cache, at, padded, config=self._model.config)

    def _continue(
        self, cache: KVCache, keep: int, block: np.ndarray, low: int, high: int
    ) -> tuple[KVCache, jax.Array]:
        """Likewise for the tokens of `block`, and what the draft model writes behind them.

        The first token's rank is from `low` to `high`; any if low is above high.
        """
        at, padded, lowest, highest = jax.device_put(
            (np.array([keep], np.int32), block, np.int32(low), np.int32(high))
        )
        return draft_chain(
            self._model.params, cache, at, padded,
            FirstTokens(self._rank, self._shared, lowest, highest), self._least,
            config=self._model.config, steps=self._tokens,
        )  # fmt: skip

    def _opening(self, text: DraftText) -> tuple[list[int], bytes]:
        """The draft tokens to read, and the bytes with which the first drafted one begins.

        Where the target's last token ends inside a draft token or inside a character, the draft
        model lags behind the text.
        """
        if text.unread:
            return text.ids, text.unread
        last = text.last
        alone = len(self._lead) + len(text.ids) < 2
        if last and not alone and self._map.may_continue(last):
            return text.ids[:-1], last
        return text.ids, b""

    def _catch_up(self, state: _Request, ids: list[int], most: int = _BLOCK) -> list[int]:
        """Reads `ids` up to at most so many, which are returned.

        Entries beyond `state.cached`, such as those of rejected drafts, are dropped by the next
        program that reads.
        """
        if len(self._lead) + len(ids) - state.first + self._tokens > self._window:
            state.first, state.cached = len(ids) - self._window // 2, []
        wanted = self._lead + ids[state.first :]
        both = enumerate(zip(state.cached, wanted[:-1], strict=False))
        last = min(len(state.cached), max(len(wanted) - 1, 0))  # the last is read for its scores
        keep = next((i for i, (old, new) in both if old != new), last)
        if len(wanted) - keep > most:
            old = wanted[keep:-1]
            tokens = np.full((1, self._window), -1, np.int32)
            tokens[0, : len(old)] = old
            state.cache = self._read(state.cache, keep, tokens)
            keep += len(old)
        state.cached = wanted[:keep]
        return wanted[keep:]
