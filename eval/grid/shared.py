"""A batch of prompts that is read once and answered under many policies and budgets.

What a policy evicts does not change the pass over the prompt, so that the answers are those of
reading it anew for each.
"""

from collections.abc import Sequence

import jax

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.eval.grid.batch import GridBatch
from lookahead_jax.generation.inputs import encode_batch
from lookahead_jax.modules.definition import LookaheadModules, staying_entries
from lookahead_jax.policies.base import Policy, WithResponse
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.prefill import Prefilled
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.whole import alike, cut_whole, read_whole, scores_of


class SharedPrompts:
    """Prompts of which nothing has been evicted, and the scores of the last policy that asked."""

    def __init__(
        self, model: Model, modules: LookaheadModules | None, batches: Sequence[GridBatch]
    ):
        """Reads the prompts that the `batches`, of one protocol, have in common.

        Raises ValueError for modules with a memory, whose entries depend on the budget.
        """
        self._model, self._modules = model, modules
        first = batches[0]
        encoded = encode_batch(model, first.contexts, first.questions, first.pin)
        policies = [batch.method.policy for batch in batches]
        if any(staying_entries(policy, modules) for policy in policies):
            raise ValueError("share_reading: modules with a memory need a reading for each budget")
        responses = [p.reading.tokens for p in policies if isinstance(p.reading, WithResponse)]
        most = max(batch.new_tokens for batch in batches)
        self._pinned = encoded.pinned
        self._whole = read_whole(
            model.params, encoded.tokens, config=model.config,
            room=max([encoded.question_width + most, *responses]),
            known_tokens=encoded.question_lengths,
        )  # fmt: skip
        self._scored: tuple[Policy, dict[int, int]] | None = None
        self._scores: dict[int, jax.Array] = {}
        self._budgets = sorted({max(batch.cell.budget, 1) for batch in batches})

    def cut(self, policy: Policy, budget: int, room: int) -> Prefilled:
        """What `policy` keeps of the prompts, with slots for `room` tokens more."""
        params, config, whole = self._model.params, self._model.config, self._whole
        if isinstance(policy, Full):
            return Prefilled(whole.cache.fork(1), whole.logits, None)
        cache = cut_whole(
            params, whole, self._scores_at(policy, budget), config=config, policy=policy,
            budget=budget, room=room, pinned=self._pinned,
        )  # fmt: skip
        return Prefilled(cache, whole.logits, None)

    def _scores_at(self, policy: Policy, budget: int) -> jax.Array:
        """The policy's scores at a budget; budgets that are alike are scored once."""
        if self._scored is None or self._scored[0] != policy:
            groups = alike(policy, self._budgets, self._whole.tokens)
            self._scored = policy, {b: group[0] for group in groups for b in group}
            self._scores = {}
        first = self._scored[1][budget]
        if first not in self._scores:
            self._scores[first] = scores_of(
                self._model.params, self._whole, policy, config=self._model.config, budget=first,
                eos_ids=self._model.generation.eos_ids, modules=self._modules,
                template=repeat_template(policy, self._model.tokenizer), pinned=self._pinned,
            )  # fmt: skip
        return self._scores[first]
