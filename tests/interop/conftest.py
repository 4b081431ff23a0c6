"""The small model and vocabulary the tests of this room share."""

from __future__ import annotations

import pytest

from aromni_jax.models.config import ModelConfig
from aromni_jax.vocab import JointVocab
from tests.fixtures.small_models import small_model, small_vocab


@pytest.fixture
def vocab() -> JointVocab:
    return small_vocab()


@pytest.fixture
def model() -> ModelConfig:
    return small_model()
