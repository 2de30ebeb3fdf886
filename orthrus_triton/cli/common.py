"""What the commands share: devices and dtypes by name, prompts to ids, errors as one line.
Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

if TYPE_CHECKING:
    import torch

    from orthrus_triton.modules.decode_options import BlockSize

# what is printed is text, whatever it looks like: a path may hold [brackets] or :colons:
PLAIN = {"markup": False, "emoji": False, "highlight": False}
# stdout carries generated text and results only, so that it can be piped
# lines are left to the terminal to wrap, so that paths stay whole where there is none
status_console = Console(stderr=True, soft_wrap=True, **PLAIN)

DtypeName = Literal["auto", "bf16", "fp16", "fp32"]
DtypeOption = Annotated[
    DtypeName, typer.Option(help="auto: bf16; fp32 on a CPU that has no instructions for bf16 and no kernel of ours.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. auto: the first GPU if there is one.")]
ImplOption = Annotated[
    Literal["auto", "triton", "torch", "reference"], typer.Option(help="auto: Triton on a GPU, torch on a CPU.")
]


def _block_size(text: str) -> int | Literal["auto"]:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number of rows or auto, but got {text!r}") from None


def _block_size_option(default: str) -> Any:
    about = f"Rows of a draft block, anchor included; auto: the fastest, cycle by cycle. By default {default}."
    return Annotated[Any, typer.Option(parser=_block_size, metavar="<int>|auto", help=about)]


BlockSizeOption = _block_size_option("the model's own")
FastBlockOption = _block_size_option("auto on a CPU, else the model's own")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"must be a JSON object, but {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"must be a JSON object, but got {text!r}")
    return value


TemplateOption = Annotated[
    Any,
    typer.Option(
        "--chat-template-kwargs", parser=_json_object, metavar="JSON",
        help="Options of the model's chat template, such as '{\"enable_thinking\": false}' for Qwen3.",
    ),
]  # fmt: skip


def fast_block(block_size: BlockSize | None, device: torch.device) -> BlockSize | None:
    """What `FastBlockOption` stands for: on a CPU every row takes time, so that fewer may be faster than all."""
    return "auto" if block_size is None and device.type == "cpu" else block_size


Int8DraftsOption = Annotated[
    bool,
    typer.Option(
        "--int8-drafts",
        help="Draft from int8 copies of the weights: the same text, a third more memory.",
    ),
]  # fmt: skip
Int8WeightsOption = Annotated[
    bool,
    typer.Option(
        "--int8-weights",
        help="Keep the layers' matrices in int8: half the memory, and text of that model, as exact with respect to it.",
    ),
]  # fmt: skip
Int8RowsOption = Annotated[
    bool,
    typer.Option(
        "--int8-rows",
        help="--int8-weights, and what they are multiplied with is rounded, too, on CPUs that are faster so: text of a "
        "model a little further from the one before.",
    ),
]  # fmt: skip
Int8HeadOption = Annotated[
    bool,
    typer.Option("--int8-head", help="--int8-weights, and the LM head in int8, too: for small models."),
]

# one sequence's sampling, as SamplingParams has it
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopKOption = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopPOption = Annotated[float, typer.Option(help="Keep the likeliest tokens that reach this probability together.")]
MinPOption = Annotated[float, typer.Option(help="Keep tokens at least this fraction as likely as the likeliest.")]
SeedOption = Annotated[int, typer.Option(help="Seed of sampling; the same one gives the same text.")]


def result_console(**options: Any) -> Console:
    """What prints results to stdout, as they are."""
    return Console(**PLAIN, **options)


def busy(text: str) -> Status:
    """A context that shows `text` on a terminal's stderr while something takes its time."""
    return status_console.status(escape(text))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report what the user can mend (bad values, missing files or packages) as one line, with exit code 2."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        _say(error)
        raise typer.Exit(2) from error
    except RuntimeError as error:  # torch has no class of its own for a CPU's
        if not any(words in str(error) for words in ("allocate memory", "out of memory")):
            raise
        _say(f"not enough memory: {error}")
        raise typer.Exit(2) from error


def _say(error: object) -> None:
    typer.echo(f"orthrus-triton: error: {' '.join(str(error).split())}", err=True)


def require_text(name: str, text: str) -> str:
    """`text`, or a ValueError that names it: bytes that are no UTF-8 come from stdin or a shell as half characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be UTF-8, but has bytes that are not") from None
    return text


def resolve_device(name: str) -> torch.device:
    """The device that `name` means here.

    Raises:
        ValueError: torch does not know it, or this machine does not have it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, but got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name} asks for a GPU, but torch sees {torch.cuda.device_count()} here")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, but got {name!r}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where kernels are launched
    return device


def cpu_bf16_instructions() -> list[str]:
    """The instruction sets of this CPU that multiply bf16; without one, torch emulates bf16, slower than fp32."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch supported
    return [name for name in ("avx512_bf16", "amx_bf16", "bf16") if capabilities.get(name)]


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype that `name` means on `device`."""
    import torch

    from orthrus_triton.ops.cpu.kernels import has_product

    if name == "auto":
        # a product of ours reads half of the bytes and is as fast as fp32 even where it has to multiply in fp32
        is_fast = device.type == "cuda" or cpu_bf16_instructions() or has_product(torch.empty(0, dtype=torch.bfloat16))
        name = "bf16" if is_fast else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def require_impl(impl: str, device: torch.device) -> str:
    """The implementation that will run on `device`.

    Raises:
        ValueError: it cannot run there.
    """
    import torch

    from orthrus_triton.ops._dispatch import resolve_impl

    try:
        return resolve_impl(impl, torch.empty(0, device=device))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def encode_prompt(
    tokenizer: Any, prompt: str, chat: bool | None, system: str | None = None, template: dict[str, Any] | None = None
) -> torch.Tensor:
    """A prompt as ids [1, L].

    Args:
        tokenizer: of transformers.
        prompt: the user's text.
        chat: put it through the chat template; None does so if there is one.
        system: system message, chat only.
        template: options of the chat template.

    Raises:
        ValueError: nothing to encode, or a template is needed that the tokenizer does not have.
    """
    import torch

    from orthrus_triton.training.prompts import Prompt, encode

    if not prompt.strip():
        raise ValueError("PROMPT must not be empty")
    require_text("PROMPT", prompt)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat is None:
        chat = has_template
    if chat and not has_template:
        raise ValueError("--chat needs a tokenizer with a chat template, and this one has none: use --raw")
    if system is not None and not chat:
        raise ValueError("--system goes with a chat template, but this prompt is raw")
    if template:
        from orthrus_triton.models.chat_template import set_template_options

        if not chat:
            raise ValueError("--chat-template-kwargs goes with a chat template, but this prompt is raw")
        set_template_options(tokenizer, template)
    if system is not None:
        require_text("--system", system)
    return torch.tensor([encode(tokenizer, Prompt(prompt, chat=chat), system)])


def text_streamer(tokenizer: Any) -> Any:
    """Prints tokens to stdout as text as they come, whole words at a time, without the prompt."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def parse_seconds(text: str) -> float | None:
    """Seconds of "300s", "5m", "1h" or a bare number; of "none", None.

    Raises:
        ValueError: another form.
    """
    if text == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--budget must be a time like 300s, 5m or 1h, or none, but got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
