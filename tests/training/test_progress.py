"""What is printed and logged while a model trains."""

import random
from pathlib import Path

import pytest

from glasshouse.training.progress import Progress, Scalars, SpikeDetector, clock


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0s"), (45.4, "45s"), (185, "3m05s"), (7800, "2h10m")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_spike_is_found_and_noise_is_not() -> None:
    draw, detector = random.Random(0), SpikeDetector()
    falling = [4.0 * 0.995**step + draw.gauss(0, 0.05) for step in range(400)]
    assert not any(detector.is_spike(loss) for loss in falling)
    assert detector.is_spike(falling[-1] * 10)
    assert detector.is_spike(float("inf"))
    assert not detector.is_spike(falling[-1]), "one spike must not hide what is normal"


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, 0) as progress:
        progress.show(5, 2.5, 1.25, 1234.0, 0.5, 2 * 10**9)
        progress.say("[odd] markup")
    printed = capsys.readouterr().out
    assert "step 5/10  loss 2.500  1.250 bits/byte  1,234 tokens/s  50% of peak  2.00 GB" in printed
    assert "[odd] markup" in printed
    assert "\x1b" not in printed


def test_scalars_are_written_where_tensorboard_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    scalars = Scalars(tmp_path)
    scalars.add({"step": 3, "loss": 1.5, "sample": "text"})
    assert any((tmp_path / "tensorboard").iterdir())
    Scalars(tmp_path / "other", quiet=True).add({"step": 3, "loss": 1.5})
    assert not (tmp_path / "other").exists()
