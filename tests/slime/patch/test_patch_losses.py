"""``slime-lora patch`` on checkouts that people have worked in, and after a kill: nothing of theirs is lost.

Run: pytest tests/slime/patch/test_patch_losses.py
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from slime_checkouts import ACTOR, COMMON, FILES, everything, git

from slime_plugins.lora.cli import main
from slime_plugins.lora.slime.patch import checkout, edits
from slime_plugins.lora.slime.patch.plugin import COPY_MARK, package_dir

MARK = edits.MARK
HTTP = "slime/utils/http_utils.py"


@pytest.fixture
def patch(slime, capsys):
    """Run a verb; returns its exit code, what it printed and the one line of its error."""

    def run(action, *words):
        code = main(["patch", action, "--slime", str(slime), *words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and (code == 0 or err.count("\n") <= 1), err
        return code, out, err

    return run


def refused(slime, patch, *words, naming):
    """The verb refuses in one line that names something, and nothing has changed."""
    before = everything(slime)
    code, _, err = patch(*words)
    assert code == 1 and err.count("\n") == 1 and naming in err, (code, err)
    assert everything(slime) == before


# The copied plugin ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["added", "in a folder", "changed", "link", "dangling", "fifo", "empty folder"])
def test_what_was_put_into_a_copied_plugin_is_not_deleted(slime, patch, damage):
    assert patch("apply", "--copy")[0] == 0
    target = slime / "slime_plugins/lora"
    mine = target / ("names.py" if damage == "changed" else "mine/mine.py" if damage == "in a folder" else "mine.py")
    mine.parent.mkdir(exist_ok=True)
    if damage == "link":
        mine.symlink_to(target / "names.py")
    elif damage == "dangling":
        mine.symlink_to("/nowhere")
    elif damage == "fifo":
        os.mkfifo(mine)
    elif damage == "empty folder":
        mine.mkdir()
    else:
        mine.write_text("x = 1\n")
    for words in (("apply",), ("apply", "--copy"), ("revert",)):
        refused(slime, patch, *words, naming=mine.name)
    code, out, _ = patch("check")
    assert code == 1 and mine.name in out
    assert patch("revert", "--force")[0] == 0
    assert git(slime, "status", "--porcelain") == ""


def test_a_copy_of_an_older_plugin_is_replaced(slime, patch):
    assert patch("apply", "--copy")[0] == 0
    target = slime / "slime_plugins/lora"
    (target / "names.py").write_text("old = 1\n")
    (target / "since_removed.py").write_text("old = 2\n")
    (target / COPY_MARK).unlink()
    from slime_plugins.lora.slime.patch import plugin

    (target / COPY_MARK).write_text(json.dumps({k: v for k, (_, v) in plugin.inventory(target).items()}))
    code, out, _ = patch("apply", "--copy")
    assert code == 0 and "copied" in out
    assert not (target / "since_removed.py").exists()
    assert (target / "names.py").read_bytes() == (package_dir() / "names.py").read_bytes()


def test_a_file_that_went_missing_from_a_copy_comes_back(slime, patch):
    assert patch("apply", "--copy")[0] == 0
    (slime / "slime_plugins/lora/names.py").unlink()
    assert patch("apply", "--copy")[0] == 0
    assert (slime / "slime_plugins/lora/names.py").is_file()
    (slime / "slime_plugins/lora/names.py").unlink()
    assert patch("revert")[0] == 0 and git(slime, "status", "--porcelain") == ""


@pytest.mark.parametrize("mark", ["", "[]", "7", "null", '{"names.py": 3}', "[" * 5000, "\x00", '{"a"', "{}", b"\xff"])
def test_a_broken_copy_mark_is_one_line(slime, patch, mark):
    assert patch("apply", "--copy")[0] == 0
    path = slime / "slime_plugins/lora" / COPY_MARK
    path.write_bytes(mark if isinstance(mark, bytes) else mark.encode())
    for words in (("apply",), ("apply", "--copy"), ("revert",)):
        refused(slime, patch, *words, naming="slime_plugins/lora")
    assert patch("check")[0] == 1
    assert patch("revert", "--force")[0] == 0 and git(slime, "status", "--porcelain") == ""


def test_the_copy_that_runs_is_not_replaced_by_a_link_to_itself(slime, patch):
    assert patch("apply", "--copy")[0] == 0
    before = everything(slime)
    for words, expected in ((["apply"], 1), (["apply", "--copy"], 0), (["check"], 0)):
        done = subprocess.run(
            [sys.executable, "-B", "-m", "slime_plugins.lora", "patch", *words, "--slime", str(slime)],
            cwd=slime, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == expected and "Traceback" not in done.stderr, done.stderr
    assert everything(slime) == before


# What is no plugin of ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["/nowhere/mine", "lora", "/nowhere/lora"])
def test_a_foreign_link_is_not_ours(slime, patch, to):
    (slime / "slime_plugins/lora").symlink_to(to)
    before = everything(slime)
    for words in (("apply",), ("apply", "--copy")):
        refused(slime, patch, *words, naming="slime_plugins/lora")
    code, out, _ = patch("check")
    assert code == 1 and "foreign" in out
    assert patch("revert")[0] == 0 and everything(slime) == before


def test_the_link_to_where_the_plugin_lay_before_is_ours(slime, patch):
    """A link that another node made, or one whose folder was moved: both verbs work on it."""
    target = slime / "slime_plugins/lora"
    target.symlink_to("/former/place/slime_plugins/lora")
    code, out, _ = patch("revert")
    assert code == 0 and "removed slime_plugins/lora, which pointed to /former/place/slime_plugins/lora" in out
    target.symlink_to("/former/place/slime_plugins/lora")
    assert patch("apply")[0] == 0 and os.path.realpath(target) == str(package_dir())


@pytest.mark.parametrize("kind", ["directory", "empty", "file", "fifo"])
def test_check_says_what_apply_will_say(slime, patch, kind):
    target = slime / "slime_plugins/lora"
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "file":
        target.write_text("x = 1\n")
    else:
        target.mkdir()
        if kind == "directory":
            (target / "mine.py").write_text("x = 1\n")
    code, out, _ = patch("check")
    assert code == 1 and "move it away" in out
    refused(slime, patch, "apply", naming="move it away")
    before = everything(slime)
    assert patch("revert")[0] == 0 and everything(slime) == before


def test_slime_plugins_in_another_place_is_refused(slime, patch, tmp_path):
    shutil.move(slime / "slime_plugins", tmp_path / "elsewhere")
    (slime / "slime_plugins").symlink_to(tmp_path / "elsewhere")
    refused(slime, patch, "apply", naming="slime_plugins")
    assert patch("check")[0] == 1 and not (tmp_path / "elsewhere/lora").exists()


@pytest.mark.parametrize("words", [("--slime", ""), ("--slime", "LOOP"), ("--slime", "x" * 5000)])
def test_no_checkout_is_one_line(tmp_path, capsys, words):
    (tmp_path / "LOOP").symlink_to("LOOP")
    words = [str(tmp_path / word) if word == "LOOP" else word for word in words]
    assert main(["patch", "check", *words]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


# Killed --------------------------------------------------------------------------------------------------------------


KILLED_AT = {
    "the third file of the copy": ("shutil.copyfile", 3),
    "the copy's mark": ("plugin._write_mark", 1),
    "the first seam file": ("os.replace", 1),
    "the fourth seam file": ("os.replace", 4),
    "the copy's place": ("os.rename", 1),
}


@pytest.mark.parametrize("when", KILLED_AT)
@pytest.mark.parametrize("then", ["apply", "apply --copy", "revert"])
def test_both_verbs_mend_what_a_killed_apply_left(slime, patch, when, then):
    before = everything(slime)
    _killed(slime, *KILLED_AT[when], "checkout.apply(checkout.plan(root), copy=True)")
    if then != "revert":
        assert patch(*then.split())[0] == 0
        assert checkout.plan(slime).applied and (slime / "slime_plugins/lora/names.py").is_file()
    assert patch("revert")[0] == 0
    assert everything(slime) == before


@pytest.mark.parametrize("when", [("shutil.rmtree", 1), ("os.unlink", 5), ("os.replace", 3), ("os.rename", 1)])
@pytest.mark.parametrize("then", ["apply", "apply --copy", "revert"])
def test_both_verbs_mend_what_a_killed_revert_left(slime, patch, when, then):
    before = everything(slime)
    assert patch("apply", "--copy")[0] == 0
    _killed(slime, *when, "checkout.revert(root)")
    if then != "revert":
        assert patch(*then.split())[0] == 0
        assert checkout.plan(slime).applied and (slime / "slime_plugins/lora/names.py").is_file()
    assert patch("revert")[0] == 0
    assert everything(slime) == before


def test_half_a_copy_of_an_earlier_version_is_taken_for_what_it_is(slime, patch):
    """Copied in place without a mark, as earlier versions left it when they were killed; nothing in it is theirs."""
    for then in ("apply", "revert"):
        target = slime / "slime_plugins/lora"
        target.mkdir()
        shutil.copy(package_dir() / "names.py", target)
        code, _, _ = patch(then)
        assert code == 0
        assert target.is_symlink() if then == "apply" else not target.exists()
        patch("revert")


def _killed(root, function, nth, call):
    """Run ``call`` in a process that is killed in front of the nth call of a function."""
    script = f"""
        import os, shutil
        from pathlib import Path
        from slime_plugins.lora.slime.patch import checkout, plugin
        root, real, left = Path({str(root)!r}), {function}, [{nth}]
        def deadly(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), 9)
            return real(*args, **kwargs)
        {function} = deadly
        {call}
    """
    done = subprocess.run([sys.executable, "-B", "-c", textwrap.dedent(script)], capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr.decode()


# Seam files ----------------------------------------------------------------------------------------------------------


def test_a_linked_seam_file_is_written_through_its_link(slime, patch):
    (slime / COMMON).rename(slime / "slime/real_common.py")
    (slime / COMMON).symlink_to("../../../real_common.py")
    before = everything(slime)
    assert patch("apply")[0] == 0
    assert (slime / COMMON).is_symlink() and MARK in (slime / "slime/real_common.py").read_text()
    assert patch("revert")[0] == 0 and everything(slime) == before


@pytest.mark.parametrize("folder", [False, True])
def test_a_seam_file_of_another_checkout_is_left_alone(slime, patch, tmp_path, folder):
    path = (slime / COMMON).parent if folder else slime / COMMON
    outside = tmp_path / "other"
    path.rename(outside)
    path.symlink_to(outside)
    refused(slime, patch, "apply", naming="outside the checkout")
    assert MARK not in (outside / "common.py" if folder else outside).read_text()
    # with lines of ours in it, revert has the same reason to stop
    file = outside / "common.py" if folder else outside
    file.write_text(f"{edits.IMPORT}  {MARK}\n" + file.read_text())
    refused(slime, patch, "revert", naming="outside the checkout")


def test_two_seams_in_one_file_by_a_link_are_refused(slime, patch):
    http = slime / HTTP
    rollout = slime / "slime/ray/rollout.py"
    rollout.write_text(rollout.read_text() + http.read_text())
    http.unlink()
    http.symlink_to(rollout)
    refused(slime, patch, "apply", naming="same file")


@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "dangling"])
@pytest.mark.parametrize("path", [COMMON, "slime/rollout/sglang_streaming_rollout.py"])
def test_a_seam_that_is_no_file_is_named(slime, patch, kind, path):
    (slime / path).unlink()
    if kind == "fifo":
        os.mkfifo(slime / path)
    elif kind == "directory":
        (slime / path).mkdir()
    else:
        (slime / path).symlink_to("common.py" if kind == "loop" and path == COMMON else "sglang_streaming_rollout.py")
        if kind == "dangling":
            (slime / path).unlink()
            (slime / path).symlink_to("nowhere.py")
    before = everything(slime)
    code, out, _ = patch("check")
    assert code == 1 and path in out
    refused(slime, patch, "apply", naming=path)
    assert patch("revert")[0] == 0 and everything(slime) == before


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_a_read_only_file_is_not_written(slime, patch, verb):
    if verb == "revert":
        assert patch("apply")[0] == 0
    (slime / COMMON).chmod(0o444)
    refused(slime, patch, verb, naming=COMMON)
    (slime / COMMON).chmod(0o644)
    assert patch(verb)[0] == 0


FORM_FEED = "import os\n\x0c\n\ndef post_helper():\n    return 'a\x0b\x1c\x85\u2028b'\n\x0c\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("import os\n", FORM_FEED, 1),
        lambda text: "\ufeff" + text,
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: text.replace("import os\n", "import os  # \u2028\x0c\x1e\n", 1),
        lambda text: text.replace("\n", "\r\n", 2),  # mixed
    ],
    ids=["form feeds", "BOM", "BOM and CRLF", "Unicode line ends", "mixed line ends"],
)
def test_lines_are_counted_as_python_counts_them(slime, patch, change):
    for path in (HTTP, COMMON):
        (slime / path).write_bytes(change(FILES[path]).encode())
    before = everything(slime)
    assert patch("apply")[0] == 0
    text = (slime / HTTP).read_bytes().decode()
    assert f"@slime_lora.naming_adapter  {MARK}" in text.replace("\r\n", "\n").partition("\nasync def post(")[0][-50:]
    shown = patch("diff")[1]
    assert patch("revert")[0] == 0 and everything(slime) == before
    git(slime, "apply", "-", input=shown)
    assert checkout.plan(slime).applied


@pytest.mark.parametrize(
    "text", ["x\x00y\n", "import os\rdef f(): pass\r", "-" * 100_000 + "1\n", "import os\n\\", "\udcff"]
)
def test_text_that_is_no_python_is_one_line(slime, patch, text):
    (slime / HTTP).write_bytes(text.encode("utf-8", "surrogateescape"))
    before = everything(slime)
    refused(slime, patch, "apply", naming=HTTP)
    assert patch("check")[0] == 1
    assert patch("revert")[0] == 0 and everything(slime) == before


THEIRS = [
    f"timeout = 30  {MARK}\n",
    f"# see {MARK}\n",
    f'"""\n@slime_lora.naming_adapter  {MARK}\n"""\n',
    f"text = '''\n    **slime_lora.request_fields(url),  {MARK}\n'''\n",
    f"note = 'ends in {MARK}\\\n  {MARK}'\n",
]


@pytest.mark.parametrize("line", THEIRS)
def test_a_line_that_only_looks_like_ours_stays(slime, patch, line):
    (slime / HTTP).write_text(FILES[HTTP] + line)
    before = everything(slime)
    code, _, err = patch("apply")
    assert code == 0 and f"{HTTP}:" in err and "is left as it is" in err
    assert line in (slime / HTTP).read_text()
    code, _, err = patch("revert")
    assert code == 0 and f"{HTTP}:" in err
    assert everything(slime) == before


def test_lines_are_taken_out_of_what_is_no_python_any_more(slime, patch):
    assert patch("apply")[0] == 0
    text = (slime / HTTP).read_text()
    (slime / HTTP).write_text("<<<<<<< HEAD\n" + text)
    assert patch("revert")[0] == 0
    assert (slime / HTTP).read_text() == "<<<<<<< HEAD\n" + FILES[HTTP]


@pytest.mark.parametrize("broken", ["((\n", "x = (\n", "return 1 +\n", "def f(\n"])
def test_a_string_in_what_is_no_python_stays(slime, patch, broken):
    (slime / HTTP).write_text(FILES[HTTP] + THEIRS[2] + broken)
    before = everything(slime)
    refused(slime, patch, "apply", naming=HTTP)
    assert patch("revert")[0] == 0 and everything(slime) == before


def test_a_line_that_may_lie_in_an_open_string_is_not_deleted(slime, patch):
    assert patch("apply")[0] == 0
    text = (slime / HTTP).read_text()
    (slime / HTTP).write_text(text.replace("import os\n", 'import os\n"""\n'))
    refused(slime, patch, "revert", naming="mend the file first")
    assert patch("check")[0] == 1
    (slime / HTTP).write_text(text)
    assert patch("revert")[0] == 0 and git(slime, "status", "--porcelain") == ""


