"""Options of a model's chat template, such as Qwen3's enable_thinking: checked for one call, or fixed for all.
Whatever else apply_chat_template takes is not among them: nobody who sends a request may replace the template."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from typing import Any

FUNCTIONS = {"raise_exception", "strftime_now"}  # what transformers lets templates call
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers' own


def require_template_options(tokenizer: Any, options: Mapping[str, Any], tools: Any = None) -> None:
    """Raise a ValueError unless the chat template looks at each of `options`, by name.

    Args:
        tokenizer: of transformers, with a chat template.
        options: what the template is to find under each name.
        tools: as for `apply_chat_template`; some tokenizers have another template for calls with tools.
    """
    if not options:
        return
    import jinja2.meta  # whoever has a chat template has it

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    template = environment.parse(GENERATION.sub("", tokenizer.get_chat_template(tools=tools)))
    taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
    known = jinja2.meta.find_undeclared_variables(template) - taken - FUNCTIONS
    for name in options:
        if name not in known:
            raise ValueError(
                f"{name!r} is no option of this model's chat template, which has {sorted(known) or 'none'}"
            )


def set_template_options(tokenizer: Any, options: Mapping[str, bool | int | float | str]) -> None:
    """Let `options` stand in the chat template wherever a call does not say otherwise.

    Raises:
        ValueError: there is no chat template, it does not look at one of them, or a value is of another kind.
    """
    if not options:
        return
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"this model has no chat template, which could have the options {sorted(options)}")
    require_template_options(tokenizer, options)
    defaults = "".join(
        # in this form only, for what is set within an `if` is there behind it as well
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(name, value)} %}}{{%- endif %}}"
        for name, value in options.items()
    )
    defaults += "\n"  # which is left out: the template begins on a line of its own
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {kind: defaults + text for kind, text in template.items()}
    else:
        tokenizer.chat_template = defaults + template


def _literal(name: str, value: Any) -> str:
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    raise ValueError(f"{name} must be true, false, a number or a text, but got {value!r}")
