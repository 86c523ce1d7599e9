# ruff: noqa
"""Kernels of a stage on a CUDA device one by one, beside the bandwidth or arithmetic they need.

Each is timed inside a CUDA graph, as it is used; weights are those of as many layers as a model has,
so that no cache holds them.

    python -m benchmarks.cuda_kernels
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

DEVICE = "cuda"
DTYPE = torch.bfloat16
RESULTS: list[dict[str, Any]] = []
EXPERIMENTS: list[Callable[[], None]] = []


def experiment(function: Callable[[], None]) -> Callable[[], None]:
    EXPERIMENTS.append(function)
    return function


def tell(**facts: Any) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}
    RESULTS.append(rounded)
    print(json.dumps(rounded), flush=True)


def graph_us(work: Callable[[], Any], replays: int = 5) -> float:
    """Microseconds of one call of `work`, captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return min(times)


HIDDEN, INNER, HEADS, KV, DIM, LAYERS, VOCAB = 4096, 14336, 32, 8, 128, 32, 128256
SHAPES = {
    "qkv": ((HEADS + 2 * KV) * DIM, HIDDEN),
    "out": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}


@experiment
def environment() -> None:
    import inspect

    import torch.nn.attention.varlen as varlen
    import triton

    p = torch.cuda.get_device_properties(0)
    tell(
        torch=torch.__version__, triton=triton.__version__, name=p.name, sms=p.multi_processor_count,
        memory=p.total_memory, free=torch.cuda.mem_get_info()[0], l2=p.L2_cache_size,
        varlen=str(inspect.signature(varlen.varlen_attn)),
        flash=str(torch.ops.aten._flash_attention_forward.default._schema),
    )  # fmt: skip


@experiment
def limits() -> None:
    a = torch.zeros(2**31, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    us = graph_us(lambda: b.copy_(a))
    tell(what="copy", tb_per_s=2 * a.numel() / us / 1e6)
    f = a.view(torch.float32)
    us = graph_us(lambda: f.sum())
    tell(what="sum", tb_per_s=a.numel() / us / 1e6)
    del a, b, f
    for m in (2048, 8192):
        x = torch.randn(m, 8192, dtype=DTYPE, device=DEVICE)
        w = torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE)
        us = graph_us(lambda x=x, w=w: x @ w)
        tell(what="matmul", m=m, tflops=2 * m * 8192 * 8192 / us / 1e6)


@experiment
def host() -> None:
    x = torch.zeros(1, device=DEVICE)
    pinned = torch.zeros(1024, pin_memory=True)
    big = torch.zeros(1024, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)

    def timed(work: Callable[[], Any]) -> float:
        for _ in range(10):
            work()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(200):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / 200 * 1e6

    event = torch.cuda.Event()

    def read() -> None:
        pinned.copy_(big, non_blocking=True)
        event.record()
        event.synchronize()

    tell(what="launch", us=timed(lambda: x.add_(1)))
    tell(what="launch + item", us=timed(lambda: x.add_(1).item()))
    tell(what="graph replay + item", us=timed(lambda: (graph.replay(), x.item())))
    tell(what="pinned read 4 KB", us=timed(read))
    tell(what="pinned upload 4 KB", us=timed(lambda: big.copy_(pinned, non_blocking=True)))
    tell(
        what="torch.tensor(list 128, device)",
        us=timed(lambda: torch.tensor(list(range(128)), device=DEVICE)),
    )


@experiment
def small_kernels() -> None:
    x = torch.randn(1, HIDDEN, dtype=DTYPE, device=DEVICE)
    w = torch.randn(HIDDEN, dtype=DTYPE, device=DEVICE)
    tell(
        what="100 adds in a graph, us each",
        us=graph_us(lambda: [x.add_(0) for _ in range(100)]) / 100,
    )
    tell(
        what="F.rms_norm us",
        us=graph_us(lambda: [F.rms_norm(x, (HIDDEN,), w, 1e-5) for _ in range(100)]) / 100,
    )
    y = torch.randn(128, HIDDEN, dtype=DTYPE, device=DEVICE)
    tell(
        what="F.rms_norm 128 rows us",
        us=graph_us(lambda: [F.rms_norm(y, (HIDDEN,), w, 1e-5) for _ in range(100)]) / 100,
    )


def _weights() -> list[dict[str, torch.Tensor]]:
    return [
        {n: torch.randn(s, dtype=DTYPE, device=DEVICE) * s[1] ** -0.5 for n, s in SHAPES.items()}
        for _ in range(LAYERS)
    ]


