"""Types of index: how exact, how fast and how large each one is, and which one suits a gallery."""

from onceover.base.errors import OnceoverError

TYPES = ("flat", "hnsw", "ivf", "ivf16", "ivfpq")
MIN_RECALL = 0.95  # recall@10 under which an approximate index is refused
FLAT_ROWS = 100_000  # up to this many rows exact search answers within milliseconds
MIN_TRAINING_ROWS = 256  # a smaller segment is flat, whatever the index's type
LINKS = 32  # of an HNSW node (Malkov and Yashunin 2018); twice as many in its bottom layer
CODE_DIMS = 4  # dimensions that share a 4-bit code of the product quantizer (Jégou et al. 2011, André et al. 2017)
EFFORTS = {  # tried in this order until the recall suffices: nodes visited by hnsw, cells visited by the ivf types
    "flat": (0,),
    "hnsw": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "ivf": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "ivf16": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "ivfpq": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
}
REBUILD = "build it again: index with --force"
_FLOAT_BYTES = 4
_ID_BYTES = 8
_NODE_BYTES = 16


class IndexingError(OnceoverError):
    """An index that is missing, damaged, made by other heads, or not accurate enough."""


def choose_type(rows: int, dim: int, memory: int) -> tuple[str, str]:
    """Chooses the type of index for a gallery and a memory limit in bytes; returns it with the reason.

    Raises:
        IndexingError: not even the cells of inverted lists fit.
    """
    sizes = {kind: memory_of(kind, rows, dim) for kind in TYPES}
    fits = {kind: f"takes {size / 2**20:,.0f} of {memory / 2**20:,.0f} MiB" for kind, size in sizes.items()}
    if rows <= FLAT_ROWS and sizes["flat"] <= memory:
        return "flat", f"exact search over {rows:,} rows answers within milliseconds, and {fits['flat']}"
    reasons = {
        "hnsw": "the fastest search",
        "ivf": "no room for links",
        "ivfpq": "no room for vectors",
        "ivf16": "no room for quantized vectors, the lists stay on the disk",
    }
    for kind, reason in reasons.items():
        if sizes[kind] <= memory:
            return kind, f"{rows:,} rows: {reason}, it {fits[kind]}"
    raise IndexingError(
        f"{rows:,} rows do not fit the budget: even with its lists on the disk, the index {fits['ivf16']}; "
        "raise --memory"
    )


def memory_of(kind: str, rows: int, dim: int) -> int:
    """The bytes of memory that a segment takes.

    The vectors with which ivfpq scores its candidates a second time stay on the disk, and so do the lists of ivf16.
    """
    vector = _FLOAT_BYTES * dim
    centroids = vector * cell_count(rows)
    if kind == "flat":
        return rows * vector
    if kind == "hnsw":
        return rows * (vector + 8 * LINKS + _NODE_BYTES)
    if kind == "ivf":
        return rows * (vector + _ID_BYTES) + centroids
    if kind == "ivf16":
        return centroids
    return rows * (code_count(dim) // 2 + _ID_BYTES) + centroids


def code_count(dim: int) -> int:
    """The number of 4-bit codes that stand for a quantized vector."""
    return -(-dim // CODE_DIMS)


def cell_count(rows: int) -> int:
    """The number of cells into which the ivf types divide the vectors."""
    return max(1, round(2 * rows**0.5))
