"""The configuration of a run: its options, its grid of cells, and its methods by name."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.drafters.registry import needs
from lookahead_jax.eval.grid.eviction import check_eviction, check_shared
from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.eval.grid.strategies import NONE, decoding_of, named_settings, reward_of
from lookahead_jax.eval.tasks.base import Task
from lookahead_jax.eval.tasks.registry import find_task
from lookahead_jax.host.config_files import check_at_least_one, cli_with_file
from lookahead_jax.modules.shipped import shipped_modules
from lookahead_jax.policies.base import Policy, WithDraft, WithReplay, WithResponse
from lookahead_jax.policies.full import Full
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.strategies.guides import work_limits

CONFIGS = Path(__file__).parent / "configs"
PROG = "lookahead eval run"
EMBEDDED = "embedded"
Protocol = Literal["seen", "hidden"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A grid of model x policy x budget x task x length x drafter x protocol x strategy."""

    out: Path
    """Folder of the run, created if missing. The same command resumes the run."""
    models: tuple[str, ...] = (EMBEDDED,)
    """Folders of checkpoints; `embedded` is the model that ships with the package."""
    policies: tuple[str, ...] = ("full", "snapkv")
    """Policies, with settings after a colon: snapkv:window=8,pool=none. Policies around others:
    critical:ada:snapkv:alpha=0.3."""
    budgets: tuple[int, ...] = (256,)
    """Entries kept per layer and KV head; the policy `full` ignores them."""
    tasks: tuple[str, ...] = ("own",)
    """Tasks, or families of tasks such as ruler, longbench, own."""
    lengths: tuple[int, ...] = (512,)
    """Tokens of a prompt. Longer prompts from files lose their middle."""
    drafters: tuple[str, ...] = ("none",)
    """Drafters that need no other model and no head, such as trie, suffix or prompt_lookup."""
    protocols: tuple[Protocol, ...] = ("seen",)
    """seen: the question is part of the compressed prompt; hidden: it is read afterwards."""
    strategies: tuple[str, ...] = (NONE,)
    """Strategies of docs/strategies.md, with settings and sampling after a colon:
    best_of_n:n=4,temperature=0.7. `none` decodes greedily, none:temperature=0.7 samples."""
    most_tokens: int | None = None
    """Tokens that all rows of an example may emit together. Default: any number."""
    oracle_reward: tyro.conf.FlagConversionOff[bool] = False
    """Where a task has no reward that its prompt alone allows, compare by its score, which knows
    the answer: an upper bound, and labelled so. Default: such strategies leave the task out."""
    count: int = 32
    """Examples of each task, at most."""
    seed: int = 0
    """Seed of the generated examples."""
    batch: int = 8
    """Examples per batch. Questions of one shared context stay together, so it may be more."""
    data: Path | None = None
    """Folder of the benchmarks' files; see docs/evaluation.md."""
    lookahead: Path | None = None
    """Folder of lookahead modules. Default: those that ship for the model."""
    draft_model: str | None = None
    """The small model of speckv, specpc and speckv_pc: a folder, or `embedded`."""
    draft_layers: int | None = None
    """Use only the first layers of the small model, if there is no smaller one."""
    kv_maps: Path | None = None
    """Folder of the maps of kv_prediction, made by python -m lookahead_jax.train.kv_prediction."""
    chat: tyro.conf.FlagConversionOff[bool] = True
    """Use the chat template of models that have one, where the benchmark does."""
    max_new_tokens: int | None = None
    """Upper limit of every answer, below that of its task."""
    evict_every: int | None = None
    """Evict while decoding too, at every position that is a multiple of this: a head holds at most
    the budget and this many entries. Methods without a budget keep everything."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights. Default: that of the checkpoint."""
    weights: Literal["int8"] | None = None
    """int8: the matrices of the models in eight bits, with one scale per output channel."""
    cache_dtype: Literal["int8"] | None = None
    """int8: keys and values of the caches in eight bits. Not for kv_prediction."""
    tensor: int = 1
    """Devices that each layer is split over."""
    fsdp: int = 1
    """Devices that the weights are split over; the rows of a batch use the remaining ones."""
    expert: int = 1
    """Devices that the experts of a mixture are split over."""
    part: int = 0
    """Index of the part that this run answers, from 0; each part needs its own --out."""
    parts: int = 1
    """Number of parts that the examples are divided into, such as one per host."""
    pair_times: tyro.conf.FlagConversionOff[bool] = False
    """Also read every batch with the full cache, right before or after, so that the time a policy
    adds to the first token can be trusted on a machine with changing load. The full cache must fit
    into memory, and on accelerators it determines the peak."""
    share_reading: tyro.conf.FlagConversionOff[bool] = False
    """Read every batch of prompts once for all policies and budgets: the same answers, up to
    rounding, in a fraction of the time, and no times or peaks. Full caches must fit into memory.
    Without drafters, strategies, --evict-every, --cache-dtype, --pair-times, and methods that need
    a small model."""
    views: int = 2
    """Examples per task whose kept tokens are stored for the report."""
    allow_exec: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run programs that the model writes, under limits, for scores that need it. Cannot be set in a
    file."""

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part {self.part} of {self.parts}: parts are counted from 0")
        check_at_least_one(self, "count", "batch", "lengths", "max_new_tokens")
        for name in self.drafters:
            if lacking := needs(name):
                raise ValueError(
                    f"drafters={name}: it needs {' and '.join(sorted(lacking))}, which no option "
                    "of an evaluation gives: take drafters without"
                )
        if self.share_reading:
            self._check_sharing()
        searched = []
        for spec in self.strategies:
            if (strategy := decoding_of(spec).strategy) is not None:
                searched.append(spec)
                sides = 2 if strategy.routes else 1
                work_limits(self.most_tokens, None, strategy.rows * sides, 1)
        if self.evict_every is not None:
            check_eviction(
                self.evict_every,
                {m: method.policy for m in self.policies if (method := method_of(m)).budgeted},
                searched,
                hidden="hidden" in self.protocols,
            )
        if searched and any(method_of(spec).predicts for spec in self.policies):
            raise ValueError(f"kv_prediction reads for no strategy: leave {searched[0]} out")

    def _check_sharing(self) -> None:
        """Raises ValueError for settings whose answers or rows depend on a reading of their own."""
        alone = {
            "drafters": self.drafters != (NONE,), "strategies": self.strategies != (NONE,),
            "evict_every": self.evict_every is not None, "pair_times": self.pair_times,
            "cache_dtype": self.cache_dtype is not None,
        }  # fmt: skip
        if any(alone.values()):
            names = ", ".join(name for name, given in alone.items() if given)
            raise ValueError(f"share_reading reads prompts once for all cells: leave out {names}")
        for spec in self.policies:
            method = method_of(spec)
            if method.speculates or method.predicts:
                raise ValueError(
                    f"policies={spec} reads with a small model: leave it or share_reading out"
                )
            check_shared(spec, method.policy)

    def find_tasks(self) -> list[Task]:
        """All tasks; ValueError for unknown names and for programs that are not allowed."""
        tasks = {task.name: task for name in self.tasks for task in find_task(name)}
        if not self.allow_exec and (refused := [t.name for t in tasks.values() if t.executes]):
            raise ValueError(
                f"{', '.join(refused)} runs programs that the model writes; --allow-exec permits it"
            )
        return list(tasks.values())


FIXED = (
    "seed", "chat", "max_new_tokens", "dtype", "weights", "cache_dtype", "lookahead", "draft_model",
    "draft_layers", "kv_maps", "most_tokens", "evict_every",
)  # fmt: skip
"""Fields that change the meaning of a row, so that a resumed run must not change them."""


def parse_run(args: Sequence[str], prog: str) -> RunConfig:
    """[CONFIG] and overrides of the command `prog` -> a run.

    CONFIG is a .json file, or the name of one that ships. Raises ValueError if it does not exist,
    does not fit, or sets `allow_exec`; UsageError for wrong options.
    """
    return cli_with_file(RunConfig, args, CONFIGS, prog, refused=("allow_exec",))


class Method(NamedTuple):
    """A policy, and what a small model does before it."""

    policy: Policy
    prune: int | None  # tokens that SpecPC keeps of a prompt; 0: as many as the budget
    select: dict[str, int]  # settings of speculation.select_tokens
    predicts: bool = False  # a small model reads the prompt (kv_prediction.py)

    @property
    def speculates(self) -> bool:
        """Whether a small model is needed."""
        reading = self.policy.reading
        drafts = isinstance(reading, WithDraft) and not reading.by_drafter
        return self.prune is not None or drafts

    @property
    def budgeted(self) -> bool:
        """Whether the budget changes its result."""
        return self.prune is not None or not isinstance(self.policy, Full)


def method_of(spec: str) -> Method:
    """`name` or `name:field=value,...` -> the method.

    Policies around others are several names, outermost first: `critical:ada:snapkv:alpha=0.3`.
    Besides the policies there are three methods: `specpc` drops prompt tokens down to the budget;
    `speckv_pc` drops them down to `prune` (2048) and then applies `speckv`; `kv_prediction` reads
    prompts with a small model and keeps everything. The published values of `select_pool` and
    `select_neighbours` are 64 for Qwen and 32 for Llama models, and 32 in speckv_pc.
    """
    parts = spec.split(":")
    named = list(itertools.takewhile(lambda part: "=" not in part, parts))
    name, settings = ":".join(named), ":".join(parts[len(named) :])
    fields = named_settings("policy", spec, settings)
    if name == "kv_prediction":
        return Method(make_policy("full", **fields), None, {}, predicts=True)
    if name not in ("specpc", "speckv_pc"):
        return Method(make_policy(name, **fields), None, {})
    size = "64" if name == "specpc" else "32"
    select = {k: int(fields.pop(f"select_{k}", size)) for k in ("pool", "neighbours")}
    prune = int(fields.pop("prune", "0" if name == "specpc" else "2048"))
    return Method(make_policy("full" if name == "specpc" else "speckv", **fields), prune, select)


def policy_of(spec: str) -> Policy:
    """The policy of a method."""
    return method_of(spec).policy


def model_folder(name: str) -> Path:
    """The folder of a model's weights."""
    return EMBEDDED_MODEL if name == EMBEDDED else Path(name)