@experiment
def matvec_shapes() -> None:
    """Each shape alone, over the weights of all layers: cuBLAS and the Triton kernel."""
    from stage_worker.triton_matvec import matvec

    for name, (num_out, num_in) in SHAPES.items():
        weights = [torch.randn(num_out, num_in, dtype=DTYPE, device=DEVICE) for _ in range(LAYERS)]
        x = torch.randn(1, num_in, dtype=DTYPE, device=DEVICE)
        num_bytes = weights[0].nbytes
        us = graph_us(lambda: [F.linear(x, w) for w in weights]) / LAYERS
        tell(what="cublas M=1", shape=name, us=us, tb_per_s=num_bytes / us / 1e6)
        gated = name == "gate_up"
        outputs = num_out // 2 if gated else num_out
        out = torch.empty(outputs, dtype=DTYPE, device=DEVICE)
        norm = (
            torch.ones(num_in, dtype=DTYPE, device=DEVICE) if name in ("qkv", "gate_up") else None
        )
        expected = weights[0].float() @ (
            x[0].float()
            * (torch.rsqrt(x[0].float().square().mean() + 1e-5) if norm is not None else 1)
        )
        if gated:
            expected = F.silu(expected[:outputs]) * expected[outputs:]
        configs = [
            (2, 1024, 4),
            (2, 2048, 4),
            (4, 1024, 4),
            (4, 512, 4),
            (4, 512, 2),
            (8, 512, 4),
            (2, 4096, 8),
            (8, 1024, 8),
        ]
        for early, (bo, bi, warps) in itertools.product((False, True), configs):
            if early and (bo, bi, warps) not in configs[:4]:
                continue
            try:

                def run(w: torch.Tensor) -> torch.Tensor:
                    return matvec(
                        x,
                        w,
                        out,
                        norm=norm,
                        eps=1e-5,
                        gated=gated,
                        block_o=bo,
                        block_i=bi,
                        num_warps=warps,
                        early=early,
                    )

                run(weights[0])
                error = float((out.float() - expected).abs().max() / expected.abs().max())
                us = graph_us(lambda: [run(w) for w in weights]) / LAYERS
                tell(
                    what="triton M=1",
                    shape=name,
                    early=early,
                    block_o=bo,
                    block_i=bi,
                    warps=warps,
                    us=us,
                    tb_per_s=num_bytes / us / 1e6,
                    error=error,
                )
            except Exception as error:
                tell(
                    what="triton M=1",
                    shape=name,
                    early=early,
                    block_o=bo,
                    block_i=bi,
                    failed=repr(error)[:200],
                )
        del weights


@experiment
def layer_chains() -> None:
    """The four matrices of 32 layers one after another, with norms, gate and residuals."""
    from stage_worker.triton_matvec import matvec

    layers = _weights()
    total = sum(w.nbytes for layer in layers for w in layer.values())
    norm = torch.ones(HIDDEN, dtype=DTYPE, device=DEVICE)
    hidden = torch.randn(1, HIDDEN, dtype=DTYPE, device=DEVICE)
    qkv = torch.empty(1, SHAPES["qkv"][0], dtype=DTYPE, device=DEVICE)
    inner = torch.empty(1, INNER, dtype=DTYPE, device=DEVICE)

    def plain() -> None:
        h = hidden
        for layer in layers:
            a = F.linear(F.rms_norm(h, (HIDDEN,), norm, 1e-5), layer["qkv"])[:, :HIDDEN]
            h = h + F.linear(a, layer["out"])
            g, u = F.linear(F.rms_norm(h, (HIDDEN,), norm, 1e-5), layer["gate_up"]).chunk(2, -1)
            h = h + F.linear(F.silu(g) * u, layer["down"])

    def fused(early: bool, bo: int, bi: int, warps: int) -> None:
        how = {"block_o": bo, "block_i": bi, "num_warps": warps, "early": early, "eps": 1e-5}
        for layer in layers:
            matvec(hidden, layer["qkv"], qkv, norm=norm, **how)
            matvec(qkv, layer["out"], hidden, addend=hidden, **how)
            matvec(hidden, layer["gate_up"], inner, norm=norm, gated=True, **how)
            matvec(inner, layer["down"], hidden, addend=hidden, **how)

    initial, first = torch.randn_like(hidden), None
    us = graph_us(plain)
    tell(what="layers, torch", us=us, tb_per_s=total / us / 1e6)
    for early, (bo, bi, warps) in itertools.product(
        (False, True), [(2, 1024, 4), (4, 512, 4), (4, 1024, 4), (2, 2048, 4), (4, 512, 2)]
    ):
        try:
            hidden.copy_(initial)
            fused(early, bo, bi, warps)
            got = hidden.clone()
            difference = (
                float((got - first).abs().max() / first.abs().max()) if first is not None else 0.0
            )
            first = got if first is None else first
            us = graph_us(lambda: fused(early, bo, bi, warps))
            tell(
                what="layers, triton",
                early=early,
                block_o=bo,
                block_i=bi,
                warps=warps,
                us=us,
                tb_per_s=total / us / 1e6,
                difference=difference,
            )
        except Exception as error:
            tell(what="layers, triton", early=early, block_o=bo, failed=repr(error)[:200])


