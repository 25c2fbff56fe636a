"""Train a Hugging Face model under a plan with transformers' own Trainer, as in

    autoplan plan examples/hf_llama.py --gpus 8 -o plan.yaml
    torchrun --nproc-per-node 8 examples/hf_trainer.py examples/hf_llama.py plan.yaml --steps 100 --output out

`PlannedTrainer` is all that it takes: copy it into your script. Datasets, callbacks, logging, learning rates and the command line
of `TrainingArguments` stay the Trainer's. It needs `pip install accelerate`, as every Trainer does.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import Trainer, TrainingArguments

import autoplan

LEARNABLE = 16  # so many different samples there are: few enough to be learnt by heart


class PlannedTrainer(Trainer):
    """A Trainer of a model that autoplan has made parallel, with or without a pipeline.

    A training step is a whole global batch: what `args` say of batch sizes and accumulation gives way to the plan. Checkpoints
    can be read under another plan; `save_model` writes what `from_pretrained` reads.
    """

    def __init__(self, parallel, args: TrainingArguments, **rest) -> None:
        self.parallel = parallel
        self.share = parallel.plan.workload.global_batch // parallel.dp_size
        args.per_device_train_batch_size = args.per_device_eval_batch_size = self.share
        args.gradient_accumulation_steps = 1
        super().__init__(model=parallel.module, args=args, **rest)
        self.model_accepts_loss_kwargs = False  # the mean of a batch is that of its micro-batches
        self.is_distributed_loading_by_transformers = True  # the Trainer's word for: wrap nothing, it is sharded

    def _move_model_to_device(self, model, device) -> None:
        """It is where it has to be."""

    def _sync_replicated_trainable_parameters(self, model) -> None:
        """There are none that the plan leaves alone; those of other stages are on meta."""

    def _loader(self, dataset: Dataset, shuffle: bool) -> DataLoader:
        """Ranks of one data-parallel group read the same samples."""
        at = {"num_replicas": self.parallel.dp_size, "rank": self.parallel.dp_rank}
        sampler = DistributedSampler(dataset, **at, shuffle=shuffle, seed=self.args.seed, drop_last=True)
        loader = DataLoader(dataset, self.share, sampler=sampler, collate_fn=self.data_collator, drop_last=True)
        loader.set_epoch = sampler.set_epoch  # which the Trainer calls
        return loader

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, shuffle=True)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Of this rank's parameters: in a pipeline those of its stages."""
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        decaying = set(self.get_decay_parameter_names(self.model))
        mine = [(name, parameter) for name, parameter in self.model.named_parameters() if not parameter.is_meta]
        groups = [
            {"params": [p for name, p in mine if (name in decaying) == decays], "weight_decay": self.args.weight_decay * decays}
            for decays in (True, False)
        ]
        self.optimizer = kind(groups, **settings)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        model.train()
        return self.parallel.step(self._prepare_inputs(inputs)).detach()

    def _clip_grad_norm(self, model) -> torch.Tensor:
        return self.parallel.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None) -> float:
        return float(self.parallel.clip_grad_norm_(float("inf")) if grad_norm is None else grad_norm)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        loader = self._loader(eval_dataset or self.eval_dataset, shuffle=False)
        losses = [self.parallel.evaluate(self._prepare_inputs(inputs)).item() for inputs in loader]
        metrics = {f"{metric_key_prefix}_loss": sum(losses) / len(losses)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.parallel.save_weights(folder)
        if self.args.should_save and hasattr(self.model, "config"):
            self.model.config.save_pretrained(folder)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.parallel.save(folder / "planned", self.optimizer.optimizer, self.state.global_step)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """All of it comes with the optimizer."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is not None:
            self.parallel.load(Path(checkpoint) / "planned", self.optimizer.optimizer)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


class Synthetic(Dataset):
    """Samples of random tokens, always the same."""

    def __init__(self, inputs) -> None:
        self.samples = []
        for index in range(LEARNABLE):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(index)
                self.samples.append({key: value[0] for key, value in inputs(1).items()})

    def __len__(self) -> int:
        return 64 * LEARNABLE

    def __getitem__(self, index: int) -> dict:
        return self.samples[index % LEARNABLE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model.py, or model.py?size=1B, of a Hugging Face model")
    parser.add_argument("plan", help="plan.yaml")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--output", default="out", help="folder for checkpoints and the weights at the end")
    parser.add_argument("--resume", help="a checkpoint of it, written under any plan")
    asked = parser.parse_args()

    settings = {"max_steps": asked.steps, "save_steps": asked.every, "learning_rate": asked.lr, "logging_steps": 1}
    here = {"use_cpu": not torch.accelerator.is_available(), "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(asked.output, **settings, **here)
    loaded = autoplan.load_model(asked.model)
    parallel = autoplan.apply(loaded.build, autoplan.load_plan(asked.plan), inputs=loaded.example_inputs)
    trainer = PlannedTrainer(parallel, arguments, train_dataset=Synthetic(loaded.example_inputs))
    trainer.train(resume_from_checkpoint=asked.resume)
    trainer.save_model()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
