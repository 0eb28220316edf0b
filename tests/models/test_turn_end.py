"""Where a chat template ends turns with another token than EOS, as those of base models do, that token ends a response everywhere."""

import json

import pytest

from openrl_reason.data.readers import Row
from openrl_reason.data.sft import SFTDataConfig, encode_row
from openrl_reason.models import export
from openrl_reason.models.loading import load_causal_lm, load_tokenizer
from openrl_reason.models.turn_end import end_token_ids, turn_end_token
from openrl_reason.workers.engine import read_eos_ids
from tests.data.offline_helpers import as_sampled, byte_tokenizer, encode, one
from tests.data.test_templates import CHATML, LLAMA3, MINICPM
from tests.helpers_models import write_tiny_model

PLAIN = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
REFUSES = "{{ raise_exception('no') }}"
SWALLOWS = "{% for m in messages %}{{ m['role'] }}{% endfor %}"


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template, end", [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MINICPM, ""), (PLAIN, "</s>"), (REFUSES, ""), (SWALLOWS, ""), (None, "")]
)
def test_the_token_that_ends_a_turn_is_the_templates(template, end):
    tokenizer = tokenizer_with(template)
    assert turn_end_token(tokenizer) == end
    names = ["</s>", *([end] if end not in ("", "</s>") else [])]
    names += ["<|im_end|>", "<|eot_id|>"] if template is None else []  # what base models have, and nothing says how chats end
    assert end_token_ids(tokenizer) == tuple(tokenizer.convert_tokens_to_ids(names))


@pytest.mark.parametrize("template, end, between", [(CHATML, "<|im_end|>", "\n<|im_start|>user"), (LLAMA3, "<|eot_id|>", "<|start_header_id|>user")])
def test_fine_tuning_on_chats_learns_to_end_turns_and_nothing_behind_them(template, end, between):
    tokenizer = tokenizer_with(template)
    said = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    row = Row("x:1", {"messages": [{"role": role, "content": content} for role, content in said]})
    ids, turns = encode_row(row, SFTDataConfig(path="x"), tokenizer)
    replies = [tokenizer.decode([token for token, turn in zip(ids, turns, strict=True) if turn == number]) for number in (0, 1)]
    assert replies == [f"A1{end}", f"A2{end}"] and turns[-1] == 1, "nothing is left behind the last turn"
    whole = tokenizer.decode(ids)
    assert between in whole and tokenizer.apply_chat_template(row.values["messages"], tokenize=False).startswith(whole)


PHI = (  # the turn ends with one token, and the conversation with another
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_what_a_template_writes_behind_the_last_turn_alone_is_not_learned_and_not_in_the_way():
    tokenizer = tokenizer_with(PHI)
    said = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    row = {"messages": [{"role": role, "content": content} for role, content in said], "reward": 1}
    ids, turns = encode_row(Row("x:1", row), SFTDataConfig(path="x"), tokenizer)
    assert tokenizer.decode([token for token, turn in zip(ids, turns, strict=True) if turn >= 0]) == "A1<|im_end|>A2<|im_end|>"
    assert ids == one(row, tokenizer).token_ids.tolist()


def test_solutions_of_a_chat_task_end_as_chats_do_and_without_a_blank_that_nobody_wrote():
    from openrl_reason.tasks import TaskConfig, load_task
    from tests.data.offline_helpers import metaspace_tokenizer

    plain = load_task(TaskConfig(name="arithmetic"))
    chat = load_task(TaskConfig(name="arithmetic", apply_chat_template=True))
    tokenizer, item = tokenizer_with(CHATML), plain.items("train")[0]
    assert tokenizer.decode(plain.encode_solution(item, tokenizer)).endswith("</s>")
    assert tokenizer.decode(chat.encode_solution(item, tokenizer)).endswith("<|im_end|>")
    sentencepiece = metaspace_tokenizer()
    first = sentencepiece.convert_ids_to_tokens(plain.encode_solution(item, sentencepiece)[0])
    assert sentencepiece.tokenize(item.solution)[0].startswith("\u2581") and not first.startswith("\u2581")


def test_a_template_without_an_end_of_turn_still_teaches_to_end():
    tokenizer = tokenizer_with(MINICPM)
    ids, turns = encode_row(Row("x:1", {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}),
                            SFTDataConfig(path="x"), tokenizer)  # fmt: skip
    assert tokenizer.decode([token for token, turn in zip(ids, turns, strict=True) if turn == 0]) == "A</s>"


def test_engines_stop_there_and_exports_say_so(tmp_path):
    path = write_tiny_model(tmp_path / "m")
    model, tokenizer = load_causal_lm(path, "float32"), load_tokenizer(path)
    assert read_eos_ids(path) == [1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "base")  # no template, but the token: as base models have it
    assert read_eos_ids(str(tmp_path / "base")) == list(end_token_ids(tokenizer)) == [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokenizer.chat_template = CHATML
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    before = model.generation_config.eos_token_id
    folder = export.export_hf(model.named_parameters(), model.config, tokenizer, tmp_path / "out", generation_config=model.generation_config)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, turn_end]
    assert model.generation_config.eos_token_id == before, "the model's own settings are left alone"
    (folder / "generation_config.json").unlink()
    assert read_eos_ids(str(folder)) == [1, turn_end]


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", ""])
def test_the_end_of_a_sampled_response_extends_its_last_step(end):
    tokenizer = tokenizer_with(CHATML)
    record = as_sampled(tokenizer, "ab\ncd\n" + end)
    assert one(record, tokenizer, step_kind="newline").step_ids[4:].tolist() == [0, 0, 0, 1, 1, 1, *([1] if end else [])]


@pytest.mark.parametrize("said, empty", [("</s>", True), ("<|im_end|>", True), (" \n</s>", True), ("<|eot_id|></s>", False), ("a", False)])
def test_a_sampled_response_without_text_is_left_out_as_a_row_of_text_is(said, empty):
    tokenizer = tokenizer_with(CHATML)
    kept, encoder = encode(as_sampled(tokenizer, said), tokenizer)
    assert encoder.counts["empty"] == int(empty) and len(kept) == 1 - empty
    kept, encoder = encode(as_sampled(tokenizer, said), tokenizer, empty="keep")
    assert encoder.counts["empty"] == 0 and len(kept) == 1
