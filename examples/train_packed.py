"""Train the same few steps on padded and on packed batches, and compare losses and time.

    python examples/train_packed.py            # four small tasks, about a minute on a CPU
    python examples/train_packed.py --steps 40 --batch_size 32

Packed batches hold no padding: texts lie one behind the other, and ``cu_seqlens`` says where each begins.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch

from camtl import CaMtlForMultiTask, CaMtlTrainer, CaMtlTrainingArguments
from camtl.data import load_task
from camtl.tasks import resolve_tasks


def run(packed: bool, steps: int, batch_size: int, folder: str) -> tuple[list[float], float]:
    """The losses of ``steps`` updates and the seconds that they took."""
    tasks = resolve_tasks("demo")
    torch.manual_seed(0)  # new heads begin alike
    model = CaMtlForMultiTask.from_pretrained(
        "minilm",
        tasks=tasks,
        max_seq_length=128,
        packed=packed,
        hidden_dropout_prob=0.0,  # so that both runs do the same
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    trainer = CaMtlTrainer(
        model=model,
        args=CaMtlTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset={task.name: load_task(task)["train"] for task in tasks},
        processing_class=model.tokenizer,
    )
    begin = time.perf_counter()
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], time.perf_counter() - begin


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(True, 1, given.batch_size, folder)  # reads and tokenises the data once, for both
        padded, slow = run(False, given.steps, given.batch_size, folder)
        packed, fast = run(True, given.steps, given.batch_size, folder)
    difference = max(abs(a - b) for a, b in zip(padded, packed, strict=True))
    print(f"padded  {slow:6.1f} s   last loss {padded[-1]:.4f}")
    print(f"packed  {fast:6.1f} s   last loss {packed[-1]:.4f}   {slow / fast:.2f} times as fast")
    print(f"losses of {given.steps} steps differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
