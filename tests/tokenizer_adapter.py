"""Stands in for `Tokenizer.encode_batch` and `encode_chat` where the package lacks them.

Delete this file, and its call in conftest.py, once `lookahead_jax.checkpoints.tokenizer` has both.
"""

import re

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
        marked = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
        text = self.render_chat(
            marked, add_generation_prompt=add_generation_prompt, **template_arguments
        )
        if continue_final_message:
            text = text[: text.rindex("\ue001") + 1]
        ids = []
        for part in re.split("(\ue000[0-9]+\ue001)", text):
            is_content = part.startswith("\ue000")
            part = messages[int(part[1:-1])]["content"] if is_content else part
            ids += encode_batch(self, [part], special=False, plain=plain and is_content)[0]
        return ids

    Tokenizer.encode_batch = encode_batch
    Tokenizer.encode_chat = encode_chat
