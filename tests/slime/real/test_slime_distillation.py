"""slime's own train.py with ``--use-gkd`` against the paper's formula on transformers + PEFT in float32, one process.

    as test_slime_training.py; some thirty runs of half a minute

In bf16, as slime trains, the loss agrees to 1e-3 and the gradient's norm to 1.5 %; in float32 (``exact``) to 1e-6 and
1e-5.
"""

from __future__ import annotations

import json

import pytest
from distilled import PREFIX, Reference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

TEMPLATE = f"--gkd-teacher-prompt-template '{PREFIX}{{prompt}}'"
LAYOUTS = {
    "tp1": (),
    "tp2-sp": ("--tp", "2"),
    "pp2": ("--pp", "2"),
    "cp2": ("--cp", "2"),
    "ep2": ("--model", "qwen3moe", "--ep", "2"),
}


@pytest.fixture(scope="module")
def dense(harness_dir, slime_python, tmp_path_factory):
    return Reference.make(harness_dir, slime_python, tmp_path_factory.mktemp("dense"), "qwen3")


@pytest.fixture(scope="module")
def experts(harness_dir, slime_python, tmp_path_factory):
    return Reference.make(harness_dir, slime_python, tmp_path_factory.mktemp("experts"), "qwen3moe")


@pytest.fixture(scope="module")
def expected(dense, experts):
    """(reference, teacher, prefix) -> loss and gradient norm, each computed once."""
    found: dict[tuple, tuple[float, float]] = {}

    def of(reference: Reference, teacher: str = "base", prefix: str = "") -> tuple[float, float]:
        key = reference.kind, teacher, prefix
        if key not in found:
            found[key] = reference.expected(teacher, prefix)
        return found[key]

    return of


@pytest.fixture(scope="module")
def train(run):
    """(reference, steps, more words of the harness, slime's flags) -> a run that starts from the reference's files."""

    def start(reference: Reference, steps: str, *words: str, extra: str):
        return run("--keep", "--steps", steps, *words, extra=extra, of=reference)

    return start


def check(done, expected, *, loss=1e-3, norm=1.5e-2):
    assert done.of("gkd/divergence")[0] == pytest.approx(expected[0], rel=loss)
    assert done.of("grad_norm")[0] == pytest.approx(expected[1], rel=norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["plain", "privileged"])
def test_equals_transformers(request, train, expected, layout, prefix):
    reference = request.getfixturevalue("experts" if layout == "ep2" else "dense")
    done = train(reference, "1", *LAYOUTS[layout], extra=f"{reference.flags} {TEMPLATE if prefix else ''}")
    check(done, expected(reference, "base", prefix))
    assert done.of("loss") == done.of("gkd/divergence")
    for name in ("kl_to_student", "kl_to_teacher", "teacher_entropy", "student_entropy"):
        assert done.of(f"gkd/{name}")[0] > 0
    assert 0 < done.of("gkd/top_agreement")[0] < 1
    assert done.of("gkd/on_policy") == [0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["plain", "privileged"])
def test_equals_transformers_in_float32(request, train, expected, layout, prefix):
    reference = request.getfixturevalue("experts" if layout == "ep2" else "dense")
    words = ("--plugin", "exact", *LAYOUTS[layout])
    done = train(reference, "1", *words, extra=f"{reference.flags} {TEMPLATE if prefix else ''}")
    check(done, expected(reference, "base", prefix), loss=1e-6, norm=1e-5)


@pytest.mark.parametrize("layout", ["tp1", "tp2-sp"])
def test_as_a_part_of_the_policy_loss(train, dense, expected, layout):
    """With advantages of 0 the gradient is the divergence's alone, times its weight."""
    flat = "--custom-reward-post-process-path exact.no_signal --kl-loss-coef 0"
    done = train(dense, "1", *LAYOUTS[layout], extra=f"{dense.flags} --gkd-coef 0.5 {flat}")
    loss, norm = expected(dense)
    check(done, (loss, norm / 2))
    assert done.of("loss") == [pytest.approx(loss / 2, rel=1e-3)]


