"""A bar on a terminal; elsewhere a line a minute, without carriage returns; nobody has to read it."""

import sys
from types import SimpleNamespace

from flashkat_hf.training import progress
from flashkat_hf.training.progress import Lines, progress_bar
from flashkat_hf.training.run_log import RunLog


def test_a_line_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress_bar(100, "step", initial=10) as bar:
        for step in range(90):
            bar.set_postfix_str(f"loss {step}", False)
            now[0] += 2.0
            bar.update()
    assert capsys.readouterr().err.split("\n") == [
        "40% 40/100 [01:00<02:00,  2.00s/step, loss 29]",
        "70% 70/100 [02:00<01:00,  2.00s/step, loss 59]",
        "100% 100/100 [03:00<00:00,  2.00s/step, loss 89]",
        "",
    ]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(3, "batch", text="evaluating") as bar:
        bar.update(3)
    assert not isinstance(bar, Lines)
    written = capsys.readouterr().err
    assert "\revaluating: " in written
    assert "3/3" in written
    with progress_bar(3, "batch", shown=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_training_goes_on_when_nobody_reads(monkeypatch):
    """As after `| head`."""

    def write(text: str) -> None:
        raise BrokenPipeError

    log = RunLog(SimpleNamespace(is_main_process=True), SimpleNamespace())
    log.show(0, 1)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=lambda: None))
    log.say("epoch 1: test accuracy 10.00%")
