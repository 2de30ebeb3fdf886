"""The Triton kernels between the two products: one program walks one row of logits, in fp32 and in a fixed order.
Logits become probabilities (teacher) or the gradient (student), each row read twice."""

from __future__ import annotations

from orthrus_triton._triton import tl, triton


@triton.jit
def _row_softmax(logits_ptr, VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, LOG2_E: tl.constexpr):
    """A row's largest logit, the base-2 logarithm of the sum of exp(logit - largest), and its most probable token,
    the first of equals."""
    row_max = tl.full((), float("-inf"), tl.float32)
    row_sum = tl.full((), 0.0, tl.float32)
    choice = tl.full((), 0, tl.int32)
    for start in range(0, VOCAB, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        # [BLOCK_V]
        logits = tl.load(logits_ptr + cols, mask=cols < VOCAB, other=float("-inf"))
        tile_max, place = tl.max(logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
        choice = tl.where(tile_max > row_max, start + place, choice)
        new_max = tl.maximum(row_max, tile_max)
        tile_sum = tl.sum(tl.exp2((logits - new_max) * LOG2_E), axis=0)
        row_sum = row_sum * tl.exp2((row_max - new_max) * LOG2_E) + tile_sum
        row_max = new_max
    return row_max, tl.log2(row_sum), choice


@triton.jit
def teacher_kernel(
    logits_ptr, negative_entropy_ptr, choice_ptr, VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, LOG2_E: tl.constexpr
):  # fmt: skip
    """Grid (teacher positions): a row of logits becomes its probabilities."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * VOCAB
    row_max, log_sum, choice = _row_softmax(logits_ptr, VOCAB, BLOCK_V, LOG2_E)
    negative_entropy = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, VOCAB, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < VOCAB
        # [BLOCK_V]
        log_probs = (tl.load(logits_ptr + cols, mask=mask, other=0.0) - row_max) * LOG2_E - log_sum
        probs = tl.exp2(log_probs)
        # a token whose logit is -inf has probability 0 and adds nothing
        negative_entropy += tl.where(mask & (probs > 0.0), probs * log_probs, 0.0)
        tl.store(logits_ptr + cols, probs, mask=mask)
    tl.store(negative_entropy_ptr + row, tl.sum(negative_entropy, axis=0) / LOG2_E)
    tl.store(choice_ptr + row, choice.to(tl.int64))


@triton.jit
def dense_rows_kernel(
    logits_ptr, probs_ptr, line_ptr, grad_ptr, cross_entropy_ptr, choice_ptr,
    VOCAB: tl.constexpr, BLOCK_V: tl.constexpr, LOG2_E: tl.constexpr, WITH_GRAD: tl.constexpr,
):  # fmt: skip
    """Grid (rows): a student row against line line[row] of the teacher's probabilities. grad may be the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * VOCAB
    probs_ptr += tl.load(line_ptr + row) * VOCAB
    row_max, log_sum, choice = _row_softmax(logits_ptr, VOCAB, BLOCK_V, LOG2_E)
    cross_entropy = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, VOCAB, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < VOCAB
        # [BLOCK_V]
        log_probs = (tl.load(logits_ptr + cols, mask=mask, other=0.0) - row_max) * LOG2_E - log_sum
        teacher = tl.load(probs_ptr + cols, mask=mask, other=0.0)
        cross_entropy -= tl.where(teacher > 0.0, teacher * log_probs, 0.0)
        if WITH_GRAD:
            grad = tl.exp2(log_probs) - teacher
            tl.store(grad_ptr + row * VOCAB + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(cross_entropy_ptr + row, tl.sum(cross_entropy, axis=0) / LOG2_E)
    tl.store(choice_ptr + row, choice.to(tl.int64))


@triton.jit
def listed_rows_kernel(
    logits_ptr, ids_ptr, probs_ptr, grad_ptr, cross_entropy_ptr, choice_ptr,
    VOCAB: tl.constexpr, NUM_IDS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, LOG2_E: tl.constexpr,
    WITH_GRAD: tl.constexpr,
):  # fmt: skip
    """Grid (rows): a student row against the probabilities of a few listed tokens. grad may be the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * VOCAB
    grad_ptr += row * VOCAB
    row_max, log_sum, choice = _row_softmax(logits_ptr, VOCAB, BLOCK_V, LOG2_E)
    listed = tl.arange(0, BLOCK_K)
    is_listed = listed < NUM_IDS
    # [BLOCK_K]
    ids = tl.load(ids_ptr + row * NUM_IDS + listed, mask=is_listed, other=0)
    teacher = tl.load(probs_ptr + row * NUM_IDS + listed, mask=is_listed, other=0.0)
    log_probs = (tl.load(logits_ptr + ids, mask=is_listed, other=0.0) - row_max) * LOG2_E - log_sum
    cross_entropy = -tl.sum(tl.where(teacher > 0.0, teacher * log_probs, 0.0), axis=0)
    tl.store(cross_entropy_ptr + row, cross_entropy / LOG2_E)
    tl.store(choice_ptr + row, choice.to(tl.int64))
    if WITH_GRAD:
        tl.debug_barrier()  # the listed logits are read before any thread writes over them
        for start in range(0, VOCAB, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            # [BLOCK_V]
            logits = tl.load(logits_ptr + cols, mask=cols < VOCAB, other=0.0)
            probs = tl.exp2((logits - row_max) * LOG2_E - log_sum)
            tl.store(grad_ptr + cols, probs.to(grad_ptr.dtype.element_ty), mask=cols < VOCAB)
        tl.debug_barrier()  # and the listed gradients written after the row's
        tl.store(grad_ptr + ids, (tl.exp2(log_probs) - teacher).to(grad_ptr.dtype.element_ty), mask=is_listed)
