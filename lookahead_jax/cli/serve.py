"""`lookahead serve`: an OpenAI-style endpoint on the continuous-batching engine."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from lookahead_jax.cli.options import (
    CacheDtype,
    DraftingOptions,
    EvictionOptions,
    File,
    ModelOptions,
    Repeated,
    Tokens,
    end_tokens,
    option,
)
from lookahead_jax.server.limits import ServerLimits


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve OpenAI-style completions and chat over HTTP, streaming included."""

    source: ModelOptions = field(default_factory=ModelOptions)
    eviction: EvictionOptions = field(default_factory=EvictionOptions)
    drafting: DraftingOptions = field(default_factory=DraftingOptions)
    request_policy: Annotated[Repeated, option("NAME")] = ()
    """A further policy, with its defaults, that requests may name in their field `policy`; --policy
    is for those that name none. May be repeated; each takes time to compile."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: File = None
    """File with the API keys of which clients must send one, one in a line. Clients with different
    keys share no stored prompt, and share the rows fairly. Default: no key."""
    rows: int = 8
    """Requests that decode at the same time."""
    max_tokens: int = 512
    """Maximum number of new tokens per request."""
    max_prompt_tokens: Annotated[int | None, option("INT")] = None
    """Longest prompt. Default: the model's positions less --max-tokens."""
    evict_every: Annotated[int | None, option("INT")] = None
    """Evict again after every this many tokens; see lookahead generate --help."""
    cache_dtype: CacheDtype = None
    """int8: store keys and values in eight bits. Default: the type of the weights."""
    eos: Tokens = ()
    """A token that ends the text, besides those of the checkpoint: its id, or the token itself,
    such as <|im_end|>. May be repeated."""
    max_stall_ms: float = 100.0
    """Milliseconds that running requests may wait for a prompt before they decode again, or as long
    as a step of decoding takes (up to ten times as long). Shorter makes their streams smoother, and
    the first token of a new request later."""
    max_question_tokens: int = 0
    """Most tokens of a prompt sent with a `document`; every row reserves slots for them. 0: no
    documents."""
    prompt_store_mb: int = 256
    """Megabytes of prompt caches to keep, so that an equal prompt is not read again; 0: none."""
    prefix_store_mb: int = 512
    """Megabytes for keys and values of prompts before they are cut, so that a prompt which begins
    as an earlier one is not read from its start, or, with --policy incremental:NAME, for their cut
    caches after every 512 tokens; 0: none."""
    allow_special_tokens: bool = False
    """Interpret control tokens, such as <|im_end|>, that clients write in prompts and messages; for
    clients that apply chat templates themselves."""
    no_request_log: bool = False
    """Write no line of JSON to stderr for every request."""
    no_page: bool = False
    """Serve no chat page at /."""
    grammars: bool = True
    """Compile for response_format and tools as well. Without, the first requests with them wait for
    the compiler, and others with them."""
    limits: ServerLimits = field(default_factory=ServerLimits)


def main(config: Serve) -> None:
    try:
        from lookahead_jax.server.request_log import log_requests
        from lookahead_jax.server.run import Server, bind
        from lookahead_jax.server.service import Service
    except ImportError as error:
        raise ValueError(
            f"{error}; install the extra: pip install 'lookahead-jax[serve]'"
        ) from error
    import lookahead_jax as lk

    if not config.max_stall_ms > 0:
        raise ValueError(f"--max-stall-ms must be above 0, not {config.max_stall_ms}")
    keys = [] if config.api_key_file is None else read_keys(config.api_key_file)
    # Bound before the model is loaded, so that a port in use is reported at once.
    with bind(config.host, config.port, has_key=bool(keys)) as socket:
        eviction = config.eviction.resolve(config.source)
        others = [
            replace(config.eviction, policy=name, policy_arg=()).resolve(config.source)
            for name in config.request_policy
        ]
        small = config.drafting.load(config.source.dtype)
        model = config.source.load()
        drafter = config.drafting.make(small, model)
        engine = lk.Engine(
            model,
            policy=eviction.policy,
            policies={each.name: each.policy for each in (*others, eviction)},
            budget=config.eviction.budget,
            lookahead=next((e for e in (eviction, *others) if e.folder), eviction).modules(model),
            eos_ids=end_tokens(model, config.eos),
            rows=config.rows,
            max_new_tokens=config.max_tokens,
            max_prompt_tokens=config.max_prompt_tokens,
            max_question_tokens=config.max_question_tokens,
            drafter=drafter,
            draft_nodes=config.drafting.draft_nodes,
            evict_every=config.evict_every,
            cache_dtype=config.cache_dtype,
            max_stall_s=config.max_stall_ms / 1000,
            prompt_store_bytes=config.prompt_store_mb * 10**6,
            prefix_store_bytes=config.prefix_store_mb * 10**6,
        )
        name = "embedded" if config.source.model is None else config.source.model.resolve().name
        if not config.no_request_log:
            log_requests()
        service = Service(engine, config.limits, keys=len(keys))
        server = Server(
            service, model, name=name, api_keys=keys,
            allow_special_tokens=config.allow_special_tokens, with_page=not config.no_page,
            drafter=config.drafting.drafter,
        )  # fmt: skip
        _say(f"compiling for prompts of up to {engine.limits.max_prompt_tokens} tokens")
        engine.warm_up(grammars=config.grammars)
        host, port = socket.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        socket.listen()  # connections wait in the backlog until the server runs
        page = "" if config.no_page else f", with a chat page at http://{host}:{port}/"
        _say(f"serving {name} at http://{host}:{port}/v1{page}")
        server.run(sockets=[socket])
    _say("stopped")


def read_keys(path: Path) -> list[str]:
    """The keys in a file; ValueError unless each line is one of printable ASCII."""
    keys = [key for line in path.read_bytes().splitlines() if (key := line.strip())]
    if not keys or not all(33 <= byte <= 126 for key in keys for byte in key):
        raise ValueError(
            f"{path} must hold keys, one in a line, of printable ASCII characters without spaces"
        )
    if len(set(keys)) < len(keys):
        raise ValueError(f"{path} holds a key twice")
    return [key.decode() for key in keys]


def _say(message: str) -> None:
    print(f"lookahead: {message}", file=sys.stderr, flush=True)
