"""The built-in task with an answer vocabulary that is new, learnt by reward with the model frozen.

pytest tests/rehearsal/test_new_tokens.py -m ""     # two minutes
"""

import json

import pytest
from rehearsals import Rehearsal

from slime_plugins.lora.cli import main

WORDS = ("zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove")


@pytest.mark.parametrize(
    "words, flags, reason",
    [
        (WORDS[:9], (), "9 tokens; the built-in task takes 10, one for each digit in order"),
        (WORDS, ("--trainable-token-indices", "5"), "name the same rows; give one of them"),
        ((*WORDS[:9], WORDS[0]), (), "'zero' is on line 1 already"),
        (WORDS, ("--objective", "gkd"), "--objective gkd with trained vocabulary rows"),
    ],
)
def test_what_cannot_work_is_refused(words, flags, reason, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("\n".join(words))
    argv = ["rehearse", "--out", str(tmp_path / "out"), "--new-tokens", str(tmp_path / "words.txt"), *flags]
    assert main(argv) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_the_rows_alone_learn_to_answer(tmp_path):
    """From never to as often as the frozen base is right in its own digits: one in five."""
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    flags = ["--new-tokens", str(tmp_path / "words.txt"), "--freeze-llm", "--tp", "2", "--sp"]
    with Rehearsal(tmp_path / "run", tmp_path / "cache", *flags) as run:
        code, log = run.wait(timeout=600)
        assert code == 0, log
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_reward_first"] == 0 and summary["eval_reward_last"] > 0.1
    assert summary["trainable_parameters"] == 10 * 64
    assert summary["base_checksum_before"] == summary["base_checksum_after"]
    answers = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    last = [a["response"].strip() for a in answers if a["held_out"] and a["step"] == summary["last_step"]]
    assert sum(answer in WORDS for answer in last) > 0.8 * len(last)
