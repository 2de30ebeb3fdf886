"""Which configurations an op may have: the tuner searches this space, and no file can bring in anything from outside.
Every configuration in it belongs to a weight or head shape; the row count has no way in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from statistics import fmean

from orthrus_triton.autotune import defaults
from orthrus_triton.autotune.config import DTYPES, KernelConfig
from orthrus_triton.autotune.defaults import SHARED_MEMORY_LIMIT
from orthrus_triton.autotune.estimate import GUESSED_REGISTERS, Work, estimate
from orthrus_triton.autotune.source import fingerprint_of_files

LAUNCH_NAMES = ("num_warps", "num_stages")
MAX_CANDIDATES = 32
# Rows the estimates are made for: a draft block. They rank configurations, which themselves know of no rows.
BLOCK_ROWS = 32
# What attention is estimated and timed for.
TIMED_CONTEXTS, TIMED_KV_HEADS = (2048, 16_384), 8
# What a program needs beside its tiles: barriers, and the reductions' scratch memory.
SHARED_SLACK = 1024


class Space:
    """The configurations of one op.

    Args:
        name: of the op.
        version: raised when the meaning of a constant changes though no kernel does; older files are then ignored.
        key: names of the key's fields.
        choices: values of each constant and of num_warps and num_stages.
    """

    # candidates that differ in warps and stages alone
    most_per_tiles = MAX_CANDIDATES

    def __init__(self, name: str, version: int, key: tuple[str, ...], choices: dict[str, tuple[int, ...]]) -> None:
        self.name, self.version, self.key, self.choices = name, version, key, choices

    def source(self) -> str:
        """Fingerprint of the kernels that a configuration was measured with."""
        raise NotImplementedError

    def default(self, dtype: str, family: str, key: dict[str, int]) -> KernelConfig:
        """What runs where nothing else is known."""
        raise NotImplementedError

    def problem_with_key(self, dtype: str, key: dict[str, int]) -> str | None:
        """Why this is no key of the op, or None."""
        if dtype not in DTYPES:
            return f"dtype must be one of {', '.join(DTYPES)}, but is {dtype!r}"
        if sorted(key) != sorted(self.key):
            return f"the key must hold {', '.join(self.key)}, but holds {', '.join(sorted(key)) or 'nothing'}"
        for name, value in key.items():
            if not 1 <= value < 2**24:
                return f"{name} must be in 1..{2**24 - 1}, but is {value}"
        return None

    def problem_with(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> str | None:
        """Why the op may not run with this configuration, or None. The default is always allowed."""
        launch = {name for name in LAUNCH_NAMES if name in self.choices}
        constants = set(self.choices) - launch
        if set(config.constants) != constants or set(config.launch) != launch:
            return f"a configuration must hold {', '.join(self.choices)}, but holds {config}"
        if config == self.default(dtype, family, key):
            return None
        for name, value in (config.constants | config.launch).items():
            if value not in self.choices[name]:
                return f"{name} must be one of {self.choices[name]}, but is {value}"
        return self.misfit(config, dtype, family, key)

    def misfit(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> str | None:
        """Why values that are each allowed do not go together, or None."""
        return None

    def rank(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> float:
        """Lower is tried first."""
        return 0.0

    def candidates(
        self, dtype: str, family: str, key: dict[str, int], most: int = MAX_CANDIDATES
    ) -> list[KernelConfig]:
        """The default, then the most promising others, in an order that is the same everywhere."""
        default = self.default(dtype, family, key)
        others = [config for config in self._allowed(dtype, family, key) if config != default]
        others.sort(key=lambda config: self.rank(config, dtype, family, key))
        tried: Counter[tuple] = Counter()
        chosen = [default]
        for config in others:
            tiles = tuple(config.constants.values())
            if len(chosen) < most and tried[tiles] < self.most_per_tiles:
                tried[tiles] += 1
                chosen.append(config)
        return chosen

    def stand_in(self, key: dict[str, int]) -> dict[str, int]:
        """A key whose kernels compile to the same registers and shared memory: one compilation serves for many."""
        return key

    def cost(
        self, config: KernelConfig, dtype: str, family: str, key: dict[str, int], shared: int, registers: int
    ) -> float | None:
        """The compile-time model's word on a compiled configuration, in seconds per byte that must move; None where
        there is no model."""
        return None

    def _allowed(self, dtype: str, family: str, key: dict[str, int]) -> Iterator[KernelConfig]:
        for values in product(*self.choices.values()):
            named = dict(zip(self.choices, values))
            launch = {name: named.pop(name) for name in LAUNCH_NAMES if name in named}
            config = KernelConfig(named, launch)
            if self.misfit(config, dtype, family, key) is None:
                yield config


class BuiltInSpace(Space):
    """An op of this package: its rule is in `defaults`, its kernels in `files`; those named in `without` do not depend
    on the configuration."""

    files: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    most_per_tiles = 2  # their estimates are often equal, and must not crowd out other tiles

    def source(self) -> str:
        """Fingerprint of the files' kernels."""
        return fingerprint_of_files(*self.files, without=self.without)

    def default(self, dtype: str, family: str, key: dict[str, int]) -> KernelConfig:
        """The built-in rule."""
        return KernelConfig(*defaults.RULES[self.name](DTYPES[dtype], family, **key))

    def shared_bytes(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> int:
        """Shared memory of a program, at most."""
        raise NotImplementedError

    def works(self, config: KernelConfig, dtype: str, key: dict[str, int]) -> list[Work]:
        """What launches of a draft block do."""
        raise NotImplementedError

    def rank(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> float:
        """By the estimate, without a compiler's word on registers."""
        return self.cost(config, dtype, family, key, self.shared_bytes(config, dtype, family, key), GUESSED_REGISTERS)

    def cost(
        self, config: KernelConfig, dtype: str, family: str, key: dict[str, int], shared: int, registers: int
    ) -> float:
        """Occupancy, shared memory and bytes in flight, by `estimate`."""
        warps, works = config.launch["num_warps"], self.works(config, dtype, key)
        return fmean(estimate(family, work, shared, warps, registers) / work.traffic for work in works)

    def misfit(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> str | None:
        """Shared memory."""
        shared, limit = self.shared_bytes(config, dtype, family, key) + SHARED_SLACK, SHARED_MEMORY_LIMIT[family]
        if shared > limit:
            return f"{config} needs up to {shared} bytes of shared memory, {family} has {limit}"
        return None


class LinearSpace(BuiltInSpace):
    """linear, and the products that have something fused behind them: one configuration per weight shape, because fused
    and unfused products must have the same bits."""

    files = ("ops/product_tile.py", "ops/linear.py", "ops/linear_swiglu.py", "ops/lm_head.py", "ops/swiglu.py")
    without = ("gated_kernel", "gelu_times", "best_tile_kernel")

    def __init__(self) -> None:
        choices = {
            "BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32, 64, 128), "BLOCK_K": (32, 64, 128, 256),
            "SPLIT_K": (1, 2, 4, 8), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5),
        }  # fmt: skip
        super().__init__("linear", 1, ("N", "K"), choices)

    def shared_bytes(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> int:
        """Tiles of x and of the weight, one of each per stage."""
        tile = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"]
        return tile * DTYPES[dtype].itemsize * config.launch["num_stages"]

    def stand_in(self, key: dict[str, int]) -> dict[str, int]:
        """The shape reaches a kernel in masks, strides and trip counts: what counts is what it is divisible by."""
        return {"N": 4096 if key["N"] % 64 == 0 else key["N"], "K": 4096 if key["K"] % 256 == 0 else key["K"]}

    def misfit(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> str | None:
        """Also: every split has depth tiles of its own, and fp32 operands fit registers."""
        if config["SPLIT_K"] > 1 and -(-key["K"] // config["BLOCK_K"]) < 2 * config["SPLIT_K"]:
            return f"SPLIT_K={config['SPLIT_K']} leaves less than two tiles of K={key['K']} to a split"
        if dtype == "fp32" and (config["BLOCK_K"] > 64 or config["BLOCK_N"] * config["BLOCK_M"] > 2048):
            return "fp32 products run on FMA units: BLOCK_K <= 64 and BLOCK_M * BLOCK_N <= 2048"
        if config["BLOCK_M"] * config["BLOCK_N"] > 32 * 32 * config.launch["num_warps"]:
            return f"{config} has more than 32 accumulators in a thread"
        return super().misfit(config, dtype, family, key)

    def works(self, config: KernelConfig, dtype: str, key: dict[str, int]) -> list[Work]:
        """The weight once from DRAM, again from L2 for every further row tile; from L2 also x, for every column tile,
        and the splits' partial sums, there and back."""
        (n, k), size = (key["N"], key["K"]), DTYPES[dtype].itemsize
        row_tiles, split = -(-BLOCK_ROWS // config["BLOCK_M"]), config["SPLIT_K"]
        column_tiles = -(-n // config["BLOCK_N"])
        cached = (row_tiles - 1) * n * k * size + column_tiles * BLOCK_ROWS * k * size
        if split > 1:
            cached += 2 * split * BLOCK_ROWS * n * 4
        flight = (config.launch["num_stages"] - 1) * config["BLOCK_N"] * config["BLOCK_K"] * size
        return [Work(n * k * size, cached, row_tiles * column_tiles * split, flight, 2 if split > 1 else 1)]


class AttentionSpace(BuiltInSpace):
    """dual_view_attention: one configuration per head size and group, for every pass and context length."""

    files = ("ops/dual_view_attention/kernels.py",)

    def __init__(self) -> None:
        choices = {
            "BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128), "SPLIT_SIZE": (256, 512),
            "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
        }  # fmt: skip
        super().__init__("dual_view_attention", 2, ("head_dim", "group"), choices)

    def shared_bytes(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> int:
        """Tiles of queries, keys, values and weights; or, on the way out, accumulators beside what is still there."""
        width, size = 1 << max(key["head_dim"] - 1, 15).bit_length(), DTYPES[dtype].itemsize
        rows, pair, stages = config["BLOCK_M"], 2 * config["BLOCK_N"] * width * size, config.launch["num_stages"]
        queries, weights, accumulators = rows * width * size, rows * config["BLOCK_N"] * size, rows * width * 4
        if family == "gfx942":  # the accumulators leave through memory that the tiles no longer need
            return max(queries + weights + stages * pair, accumulators + max(queries, (stages - 1) * pair))
        return queries + max(weights, accumulators) + stages * pair

    def problem_with_key(self, dtype: str, key: dict[str, int]) -> str | None:
        """Also: a head that fits a tile."""
        return super().problem_with_key(dtype, key) or (
            f"head_dim and group must be at most 512, but are {key['head_dim']} and {key['group']}"
            if max(key.values()) > 512
            else None
        )

    def misfit(self, config: KernelConfig, dtype: str, family: str, key: dict[str, int]) -> str | None:
        """Also: accumulators and, in fp32, operands that registers can hold."""
        if dtype == "fp32" and config["BLOCK_M"] * config["BLOCK_N"] > 512:
            return "fp32 products run on FMA units: BLOCK_M * BLOCK_N <= 512"
        held = config["BLOCK_M"] * (key["head_dim"] + config["BLOCK_N"])
        if held > 32 * 128 * config.launch["num_warps"]:
            return f"{config} has more than 128 accumulators in a thread"
        return super().misfit(config, dtype, family, key)

    def works(self, config: KernelConfig, dtype: str, key: dict[str, int]) -> list[Work]:
        """K and V once from DRAM, again from L2 for every further row tile; the splits' partial results there and
        back. Over a short and a long context."""
        width, size = key["head_dim"], DTYPES[dtype].itemsize
        rows = BLOCK_ROWS * key["group"]
        row_tiles = -(-rows // config["BLOCK_M"])
        # without stages, loads and products alternate
        flight = int(2 * max(config.launch["num_stages"] - 1, 0.5)) * config["BLOCK_N"] * width * size
        found = []
        for context in TIMED_CONTEXTS:
            splits = defaults.count_splits(context, config["SPLIT_SIZE"])
            keys = 2 * TIMED_KV_HEADS * context * width * size
            partial = 2 * rows * TIMED_KV_HEADS * splits * width * 4
            programs = row_tiles * TIMED_KV_HEADS * splits
            found.append(Work(keys, (row_tiles - 1) * keys + partial, programs, flight, 2))
        return found


SPACES: dict[str, Space] = {space.name: space for space in (AttentionSpace(), LinearSpace())}
