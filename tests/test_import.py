"""Importing is cheap and harmless: no GPU, no environment write, no transformers, and Triton may be missing.
Each check runs in a fresh process, because this one has imported everything already."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import typing


def run_python(source: str) -> str:
    """Run `source` in a process that sees no GPU and no TRITON_INTERPRET; its stdout."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_top_level_import_loads_nothing_heavy():
    source = """
import sys
import orthrus_triton
print(*[name for name in ("torch", "triton", "transformers", "numpy") if name in sys.modules])
assert orthrus_triton.__version__
"""
    assert run_python(source).split() == []


def test_modules_import_without_gpu_env_writes_or_transformers():
    source = """
import os, sys
before = dict(os.environ)
import orthrus_triton.modules, orthrus_triton.ops, orthrus_triton.testing
assert "torch" in sys.modules
assert "transformers" not in sys.modules, "transformers belongs to orthrus_triton.models"
import torch
assert not torch.cuda.is_initialized()
# importing torch registers keys of its own: compare with what torch alone does
changed = {key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)}
print(*sorted(changed))
"""
    alone = "import os; before = dict(os.environ); import torch, triton, einops, numpy; print(*sorted("
    alone += "key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)))"
    assert run_python(source) == run_python(alone)


def test_modules_do_not_need_transformers_at_all():
    source = """
import sys
sys.modules["transformers"] = None  # makes every import of it an ImportError
from orthrus_triton import ConsensusDecoder
from orthrus_triton.testing import TinyDualViewModel
import torch
out = ConsensusDecoder(TinyDualViewModel().eval()).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
print(out.stats.tokens)
"""
    assert run_python(source).strip() == "4"


def test_type_hints_of_what_is_exported_can_be_resolved():
    """For tools that read them while a program runs. Those left out name what would be imported in a circle."""
    from orthrus_triton import modules, ops, testing
    from orthrus_triton.modules import choose
    from orthrus_triton.modules.run_slots import RunSlots

    unresolved = set()
    exported = [getattr(package, name) for package in (modules, ops, testing) for name in package.__all__]
    for one in [*exported, RunSlots, choose.choose_tokens, choose.choose_logits, choose.process_on_host]:
        members = (
            [member for member in vars(one).values() if inspect.isfunction(member)] if inspect.isclass(one) else []
        )
        for member in [one, *members] if callable(one) else []:
            try:
                typing.get_type_hints(member)
            except NameError:
                unresolved.add(member.__qualname__)
    assert unresolved <= {"DecodeRun.__init__", "RunSlots.__init__"}


def test_every_export_resolves_and_others_do_not():
    source = """
import orthrus_triton
for name in orthrus_triton.__all__:
    assert getattr(orthrus_triton, name) is not None, name
assert orthrus_triton.ConsensusDecoder.__module__.startswith("orthrus_triton.modules")
assert orthrus_triton.OrthrusForCausalLM.__module__.startswith("orthrus_triton.models")
assert set(orthrus_triton.__all__) <= set(dir(orthrus_triton))
try:
    orthrus_triton.NoSuchThing
except AttributeError as error:
    print(error)
"""
    assert "no attribute 'NoSuchThing'" in run_python(source)


def test_works_where_triton_cannot_be_imported():
    source = """
import sys
import torch

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ImportError(f"{name} is blocked")

for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocker())
import orthrus_triton.modules, orthrus_triton.testing
from orthrus_triton import ops
from orthrus_triton._triton import HAS_TRITON
assert not HAS_TRITON
x = torch.tensor([[3.0, 4.0]])
for impl in ("auto", "torch", "reference"):
    y = ops.rms_norm(x, torch.ones(2), 0.0, impl=impl)
    torch.testing.assert_close(y.float(), x / 12.5**0.5)
try:
    ops.rms_norm(x, torch.ones(2), 0.0, impl="triton")
except RuntimeError as error:
    print(error)
"""
    assert "Triton, which is not installed" in run_python(source)
