"""How `aromni generate` chooses tokens: the fields of `aromni_jax.inference.policy.DecodingConfig`.

    aromni generate text-to-image --text="a red star" --model=DIR --output=DIR --config=configs/decode.py:released
    aromni generate text-to-image --text="a red star" --model=DIR --output=DIR --config.image.top_k=200

Variants: the default (ours), and `released`, the settings of the released AR-Omni code: all text is sampled, captions
and recognised speech too, hot, with a penalty on every word the answer has used, its transcript included. Ours takes
the likeliest wording where the input decides it, and cuts the tail of open text relative to its likeliest token, which
keeps few choices where the model is sure and many where it is not. Transcripts and speech are greedy in both. Guidance
of pictures is the same where only words ask for one; where a prompt holds a picture, the released settings weigh what
is seen and what is said apart (`image_guidance`), which takes a third row of the cache.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def _mode(**settings: float | int | str) -> ConfigDict:
    """A complete `Mode`: greedy, but for `settings`."""
    greedy = dict(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        repetition_scope="answer",
        guidance=1.0,
        image_guidance=None,
    )
    return ConfigDict(greedy | settings)


def get_config(variant: str = "") -> ConfigDict:
    """The fields of `aromni_jax.inference.policy.DecodingConfig`."""
    if variant not in ("", "ours", "released"):
        raise ValueError(f"unknown variant {variant!r}; variants: ours (the same as none) and released")
    config = ConfigDict(
        dict(
            text=_mode(temperature=1.0, min_p=0.05, repetition_penalty=1.1, repetition_scope="segment"),
            recognition=_mode(),
            transcript=_mode(),
            speech=_mode(),
            image=_mode(temperature=1.0, top_p=0.96, guidance=3.07),
            text_budget=512,
            speech_budget_frames=1500,
        )
    )
    if variant == "released":
        config.image = _mode(temperature=1.0, top_p=0.96, guidance=3.07, image_guidance=1.15)
        config.text = _mode(temperature=1.2, top_p=0.96, repetition_penalty=1.2)
        config.recognition = _mode(temperature=1.2, top_p=0.96, repetition_penalty=1.2)
    return config
