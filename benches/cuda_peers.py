"""PyTorch's optimizers beside those of benches/cuda.rs, which says what is measured and starts this.

The argument is a JSON object: the name of a model, the shapes of its parameters, how long to measure. The answer is a
list of cases. Without a GPU it runs on the CPU: a test of the benchmark.
"""

import json
import sys
import time

import torch


def timed(weights, step, seconds, repetitions):
    def run(n):
        weights[0].view(-1)[0].item()
        start = time.perf_counter()
        for _ in range(n):
            step()
        weights[0].view(-1)[0].item()
        return time.perf_counter() - start

    run(3)
    n = min(max(int(seconds / repetitions / (run(5) / 5)), 3), 10_000)
    return 1e3 * sorted(run(n) / n for _ in range(repetitions))[repetitions // 2]


def main():
    request = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = []
    for name, kind in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        weights = [torch.nn.Parameter(torch.full(s, 0.02, dtype=kind, device=device)) for s in request["shapes"]]
        for w in weights:
            w.grad = torch.full_like(w, 1e-3)
        peers = {
            "torch-fused-adam": torch.optim.Adam(weights, lr=1e-4, fused=True),
            "torch-foreach-adam": torch.optim.Adam(weights, lr=1e-4, foreach=True),
            "torch-fused-sgd": torch.optim.SGD(weights, lr=1e-3, fused=True),
        }
        for peer, opt in peers.items():
            with torch.no_grad():
                ms = timed(weights, opt.step, request["seconds"], request["repetitions"])
            cases.append({"case": f"{request['model']}/{name}/{peer}", "ms": ms, "torch": torch.__version__})
            opt.state.clear()
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
