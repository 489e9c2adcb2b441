"""Shows the comment behind a field of a dataclass in the reference, where it has no docstring.

Fields carry their shapes and units as comments (`k: jax.Array  # [L, B, K, S, H]`).
"""

import re

import griffe


class FieldComments(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        inside_class = attr.parent is not None and attr.parent.is_class
        if not inside_class or attr.docstring is not None:
            return
        comment = attr.source.splitlines()[-1].partition("  # ")[2]
        if not comment or comment.startswith(("type:", "fmt:", "noqa", "pyright:")):
            return
        if "`" not in comment:  # brackets are links in Markdown
            comment = re.sub(r"((?:\[[^\]]*\])+)", r"`\1`", comment)
        attr.docstring = griffe.Docstring(comment, parent=attr)
