"""``slime-lora history``: the table that it prints, the picture that it draws. pytest tests/control"""

from __future__ import annotations

import math

import pytest

from slime_plugins.lora.cli import main
from slime_plugins.lora.control.history import FILE, History
from slime_plugins.lora.control.plateau import Plateau

RULE = Plateau(metric="val_loss", lr=1e-4, stop_min_lr=6e-5)


@pytest.fixture
def run(tmp_path):
    past = History(RULE, RULE.lr)
    past.add(5, {"eval/math": 0.5})
    for step, value in ((10, 0.9), (20, 0.8), (30, math.nan), (40, 0.79)):
        past.add(step, {"val_loss": value})
    past.write(tmp_path / "run")
    return tmp_path / "run"


def test_table(run, capsys):
    assert main(["history", str(run)]) == main(["history", str(run / FILE)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[: len(out) // 2] == out[len(out) // 2 :] == [
        "step      lr  val_loss  eval/math     decision",
        "   5  0.0001                  0.5",
        "  10  0.0001       0.9                best so far",
        "  20  0.0001       0.8                best so far; better than 0.9 by more than 5 %",
        "  30  0.0001       nan                not finite; 1 in a row, 1 allowed",
        "  40  0.0001      0.79             *  best so far; not better than 0.8 by 5 %; 2 in a row, 1 allowed; "
        "learning rate 0.0001 -> 5e-05; stop: the learning rate 5e-05 is below --stop-min-lr 6e-05",
        "best: 0.79 after step 40",
        "learning rate: 0.0001 at the start, 5e-05 now",
        "stopped after step 40: the learning rate 5e-05 is below --stop-min-lr 6e-05",
    ]  # fmt: skip


def test_picture(run, tmp_path, capsys):
    """Every curve is in it: two metrics, without the value that is none, and the rate with its fall."""
    from matplotlib.figure import Figure

    drawn = []
    original = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k))[1])
        assert main(["history", str(run), "--png", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'x.png'}\n")
    loss, reward, rate = drawn[0].axes
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["val_loss", "eval/math", "learning rate"]
    assert [list(xy) for xy in loss.lines[0].get_xydata()] == [[10, 0.9], [20, 0.8], [40, 0.79]]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["best: 0.79", "stopped"]
    assert [list(xy) for xy in reward.lines[0].get_xydata()] == [[5, 0.5]]
    assert rate.lines[0].get_ydata()[-1] == 5e-5


@pytest.mark.parametrize("argv", [["history", "nowhere"], ["history", "."], ["history", ""]])
def test_what_is_not_there(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("slime-lora: error: ") and err.count("\n") == 1


def test_nothing_to_draw(tmp_path, capsys):
    History(RULE, RULE.lr).write(tmp_path)
    assert main(["history", str(tmp_path)]) == 0
    assert main(["history", str(tmp_path), "--png", str(tmp_path / "x.png")]) == 1
    assert "nothing to draw" in capsys.readouterr().err and not (tmp_path / "x.png").exists()
