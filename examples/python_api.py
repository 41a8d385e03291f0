"""Train on two tasks and predict, from Python: python examples/python_api.py [encoder]."""

from __future__ import annotations

import sys
from pathlib import Path

from camtl import CaMtlForMultiTask, CaMtlTrainer, CaMtlTrainingArguments
from camtl.data import load_task
from camtl.tasks import resolve_tasks

HERE = Path(__file__).parent


def main(encoder: str = "minilm", output_dir: str = "runs/python_api", max_steps: int = 20) -> list[dict]:
    # One task of a YAML file beside a built-in one; each with its rows.
    tasks = resolve_tasks("tickets,demo_sentiment", HERE / "custom_csv" / "tasks.yaml")
    data = {task.name: load_task(task) for task in tasks}

    model = CaMtlForMultiTask.from_pretrained(encoder, tasks=tasks, max_seq_length=48)
    trainer = CaMtlTrainer(
        model=model,
        args=CaMtlTrainingArguments(
            output_dir=output_dir,
            max_steps=max_steps,
            per_device_train_batch_size=16,
            learning_rate=1e-4,
            sampler="uniform",
            report_to="none",
        ),
        train_dataset={name: splits["train"] for name, splits in data.items()},
        eval_dataset={name: splits["validation"].select(range(12)) for name, splits in data.items()},
        processing_class=model.tokenizer,
    )
    trainer.train()
    print({name: round(value, 3) for name, value in trainer.evaluate().items() if name.endswith("accuracy")})
    trainer.save_model(output_dir)

    trained = CaMtlForMultiTask.from_pretrained(output_dir)
    answers = trained.predict(["I paid twice for one order.", "The app does not start."], task="tickets")
    for answer in answers:
        print(answer["label"], round(answer["score"], 3))
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
