"""How many rows a chunk of logits gets: a byte budget, then the arithmetic of waves and of the dW accumulation.

Of the three matmuls of a chunk of C rows, in units of one row of one ideal matmul (2*V*D flops):
    logits  C                (V is large: enough tiles to fill any GPU)
    dX      its C x D output, in 128 x 256 tiles, runs in whole waves of the GPU's processors
    dW      C + DW_ROWS: the float32 read-modify-write of (V, D) costs at most as much as 1064 rows (H100: 798 TFLOP/s
            against 3.0 TB/s, both measured; of large chunks a part hides behind the matmul, bench/NOTES.md). The first
            chunk only writes; that saving is the same for every plan
"""

TILE_ROWS, TILE_COLUMNS = 128, 256
DW_ROWS = 1064
BUDGET_BYTES = 4 << 30
BUDGET_SHARE = 20  # never more than 1/20 of the device's memory


def budget_bytes(total_memory_bytes: int | None) -> int:
    return BUDGET_BYTES if total_memory_bytes is None else min(BUDGET_BYTES, total_memory_bytes // BUDGET_SHARE)


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
