"""The settings of a task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskConfig:
    """Which task, where its data lies, and how its prompts are written."""

    name: str = "arithmetic"
    """arithmetic (generated), gsm8k, math, logiqa2, reclor, multiple_choice (your own questions with options), file (your own prompts and
    answers, see input_key), or path/to/file.py:ClassName."""
    train_path: str = ""
    """Training data: a local .jsonl, .json, .txt (JSON lines), .csv or .parquet file, or a hub name org/name[:config]. Empty: the task's own on
    the hub (gsm8k: openai/gsm8k, math: EleutherAI/hendrycks_math; the others have none)."""
    test_path: str = ""
    """Held-out data, as train_path."""
    levels: tuple[int, ...] = (1, 2)
    """arithmetic: difficulty levels, 1 to 5, mixed in equal parts."""
    styles: tuple[str, ...] = ("expression",)
    """arithmetic: some of expression, word and columns (addition of two numbers of level + 1 digits, column by column)."""
    direct_share: float = 0.0
    """arithmetic: share of the reference solutions that are the bare answer, without steps. A model fine-tuned on both kinds does not know
    that working a problem out pays; reinforcement learning finds out."""
    num_train: int = 0
    """Number of training items, at most: the first ones. 0: all there are; of generated ones a few thousand."""
    num_test: int = 0
    """Number of held-out items; as num_train."""
    seed: int = 0
    """Seed of the generator, of the choice of few-shot examples and of option_order random. Generated train and test items are disjoint
    whatever the seeds."""
    prompt_style: str = ""
    """A published prompt, byte for byte. gsm8k and math: oreo_qwen (chat), deepseek_math, vineppo; logiqa2, reclor and multiple_choice:
    react_v2. Empty: the task's own prompt, or prompt_template."""
    prompt_template: str = ""
    """How a question becomes a prompt; {question} is replaced. Empty: the task's own."""
    apply_chat_template: bool = False
    """Send the question as a user message through the tokenizer's chat template. (A prompt_style that is a chat does so by itself.)"""
    system_prompt: str = ""
    """With apply_chat_template: the system message. Empty: none."""
    num_few_shot: int = 0
    """Number of solved training items put before every question: the same ones for all, chosen by seed, never the question itself."""
    input_key: str = "question"
    """file: the column of the prompt (a string, or a list of chat messages); multiple_choice: of the question."""
    label_key: str = "answer"
    """file: the column of the gold answer; multiple_choice: of the right option, by its letter or its index from 0."""
    solution_key: str = ""
    """file, multiple_choice, logiqa2, reclor: the column of a reference solution, for SFT and few-shot examples. Empty: none (of a multiple
    choice question "The answer is X.")."""
    context_key: str = ""
    """multiple_choice: the column of the passage before the question. Empty: none."""
    options_key: str = "options"
    """multiple_choice: the column of the 2 to 26 options: a list, or {text: [...], label: [...]}."""
    id_key: str = ""
    """file, multiple_choice: the column of the row's own id, by which evaluation subsets may name it. Empty: none."""
    option_order: str = ""
    """Multiple choice: which option is shown where. Empty: as in the data; random: by seed, another order for each item; letters, such as DCBA:
    the fourth comes first. The gold letter moves along."""
    grader: str = ""
    """How answers are graded, instead of the task's own way: arithmetic, gsm8k (strict ####), gsm8k_lenient (last number), or another kind of
    docs/tasks.md, module:function or path.py:function."""
    strip_calculations: bool = True
    """gsm8k: remove the <<calc>> spans from the reference solutions."""
    allow_test_data_in_training: bool = False
    """Switch off the guard that refuses training data which contains held-out questions."""
