"""What the frozen model says about every training row, once: its K/V and its top-k next-token probabilities, on disk.
Training then runs neither the AR view nor its LM head."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orthrus_triton.models.modeling import OrthrusForCausalLM
from orthrus_triton.modules import SharedKVCache
from orthrus_triton.training.data import TextRow

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 2
RECORD_EVERY = 32  # rows after which a build that is cut short goes on
KEY_QUANTUM = 64  # contexts are padded to a multiple of it, so that kernels see few different shapes


class FrozenCache:
    """Memory-mapped K/V [tokens, layers, 2, HKV, D] and teacher top-k (ids, probabilities) [tokens, k] of all rows.

    Token n of row r lies at `starts[r] + n`. The probabilities beside it are those of the next token, renormalised over
    the k that are kept; only places that predict an answer have them. Make one with `open_or_build`.
    """

    def __init__(self, folder: Path, manifest: dict) -> None:
        self._paths = [folder / name for name in _layouts(manifest)]
        self.starts = manifest["starts"]
        self.kv, self.teacher_ids, self.teacher_probs = (
            _map(folder / name, *layout) for name, layout in _layouts(manifest).items()
        )

    @classmethod
    def open_or_build(
        cls,
        folder: str | Path,
        model: OrthrusForCausalLM,
        rows: Sequence[TextRow],
        top_k: int = 32,
        dtype: torch.dtype = torch.bfloat16,
    ) -> FrozenCache:
        """The cache of these rows and this model in `folder`: the one there if it is theirs, else a new one.

        A build that was cut short goes on where it stopped. What an earlier call gave stays as it is, whatever replaces
        it in `folder`. Where several processes ask for one folder, also from nodes that share a disk, one builds and
        the others wait for it.

        Args:
            folder: made if it does not exist.
            model: its frozen AR view reads every row.
            rows: all that the cache is to serve, in the order of their row ids.
            top_k: probabilities kept per position.
            dtype: of K/V on disk; in bf16, a token of SmolLM2-135M takes 23 kB.

        Raises:
            ValueError: top_k is out of range. OSError: the disk has no room for it.
        """
        if not 1 <= top_k <= model.vocab_size:
            raise ValueError(f"top_k must be in 1..{model.vocab_size}, but got {top_k}")
        folder = Path(folder)
        layer = model.model.layers[0].self_attn
        starts, tokens = [], 0
        for row in rows:
            starts.append(tokens)
            tokens += len(row.ids)
        manifest = {
            "format": FORMAT, "rows": _hash_rows(rows), "model": _hash_model(model), "tokens": tokens, "top_k": top_k,
            "dtype": str(dtype).removeprefix("torch."), "starts": starts,
            "kv_shape": [len(model.model.layers), 2, layer.num_kv_heads, layer.head_dim],
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            path = folder / "manifest.json"
            found = _read_json(path)
            filled = found.pop("filled", 0)
            # a file that was lost or cut short is made anew, and empty
            whole = all(_is_whole(folder / name, *layout) for name, layout in _layouts(manifest).items())
            if found != manifest or not whole:
                filled = 0
                # a run that reads them keeps its files: written anew, they would teach it what another model says
                for name in ("manifest.json", *_layouts(manifest)):
                    (folder / name).unlink(missing_ok=True)
            cache = cls(folder, manifest)
            if filled < len(rows):
                cache._fill(model, rows, top_k, filled, lambda done: _write_json(path, {**manifest, "filled": done}))
        return cache

    @torch.no_grad()
    def _fill(
        self,
        model: OrthrusForCausalLM,
        rows: Sequence[TextRow],
        top_k: int,
        filled: int,
        record: Callable[[int], None],
    ) -> None:
        columns = (TextColumn("frozen K/V and teacher"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        buffers = model.new_cache(1, max(len(row.ids) for row in rows), model.block_size)
        with Progress(*columns) as progress:
            task = progress.add_task("", total=len(rows), completed=filled)
            for n in range(filled, len(rows)):
                self._fill_row(model, rows[n], self.starts[n], buffers, top_k)
                progress.advance(task)
                if (n + 1) % RECORD_EVERY == 0 or n + 1 == len(rows):
                    self._sync()  # else a machine that stops may keep the record and lose the rows
                    record(n + 1)

    def _sync(self) -> None:
        """From the maps to the disk, where another node can read it."""
        for path in self._paths:
            with open(path, "r+b") as file:
                os.fsync(file.fileno())

    def _fill_row(
        self, model: OrthrusForCausalLM, row: TextRow, start: int, buffers: SharedKVCache, top_k: int
    ) -> None:
        length = len(row.ids)
        buffers.prompt_len.fill_(row.prompt_len)
        view_pass = buffers.view_pass("ar", length, linear_impl="library")
        hidden = model.forward_view(torch.tensor([row.ids], device=model.device), buffers, view_pass)
        for n, layer in enumerate(buffers.layers):
            for which, states in enumerate((layer.k, layer.v)):
                # [HKV, S, D] -> [S, HKV, D]
                kept = states[0, :, :length].transpose(0, 1)
                self.kv[start : start + length, n, which] = kept.to("cpu", self.kv.dtype)
        for first, end in row.answers:
            # the first answer token is predicted by the token before it
            taught = slice(first - 1, end - 1)
            top, ids = model.compute_logits(hidden[0, taught], "library").topk(top_k)
            self.teacher_ids[start:][taught] = ids.to("cpu", torch.int32)
            self.teacher_probs[start:][taught] = torch.softmax(top, dim=-1).cpu()

    def context(self, row_ids: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """K/V of the first `lengths[b]` tokens of each row -> [B, layers, 2, HKV, S, D], zeros beyond a length."""
        layers, _, heads, dim = self.kv.shape[1:]
        longest = -(-max(*lengths, 1) // KEY_QUANTUM) * KEY_QUANTUM
        out = torch.zeros(len(row_ids), layers, 2, heads, longest, dim, dtype=self.kv.dtype)
        for b, (row, length) in enumerate(zip(row_ids, lengths)):
            tokens = self.kv[self.starts[row] : self.starts[row] + length]
            out[b, :, :, :, :length] = tokens.permute(1, 2, 3, 0, 4)
        return out


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time. The lock goes with the process that holds it; a disk that knows no locks has none."""
    with open(folder / ".lock", "w") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _layouts(manifest: dict) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each file."""
    tokens, top_k = manifest["tokens"], manifest["top_k"]
    return {
        "kv.bin": (torch.Size((tokens, *manifest["kv_shape"])), getattr(torch, manifest["dtype"])),
        "teacher_ids.bin": (torch.Size((tokens, top_k)), torch.int32),
        "teacher_probs.bin": (torch.Size((tokens, top_k)), torch.float32),
    }


def _is_whole(path: Path, shape: torch.Size, dtype: torch.dtype) -> bool:
    return path.is_file() and path.stat().st_size == shape.numel() * dtype.itemsize


def _map(path: Path, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if not _is_whole(path, shape, dtype):
        size = shape.numel() * dtype.itemsize
        try:
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # a full disk says so here, not while the map is written
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(f"the frozen cache needs {size / 1e9:.1f} GB for {path}, but: {error}") from error
    return torch.from_file(str(path), shared=True, size=shape.numel(), dtype=dtype).view(shape)


def _read_json(path: Path) -> dict:
    """Nothing where there is no such file, or one that a machine which stopped left empty or cut short."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _write_json(path: Path, content: dict) -> None:
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(content))
    staged.replace(path)


def _hash_rows(rows: Sequence[TextRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.answers, row.ids]).encode())
    return digest.hexdigest()


def _hash_model(model: OrthrusForCausalLM) -> str:
    """Of the frozen weights, of which one column each is enough to tell two models apart, and of what is computed with
    them."""
    config = model.config
    layers = [{name: value for name, value in one.items() if name != "view_rank"} for one in config.layer_options()]
    arithmetic = [str(model.dtype), config.rope_parameters, config.max_position_embeddings, layers]
    digest = hashlib.sha256(json.dumps(arithmetic, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if "_diff" not in name:
            digest.update(name.encode() + tensor.reshape(tensor.shape[0], -1)[:, 0].float().cpu().numpy().tobytes())
    return digest.hexdigest()
