"""What every phone runtime's session must do as the model itself does in torch."""

from __future__ import annotations

import pytest

from edgelora.errors import Unsupported
from edgelora.runtime import Session
from tests.test_onnx_export import IDS


def assert_answers_alike(torch: Session, session: Session) -> None:
    """The same greedy answer, ended by a stop token in the middle of it; a text longer than the file's context is refused."""
    greedy = [*torch.generate(IDS[:40], 24, ())]
    assert [*session.generate(IDS[:40], 24, ())] == greedy
    assert [*session.generate(IDS[:40], 24, greedy[5:6])] == greedy[: greedy.index(greedy[5])]
    with pytest.raises(Unsupported, match="257 tokens do not fit into the 256"):
        session.score([3] * 257)