@experiment
def products() -> None:
    """cuBLAS at batch sizes of decode, over all layers."""
    layers = _weights()
    for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048):
        for name, (_, num_in) in SHAPES.items():
            x = torch.randn(m, num_in, dtype=DTYPE, device=DEVICE)
            us = graph_us(lambda: [F.linear(x, layer[name]) for layer in layers], 3) / LAYERS
            num_bytes = layers[0][name].nbytes
            tell(
                what="cublas",
                m=m,
                shape=name,
                us=us,
                tb_per_s=num_bytes / us / 1e6,
                tflops=2 * m * layers[0][name].numel() / us / 1e6,
            )


def _items(lengths: list[int], budget: int, tile: int) -> tuple[list[list[int]], list[int]]:
    size = max(tile, -(-(-(-sum(lengths) // budget)) // tile) * tile)
    items: list[list[int]] = []
    firsts = []
    for row, length in enumerate(lengths):
        starts = range(0, length, size)
        firsts.append(len(items))
        items += [[row, s, min(s + size, length), len(starts)] for s in starts]
    return items, firsts


@experiment
def decode_attention_kernel() -> None:
    from stage_worker.triton_decode import decode_attention, decode_scratch

    block, num_layers = 16, 4
    for batch, context in [
        (1, 128),
        (1, 1024),
        (1, 4096),
        (1, 32768),
        (32, 512),
        (32, 2048),
        (128, 512),
        (128, 2048),
    ]:
        need = batch * -(-context // block)
        num_blocks = max(need, 20000 // 1)
        caches = [
            torch.randn(2, num_blocks, block, KV, DIM, dtype=DTYPE, device=DEVICE)
            for _ in range(num_layers)
        ]
        order = torch.randperm(num_blocks, device=DEVICE)[:need].int()
        tables = order.view(batch, -1)
        queries = torch.randn(batch, HEADS + 2 * KV, DIM, dtype=DTYPE, device=DEVICE)[:, :HEADS]
        out = torch.empty(batch, HEADS, DIM, dtype=DTYPE, device=DEVICE)
        slots = (tables.long()[:, :, None] * block + torch.arange(block, device=DEVICE)).flatten(1)
        k, v = (c.flatten(0, 1)[slots].transpose(1, 2)[:, :, :context] for c in caches[0])
        q = (
            queries.view(batch, KV, HEADS // KV, DIM)
            if queries.is_contiguous()
            else queries.reshape(batch, KV, -1, DIM)
        )
        expected = (
            F.scaled_dot_product_attention(q.float(), k.float(), v.float()).reshape(
                batch, HEADS, DIM
            )
            if batch * context < 40000
            else None
        )
        num_bytes = batch * context * 2 * KV * DIM * 2
        del k, v
        for per_sm, tile, warps, stages in [
            (2, 64, 4, 2),
            (4, 64, 4, 2),
            (2, 64, 4, 3),
            (2, 128, 4, 2),
            (2, 32, 4, 3),
            (4, 32, 2, 3),
            (2, 128, 8, 2),
        ]:
            items, firsts = _items([context] * batch, per_sm * 132 // KV, tile)
            try:
                scratch = decode_scratch(len(items), batch, HEADS, KV, DIM, torch.device(DEVICE))
                ti = torch.tensor(items, dtype=torch.int32, device=DEVICE)
                tf = torch.tensor(firsts, dtype=torch.int32, device=DEVICE)

                def run(c: torch.Tensor) -> None:
                    decode_attention(
                        queries,
                        c[0],
                        c[1],
                        tables,
                        ti,
                        tf,
                        scratch,
                        out,
                        tile=tile,
                        num_warps=warps,
                        num_stages=stages,
                    )

                run(caches[0])
                error = None
                if expected is not None:
                    error = float((out.float() - expected).abs().max())
                us = graph_us(lambda: [run(c) for c in caches]) / num_layers
                tell(
                    what="decode attention",
                    batch=batch,
                    context=context,
                    items=len(items),
                    per_sm=per_sm,
                    tile=tile,
                    warps=warps,
                    stages=stages,
                    us=us,
                    tb_per_s=num_bytes / us / 1e6,
                    error=error,
                )
            except Exception as error:
                tell(
                    what="decode attention",
                    batch=batch,
                    context=context,
                    tile=tile,
                    failed=repr(error)[:200],
                )
        del caches


@experiment
def prefill_attention_kernels() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    from stage_worker.triton_prefill import prefill_attention, tokens_per_tile

    block = 16
    for n, start in [(512, 0), (2048, 0), (8192, 0), (512, 7680), (2048, 6144)]:
        context = start + n
        num_blocks = -(-context // block) + 100
        k_pages, v_pages = torch.randn(2, num_blocks, block, KV, DIM, dtype=DTYPE, device=DEVICE)
        tables = torch.randperm(num_blocks, device=DEVICE)[: -(-context // block)].int()[None]
        q = torch.randn(n, HEADS, DIM, dtype=DTYPE, device=DEVICE)
        slots = (tables[0].long()[:, None] * block + torch.arange(block, device=DEVICE)).flatten()[
            :context
        ]
        flop = 4 * HEADS * DIM * (n * start + n * (n + 1) / 2)
        gather = lambda: [
            p.view(-1, KV * DIM).index_select(0, slots).view(-1, KV, DIM)
            for p in (k_pages, v_pages)
        ]
        k, v = gather()
        us = graph_us(gather)
        tell(what="gather", n=n, start=start, us=us)
        expected = None

        def timed(name: str, work: Callable[[], torch.Tensor]) -> None:
            nonlocal expected
            try:
                got = work()
                if expected is None:
                    expected = got.float()
                error = float((got.float() - expected).abs().max())
                us = graph_us(work)
                tell(what=name, n=n, start=start, us=us, tflops=flop / us / 1e6, difference=error)
            except Exception as error:
                tell(what=name, n=n, start=start, failed=repr(error)[:300])

        cq = torch.tensor([0, n], dtype=torch.int32, device=DEVICE)
        ck = torch.tensor([0, context], dtype=torch.int32, device=DEVICE)
        flash = torch.ops.aten._flash_attention_forward
        timed("aten flash varlen", lambda: flash(q, k, v, cq, ck, n, context, 0.0, True, False)[0])
        timed(
            "varlen_attn window",
            lambda: varlen_attn(q, k, v, cq, ck, n, context, window_size=(-1, 0)),
        )
        timed(
            "varlen_attn is_causal",
            lambda: varlen_attn(q, k, v, cq, ck, n, context, is_causal=True),
        )
        if start == 0:
            qt, kt, vt = (x.transpose(0, 1)[None] for x in (q, k, v))
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

                def sdpa(backend: SDPBackend = backend) -> torch.Tensor:
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(
                            qt, kt, vt, is_causal=True, enable_gqa=True
                        )[0].transpose(0, 1)

                timed(f"sdpa {backend.name}", sdpa)
        for bm, tile, warps, stages in [
            (128, 64, 8, 3),
            (128, 128, 8, 2),
            (64, 64, 4, 3),
            (128, 64, 4, 3),
            (128, 32, 8, 3),
        ]:
            per = tokens_per_tile(HEADS, KV, bm)
            tiles = [[0, i, start + i, min(per, n - i)] for i in range(0, n, per)]
            tiles.reverse()  # the longest first
            tt = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
            out = torch.empty_like(q)

            def paged() -> torch.Tensor:
                prefill_attention(
                    q,
                    k_pages,
                    v_pages,
                    tables,
                    tt,
                    None,
                    out,
                    block_m=bm,
                    tile=tile,
                    num_warps=warps,
                    num_stages=stages,
                )
                return out

            timed(f"triton paged {bm}x{tile} w{warps} s{stages}", paged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--json")
    args = parser.parse_args()
    order = [
        environment,
        limits,
        host,
        small_kernels,
        layer_chains,
        decode_attention_kernel,
        prefill_attention_kernels,
        matvec_shapes,
        products,
    ]
    for function in order:
        if args.only and function.__name__ not in args.only:
            continue
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                function()
        except Exception:
            traceback.print_exc()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"# {function.__name__}: {time.perf_counter() - started:.1f} s", flush=True)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(RESULTS, file)


if __name__ == "__main__":
    main()
