"""What a caller gives a search, checked against what its strategy can use.

All raise ValueError that names what does not fit, and the remedy.
"""

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.decoding.sampling import GREEDY, Sampling
from lookahead_jax.drafters.draft_model import check_vocabulary
from lookahead_jax.host.integers import check_integer
from lookahead_jax.modules.reward_head import RewardHead
from lookahead_jax.strategies.base import Strategy
from lookahead_jax.strategies.rows import Reward, Router, Verifier, Work
from lookahead_jax.strategies.verifier import model_verifier


def checked_sampling(strategy: Strategy, sampling: Sampling | None) -> Sampling:
    """The caller's sampling, or the strategy's own."""
    name = type(strategy).__name__
    if sampling is None:
        return strategy.default_sampling
    if strategy.draws and sampling.temperature == 0:
        raise ValueError(f"{name} draws samples: give a temperature above 0, or no sampling")
    if sampling.presence_penalty or sampling.frequency_penalty:
        raise ValueError(
            "lk.search takes back tokens, which presence_penalty and frequency_penalty would still "
            "count: leave them at 0"
        )
    if strategy.draws is False and sampling != GREEDY:
        raise ValueError(f"{name} chooses tokens by its own rule: leave sampling out")
    return sampling


def check_guides(
    strategy: Strategy,
    reward: Reward | None,
    router: Router | None,
    draft_model: Model | None,
    model: Model,
) -> None:
    """Checks the functions and models by which a strategy compares what it writes."""
    name = type(strategy).__name__
    if strategy.routes and draft_model is None:
        raise ValueError(f"{name} needs a smaller model: give draft_model=")
    if not strategy.routes and (draft_model is not None or router is not None):
        raise ValueError(f"{name} asks no other model: leave draft_model and router out")
    if draft_model is not None:
        check_vocabulary(draft_model.config, model.config)
        if model.tokenizer is not None and draft_model.tokenizer is None:
            raise ValueError(
                f"the draft model {draft_model.path} has no tokenizer.json: put the model's there"
            )
    if router is not None and reward is not None:
        raise ValueError("a router predicts what rewards would say: give router= or reward=")
    if strategy.reads_reward and reward is None and router is None:
        also = ", or router=, a function of (text, step)" if strategy.routes else ""
        raise ValueError(f"{name} needs a reward: give reward=, a function of (prompt, text){also}")
    if strategy.reads_reward is False and reward is not None:
        raise ValueError(f"{name} compares no rewards: leave reward out")
    if model.tokenizer is None and strategy.reads_reward and hasattr(strategy, "step"):
        raise ValueError(f"{name} finds steps in texts, and this model has no tokenizer.json")
    if isinstance(reward, RewardHead):
        if (width := reward.hidden_size) != model.config.hidden_size:
            raise ValueError(
                f"the reward head reads hidden states of width {width}, and this model's have "
                f"{model.config.hidden_size}: give lk.reward_head(path, model)"
            )
    elif (reward is not None or router is not None) and model.tokenizer is None:
        given = "router" if reward is None else "reward"
        raise ValueError(f"a {given} reads texts, and this model has no tokenizer.json")


def checked_verifier(
    strategy: Strategy, verifier: Verifier | None, model: Model
) -> Verifier | None:
    """The caller's verifier, or the model itself, if the strategy asks one."""
    if strategy.verifies:
        return model_verifier(model) if verifier is None else verifier
    if verifier is not None:
        raise ValueError(f"{type(strategy).__name__} asks no verifier: leave verifier out")
    return None


def work_limits(tokens: int | None, forwards: int | None, rows: int, least: int) -> Work:
    """The limits on the work for one prompt of so many `rows`, with `least` steps at least."""
    if tokens is not None:
        check_integer("most_tokens", tokens, least=rows)
    if forwards is not None:
        check_integer("most_forwards", forwards, least=least)
    return Work(tokens=tokens, forwards=forwards)
