"""How many rows a chunk of logits gets: a byte budget, then the arithmetic of waves and of the dW accumulation.

Of the three matmuls of a chunk of C rows, in units of one row of one ideal matmul (2*V*D flops):
    logits  C                (V is large: enough tiles to fill any GPU)
    dX      its C x D output, in 128 x 256 tiles, runs in whole waves of the GPU's processors
    dW      C + DW_ROWS: the float32 read-modify-write of (V, D) costs at most as much as 1064 rows (H100: 798 TFLOP/s
            against 3.0 TB/s, both measured; of large chunks a part hides behind the matmul, bench/NOTES.md). The first
            chunk only writes; that saving is the same for every plan

The budget: beyond inputs and returned gradients a float32 dW and EXTRA_BYTES, and for the logits with their gradient
never more than a share of the device's memory. On AMD, where no gradient lies over wider logits, up to half as much
again.
"""

TILE_ROWS, TILE_COLUMNS = 128, 256
DW_ROWS = 1064
EXTRA_BYTES = 1 << 30
SHARE = 20  # 1/20 of the device's memory
LOGIT_ROWS = 1024  # of float32 logits at a time, where the bfloat16 gradient of a longer chunk is kept


def within(most: int, total_memory_bytes: int | None) -> int:
    """`most` bytes, or the device's share where that is less; None: the interpreter's."""
    return most if total_memory_bytes is None else min(most, total_memory_bytes // SHARE)


def chunk_cost(num_rows: int, dim: int, num_processors: int) -> float:
    """Cost of one chunk in rows of an ideal matmul."""
    tiles = -(-num_rows // TILE_ROWS) * -(-dim // TILE_COLUMNS)
    waves = -(-tiles // num_processors)
    dx = waves * num_processors * TILE_ROWS * TILE_COLUMNS / dim
    return num_rows + dx + num_rows + DW_ROWS


def chunk_rows(num_rows: int, dim: int, row_bytes: int, num_processors: int, budget: int) -> int:
    """Rows per chunk for num_rows rows whose logits take row_bytes each: the cheapest multiple of 128 in the budget."""
    largest = max(1, budget // row_bytes)
    if num_rows <= min(largest, TILE_ROWS) or largest < TILE_ROWS:
        return max(1, min(num_rows, largest))

    def cost(size: int) -> float:
        whole, rest = divmod(num_rows, size)
        last = chunk_cost(rest, dim, num_processors) if rest else 0.0
        return whole * chunk_cost(size, dim, num_processors) + last

    top = min(largest, -(-num_rows // TILE_ROWS) * TILE_ROWS)
    return min(num_rows, min(range(TILE_ROWS, top + 1, TILE_ROWS), key=lambda size: (cost(size), size)))


def rows_at_a_time(
    num_rows: int,
    dim: int,
    size: int,
    logit_bytes: int,
    gradient_bytes: int,
    num_processors: int,
    total_memory_bytes: int | None,
    beside: int = 0,
) -> tuple[int, int]:
    """(rows of a chunk, rows of its logits at a time) for (num_rows, size) logits and gradients of so many bytes each.

    beside: bytes that a row of the chunk takes elsewhere.
    A gradient lies over its logits, or, where that takes less, in a buffer of its own which LOGIT_ROWS of logits at a
    time fill. In one chunk dW is written as it is returned, and what a float32 one would take is free; in several it is
    summed in float32, and what the returned one will take is free until then.
    """
    wide, narrow = size * logit_bytes + beside, size * gradient_bytes + beside
    by_rows = LOGIT_ROWS * size * logit_bytes
    room = within(EXTRA_BYTES + 4 * size * dim, total_memory_bytes)
    if by_rows + num_rows * narrow < num_rows * wide and by_rows + num_rows * narrow <= room:
        return num_rows, LOGIT_ROWS
    if num_rows * wide <= room:
        return max(1, num_rows), max(1, num_rows)
    room = within(EXTRA_BYTES + gradient_bytes * size * dim, total_memory_bytes)
    in_place = chunk_rows(num_rows, dim, wide, num_processors, room)
    chunk = chunk_rows(num_rows, dim, narrow, num_processors, room - by_rows)
    return (chunk, min(LOGIT_ROWS, chunk)) if chunk > in_place else (in_place, in_place)
