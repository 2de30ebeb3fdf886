"""The C kernels as a library: compiled when one is first asked for, with the C compiler that is there, and kept.
Where there is none, or it cannot compile them, the torch implementations do without."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from orthrus_triton.autotune.files import cache_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-fopenmp", "-nodefaultlibs", "-lc", "-lm"),  # threads are those of torch's own OpenMP
)  # fmt: skip
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 60
SLOWER = "PyTorch's own operations are taken, and decoding takes about twice as long"

VOID_P, INT64, FLOAT, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
ARGUMENTS = {
    "orthrus_add_normed": (*[VOID_P] * 6, *[INT64] * 2, *[FLOAT] * 3, INT, INT),
    "orthrus_attention": (*[VOID_P] * 7, *[INT64] * 15, FLOAT, INT, INT),
    "orthrus_consensus": (*[VOID_P] * 10, *[INT64] * 6),
    "orthrus_gated": (*[VOID_P] * 2, *[INT64] * 2, *[INT] * 3),
    "orthrus_greedy_choice": (*[VOID_P] * 2, *[INT64] * 3, INT, INT),
    "orthrus_linear_bf16": (*[VOID_P] * 4, *[INT64] * 4, INT),
    "orthrus_linear_bf16_int8_integers": (*[VOID_P] * 6, *[INT64] * 4, INT),
    "orthrus_linear_bf16_int8_wide": (*[VOID_P] * 6, *[INT64] * 4, INT),
    "orthrus_linear_bf16_wide": (*[VOID_P] * 5, *[INT64] * 4, INT),
    "orthrus_linear_fp16_int8_integers": (*[VOID_P] * 6, *[INT64] * 4, INT),
    "orthrus_linear_fp16_int8_wide": (*[VOID_P] * 6, *[INT64] * 4, INT),
    "orthrus_linear_fp16_wide": (*[VOID_P] * 5, *[INT64] * 4, INT),
    "orthrus_linear_fp32": (*[VOID_P] * 4, *[INT64] * 4, INT),
    "orthrus_linear_fp32_int8_integers": (*[VOID_P] * 6, *[INT64] * 4, INT),
    "orthrus_linear_fp32_int8_wide": (*[VOID_P] * 6, *[INT64] * 4, INT),
    "orthrus_norm_spans": (*[VOID_P] * 4, *[INT64] * 4, FLOAT, FLOAT, INT, INT),
    "orthrus_recall": (*[VOID_P] * 7, *[INT64] * 4, FLOAT),
    "orthrus_rms_norm": (*[VOID_P] * 5, *[INT64] * 2, FLOAT, FLOAT, INT, INT),
    "orthrus_rope_cache": (*[VOID_P] * 9, *[INT64] * 13, FLOAT, FLOAT, INT, INT),
    "orthrus_sample_choice": (*[VOID_P] * 9, *[INT64] * 5, INT, INT),
    "orthrus_void_rows": (*[VOID_P] * 3, *[INT64] * 3, INT),
}


@cache
def c_library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none: not Linux, no C compiler, or a CPU without fused multiply-adds.

    The library lies in the user's cache folder, under a name made from the source, the compiler and what `native` means
    to it here, so that machines may share a folder.
    """
    if sys.platform != "linux":
        return None
    compilers = {os.path.realpath(path): path for path in map(shutil.which, COMPILERS) if path}
    if not compilers:
        logger.warning("no C compiler (%s) is installed, so that %s", ", ".join(COMPILERS), SLOWER)
        return None
    reasons = []
    for compiler in compilers.values():  # cc may be a clang without OpenMP, and gcc there as well
        try:
            library = _load(compiler, cache_folder() / "cpu")
            break
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{compiler}: {getattr(error, 'stderr', None) or error}")
    else:
        logger.warning("no C kernels, so that %s: %s", SLOWER, "\n".join(reasons))
        return None
    for name, arguments in ARGUMENTS.items():
        if hasattr(library, name):  # of bf16's products a CPU has one or none
            kernel = getattr(library, name)
            kernel.argtypes, kernel.restype = arguments, None
    return library


def _load(compiler: str, folder: Path) -> ctypes.CDLL:
    macros = _run(compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull)
    sources = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]"))]
    name = hashlib.sha256("\0".join((compiler, *FLAGS, macros, *sources)).encode()).hexdigest()[:32] + ".so"
    kept = folder / name
    if folder.is_absolute():  # else there is no home, and a library must not come from wherever this process runs
        with suppress(OSError):  # there is none, or not a whole one
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / name
        _compile(compiler, sorted(SOURCES.glob("*.c")), fresh)
        if folder.is_absolute():
            with suppress(OSError):  # nowhere to keep it
                _keep(fresh, kept)
                return ctypes.CDLL(str(kept))  # rather than `fresh`: a temporary folder may be mounted as noexec
        return ctypes.CDLL(str(fresh))


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    objects = [str(library.with_name(f"{source.stem}.o")) for source in sources]
    commands = [(compiler, "-c", str(source), "-o", to, *FLAGS) for source, to in zip(sources, objects)]

    def run(command: tuple[str, ...]) -> None:
        _run(*command)

    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # some take seconds
            list(pool.map(run, commands))
    except RuntimeError:  # no thread can be started once the main one has ended
        list(map(run, commands))
    _run(compiler, *objects, "-o", str(library), *FLAGS)


def _keep(fresh: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    # renamed once it is whole, for others may look for it; process ids are no names where containers share a folder
    with tempfile.NamedTemporaryFile(dir=kept.parent, prefix=f"{kept.name}.", delete=False) as whole:
        try:
            whole.write(fresh.read_bytes())
            whole.flush()
            os.fsync(whole.fileno())
            os.chmod(whole.name, 0o644)  # users may share it, too
            os.replace(whole.name, kept)
        except OSError:
            os.unlink(whole.name)
            raise


def _run(*command: str) -> str:
    how = {"capture_output": True, "text": True, "errors": "replace", "timeout": COMPILE_SECONDS}
    return subprocess.run(command, check=True, **how).stdout
