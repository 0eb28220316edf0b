"""Preference pairs: a pure function of samples and seed, no pair twice, and nothing left out without being counted."""

import json
from collections import Counter

import numpy as np
import pytest

from openrl_reason.core.trajectory import StopReason, Trajectory, write_jsonl, write_parquet
from openrl_reason.data.pairs import PairBuilder, PairsConfig, build_pairs, pair_samples, pair_texts, read_pairs, read_samples
from openrl_reason.data.readers import Row
from openrl_reason.errors import ConfigError, DataError
from tests.helpers_models import write_tiny_model


def sample(task, response, reward, *, index=0, stop=StopReason.EOS, prompt=(5, 6), **info):
    return Trajectory.from_completion(
        prompt, response, None, task_id=task, group_id=task, sample_index=index, reward=reward, stop_reason=stop, info=info
    )


def many(seed=0, num_questions=40, num_samples=16):
    """Samples with all the reasons there are for being left out."""
    rng = np.random.default_rng(seed)
    samples = []
    for question in range(num_questions):
        skill = rng.choice([0.0, 0.3, 0.8, 1.0])
        for index in range(num_samples):
            response = rng.integers(2, 5, rng.integers(0, 6)).tolist()
            stop = StopReason.LENGTH if rng.random() < 0.1 else StopReason.EOS
            status = "timeout" if rng.random() < 0.1 else "ok"
            samples.append(sample(f"q{question}", response, float(rng.random() < skill), index=index, stop=stop, grade_status=status))
    return samples


def identities(data):
    return [(pair.task_id, pair.chosen.token_ids.tobytes(), pair.rejected.token_ids.tobytes()) for pair in data.pairs]


@pytest.mark.parametrize("dedup", [True, False])
def test_everything_that_is_no_pair_is_counted(dedup):
    samples = many()
    data = build_pairs(samples, max_per_question=4, max_length=6, dedup=dedup)
    counts = data.counts
    parts = ("accepted", "rejected", "ungraded", "empty", "too_long", "repeated", "contradictory")
    assert counts["samples"] == len(samples) == sum(counts[name] for name in parts)
    assert all(counts[name] for name in parts if name != "repeated") and bool(counts["repeated"]) == dedup
    sides = ("paired", "all_accepted", "all_rejected", "no_samples_left")
    assert counts["questions"] == sum(counts[f"questions_{side}"] for side in sides) >= 40
    assert counts["possible_pairs"] == counts["pairs"] + counts["pairs_not_drawn"] and counts["pairs_not_drawn"]
    assert counts["pairs"] == len(data.pairs) and json.loads(json.dumps(counts)) == counts


def test_pairs_join_an_accepted_with_a_rejected_response_to_the_same_prompt_and_none_comes_twice():
    data = build_pairs(many(), max_per_question=5)
    assert len(set(identities(data))) == len(data.pairs) == len({pair.pair_id for pair in data.pairs})
    for pair in data.pairs:
        assert pair.chosen.task_id == pair.rejected.task_id and np.array_equal(pair.chosen.prompt_ids, pair.rejected.prompt_ids)
        assert pair.chosen.reward >= 0.5 and pair.chosen.stop_reason != StopReason.LENGTH
        assert pair.rejected.reward < 0.5 or pair.rejected.stop_reason == StopReason.LENGTH
        assert not np.array_equal(pair.chosen.token_ids, pair.rejected.token_ids)
    assert max(Counter(pair.task_id for pair in data.pairs).values()) == 5


def test_without_a_limit_all_accepted_meet_all_rejected():
    samples = [sample("q", [n], float(n < 5), index=n) for n in range(2, 10)]
    data = build_pairs(samples, max_per_question=100)
    drawn = {(int(pair.chosen.response_ids[0]), int(pair.rejected.response_ids[0])) for pair in data.pairs}
    assert drawn == {(right, wrong) for right in (2, 3, 4) for wrong in range(5, 10)} and len(data.pairs) == 15


