"""The C++ extension. Tensors are addresses (0 for none), which fastgpt.cpu has checked."""

def blas() -> str | None: ...
def has_openmp() -> bool: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def limit_threads(most: int, within_affinity: bool = True) -> None: ...
def usable_threads(threads: int, /) -> int: ...
def layer_norm(
    x: int,
    branch: int,
    weight: int,
    bias: int,
    total: int,
    y: int,
    mean: int,
    rstd: int,
    rows: int,
    cols: int,
    eps: float,
    seed: int,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def norm_partials(rows: int, cols: int, /) -> int: ...
def layer_norm_backward(
    fields: list[int], dbranch: int, seed: int, dropout_p: float, threads: int, /
) -> None: ...
def bias_gelu(x: int, bias: int, y: int, rows: int, cols: int, threads: int, /) -> None: ...
def bias_gelu_backward(
    dy: int, x: int, bias: int, dx: int, dbias: int, rows: int, cols: int, threads: int, /
) -> None: ...
def causal_attention(
    q: int,
    k: int,
    v: int,
    out: int,
    softmax: int,
    scale: float,
    shape: list[int],
    seed: int,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def causal_attention_backward(
    tensors: list[int],
    scale: float,
    shape: list[int],
    gradients: list[int],
    seed: int,
    dropout_p: float,
    threads: int,
    /,
) -> None: ...
def dropout(x: int, rows: int, cols: int, seed: int, p: float, threads: int, /) -> None: ...
def embedding(fields: list[int], y: int, threads: int, /) -> None: ...
def embedding_backward(
    fields: list[int],
    dy: int,
    dtok: int,
    vocab: int,
    dpos: int,
    context: int,
    threads: int,
    /,
) -> None: ...
def ask_for_large_pages(block: int, size: int) -> None: ...
def few_rows(column_major: bool) -> int: ...
def deepest_alike() -> int: ...
def product_scratch(backward: bool, /) -> int: ...
def linear(
    weight: tuple[int, ...], x: int, y: int, rows: int, workspace: int, threads: int, /
) -> None: ...
def linear_backward(
    weight: tuple[int, ...],
    dy: int,
    x: int,
    dx: int,
    gradient: tuple[int, ...],
    rows: int,
    workspace: int,
    threads: int,
    /,
) -> None: ...
def linear_cross_entropy_workspace(rows: int, vocab: int, threads: int, /) -> int: ...
def linear_cross_entropy(
    weight: tuple[int, ...],
    x: int,
    targets: int,
    ignore: int,
    loss: int,
    upstream: int,
    dx: int,
    gradient: tuple[int, ...],
    rows: int,
    workspace: int,
    threads: int,
    /,
) -> None: ...
def block_kept(step: list[int], /) -> int: ...
def block_step_workspace(step: list[int], backward: bool, threads: int, /) -> int: ...
def block_step(step: list[int], block: list[int], eps: float, threads: int, /) -> None: ...
def block_step_backward(
    step: list[int],
    block: list[int],
    dy: int,
    dx: int,
    gradients: list[int],
    threads: int,
    /,
) -> None: ...
def forward_workspace(fields: list[int], threads: int, /) -> int: ...
def forward(fields: list[int], blocks: list[int], eps: float, threads: int, /) -> None: ...
def multiply_adds_float32(ends: int, pieces: int, threads: int, /) -> int: ...
def read_float32(
    block: int, size: int, piece: int, ends: int, pieces: int, threads: int, /
) -> None: ...
