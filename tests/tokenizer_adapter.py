"""Stands in for `Tokenizer.encode_batch` and `encode_chat` where the package lacks them.

Delete this file, and its call in conftest.py, once `lookahead_jax.checkpoints.tokenizer` has both.
"""

import tokenizers

from lookahead_jax.checkpoints.tokenizer import Tokenizer


def install() -> None:
    if hasattr(Tokenizer, "encode_batch"):
        return

    def encode_batch(self, texts, *, special=True, plain=False):
        backend = self.backend
        if plain:
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
            backend.encode_special_tokens = True
        try:
            found = backend.encode_batch_fast(list(texts), add_special_tokens=special)
        except Exception as error:
            raise ValueError(f"the text cannot be tokenized ({error})") from error
        return [encoding.ids for encoding in found]

    def encode_chat(
        self, messages, *, add_generation_prompt=True, continue_final_message=False, plain=True,
        **template_arguments,
    ):  # fmt: skip
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, **template_arguments
        )
        if continue_final_message:
            last = messages[-1]["content"]
            text = text[: text.rindex(last) + len(last)]
        return encode_batch(self, [text], special=False, plain=plain)[0]

    Tokenizer.encode_batch = encode_batch
    Tokenizer.encode_chat = encode_chat
