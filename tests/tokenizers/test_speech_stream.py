"""Streams: of causal codecs, chunks put together are the whole, however they are cut; of others, the error is shown."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aromni_jax.tokenizers import speech as speech_module
from aromni_jax.tokenizers.nets.seanet import ENCODEC_24KHZ, SOUNDSTREAM_24KHZ, SeanetConfig
from aromni_jax.tokenizers.nets.vocos import VocosConfig
from aromni_jax.tokenizers.nets.wavtokenizer import WavTokenizerConfig
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.speech_codecs import SeanetCodec, VocosCodec, WavTokenizerCodec
from aromni_jax.tokenizers.speech_stream import Window
from tests.tokenizers import test_speech

THIN = dict(filters=4, ratios=(2, 5), code_dim=8)
WAVTOKENIZER = WavTokenizerConfig(
    encoder=dataclasses.replace(ENCODEC_24KHZ, filters=4, ratios=(4, 5), code_dim=8, causal=False),
    width=32,
    mlp_dim=48,
    num_layers=2,
    num_conditions=4,
    num_groups=8,
    window=80,
)
NUM_CODES = 32


def random_tokenizer(net: SeanetConfig | VocosConfig | WavTokenizerConfig, num_codebooks: int = 1) -> SpeechTokenizer:
    """A tokenizer whose parameters are all random, biases included."""
    if isinstance(net, VocosConfig):
        config = dataclasses.replace(test_speech.TINY, net=net, num_codes=NUM_CODES)
        shapes = VocosCodec(net, NUM_CODES).shapes()
    elif isinstance(net, SeanetConfig):
        config = SeanetCodec("seanet", net, NUM_CODES, num_codebooks)
        shapes = config.shapes()
    else:
        config = WavTokenizerCodec("wavtokenizer", net, NUM_CODES)
        shapes = config.shapes()
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        return (rng.normal(size=leaf.shape) * (1.5 / fan_in) ** 0.5).astype(np.float32)

    params = jax.tree.map(draw, shapes.pop("params"))
    (table,) = shapes.values()
    return SpeechTokenizer(config, params, rng.normal(size=table.shape).astype(np.float32))


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.3 * rng.normal(size=num_samples)).astype(np.float32)


CAUSAL = {
    "encodec": (dataclasses.replace(ENCODEC_24KHZ, **THIN), 3),
    "soundstream": (dataclasses.replace(SOUNDSTREAM_24KHZ, **THIN), 2),
    "quickstart": (test_speech.TINY.net, 1),
    "two frames a code": (dataclasses.replace(test_speech.TINY.net, frames_per_code=2), 1),
}


@pytest.fixture(scope="module", params=CAUSAL)
def causal(request):
    return random_tokenizer(*CAUSAL[request.param])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_encoded_chunks_are_the_whole(causal, data):
    """Any length, any cuts, empty chunks and single samples too."""
    length = data.draw(st.integers(1, 30 * causal.hop))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    waveform_T = noise(length)
    stream = causal.stream_encoder()
    state, codes = stream.start(), []
    for start, stop in zip([0, *cuts], [*cuts, length]):
        state, found = stream.step(state, waveform_T[start:stop])
        codes.append(found)
        done = sum(part.shape[1] for part in codes)
        assert done == stop // causal.hop or (done == 0 and stop // causal.hop < stream.codec.start_codes)
    codes.append(stream.finish(state))
    (whole,) = causal.encode([waveform_T])
    found = np.concatenate(codes, axis=1)
    assert found.shape == whole.shape
    assert (found == whole).mean() > 0.99 and (found[0] == whole[0]).all()


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_decoded_chunks_are_the_whole(causal, data):
    length = data.draw(st.integers(1, 30))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    codes_KU = np.random.default_rng(length).integers(0, NUM_CODES, (causal.num_codebooks, length), dtype=np.int32)
    stream = causal.stream_decoder()
    state, sound = stream.start(), []
    for start, stop in zip([0, *cuts], [*cuts, length]):
        state, found = stream.step(state, codes_KU[:, start:stop])
        sound.append(found)
        done = sum(map(len, sound))
        if stop >= stream.codec.start_codes:
            assert done == max(0, stop * causal.hop - stream.delay_samples)
    sound.append(stream.finish(state))
    (whole,) = causal.decode([codes_KU])
    found = np.concatenate(sound)
    assert found.shape == whole.shape and np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(found, whole, atol=1e-5, rtol=0)


def test_first_sound_comes_with_the_first_chunk(causal):
    stream = causal.stream_decoder()
    assert stream.codec.start_codes == (7 if causal.codec.num_codebooks == 3 else 1)
    if isinstance(causal.codec, SeanetCodec):
        assert causal.lookahead_codes == 0
    assert causal.lookahead_codes == -(-stream.delay_samples // causal.hop) <= 2
    first = stream.codec.start_codes + causal.lookahead_codes
    _, sound = stream.step(stream.start(), np.zeros((causal.num_codebooks, first), np.int32))
    assert len(sound) == first * causal.hop - stream.delay_samples > 0


def test_a_state_can_be_used_again(causal):
    """States are values: two continuations of one state do not see each other."""
    stream = causal.stream_decoder()
    rng = np.random.default_rng(0)
    codes_KU = rng.integers(0, NUM_CODES, (causal.num_codebooks, 20), dtype=np.int32)
    state, _ = stream.step(stream.start(), codes_KU[:, :12])
    _, once = stream.step(state, codes_KU[:, 12:])
    stream.step(state, codes_KU[:, :8])
    np.testing.assert_array_equal(stream.step(state, codes_KU[:, 12:])[1], once)


def test_few_shapes_are_compiled():
    tokenizer = random_tokenizer(*CAUSAL["soundstream"])
    stream = tokenizer.stream_decoder()
    state = stream.start()
    for size in (1, 2, 3, 5, 6, 7, 4, 1, 13):
        state, _ = stream.step(state, np.zeros((2, size), np.int32))
    assert stream._jitted._cache_size() == 2, "1 and 4 codes"


@pytest.fixture(scope="module")
def wavtokenizer():
    return random_tokenizer(WAVTOKENIZER)


def test_wavtokenizer_error_falls_with_the_lookahead(wavtokenizer, capsys):
    """Attention and group norms see the whole utterance, so windows never give it exactly; more to see comes nearer."""
    codes_KU = np.random.default_rng(0).integers(0, NUM_CODES, (1, 96), dtype=np.int32)
    waveform_T = noise(96 * wavtokenizer.hop)
    (sound,), (codes,) = wavtokenizer.decode([codes_KU]), wavtokenizer.encode([waveform_T])
    table = []
    for context, lookahead in ((80, 0), (80, 1), (80, 2), (80, 8), (16, 8)):
        window = Window(chunk_codes=4, context_codes=context, lookahead_codes=lookahead)
        decoder, encoder = wavtokenizer.stream_decoder(window), wavtokenizer.stream_encoder(window)
        found = speech_module._through(decoder, codes_KU, bucket_size=3)
        assert found.shape == sound.shape
        error = np.sqrt(np.mean(np.square(found - sound)) / np.mean(np.square(sound)))
        same = speech_module._through(encoder, waveform_T, bucket_size=70) == codes
        table.append((context, lookahead, error, same.mean()))
    with capsys.disabled():
        print("\nWavTokenizer, random weights, chunks of 4 codes\ncontext  look-ahead  error of sound  equal codes")
        for context, lookahead, error, same in table:
            print(f"{context:7d}  {lookahead:10d}  {error:14.4f}  {same:11.3f}")
    errors = {(context, lookahead): error for context, lookahead, error, _ in table}
    shares = {(context, lookahead): same for context, lookahead, _, same in table}
    assert errors[80, 0] > errors[80, 1] > errors[80, 2] > errors[80, 8]
    assert errors[16, 8] > errors[80, 8]
    assert shares[80, 0] < shares[80, 2] < shares[80, 8] and shares[80, 8] > 0.99
    everything = Window(chunk_codes=96, context_codes=0, lookahead_codes=0)
    whole = speech_module._through(wavtokenizer.stream_decoder(everything), codes_KU, bucket_size=5)
    np.testing.assert_allclose(whole, sound, atol=1e-5, rtol=0)


def test_windows_wait_for_their_lookahead(wavtokenizer):
    stream = wavtokenizer.stream_decoder(Window(chunk_codes=2, context_codes=4, lookahead_codes=3))
    state, sizes = stream.start(), []
    for _ in range(9):
        state, sound = stream.step(state, np.zeros((1, 1), np.int32))
        sizes.append(len(sound) // wavtokenizer.hop)
    assert sizes == [0, 0, 0, 0, 2, 0, 2, 0, 2]
    assert len(stream.finish(state)) == 3 * wavtokenizer.hop
    assert wavtokenizer.lookahead_codes is None
    with pytest.raises(ValueError, match="chunk_codes must be at least 1"):
        Window(chunk_codes=0, context_codes=1, lookahead_codes=1)


@pytest.mark.parametrize("name", ["encodec", "wavtokenizer"])
def test_long_sound_goes_through_in_pieces(name, monkeypatch, wavtokenizer):
    """Beyond the longest call memory is bounded: the codes are those of a stream."""
    tokenizer = wavtokenizer if name == "wavtokenizer" else random_tokenizer(*CAUSAL[name])
    waveform_T = noise(200 * tokenizer.hop - 3)
    (whole,) = tokenizer.encode([waveform_T])
    (sound,) = tokenizer.decode([whole])
    monkeypatch.setattr(speech_module, "_LONGEST_CALL", 128)
    monkeypatch.setattr(speech_module, "_LONG_WINDOW", Window(64, 32, 16))
    (pieces,) = tokenizer.encode([waveform_T])
    (again,) = tokenizer.decode([whole])
    assert pieces.shape == whole.shape and again.shape == sound.shape
    assert (pieces == whole).mean() > 0.99
    if name == "encodec":
        np.testing.assert_allclose(again, sound, atol=1e-5, rtol=0)
