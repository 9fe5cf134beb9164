"""The peers of benches/peers.rs that live in Python; that file says what is measured.

Started by it with the number of threads and two .npy files (images, labels). Says which versions it has, then answers
each line `WORKLOAD PEER WARM_UP TIMED` on stdin with the milliseconds that the timed steps took.
"""

import sys
import time
from importlib.metadata import version

import ivon
import numpy
import torch
from torch.nn.functional import cross_entropy

# The same in peers.rs.
LR = 1e-3
IVON = {"lr": 0.1, "ess": 60_000.0, "hess_init": 0.1}
BATCH = 128


def optimizer(peer, weights):
    if peer == "torch-fused-adam":
        return torch.optim.Adam(weights, lr=LR, fused=True)
    if peer == "torch-foreach-adam":
        return torch.optim.Adam(weights, lr=LR, foreach=True)
    assert peer == "ivon-opt", peer
    return ivon.IVON(weights, **IVON)


def resnet18():
    shapes = []

    def convolution(to, source, side):
        shapes.extend([(to, source, side, side), (to,), (to,)])

    convolution(64, 3, 7)
    width = 64
    for stage in (64, 128, 256, 512):
        for _block in range(2):
            convolution(stage, width, 3)
            convolution(stage, stage, 3)
            if stage != width:
                convolution(stage, width, 1)
            width = stage
    shapes.extend([(1000, width), (1000,)])
    weights = [torch.nn.Parameter(0.05 * torch.randn(shape)) for shape in shapes]
    assert (len(weights), sum(w.numel() for w in weights)) == (62, 11_689_512)
    return weights


def batches(images, labels):
    while True:
        for rows in torch.randperm(len(images)).split(BATCH):
            if len(rows) == BATCH:
                yield images.index_select(0, rows), labels.index_select(0, rows)


def gradients_given(peer):
    weights = resnet18()
    for w in weights:
        w.grad = 0.01 * torch.randn_like(w)
    opt = optimizer(peer, weights)
    if peer != "ivon-opt":
        return opt.step

    def step():
        with opt.sampled_params(train=True):
            pass
        opt.step()

    return step


def training(peer, width, data):
    linear, relu = torch.nn.Linear, torch.nn.ReLU()
    net = torch.nn.Sequential(linear(784, width), relu, linear(width, width), relu, linear(width, 10))
    opt = optimizer(peer, net.parameters())
    data = batches(*data)

    def differentiate(x, y):
        opt.zero_grad()
        cross_entropy(net(x), y).backward()

    def step():
        x, y = next(data)
        if peer == "ivon-opt":
            with opt.sampled_params(train=True):
                differentiate(x, y)
        else:
            differentiate(x, y)
        opt.step()

    return step


def build(workload, peer, data):
    if workload == "resnet18":
        return gradients_given(peer)
    return training(peer, int(workload.removeprefix("epoch-mnist-")), data)


def main():
    threads, images, labels = sys.argv[1:]
    torch.set_num_threads(int(threads))
    data = [torch.from_numpy(numpy.load(path)) for path in (images, labels)]
    print(f"PyTorch {torch.__version__}, ivon-opt {version('ivon-opt')}", flush=True)
    steps = {}
    for line in sys.stdin:
        workload, peer, warm_up, timed = line.split()
        if (workload, peer) not in steps:
            steps[workload, peer] = build(workload, peer, data)
        step = steps[workload, peer]
        for _ in range(int(warm_up)):
            step()
        start = time.perf_counter()
        for _ in range(int(timed)):
            step()
        print(1e3 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # the other process was stopped
        sys.exit(1)
