"""The language model's log-probabilities: shifted once, tempered, masked, and refused where they would be wrong."""

import pytest
import torch

from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.policy import LanguageModel, TokenScoringHead
from tests.helpers_models import random_batch, write_tiny_model
from tests.models.test_attention import alone, packed_model


def test_entropy_and_temperature_follow_the_definition(tmp_path):
    path = write_tiny_model(tmp_path / "m", tied=False)
    batch = random_batch([11, 6])
    _, reference = alone(path, batch)
    logprobs, entropy = packed_model(path, head_chunk_tokens=3)(batch.token_ids, batch.cu_seqlens, temperature=0.7, with_entropy=True)
    scores = torch.log_softmax(reference(batch.token_ids[None, :11]).logits[0] / 0.7, -1)
    torch.testing.assert_close(logprobs[1:11], scores[:-1].gather(1, batch.token_ids[1:11, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy[1:11], -(scores.exp() * scores).sum(-1)[:-1], atol=1e-5, rtol=0)
    assert logprobs[0] == logprobs[11] == entropy[0] == entropy[11] == 0.0


def test_a_score_mask_leaves_the_scored_tokens_as_they_were(tmp_path):
    model = packed_model(write_tiny_model(tmp_path / "m"))
    batch = random_batch([11, 6], prompt_tokens=4)
    everything = model(batch.token_ids, batch.cu_seqlens)[0]
    actions = model(batch.token_ids, batch.cu_seqlens, score_mask=batch.action_mask)[0]
    torch.testing.assert_close(actions, everything * batch.action_mask)


def test_tied_and_untied_heads_own_their_weight(tmp_path):
    for tied in (True, False):
        model = packed_model(write_tiny_model(tmp_path / f"{tied}", tied=tied))
        head = model.model.get_output_embeddings()
        assert isinstance(head, TokenScoringHead)
        assert (head.weight is model.model.get_input_embeddings().weight) is tied


def test_a_sequence_beyond_the_positions_is_refused_with_the_numbers(tmp_path):
    model = packed_model(write_tiny_model(tmp_path / "m", max_position_embeddings=16))
    batch = random_batch([17])
    with pytest.raises(DataError, match="17 tokens.*16 positions"):
        model(batch.token_ids, batch.cu_seqlens)


def test_a_head_that_is_not_a_plain_matrix_is_refused(tmp_path):
    model = packed_model(write_tiny_model(tmp_path / "m")).model
    with pytest.raises(ConfigError, match="TokenScoringHead"):
        LanguageModel(model, attn_impl="openrl_packed")
