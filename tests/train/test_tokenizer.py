"""The byte-level tokenizer loses nothing and never fails."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from seer_jax.train.tokenizer import BOS_ID, EOS_ID, NUM_TOKENS, PAD_ID, decode, encode


@given(st.text())
def test_decode_inverts_encode_for_any_text(text):
    assert decode(encode(text)) == text


def test_special_ids_frame_the_text_and_decode_to_nothing():
    ids = encode("é?", add_bos=True, add_eos=True)
    assert ids.dtype == np.int32
    assert ids.tolist() == [BOS_ID, 0xC3, 0xA9, ord("?"), EOS_ID]
    assert decode([*ids.tolist(), PAD_ID, PAD_ID]) == "é?"


@given(st.lists(st.integers(0, NUM_TOKENS + 20)))
def test_decode_takes_whatever_a_model_samples(token_ids):
    assert decode(token_ids).isascii() or any(i >= 128 for i in token_ids)
