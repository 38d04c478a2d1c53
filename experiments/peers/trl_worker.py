"""TRL's side of experiments/compare_trl.py: one update of its GRPOTrainer on given samples, and updates that it times.

`trl_worker.py gradients FOLDER` reads the settings in FOLDER/job.json, the checkpoint in FOLDER/model, the samples in
FOLDER/samples.npz and the adapters in FOLDER/adapters.npz. For each of the job's losses, it writes FOLDER/LOSS.npz: the
loss of those samples and its gradient with respect to each adapter. `trl_worker.py updates FOLDER` trains on samples of
its own. Both print the seconds of every update, and the process's peak memory.
"""

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from peft import LoraConfig  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # pyright: ignore[reportMissingImports]
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

NAMES = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"} | {
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


class Watch(TrainerCallback):
    """Keeps the first update's gradients, and the seconds of every update."""

    def __init__(self) -> None:
        self.gradients: dict[str, np.ndarray] = {}
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(-time.perf_counter())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {k: p.grad.numpy().copy() for k, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds[-1] += time.perf_counter()


class Trainer(GRPOTrainer):
    """Keeps the last loss, which is not rounded as in the log."""

    last_loss = float("nan")

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.last_loss = loss.item()
        return loss


def trainer(folder: Path, job: dict[str, Any], loss: str, updates: int, samples: Any = None) -> tuple[Trainer, Watch]:
    """A GRPOTrainer for `updates` updates, whose samples are the given ones, or its own if `samples` is None.
    Gradients of given samples are not clipped."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    batch = job["num_prompts"] * job["group_size"]
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=job["group_size"],
        max_completion_length=job["response_length"],
        max_steps=updates,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        beta=0.0,
        epsilon=job["clip_eps"],
        loss_type=loss,
        scale_rewards="none",
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_grad_norm=1.0 if samples is None else 0.0,
        seed=job["seed"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
    )

    def given(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        assert samples is not None
        del prompts, trainer
        L, rows = job["prompt_length"], samples["token"].tolist()
        prompt_ids = [[t for t in row[:L] if t >= 0] for row in rows]
        completion_ids = [[t for t in row[L:] if t >= 0] for row in rows]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    def rewards(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        if samples is not None:
            return samples["reward"].tolist()
        texts = [x[0]["content"] if isinstance(x, list) else x for x in completions]
        return [float(right in text) for text, right in zip(texts, answer, strict=True)]

    found = Trainer(
        model=model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=job["lora_rank"],
            lora_alpha=job["lora_alpha"],
            lora_dropout=0.0,
            target_modules=[NAMES[x].split(".")[1] for x in job["targets"]],
            task_type="CAUSAL_LM",
        ),
        rollout_func=None if samples is None else given,
    )
    watch = Watch()
    found.add_callback(watch)
    return found, watch


def adapter_name(ours: str) -> str:
    """PEFT's name of an adapter that is called LAYER/PROJECTION/a or b here: its matrices are transposed."""
    layer, projection, matrix = ours.split("/")
    return f"base_model.model.model.layers.{layer}.{NAMES[projection]}.lora_{matrix.upper()}.default.weight"


def gradients(folder: Path, job: dict[str, Any]) -> Watch:
    """Writes every loss of the given samples, and its gradient."""
    samples, adapters = np.load(folder / "samples.npz"), np.load(folder / "adapters.npz")
    watch = Watch()
    for loss in job["losses"]:
        found, watch = trainer(folder, job, loss, 1, samples)
        own = dict(found.model.named_parameters())
        with torch.no_grad():
            for name in adapters.files:
                own[adapter_name(name)].copy_(torch.from_numpy(adapters[name].T.copy()))
        found.train()
        answer: Any = {name: watch.gradients[adapter_name(name)].T for name in adapters.files}
        np.savez(folder / f"{loss}.npz", loss=found.last_loss, **answer)
    return watch


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    if what == "gradients":
        watch = gradients(folder, job)
    else:
        found, watch = trainer(folder, job, job["losses"][0], job["updates"])
        found.train()
    packages = {name: version(name) for name in ("trl", "torch", "transformers", "peft")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": watch.seconds, "peak": peak, "versions": packages}))


if __name__ == "__main__":
    main()
