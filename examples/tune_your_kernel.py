"""A kernel of your own with tuned configurations: declare the values to try, the key and a reference.
Run it as it is: on a GPU it tunes itself for H = 4096 and prints the winner; on a CPU set TRITON_INTERPRET=1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from orthrus_triton.autotune import describe, tunable, tune


@triton.jit
def scaled_add_kernel(x_ptr, y_ptr, scale_ptr, out_ptr, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < H
    x = tl.load(x_ptr + row * H + cols, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + row * H + cols, mask=mask).to(tl.float32)
    scale = tl.load(scale_ptr + cols, mask=mask).to(tl.float32)
    tl.store(out_ptr + row * H + cols, (x + y * scale).to(out_ptr.dtype.element_ty), mask=mask)


@tunable(
    "scaled_add",
    kernels=[scaled_add_kernel],
    space={"BLOCK": [256, 512, 1024, 2048], "num_warps": [2, 4, 8]},
    default={"BLOCK": 1024, "num_warps": 4},
    key={"H": lambda x, y, scale: scale.shape[0]},  # the weight's shape, never the number of rows
    inputs=lambda key, rows, randn: (randn(rows, key["H"]), randn(rows, key["H"]), randn(key["H"])),
    reference=lambda x, y, scale: x + y * scale,
    rows_of=(0, 1),  # x and y have rows, scale has none
)
def scaled_add(x, y, scale, config):
    """x [rows, H] + y [rows, H] * scale [H]. The configuration is looked up unless the caller passes `config=`."""
    out, (rows, H) = torch.empty_like(x), x.shape
    scaled_add_kernel[(rows, triton.cdiv(H, config["BLOCK"]))](
        x, y, scale, out, H=H, BLOCK=config["BLOCK"], **config.launch, enable_fp_fusion=False
    )
    return out


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, scale = (torch.randn(*shape, device=device) for shape in [(3, 4096), (3, 4096), (4096,)])
    torch.testing.assert_close(scaled_add(x, y, scale), x + y * scale)
    try:
        tune(scaled_add.problem("bf16", H=4096), budget=60)
    except ValueError as error:  # without a GPU there is nothing to time
        print(error)
    print(*describe([scaled_add.problem("bf16", H=4096)]), sep="\n")