def test_the_draw_is_a_function_of_seed_and_question_alone():
    samples = many()
    data = build_pairs(samples, max_per_question=3, seed=1)
    assert identities(data) == identities(build_pairs(samples, max_per_question=3, seed=1))
    assert identities(data) != identities(build_pairs(samples, max_per_question=3, seed=2))
    without = build_pairs([s for s in samples if s.task_id != "q1"], max_per_question=3, seed=1)
    assert identities(without) == [one for one in identities(data) if one[0] != "q1"]


def test_block_by_block_gives_the_same_pairs_and_counts_as_all_at_once_and_keeps_what_is_in_pairs_alone():
    # q3 is in the data twice, far apart: its samples are all there at the end alone.
    samples = [*many(num_samples=8), *(sample("q3", [2, n], float(n % 2), index=n) for n in range(8))]
    straight = build_pairs(samples, max_per_question=3, max_length=6, seed=7)
    builder = PairBuilder(max_per_question=3, max_length=6, seed=7)
    for first in range(0, len(samples), 5 * 8):
        builder.add(samples[first : first + 5 * 8])
        builder.close({"q3"})
        assert set(builder._open) <= {"q3"}
    data = builder.finish()
    assert [pair.pair_id for pair in data.pairs] == [pair.pair_id for pair in straight.pairs] and identities(data) == identities(straight)
    assert data.counts == straight.counts and any(pair.task_id == "q3" and 2 in pair.chosen.response_ids for pair in data.pairs)
    assert not any(side.info for pair in data.pairs if pair.task_id != "q3" for side in (pair.chosen, pair.rejected))


def test_a_cut_off_response_is_rejected_whatever_its_reward_unless_asked_otherwise():
    samples = [sample("q", [2], 1.0, stop=StopReason.LENGTH), sample("q", [3], 1.0), sample("q", [4], 0.0)]
    data = build_pairs(samples)
    assert data.counts["truncated_rejected"] == 1 and {int(pair.rejected.response_ids[0]) for pair in data.pairs} == {2, 4}
    assert len(build_pairs(samples, accept_truncated=True).pairs) == 2
    assert {int(pair.chosen.response_ids[0]) for pair in build_pairs(samples, accept_truncated=True).pairs} == {2, 3}


def test_a_threshold_holds_for_rewards_that_float32_rounds():
    samples = [sample("q", [2], 0.9), sample("q", [3], 0.3)]
    assert len(build_pairs(samples, threshold=0.9).pairs) == 1


def test_a_sample_without_a_reward_is_not_taken_for_a_wrong_one():
    data = build_pairs([sample("q", [2], 1.0), sample("q", [3], 0.0, has_reward=False), sample("q", [4], 0.0, grade_status="crashed")])
    assert data.counts["ungraded"] == 2 and not data.pairs and data.counts["questions_all_accepted"] == 1


