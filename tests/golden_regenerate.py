"""Makes the PyTorch and ivon-opt runs of tests/data/trajectories.json anew and compares them with the file.

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 ivon-opt==0.1.3
    venv/bin/python tests/golden_regenerate.py            # largest difference per run; fails above 1e-12
    venv/bin/python tests/golden_regenerate.py --write    # also puts the new numbers into the file

The noise is taken from the file, so both packages see what our tests see. The VOGN, SAM and bSAM runs come from
repositories that no package index has; they are left as they are.
"""

import json
import pathlib
import sys

import ivon
import torch

PATH = pathlib.Path(__file__).parent / "data" / "trajectories.json"
TORCH = {"Sgd": torch.optim.SGD, "RmsProp": torch.optim.RMSprop, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


class Network:
    """The two-layer tanh network of the file, in float64."""

    def __init__(self, problem):
        self.inputs = torch.tensor(problem["inputs"], dtype=torch.float64)
        self.targets = torch.tensor(problem["targets"])
        self.parameters, at = [], 0
        for spec in problem["parameters"]:
            shape = torch.Size(spec["shape"])
            values = problem["initial"][at : at + shape.numel()]
            at += shape.numel()
            self.parameters.append(torch.tensor(values, dtype=torch.float64).reshape(shape).requires_grad_())

    def loss(self):
        w1, b1, w2, b2 = self.parameters
        logits = torch.tanh(self.inputs @ w1.T + b1) @ w2.T + b2
        return torch.nn.functional.cross_entropy(logits, self.targets)

    def mean(self):
        return torch.cat([p.detach().flatten() for p in self.parameters]).tolist()


def torch_run(run, network):
    hyper = dict(run["hyper"])
    if "beta1" in hyper:
        hyper["betas"] = (hyper.pop("beta1"), hyper.pop("beta2"))
    optimizer = TORCH[run["algorithm"]](network.parameters, **hyper)
    for _ in run["trajectory"]:
        optimizer.zero_grad()
        loss = network.loss()
        loss.backward()
        optimizer.step()
        yield {"loss": loss.item(), "mean": network.mean()}


def ivon_run(run, network):
    hyper = dict(run["hyper"])
    samples = hyper.pop("mc_samples")
    optimizer = ivon.IVON(network.parameters, mc_samples=samples, **hyper)
    draw, given = torch.randn, iter([z for step in run["noise"] for z in step])
    # The package draws one flat vector per sample, in the order of the parameters.
    torch.randn = lambda _count, dtype, **_device: torch.tensor(next(given), dtype=dtype)
    try:
        for _ in run["trajectory"]:
            losses = []
            for _ in range(samples):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    loss = network.loss()
                    loss.backward()
                losses.append(loss.item())
            optimizer.step()
            group = optimizer.param_groups[0]
            state = {"hess": group["hess"].tolist(), "momentum": group["momentum"].tolist()}
            yield {"loss": sum(losses) / samples, "mean": network.mean(), **state}
    finally:
        torch.randn = draw


def difference(a, b):
    if isinstance(a, list):
        return max(abs(x - y) for x, y in zip(a, b, strict=True))
    return abs(a - b)


def main():
    torch.set_default_dtype(torch.float64)  # or ivon-opt rounds hess_init to float32
    data = json.loads(PATH.read_text())
    worst = 0.0
    for run in data["runs"]:
        if run["algorithm"] not in (*TORCH, "Ivon"):
            print(f"{run['name']}: left as it is ({run['source']})")
            continue
        make = ivon_run if run["algorithm"] == "Ivon" else torch_run
        new = list(make(run, Network(data["problem"])))
        gap = max(difference(step[key], old[key]) for step, old in zip(new, run["trajectory"], strict=True) for key in old)
        print(f"{run['name']}: largest difference {gap:.1e}")
        worst = max(worst, gap)
        run["trajectory"] = new
    if "--write" in sys.argv[1:]:
        PATH.write_text(json.dumps(data, separators=(",", ":")))
        print(f"written: {PATH}")
    return int(not worst < 1e-12)


if __name__ == "__main__":
    sys.exit(main())