def test_an_edit_that_would_change_the_meaning_of_a_line_is_refused(slime, patch):
    for old, new in (
        ("import os\nfrom functools", "import os\nif 1: import re\nfrom functools"),
        ("        self.weight_updater = update", "        x = 1; self.weight_updater = update"),
        ("    @timer\n", "    x = 1; y = '''\n    '''\n\n    @timer\n"),
    ):
        assert old in FILES[ACTOR]
        (slime / ACTOR).write_text(FILES[ACTOR].replace(old, new))
        if "x = 1; self" in new:
            refused(slime, patch, "apply", naming="shares its line")
        else:
            assert patch("apply")[0] == 0
            compile((slime / ACTOR).read_text(), ACTOR, "exec")
            patch("revert")
    (slime / HTTP).write_text('import os; text = """\n"""\n' + FILES[HTTP].removeprefix("import os\n"))
    refused(slime, patch, "apply", naming="inside a string")


def test_tabs_are_kept(slime, patch):
    (slime / ACTOR).write_text(FILES[ACTOR].replace("    ", "\t"))
    before = everything(slime)
    assert patch("apply")[0] == 0
    assert f"\n\t@slime_lora.syncing  {MARK}\n\t@timer" in (slime / ACTOR).read_text()
    assert patch("revert")[0] == 0 and everything(slime) == before


def test_a_checkout_inside_another_repository_is_not_called_dirty(tmp_path, capsys):
    from slime_checkouts import make_checkout

    outer = tmp_path / "outer"
    make_checkout(outer / "slime")
    shutil.rmtree(outer / "slime/.git")
    (outer / "other.py").write_text("x = 1\n")
    git(outer, "init", "-q")
    git(outer, "add", "-A")
    git(outer, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "all")
    (outer / "other.py").write_text("x = 2\n")
    assert main(["patch", "apply", "--slime", str(outer / "slime")]) == 0
    assert main(["patch", "apply", "--slime", str(outer / "slime")]) == 0
    assert capsys.readouterr().err == ""


def test_a_tracked_file_that_became_a_fifo_does_not_hang(slime, patch):
    (slime / "slime/other.py").write_text("x = 1\n")
    git(slime, "add", "-A")
    git(slime, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "other")
    (slime / "slime/other.py").unlink()
    os.mkfifo(slime / "slime/other.py")
    code, _, err = patch("apply")
    assert code == 0 and "slime/other.py" in err
