"""The C++ extension. Tensors are addresses (0 for none), which fastgpt.cpu has checked."""

openmp: bool

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
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
    threads: int,
    /,
) -> None: ...
def bias_gelu(x: int, bias: int, y: int, rows: int, cols: int, threads: int, /) -> None: ...
def causal_attention(
    q: int,
    q_strides: tuple[int, ...],
    k: int,
    k_strides: tuple[int, ...],
    v: int,
    v_strides: tuple[int, ...],
    out: int,
    out_strides: tuple[int, ...],
    lse: int,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    scale: float,
    threads: int,
    /,
) -> None: ...
def forward_workspace(fields: list[int], threads: int, /) -> int: ...
def forward(fields: list[int], blocks: list[int], eps: float, threads: int, /) -> None: ...
