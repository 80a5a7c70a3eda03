"""The entry point: exit codes, one-line errors, help that is fast. Run: pytest tests/cli/test_cli.py"""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from slime_plugins.lora import cli
from slime_plugins.lora.errors import UsageError

VERB_NAMES = ("rehearse", "export", "import", "merge", "verify", "convert-zero", "history", "plan", "patch")


def slime_lora(*args: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "slime_plugins.lora", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


@pytest.fixture
def run_verb(monkeypatch, capsys):
    """Run a stand-in verb ``do`` whose body is given; returns (exit code, stdout, stderr)."""

    def run(body, *argv):
        verb = SimpleNamespace(
            NAME="do", HELP="h", EPILOG="", add_arguments=lambda p: p.add_argument("--n", type=int), run=body
        )
        monkeypatch.setattr(cli, "_verb_modules", lambda: [verb])
        code = cli.main(["do", *argv])
        return (code, *capsys.readouterr())

    return run


def raising(error):
    def body(args):
        raise error

    return body


def test_exit_code_is_the_verbs_own(run_verb):
    assert run_verb(lambda args: 0)[0] == 0
    assert run_verb(lambda args: 1)[0] == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("rank is 0"), 2, "slime-lora: error: rank is 0\n"),
        (ValueError("adapter is\n  empty"), 1, "slime-lora: error: adapter is empty\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            1,
            "slime-lora: error: x: No such file or directory\n",
        ),
        (OSError("disk full"), 1, "slime-lora: error: disk full\n"),
        (
            json.JSONDecodeError("Expecting value", "", 0),
            1,
            "slime-lora: error: Expecting value: line 1 column 1 (char 0)\n",
        ),
        (KeyboardInterrupt(), 130, "slime-lora: interrupted\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(run_verb, error, code, line):
    assert run_verb(raising(error)) == (code, "", line)


def test_missing_package_names_the_extra_that_brings_it(run_verb):
    code, _, err = run_verb(raising(ModuleNotFoundError("No module named 'ray.util'", name="ray.util")))
    assert code == 1
    assert err == (
        "slime-lora: error: this needs the package 'ray', which is not installed: "
        "pip install 'slime-lora[rehearsal]'\n"
    )


def test_a_module_of_our_own_that_is_missing_is_a_bug_and_shows_its_traceback(run_verb):
    with pytest.raises(ModuleNotFoundError):
        run_verb(
            raising(ModuleNotFoundError("No module named 'slime_plugins.lora.gone'", name="slime_plugins.lora.gone"))
        )


def test_other_exceptions_are_bugs_and_show_their_traceback(run_verb):
    with pytest.raises(KeyError):
        run_verb(raising(KeyError("a")))


def test_debug_shows_the_traceback_before_or_after_the_verb(monkeypatch, run_verb):
    with pytest.raises(UsageError):
        run_verb(raising(UsageError("x")), "--debug")
    with pytest.raises(UsageError):
        cli.main(["--debug", "do"])


@pytest.mark.parametrize("argv", [["nonsense"], ["do", "--n", "many"], ["do", "--unknown"], ["--unknown"]])
def test_wrong_usage_is_one_line_and_2(monkeypatch, capsys, argv):
    verb = SimpleNamespace(
        NAME="do", HELP="h", EPILOG="", add_arguments=lambda p: p.add_argument("--n", type=int), run=lambda a: 0
    )
    monkeypatch.setattr(cli, "_verb_modules", lambda: [verb])
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("slime-lora: error: ")
    assert err.count("\n") == 1
    assert "--help" in err


def test_no_verb_prints_the_help_and_lists_the_verbs(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert [name for name in VERB_NAMES if name not in out] == []


@pytest.mark.parametrize("verb", VERB_NAMES)
def test_every_verb_has_help_with_examples(capsys, verb):
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out.lower()
    assert f"slime-lora {verb}" in out


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from slime_plugins.lora.cli import main\n"
        "main(['--help']); main(['rehearse', '--help'])\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'ray', 'peft', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    # Processor time of the child would be steadier, but what a user feels is the clock: the best of three.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1.0


def test_module_form_is_the_same_command():
    done = slime_lora("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "slime-lora")
    assert slime_lora("nonsense").returncode == 2


def test_a_reader_that_goes_away_is_not_an_error_message():
    body = (
        "import sys; from types import SimpleNamespace as N; from slime_plugins.lora import cli\n"
        "def run(a):\n    print('x\\n' * 1_000_000)\n    return 0\n"
        "cli._verb_modules = lambda: [N(NAME='do', HELP='', EPILOG='', add_arguments=lambda p: None, run=run)]\n"
        "sys.exit(cli.main(['do']))"
    )
    child = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(timeout=60) == 141
