"""From requests in text to checked token ids."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.decoding.grammar import CompiledGrammar
from lookahead_jax.engine.requests import EncodedRequest, Limits, Request, RequestError
from lookahead_jax.generation.inputs import compiled_grammar, encode_prompts, end_ids
from lookahead_jax.host.panics import panics_as_errors
from lookahead_jax.prefilling.batching import pad_batch


def longest_token_bytes(tokenizer: Tokenizer | None) -> int:
    """An upper bound of the bytes of text that one token stands for: the longest token's.

    Byte-level vocabularies write some bytes as characters of two, so this may be twice the truth.
    """
    vocabulary = () if tokenizer is None else tokenizer.backend.get_vocab(with_added_tokens=True)
    return max((len(token.encode()) for token in vocabulary), default=1)


def encode_request(
    model: Model,
    request: Request,
    *,
    limits: Limits,
    eos_ids: Sequence[int],
    policies: Collection[str],
) -> EncodedRequest:
    """The request in token ids; `eos_ids` and the names of `policies` are those of the engine.

    Raises ValueError (`TooLong`) for a request that the engine cannot serve.
    """
    if request.policy is not None and request.policy not in policies:
        known = f"the engine's are {', '.join(policies)}" if policies else "the engine has one only"
        raise RequestError(f"there is no policy {request.policy!r} here: {known}", "policy")
    texts = partial(_ids, model, request=request, limits=limits)
    document = []
    if request.document is not None:
        document = texts(request.document, "document", behind=False)
    prompt = texts(request.prompt, "prompt", behind=request.document is not None)
    own = eos_ids if request.eos_ids is None else request.eos_ids
    ends = end_ids(model, own, request.stop_token_ids)
    encoded = EncodedRequest(
        tokens=document + prompt,
        document=len(document),
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        seed=request.seed,
        eos_ids=ends,
        pin=tuple((start, end) for start, end in request.pin),
        logprobs=request.logprobs,
        tenant=request.tenant,
        grammar=_grammar(model, request, ends),
        policy=request.policy,
        draft=request.draft,
    )
    encoded.check(limits)
    try:
        request.sampling.check_ids(model.config.vocab_size)
    except ValueError as error:
        raise RequestError(str(error), "logit_bias") from None
    pad_batch([encoded.tokens], config=model.config)  # checks the ids
    return encoded


def _grammar(model: Model, request: Request, ends: Sequence[int]) -> CompiledGrammar | None:
    try:
        return compiled_grammar(model, request.grammar, ends)
    except ValueError as error:
        raise RequestError(str(error), "grammar") from None


def _ids(
    model: Model,
    given: str | Sequence[int],
    field: Literal["prompt", "document"],
    *,
    behind: bool,
    request: Request,
    limits: Limits,
) -> list[int]:
    if isinstance(given, str) and given and model.tokenizer is not None:
        limits.check_text([given], field, behind=behind)
        encode = model.tokenizer.encode_behind if behind else model.tokenizer.encode
        with panics_as_errors("the text cannot be tokenized"):
            given = encode(given, plain=request.plain)
    (ids,) = encode_prompts(model, [given])
    return ids