def test_beside_a_policy_loss_that_says_something(train, dense):
    done = train(dense, "2", extra=f"{dense.flags} --gkd-coef 0.5")
    for total, policy, divergence in zip(done.of("loss"), done.of("policy_loss"), done.of("gkd/divergence")):
        assert total == pytest.approx(policy + 0.5 * divergence, abs=1e-6)
        assert divergence > 0
    assert all(value > 0 for value in done.of("kl_loss")), "advantages and reference are there"


def test_another_adapter_teaches(train, dense, expected):
    """Of another rank, scaling and fewer linears."""
    done = train(dense, "1", "--tp", "2", extra=f"{dense.flags} --gkd-teacher {dense.attention}")
    check(done, expected(dense, "attention"))


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
def test_other_weights_teach(train, dense, expected, layout):
    """With a head of their own; two full copies in host memory, which is said."""
    done = train(dense, "2", *LAYOUTS[layout], extra=f"{dense.flags} --gkd-teacher {dense.other}")
    check(done, expected(dense, "other"))
    assert "two full copies" in done.log
    by_rank: dict[int, set] = {}
    for probe in done.probes:
        by_rank.setdefault(probe["rank"], set()).add(probe["base"])
    assert all(len(bits) == 1 for bits in by_rank.values()), "the base has changed"


def test_the_student_teaches_itself(train, dense, expected):
    """With more to read; in float32, for both policies have the noise of bf16 and differ by little."""
    done = train(dense, "1", "--plugin", "exact", extra=f"{dense.flags} {TEMPLATE} --gkd-teacher live")
    check(done, expected(dense, "live", PREFIX), loss=1e-6, norm=1e-5)


def test_an_average_teaches(train, dense):
    """One that keeps nothing is the student, also where slime offloads the trainer."""
    live = train(dense, "2", extra=f"{dense.flags} {TEMPLATE} --gkd-teacher live")
    average = f"{dense.flags} {TEMPLATE} --gkd-teacher ema --gkd-ema-decay"
    sampled = "--label-key label --n-samples-per-prompt 1 --rollout-batch-size 16 --gkd-lmbda 1"
    nothing = train(dense, "2", "--mode", "colocate", "--offload", extra=f"{average} 0 {sampled}")
    for name in ("gkd/divergence", "grad_norm"):
        assert nothing.of(name) == pytest.approx(live.of(name), rel=1e-3), name
    half = train(dense, "2", extra=f"{average} 0.5")
    assert half.of("gkd/divergence")[0] == live.of("gkd/divergence")[0]
    assert half.of("gkd/divergence")[1] != pytest.approx(live.of("gkd/divergence")[1], rel=1e-3)


def test_lambda(train, dense):
    """slime's own rollout loop; steps on its samples and on the labels of the data."""
    more = "--gkd-lmbda 0.5 --seed 3 --label-key label --n-samples-per-prompt 1 --rollout-batch-size 16"
    done = train(dense, "3", "--mode", "colocate", "--generate", extra=f"{dense.flags} {TEMPLATE} {more}")
    assert set(done.of("gkd/on_policy")) == {0.0, 1.0}
    assert all(value > 0 for value in done.of("gkd/divergence"))


def test_slimes_own_distillation_goes_on_beside_it(train, dense, expected):
    """Its teacher and ours are two, and what it reports is what it reports without us."""
    opd = f"--use-opd --opd-type megatron --opd-kl-coef 1.0 --opd-teacher-load {dense.other}"
    lora = dense.flags.partition(" --use-gkd")[0]
    alone = train(dense, "2", extra=f"{lora} {opd}")
    beside = train(dense, "2", extra=f"{dense.flags} --gkd-coef 0.5 {opd}")
    first = [json.loads((done.work / "steps.json").read_text())["rollouts"][0] for done in (alone, beside)]
    assert first[0]["rollout/opd_reverse_kl"] == first[1]["rollout/opd_reverse_kl"] != 0
    assert beside.of("gkd/divergence")[0] == pytest.approx(expected(dense)[0], rel=1e-3)
    assert beside.of("grad_norm")[0] != alone.of("grad_norm")[0]