def test_samples_are_read_from_files_and_folders_alike(tmp_path):
    samples = many(num_questions=4)
    write_jsonl(tmp_path / "a/one.jsonl", samples[:20])
    write_parquet(tmp_path / "a/two.parquet", samples[20:])
    (tmp_path / "a/notes.txt").write_text("not a sample")
    assert [s.trajectory_id for s in read_samples([str(tmp_path / "a")])] == [s.trajectory_id for s in samples]
    with open(tmp_path / "a/one.jsonl", "a") as file:
        file.write('{"schema_version": 1, "oops"\n')
    with pytest.raises(DataError, match=r"one\.jsonl:21"):
        list(read_samples([str(tmp_path / "a/one.jsonl")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no .jsonl or .parquet file"):
        list(read_samples([str(tmp_path / "empty")]))


class Watched(PairBuilder):
    """Notes how many samples are in memory."""

    most = 0

    def add(self, trajectories):
        super().add(trajectories)
        self.most = max(self.most, sum(len(samples) for prompts in self._open.values() for samples in prompts.values()))


@pytest.mark.parametrize("order", ["together", "two apart", "by sample"])
def test_files_are_paired_question_by_question_wherever_their_rows_are(tmp_path, order):
    samples, num_questions, num_samples = many(num_samples=8), 40, 8
    samples += [sample("q7", [2, n], float(n % 2), index=n, prompt=(6, 6)) for n in range(8)]  # another prompt under the same name
    names = [trajectory.task_id for trajectory in samples]
    if order != "two apart":
        samples = [samples[place] for place in sorted(range(len(samples)), key=lambda place: names.index(names[place]))]
    if order == "by sample":
        samples = [one for index in range(num_samples) for one in samples[index::num_samples]]
    write_jsonl(tmp_path / "a.jsonl", samples[:100])
    write_parquet(tmp_path / "b.parquet", samples[100:])
    straight = build_pairs(samples, max_per_question=3, max_length=6, seed=7)
    builder = Watched(max_per_question=3, max_length=6, seed=7)
    data = pair_samples([str(tmp_path)], builder)
    spread = {"together": 0, "two apart": 1, "by sample": num_questions}[order]
    assert [pair.pair_id for pair in data.pairs] == [pair.pair_id for pair in straight.pairs] and identities(data) == identities(straight)
    assert data.counts == straight.counts | {"questions_spread": spread} and not any(pair.chosen.info for pair in data.pairs)
    assert ("questions spread" in data.describe()) == bool(spread)
    if order != "by sample":
        assert builder.most <= 3 * num_samples, "one question's, and another's whose rows are apart"


def test_a_row_without_a_task_id_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [sample("q", [2], 1.0)])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"schema_version": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a trajectory: there is no 'task_id'"):
        pair_samples([str(tmp_path / "a.jsonl")], PairBuilder())


# ---- files of pairs ----------------------------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
CHAT += "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("tokenizer") / "tiny"))
    tokenizer.chat_template = CHAT
    return tokenizer


def read(tmp_path, rows, tokenizer, **settings):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    max_length = settings.pop("max_length", 0)
    return read_pairs(PairsConfig(path=str(path), **settings), tokenizer, max_length=max_length)


def turn(role, content):
    return {"role": role, "content": content}


def test_the_prompt_is_shared_and_unscored_and_each_response_ends(tmp_path, tokenizer):
    (pair,) = read(tmp_path, [{"prompt": "ABC", "chosen": "DE", "rejected": "F"}], tokenizer).pairs
    assert tokenizer.decode(pair.chosen.prompt_ids) == tokenizer.decode(pair.rejected.prompt_ids) == "ABC"
    assert tokenizer.decode(pair.chosen.response_ids) == "DE<|endoftext|>" and tokenizer.decode(pair.rejected.response_ids) == "F<|endoftext|>"
    assert pair.chosen.action_mask.tolist() == [False] * 3 + [True] * 3


def test_messages_without_a_prompt_give_the_same_pair_as_with_one(tmp_path, tokenizer):
    prompt, chosen, rejected = [turn("user", "A?")], [turn("assistant", "B")], [turn("assistant", "C")]
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"chosen": prompt + chosen, "rejected": prompt + rejected},
        {"prompt": "A?", "chosen": prompt + chosen, "rejected": prompt + rejected},
    ]
    pairs = read(tmp_path, rows, tokenizer).pairs
    assert len({pair.chosen.token_ids.tobytes() for pair in pairs}) == len({pair.rejected.token_ids.tobytes() for pair in pairs}) == 1
    assert len({pair.task_id for pair in pairs}) == 1 and len({pair.pair_id for pair in pairs}) == 3
    assert tokenizer.decode(pairs[0].chosen.response_ids) == "B<|endoftext|>"
    text = read(tmp_path, [{"prompt": "A?", "chosen": "B", "rejected": "C"}], tokenizer, apply_chat_template=True).pairs[0]
    assert np.array_equal(text.chosen.token_ids, pairs[0].chosen.token_ids)


