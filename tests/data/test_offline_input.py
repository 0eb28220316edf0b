"""Input that reads, and means something else than it seems to: said or counted, never taken quietly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openrl_reason.data.offline import OfflineDataConfig, build_store
from openrl_reason.data.pairs import PairsConfig, pair_texts
from openrl_reason.data.readers import Row, read_rows
from openrl_reason.data.sft import SFTDataConfig, encode_row
from openrl_reason.data.sources import expand
from openrl_reason.errors import ConfigError, DataError
from tests.data.offline_helpers import byte_tokenizer, encode, metaspace_tokenizer, one, write_lines, write_tokenizer_folder
from tests.data.test_templates import CHATML


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def build(path, model, folder, said=None, **settings):
    config = OfflineDataConfig(path=(str(path),), max_length=64, **settings)
    return build_store(config, model, folder / "store", say=(said if said is not None else []).append)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


# ---- columns -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reward", "prompt", "response", "messages", "label", "chosen", "rejected"])
def test_a_column_that_is_asked_for_and_not_there_is_an_error(key, model, tmp_path):
    """Rewards under a misspelt name would be no rewards at all."""
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "1?", "response": "a", "reward": 1}] * 3)
    with pytest.raises(DataError, match=rf"rows.jsonl: --data.{key}_key is 'rewrd': no such column \(did you mean 'reward'\?\); there are: prompt"):
        build(file, model, tmp_path, **{f"{key}_key": "rewrd"})


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_reward_behind_rows_without_one_is_not_lost(suffix, model, tmp_path):
    rows = [{"prompt": "1?", "response": "a"}] * 101 + [{"prompt": "1?", "response": "b", "reward": 1}]
    file = tmp_path / f"rows.{suffix}"
    file.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"(row 101|rows.jsonl:102): this row has a column 'reward', and the first ones of its file.*--data.format"):
        build(file, model, tmp_path)
    store = build(file, model, tmp_path, format="responses", bad_rows="skip")
    assert len(store) == 1 and store.statistics["counts"]["bad/missing_column"] == 101
    assert len(build(file, model, tmp_path, format="sft")) == 102


def test_a_response_and_a_conversation_in_one_row_need_a_choice(model, tmp_path):
    row = {"prompt": "1?", "response": "right", "reward": 1, "messages": [user("1?"), assistant("other")]}
    file = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match="say which are to be learned, by --data.messages_key messages or --data.response_key response"):
        build(file, model, tmp_path)
    for settings in ({"format": "responses"}, {"response_key": "response"}):
        assert build(file, model, tmp_path, **settings).trajectory(0).num_actions == len("right") + 1
    for settings in ({"format": "conversations"}, {"messages_key": "messages"}):
        store = build(file, model, tmp_path, **settings)
        assert store.kind == "responses" and store.trajectory(0).num_actions == len("other") + 1
    from openrl_reason.algorithms.rejection import offline_data

    config = offline_data(SFTDataConfig(path=file, min_reward=1.0))  # as sft reads such rows without a reward
    assert config.messages_key == "messages"


def test_equal_rows_are_told(model, tmp_path):
    said = []
    build(write_lines(tmp_path / "rows.jsonl", [{"prompt": "1?", "response": "a", "reward": 1}] * 3), model, tmp_path, said)
    assert "3 of 3 rows kept; 2 equal to an earlier one;" in said[-1]


# ---- what a policy could not have said -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_the_end_of_a_response_in_its_middle_is_a_bad_row(end, tokenizer):
    for row in ({"prompt": "Q", "response": f"a{end} b", "reward": 1}, {"messages": [user("Q"), assistant(f"a{end} b")], "reward": 1},
                ):  # fmt: skip
        with pytest.raises(DataError, match=r"x.jsonl:1: .*ends a response, stands in the text of one"):
            encode(row, tokenizer)
        kept, encoder = encode(row, tokenizer, bad_rows="skip")
        assert not kept and encoder.counts["bad/end_inside"] == 1


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_a_text_that_ends_already_gets_no_second_end(end, tokenizer):
    for tail in ("", "\n", " \n"):
        trajectory = one({"prompt": "Q", "response": f"ab{end}{tail}", "reward": 1}, tokenizer)
        assert tokenizer.decode(trajectory.response_ids) == f"ab{end}"
        ids, turns = encode_row(Row("x:1", {"prompt": "Q", "completion": f"ab{end}{tail}"}), SFTDataConfig(path="x"), tokenizer)
        assert ids == trajectory.token_ids.tolist()
        chat = [user("Q"), assistant(f"ab{end}{tail}")]
        trajectory = one({"messages": chat, "reward": 1}, tokenizer)
        assert tokenizer.decode(trajectory.response_ids) == "ab<|im_end|>"
        ids, turns = encode_row(Row("x:1", {"messages": chat}), SFTDataConfig(path="x"), tokenizer)
        assert ids == trajectory.token_ids.tolist()
    for row in ({"prompt": "Q", "response": f"{end}\n", "reward": 1}, {"messages": [user("Q"), assistant(f" {end}")], "reward": 1}):
        kept, encoder = encode(row, tokenizer)
        assert not kept and encoder.counts["empty"] == 1


def test_a_template_that_ends_turns_with_what_is_no_token_is_refused():
    tokenizer = metaspace_tokenizer()
    assert tokenizer.decode(one({"prompt": "Q", "response": "a", "reward": 1}, tokenizer, template="llama3").response_ids) == "a<|eot_id|>"
    from openrl_reason.models.tiny import make_tokenizer

    with pytest.raises(ConfigError, match=r"--data.template llama3 ends turns with '<\|eot_id\|>', and of this tokenizer engines stop at .* alone"):
        encode({"prompt": "Q", "response": "a", "reward": 1}, make_tokenizer(), template="llama3")


@pytest.mark.parametrize("prompt, response", [("Answer: ", "12"), ("Answer:", " 12"), ("Answer:", "12"), ("So:\n", "the answer"), ("2+2= ", "4\n72")])
def test_no_blank_comes_between_a_prompt_and_its_response_that_nobody_wrote(prompt, response):
    """SentencePiece puts one in front of every text that it is given alone."""
    tokenizer = metaspace_tokenizer()
    row = {"prompt": prompt, "response": response, "reward": 1}
    assert tokenizer.decode(one(row, tokenizer).token_ids, skip_special_tokens=True).strip() == prompt + response
    ids, _ = encode_row(Row("x:1", {"prompt": prompt, "completion": response}), SFTDataConfig(path="x"), tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt + response


# ---- supervised rows and pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, message", [
    ({"messages": [user("x"), assistant("ab <|im_end|> cd")]}, "message 1: '<|im_end|>', which ends a response, stands in the text"),
    ({"messages": [user("x"), assistant("", tool_calls=[{"function": {"name": "add"}}])]}, "has tool_calls, which the policy wrote"),
    ({"prompt": "q", "completion": "a\ud800b"}, "half of a character"), ({"prompt": "q\ud800", "completion": "ab"}, "half of a character"),
    ({"messages": [user("x\ud800"), assistant("a")]}, "half of a character"), ({"prompt": "", "completion": "ab"}, "the prompt is empty"),
    ({"prompt": "q", "completion": "a</s>b"}, "'</s>', which ends a response, stands in the text"),
    ({"prompt": "q", "completion": " "}, "column 'completion' has no text"),
    ({"prompt": "q", "completion": None}, "column 'completion' holds 'None'"),
    ({"prompt": 5, "completion": "a"}, "column 'prompt' holds '5'"),
])  # fmt: skip
def test_supervised_rows_that_lose_or_lack_something_are_refused(row, message, tokenizer):
    tokenizer.post_processor = None
    plain = byte_tokenizer(bos=False)
    plain.chat_template = CHATML
    with pytest.raises(DataError, match="x:1: .*" + message.replace("|", r"\|")):
        encode_row(Row("x:1", row), SFTDataConfig(path="x"), plain)


def test_tool_calls_that_the_template_writes_are_learned():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("m['content'] +", "m['content'] + (m['tool_calls'][0]['function']['name'] if m['tool_calls'] else '') +")
    row = {"messages": [user("x"), assistant("", tool_calls=[{"function": {"name": "add", "arguments": {"a": 1}}}])]}
    ids, turns = encode_row(Row("x:1", row), SFTDataConfig(path="x"), tokenizer)
    assert tokenizer.decode([token for token, turn in zip(ids, turns, strict=True) if turn == 0]) == "add<|im_end|>"


@pytest.mark.parametrize("prompt, completion", [("q", [assistant("a")]), ([user("q")], "a")])
def test_text_and_messages_may_stand_side_by_side(prompt, completion, tokenizer):
    ids, _ = encode_row(Row("x:1", {"prompt": prompt, "completion": completion}), SFTDataConfig(path="x"), tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"


def test_a_prompt_that_both_sides_repeat_is_there_once():
    row = Row("x:1", {"prompt": [user("q")], "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]})
    assert pair_texts(row, PairsConfig()) == ([user("q")], [assistant("a")], [assistant("b")])
    row.values["prompt"] = "q"
    assert pair_texts(row, PairsConfig()) == ([user("q")], [assistant("a")], [assistant("b")])
    row.values["prompt"] = "another"
    with pytest.raises(DataError, match="x:1: column 'prompt' holds 'another', which 'chosen' and 'rejected' do not begin with"):
        pair_texts(row, PairsConfig())


def test_a_limit_that_another_flag_decides_is_refused():
    from openrl_reason.algorithms.dpo_config import DPOConfig
    from openrl_reason.algorithms.sft import SFTConfig

    with pytest.raises(ConfigError, match="--data.max_length is 20: --max_length .* limits sequences in this command"):
        SFTConfig(data=SFTDataConfig(max_length=20))
    with pytest.raises(ConfigError, match="--data.max_length is 20: --max_length .* limits sequences in this command"):
        DPOConfig(data=OfflineDataConfig(max_length=20))
    DPOConfig(data=OfflineDataConfig(max_length=20), max_length=20)


def test_rows_that_cannot_be_used_are_skipped_and_counted_where_that_is_asked_for(tmp_path):
    from openrl_reason.data.pairs import read_pairs
    from openrl_reason.data.sft import load_sft_trajectories

    plain = byte_tokenizer()
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a</s>b"}, {"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*\(--data.bad_rows skip leaves such rows out, counted\)"):
        load_sft_trajectories(SFTDataConfig(path=file), plain)
    data = load_sft_trajectories(SFTDataConfig(path=file, bad_rows="skip"), plain)
    assert len(data.trajectories) == 1 and data.num_bad == 1
    file = write_lines(tmp_path / "torn.jsonl", ['{"prompt": "q", "comp', {"question": "q"}, {"prompt": "q", "completion": "a"}])
    data = load_sft_trajectories(SFTDataConfig(path=file, bad_rows="skip"), plain)
    assert len(data.trajectories) == 1 and data.num_bad == 2, "a line that does not read, and one without the columns"
    with pytest.raises(DataError, match=r"torn.jsonl:1: malformed JSON.*--data.bad_rows skip"):
        load_sft_trajectories(SFTDataConfig(path=file), plain)
    rows = [{"prompt": "q", "chosen": chosen, "rejected": "c"} for chosen in ("a</s>b", "a")]
    file = write_lines(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(DataError, match=r"pairs.jsonl:1: .*\(--pairs.bad_rows skip leaves such rows out, counted\)"):
        read_pairs(PairsConfig(path=file), plain)
    pairs = read_pairs(PairsConfig(path=file, bad_rows="skip"), plain)
    assert len(pairs.pairs) == 1 and pairs.counts["bad"] == 1 and pairs.counts["rows"] == 2
    file = write_lines(tmp_path / "torn.jsonl", ['{"prompt": "q", "ch', {"prompt": "q", "chosen": "a"}, *rows])
    pairs = read_pairs(PairsConfig(path=file, bad_rows="skip"), plain)
    assert len(pairs.pairs) == 1 and pairs.counts["bad"] == 3 and pairs.counts["rows"] == 4


# ---- files ----------------------------------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_say_why(tmp_path, monkeypatch):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="link.jsonl is a link to .*nowhere.jsonl, which is not there"):
        read_rows(tmp_path / "link.jsonl")
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_rows("x" * 300 + ".jsonl")
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        expand(["x" * 300 + ".jsonl"])
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "1?"}])

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")  # permissions do not hold for the root user that tests may run as

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match="rows.jsonl cannot be read: Permission denied"):
        read_rows(file)


def test_a_parquet_column_that_python_cannot_hold_is_told(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"prompt": ["1?"], "when": pa.array([2**60], pa.timestamp("ms"))})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet: a value that cannot be read: .*leave its column out"):
        read_rows(tmp_path / "rows.parquet")


def test_hidden_files_are_not_data_and_other_spellings_of_json_are_not_passed_over(tmp_path):
    write_lines(tmp_path / "d" / "a.jsonl", [{"prompt": "1?"}])
    (tmp_path / "d" / "._a.jsonl").write_bytes(b"\0\5\x16")
    assert [Path(source.path).name for source in expand([str(tmp_path / "d")])] == ["a.jsonl"]
    write_lines(tmp_path / "e" / "a.json", [{"prompt": "1?"}])
    write_lines(tmp_path / "e" / "b.JSON", [{"prompt": "1?"}])
    with pytest.raises(DataError, match="b.JSON would not be read.*rename it to end in .json"):
        expand([str(tmp_path / "e")])


def test_output_that_nobody_reads_to_the_end_or_that_lacks_characters_is_no_error(model, tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": f"{n}?", "response": "a" * 40, "reward": 1} for n in range(400)])
    words = [sys.executable, "-m", "openrl_reason", "inspect-data", "--model", model, "--data.path", file]
    words += ["--output", str(tmp_path / "store")]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([*words, "--num_examples", "1"], capture_output=True, env=environment)
    assert done.returncode == 0 and b"states: 41 token" in done.stdout and not done.stderr.strip(), done.stderr
    process = subprocess.Popen([*words, "--num_examples", "400"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait() in (0, 1, 141)  # 1: what rich makes of it
