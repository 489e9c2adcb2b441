"""`python -m lookahead_jax.lm_eval <arguments of lm_eval>`: the harness with this library's models.

    python -m lookahead_jax.lm_eval run --model lookahead --tasks arc_easy \
        --model_args pretrained=DIR,policy=snapkv,policy_window=8,budget=256,drafter=trie

lm-evaluation-harness (extra `lm-eval`, tested with 0.4.13) has no plugins, so a model must be
registered in its own process; this command does that and then runs the harness's command line.
Log-likelihoods are those of the full cache unless `evict_loglikelihood=true`.
"""

import sys
from typing import Any


def register() -> type:
    """Registers the model `lookahead` with the harness; returns its class.

    Raises ModuleNotFoundError, saying what to install, without the harness. The class stands
    inside, hence the length: its base is the harness's, which is imported here only.
    """
    try:
        from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("lm_eval"):
            raise
        raise ModuleNotFoundError(
            "this needs lm-evaluation-harness: pip install 'lookahead-jax[lm-eval]'"
        ) from None
    from tqdm import tqdm

    from lookahead_jax.eval.harness.model import HarnessModel, Settings

    @register_model("lookahead")
    class LookaheadLM(TemplateLM):
        """A checkpoint with a policy, a budget and a drafter."""

        def __init__(self, **arguments: Any):
            super().__init__()
            self.own = HarnessModel(Settings.of(arguments))
            self._template: str | None = None  # by name; None: the default one

        @property
        def eot_token_id(self) -> int:
            return self.own.model.generation.eos_ids[0]

        @property
        def prefix_token_id(self) -> int:
            return self.own.prefix_token

        @property
        def max_length(self) -> int:
            return self.own.max_length

        @property
        def tokenizer_name(self) -> str:
            return str(self.own.model.path)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            return self.own.encode(string, add_special_tokens)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            """The source of the template, which the harness stores with its results.

            A name chooses the template of all later chats.
            """
            if chat_template is False or chat_template is None:
                return None
            self._template = chat_template if isinstance(chat_template, str) else None
            return self.own.template_source(self._template)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return self.own.render_chat(
                chat_history, add_generation_prompt=add_generation_prompt, template=self._template
            )

        def _loglikelihood_tokens(
            self, requests: list, disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            with tqdm(total=len(pairs), disable=disable_tqdm) as bar:
                return self.own.loglikelihoods(pairs, bar.update)

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            with tqdm(unit=" windows", disable=disable_tqdm) as bar:
                return self.own.rolling_loglikelihoods(texts, bar.update)

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            with tqdm(total=len(requests), disable=disable_tqdm) as bar:
                return self.own.generate([request.args for request in requests], bar.update)

    return LookaheadLM


def main() -> int:
    """Registers the model and runs the harness's own command line."""
    try:
        register()
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
    return 0
