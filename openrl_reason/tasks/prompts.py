"""How a question becomes a prompt: published prompts byte for byte, plain or through the tokenizer's chat template.

A task lists the styles it has in ``prompt_styles``; ``--task.prompt_style`` picks one. Bytes are taken from the systems named beside each,
and held by golden tests. What a paper leaves open (how solved examples are joined, the blank before a solution) is ours, said below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openrl_reason.errors import ConfigError, DataError, did_you_mean
from openrl_reason.tasks.config import TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOT_SEPARATOR = "\n\n"
"""Between a solved example and what follows it, in plain prompts."""


@dataclass(frozen=True)
class PromptStyle:
    """One way to ask."""

    template: str = "{question}"
    """The question's part of the prompt; in a chat, the user message."""
    chat: bool = False
    """Whether the prompt goes through the tokenizer's chat template."""
    system: str = ""
    """In a chat, the system message."""
    instruction: str = ""
    """Plain: what stands once before everything, solved examples included."""
    glue: str = ""
    """Plain: what a reference solution begins with, where the prompt ends in the middle of a line. Ours, except react_v2's."""
    stop: tuple[str, ...] = ()
    """Stop strings that sampling needs with this prompt."""
    grader: str = ""
    """The grader that fits the answer asked for, where it is not the task's own."""
    step_kind: str = ""
    """The step splitter that fits, where it is not the task's own."""


BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

OREO_GSM8K = PromptStyle(chat=True, system="Please reason step by step, and produce a final answer following 4 '#', like '#### 0'")
"""OREO (arXiv 2412.16145), Qwen models on GSM8K."""
OREO_MATH = PromptStyle(chat=True, system=BOXED_INSTRUCTION)
"""OREO, Qwen models on MATH."""
DEEPSEEK_MATH = PromptStyle(template=f"User: {{question}}\n{BOXED_INSTRUCTION}\n\nAssistant:", glue=" ", grader="math")
"""DeepSeekMath's zero-shot prompt, which OREO uses for that model on GSM8K and MATH alike: the answer is boxed."""
VINEPPO = PromptStyle(template="[MATH_TASK] Problem:\n{question}\n\nSolution:", glue=" ", stop=("\n\n\nProblem:",))
"""VinePPO (arXiv 2410.01679), GSM8K and MATH."""
REACT_V2 = PromptStyle(
    instruction="Solve a question answering task by having a Thought, then Finish with your answer. Thought can reason about the current "
    "situation. Finish[answer] returns the answer and finishes the task. You will be given context that you should use to help you answer the "
    "question.\n\n",
    template="{question}\n\nThought 1:",
    glue=" ",
    stop=("\n\n\n\n", "Context:\n"),
    step_kind="react",
)
"""Planning-based reasoning (arXiv 2402.00658), LogiQA 2.0 and ReClor: instruction ``react_v2`` and template 8. Its stop strings are those of
the ReClor runs; the LogiQA runs had the first alone."""


def resolve_style(config: TaskConfig, styles: Mapping[str, PromptStyle], own: PromptStyle, task: str) -> PromptStyle:
    """The style that the settings ask for; ``own`` is the task's default. Raises ConfigError for unknown or contradictory settings."""
    if not config.prompt_style:
        if config.system_prompt and not config.apply_chat_template:
            raise ConfigError("--task.system_prompt is set, but --task.apply_chat_template is false: set it true")
        template = config.prompt_template or own.template
        if "{question}" not in template:
            raise ConfigError(f"--task.prompt_template is {config.prompt_template!r}: it must contain {{question}}")
        return PromptStyle(template, config.apply_chat_template, config.system_prompt)
    if config.prompt_style not in styles:
        known = f"it has {', '.join(styles)}{did_you_mean(config.prompt_style, styles)}" if styles else "it has none: use --task.prompt_template"
        raise ConfigError(f"--task.prompt_style {config.prompt_style!r}: task {task} has no such style; {known}")
    style = styles[config.prompt_style]
    if config.prompt_template:
        raise ConfigError(f"--task.prompt_style {config.prompt_style} and --task.prompt_template are both set; drop one")
    if config.apply_chat_template and not style.chat:
        raise ConfigError(f"--task.prompt_style {config.prompt_style} is plain text; drop --task.apply_chat_template (or the style)")
    if config.system_prompt:
        why = "has its own system prompt" if style.chat else "is plain text without a system prompt"
        raise ConfigError(f"--task.prompt_style {config.prompt_style} {why}; drop --task.system_prompt (or the style)")
    return style


def render_chat(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = True) -> str:
    """Chat messages as text by the tokenizer's template. Raises ConfigError if it has none, DataError if it refuses the messages."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "this prompt is a chat (apply_chat_template=true, or the prompt_style is one), but the tokenizer has no chat template; set "
            "--task.apply_chat_template false, "
            "use an instruction-tuned model, or put a chat_template.jinja into the model's folder"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise DataError(f"the chat template refuses these messages ({error}): {str(list(messages))[:200]}") from None
