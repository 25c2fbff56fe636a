"""Train a model file under a plan, as in

    autoplan plan examples/gpt.py --gpus 8 -o plan.yaml
    torchrun --nproc-per-node 8 examples/train.py examples/gpt.py plan.yaml --steps 100 --checkpoint checkpoints/gpt

Stopped and started again, with this plan or another, it goes on where the last checkpoint was written.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

import autoplan

LEARNABLE = 16  # so many different samples there are: few enough to be learnt by heart


def sample(inputs, index: int) -> dict:
    """Sample `index` of the synthetic data: always the same, so that every plan sees the same batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index % LEARNABLE)
        return inputs(1)


def batch(inputs, step: int, parallel, device: torch.device) -> dict:
    """This dp rank's share of the global batch of `step`."""
    size = parallel.plan.workload.global_batch
    share = size // parallel.dp_size
    first = step * size + parallel.dp_rank * share
    samples = [sample(inputs, first + i) for i in range(share)]
    return {key: torch.cat([s[key] for s in samples]).to(device) for key in samples[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model.py, or model.py?size=1B, with build_model and example_inputs")
    parser.add_argument("plan", help="plan.yaml")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--checkpoint", type=Path, help="folder to write to, and to resume from")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--time", type=Path, help="file for the steps' times, for `autoplan calibrate`")
    args = parser.parse_args()

    loaded = autoplan.load_model(args.model)
    plan = autoplan.load_plan(args.plan)
    parallel = autoplan.apply(loaded.build, plan, loss_fn=loaded.loss_fn, inputs=loaded.example_inputs)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=args.lr)
    device = next(parallel.parameters()).device

    start = 0
    if args.checkpoint and args.checkpoint.exists():
        start = parallel.load(args.checkpoint, optimizer)
    timer = autoplan.Timer(args.time, plan=plan) if args.time else None
    for step in range(start, args.steps):
        samples = batch(loaded.example_inputs, step, parallel, device)
        with timer.step() if timer else nullcontext():
            loss = parallel.step(samples)
            parallel.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1:5d}  loss {loss.item():.4f}", flush=True)
        if args.checkpoint and (step + 1) % args.every == 0:
            parallel.save(args.checkpoint, optimizer, step=step + 1)
    if timer:
        timer.write()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
