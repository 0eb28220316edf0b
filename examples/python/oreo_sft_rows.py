"""GSM8K's and MATH's training solutions as chats, with the system prompts that OREO published: one file for `openrl-reason sft`.

    python examples/python/oreo_sft_rows.py rows.jsonl --gsm8k gsm8k/train.jsonl --math math/train.jsonl      (default: the hub's data)
"""

import argparse
import json

from openrl_reason.tasks.base import TaskConfig, load_task

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("output")
parser.add_argument("--gsm8k", default="")
parser.add_argument("--math", default="")
arguments = parser.parse_args()

count = 0
with open(arguments.output, "w", encoding="utf-8") as file:
    for name in ("gsm8k", "math"):
        task = load_task(TaskConfig(name=name, prompt_style="oreo_qwen", train_path=getattr(arguments, name)))
        for item in task.items("train"):
            messages = [*task.messages(item), {"role": "assistant", "content": item.solution}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            count += 1
print(f"{count} rows in {arguments.output}")