def modules_folder(config: RunConfig, model: str) -> Path | None:
    """The folder of the lookahead modules for a model, if there is one."""
    return modules_folder_of(config.lookahead, model)


def modules_folder_of(given: Path | None, model: str) -> Path | None:
    """The given folder, or the one that ships for the model."""
    shipped = shipped_modules(None if model == EMBEDDED else model)
    return given or (None if shipped is None else shipped.folder)


def cells(config: RunConfig, model: str, task: str, length: int) -> Iterator[GridCell]:
    """All cells of one model, task and length.

    Methods that keep everything come last, after those of two passes, since on accelerators the
    high-water mark of memory never falls.
    """

    def last(spec: str) -> tuple[bool, bool]:
        two_passes = isinstance(policy_of(spec).reading, (WithResponse, WithReplay))
        return not method_of(spec).budgeted, two_passes

    ways = strategies_of(config, find_task(task)[0])
    for spec in sorted(config.policies, key=last):
        budgets = sorted(set(config.budgets)) if method_of(spec).budgeted else (0,)
        for budget in budgets:
            for drafter in config.drafters:
                for protocol, way in itertools.product(config.protocols, ways):
                    drafted = drafter
                    if decoding_of(way).strategy is not None:  # a drafter changes no token
                        if drafter != config.drafters[0]:
                            continue
                        drafted = NONE
                    yield GridCell(model, spec, budget, task, length, drafted, protocol, way)


def strategies_of(config: RunConfig, task: Task) -> list[str]:
    """The strategies that can be run on a task: those it has the reward for."""

    def runs(spec: str) -> bool:
        strategy = decoding_of(spec).strategy
        asks = strategy is not None and strategy.reads_reward is True
        return not asks or reward_of(task, config.oracle_reward) is not None

    return [spec for spec in config.strategies if runs(spec)]


def settings(config: RunConfig) -> dict[str, Any]:
    """The settings that must stay the same when a run is resumed."""
    return {
        name: str(value) if isinstance(value := getattr(config, name), Path) else value
        for name in FIXED
    }