def test_the_preference_layouts_of_trl_and_openrlhf_give_one_pair(tmp_path, tokenizer):
    """TRL: with and without a prompt, text and messages. OpenRLHF: messages without one, or prompt_key; a margin column is not used here."""
    user, good, bad = turn("user", "A?"), turn("assistant", "B"), turn("assistant", "C")
    chats = [
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad], "margin": 0.5},
        {"prompt": "A?", "chosen": [user, good], "rejected": [user, bad], "score_chosen": 1.0},
    ]
    texts = [{"prompt": "A?\n", "chosen": "B", "rejected": "C"}]
    implicit = [{"chosen": "A?\nB", "rejected": "A?\nC"}]
    assert len({pair.chosen.token_ids.tobytes() for pair in read(tmp_path, chats, tokenizer).pairs}) == 1
    named = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in texts]
    results = [
        read(tmp_path, texts, tokenizer), read(tmp_path, named, tokenizer, prompt_key="question", chosen_key="good", rejected_key="bad"),
        read(tmp_path, implicit, tokenizer, prompt_key=""),
    ]  # fmt: skip
    for side in ("chosen", "rejected"):
        sequences = [getattr(result.pairs[0], side) for result in results]
        assert len({(t.token_ids.tobytes(), t.action_mask.tobytes()) for t in sequences}) == 1
    assert len(read(tmp_path, chats[1:2], tokenizer, prompt_key="").pairs) == 1


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("H: great\n\nA: yes", "H: great\n\nA: yesterday", "H: great\n\nA:"),
        ("1+1=?\n2", "1+1=?\n3", "1+1=?\n"),
        ("a b", "a b c", "a"),
    ],
)
def test_an_implicit_prompt_ends_at_a_word(chosen, rejected, prompt):
    row = Row("pairs.jsonl:1", {"chosen": chosen, "rejected": rejected})
    found = pair_texts(row, PairsConfig(path="pairs.jsonl", prompt_key=""))
    assert found == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    for other in ("Xx", " The", ""):
        with pytest.raises(DataError, match="must begin with the same words"):
            pair_texts(Row("pairs.jsonl:1", {"chosen": chosen, "rejected": other}), PairsConfig(path="pairs.jsonl", prompt_key=""))


def test_rows_that_teach_nothing_are_counted(tmp_path, tokenizer):
    rows = [
        {"prompt": "A", "chosen": "B", "rejected": "C"}, {"prompt": "A", "chosen": "B", "rejected": "B"},
        {"prompt": "A", "chosen": " ", "rejected": "C"}, {"prompt": "A", "chosen": "B", "rejected": "C" * 30},
        {"chosen": [turn("user", "A"), turn("assistant", "B")], "rejected": [turn("user", "A"), turn("assistant", "B")]},
        {"prompt": [turn("user", "A")], "chosen": [turn("assistant", "")], "rejected": [turn("assistant", "B")]},
    ]  # fmt: skip
    data = read(tmp_path, rows, tokenizer, max_length=20)
    assert data.counts == {"rows": 6, "pairs": 1, "identical": 2, "empty": 2, "too_long": 1} and len(data.pairs) == 1
    assert data.describe() == "6 rows, 1 pairs, 2 identical, 2 empty, 1 too long"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "A", "chosen": "B"', r"pairs\.jsonl:2: malformed JSON"),
        ({"prompt": "A", "chosen": "B"}, r"pairs\.jsonl:2: no column 'rejected'"),
        ({"prmpt": "A", "chosen": "B", "rejected": "C"}, r"pairs\.jsonl:2: column 'prompt' is missing \(.*\); there are: prmpt"),
        ({"prompt": "A", "chosen": 3, "rejected": "C"}, r"pairs\.jsonl:2: column 'chosen' holds '3'"),
        ({"prompt": "A", "chosen": "B", "rejected": [turn("assistant", "C")]}, r"pairs\.jsonl:2: 'chosen' is a str, 'rejected' a list"),
        ({"chosen": [turn("user", "A")], "rejected": [turn("user", "B")]}, r"pairs\.jsonl:2: .* must begin with the same messages"),
        ({"prompt": [turn("user", "A")], "chosen": ["B"], "rejected": ["C"]}, r"pairs\.jsonl:2: column 'chosen': a message needs"),
    ],
)
def test_a_bad_row_is_named_with_its_line(row, message, tmp_path, tokenizer):
    with pytest.raises(DataError, match=message):
        read(tmp_path, [{"prompt": "A", "chosen": "B", "rejected": "C"}, row], tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_pairs_per_question": 0}, "--pairs.max_pairs_per_question is 0"),
        ({"threshold": float("nan")}, "--pairs.threshold is nan"),
        ({"path": "a.jsonl", "trajectories": ("b.jsonl",)}, "two sources"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PairsConfig(**settings)
