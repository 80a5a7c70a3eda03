"""``slime-lora patch`` on small synthetic checkouts: what it inserts, what it refuses, and that it leaves no trace.

Run: pytest tests/slime/patch/test_patch.py
"""

import os
import re
import subprocess
import tokenize

import pytest
from slime_checkouts import ACTOR, COMMON, FILES, contents, git

from slime_plugins.lora.cli import main
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.patch import checkout, edits
from slime_plugins.lora.slime.patch.plugin import package_dir
from slime_plugins.lora.slime.patch.seams import SEAMS


def patch(capsys, *words):
    code = main(["patch", *map(str, words)])
    return code, *capsys.readouterr()


def test_apply_inserts_marked_lines_and_nothing_else(slime):
    before = contents(slime)
    done = checkout.apply(checkout.plan(slime))
    assert "linked slime_plugins/lora" in done
    inserted = []
    for path, text in contents(slime).items():
        lines = text.decode().splitlines(keepends=True)
        inserted += [line.strip() for line in lines if edits.is_ours(line)]
        assert "".join(line for line in lines if not edits.is_ours(line)).encode() == before[path]
        compile(text, path, "exec")
    assert 15 <= len(inserted) <= 45, inserted
    assert (slime / "slime_plugins/lora").is_symlink()
    assert (slime / "slime_plugins/lora/slime/patch/seams.py").is_file()


def test_every_edit_lies_where_it_belongs(slime):
    checkout.apply(checkout.plan(slime))
    actor = (slime / ACTOR).read_text()
    mark = re.escape(edits.MARK)
    for expected in (
        r"\)\n        self\.weights_backuper = slime_lora\.weights_backuper\(self, self\.weights_\w+\)  MARK\n",
        r"\n        update_weight_cls = slime_lora\.weight_updater\(self, \w+\)  MARK\n        self\.weight_updater",
        r"\n    @slime_lora\.syncing  MARK\n    @timer\n    def update_weights",
        r"\n    @slime_lora\.other_policy  MARK\n    def load_other",
        r"\n\)\nfrom slime_plugins\.lora import slime as slime_lora  MARK\n\ntimer",
    ):
        assert re.search(expected.replace("MARK", mark), actor), expected
    streaming = (slime / "slime/rollout/sglang_streaming_rollout.py").read_text()
    assert f"payload = {{\n        **slime_lora.request_fields(url),  {edits.MARK}\n        'sampling" in streaming


def test_a_text_is_tokenised_once(slime, monkeypatch):
    """However many edits go into a file, and however often it is asked for."""
    edits._comments.cache_clear()  # of other tests
    texts, tokenise = [], tokenize.generate_tokens

    def counting(readline):
        lines = list(iter(readline, ""))
        texts.append("".join(lines))
        rest = iter(lines)
        return tokenise(lambda: next(rest, ""))

    monkeypatch.setattr(tokenize, "generate_tokens", counting)
    made = checkout.plan(slime)
    edited = {edited.decode() for _, _, edited in made.files.values()}
    assert sorted(texts) == sorted(edited)
    checkout.apply(made)
    for _ in range(2):
        assert checkout.plan(slime).applied
    checkout.dirty_files(slime)
    checkout.revert(slime)
    assert sorted(texts) == sorted(edited)


def test_every_hook_that_a_seam_names_exists():
    from slime_plugins.lora import slime as hooks

    for seam in SEAMS:
        for _, edit in seam.edits:
            text = getattr(edit, "hook", None) or getattr(edit, "call", None) or edit.text
            name = re.search(r"slime_lora\.(\w+)", text) or re.match(r"(\w+)", text)
            assert callable(getattr(hooks, name[1])), name[1]


@pytest.mark.parametrize("copy", [False, True])
def test_apply_twice_is_apply_once_and_revert_leaves_git_status_clean(slime, copy):
    before = contents(slime)
    assert checkout.apply(checkout.plan(slime), copy=copy)
    once = contents(slime)
    assert checkout.plan(slime).applied
    assert checkout.apply(checkout.plan(slime), copy=copy) == []
    assert contents(slime) == once
    (slime / "slime_plugins/lora/__pycache__").mkdir(exist_ok=True)  # as running from it leaves behind
    done = checkout.revert(slime)
    assert "removed slime_plugins/lora" in done
    assert contents(slime) == before
    assert git(slime, "status", "--porcelain") == ""
    assert checkout.revert(slime) == []
    assert (package_dir() / "slime/patch/seams.py").is_file()  # the link went, not what it points to


def test_link_becomes_copy_and_back(slime):
    checkout.apply(checkout.plan(slime))
    checkout.apply(checkout.plan(slime), copy=True)
    target = slime / "slime_plugins/lora"
    assert not target.is_symlink() and (target / "names.py").is_file()
    assert not list(target.rglob("__pycache__"))
    checkout.apply(checkout.plan(slime))
    assert target.is_symlink()


def test_line_ends_modes_and_other_changes_survive(slime):
    windows = (slime / COMMON).read_text().replace("\n", "\r\n").encode()
    (slime / COMMON).write_bytes(windows)
    (slime / ACTOR).chmod(0o755)
    checkout.apply(checkout.plan(slime))
    assert b"@slime_lora.merging_one  " + edits.MARK.encode() + b"\r\n" in (slime / COMMON).read_bytes()
    assert os.access(slime / ACTOR, os.X_OK)
    # somebody edits the file while the plugin is in it
    (slime / ACTOR).write_text((slime / ACTOR).read_text().replace("return 1", "return 11"))
    checkout.revert(slime)
    assert (slime / COMMON).read_bytes() == windows
    assert (slime / ACTOR).read_text() == FILES[ACTOR].replace("return 1", "return 11")


def test_lines_of_an_older_plugin_are_replaced(slime):
    checkout.apply(checkout.plan(slime))
    new = (slime / COMMON).read_bytes()
    old = new.replace(b"slime_lora.merging_one", b"slime_lora.what_it_was_called_before")
    (slime / COMMON).write_bytes(old)
    made = checkout.plan(slime)
    assert made.touched and not made.applied
    assert checkout.apply(made) == [f"edited {COMMON}"]
    assert (slime / COMMON).read_bytes() == new


@pytest.mark.parametrize(
    "path, old, new, seam, reason",
    [
        (COMMON, "def all_gather_param", "def gather", "weight sync", "no definition of all_gather_param"),
        (COMMON, "(name, param)", "(name, tensor)", "weight sync", "has no parameter param"),
        (COMMON, "import os\n", "", "weight sync", "no import in front of the first definition"),
        (ACTOR, "self.weight_updater =", "self.updater =", "weight sync", "no assignments to self.weight_updater"),
        (
            ACTOR,
            "        if args:",
            "        self.weights_backuper = 1\n        if args:",
            "policies",
            "has 2 assignm",
        ),
        (ACTOR, "class MegatronTrainRayActor", "class Actor", "policies", "no definition of MegatronTrainRayActor"),
        (
            "slime/backends/megatron_utils/checkpoint.py",
            "as save_checkpoint",
            "as save",
            "checkpoint",
            "no import of save_checkpoint",
        ),
        (
            "slime/rollout/sglang_streaming_rollout.py",
            "'stream'",
            "'flow'",
            "requests of the streaming rollout",
            "no single dict",
        ),
        ("slime/utils/http_utils.py", "async def post", "async def post(", "requests", "not Python"),
        ("slime/ray/rollout.py", None, None, "requests", "no such file"),
        (
            "slime/backends/megatron_utils/hf_checkpoint_saver.py",
            None,
            None,
            "Hugging Face save",
            "no definition of save_hf_model",
        ),
    ],
)
def test_a_missing_seam_is_named_and_nothing_is_written(slime, capsys, path, old, new, seam, reason):
    if old is None:
        (slime / path).unlink()
    else:
        assert old in FILES[path]
        (slime / path).write_text(FILES[path].replace(old, new, 1))
    before = git(slime, "status", "--porcelain"), git(slime, "diff")
    code, out, _ = patch(capsys, "check", "--slime", slime)
    assert code == 1 and re.search(f"{seam} +MISSING .*{re.escape(path)}: .*{re.escape(reason)}", out)
    for action in ("apply", "diff"):
        code, out, err = patch(capsys, action, "--slime", slime)
        assert code == 1 and out == "" and err.count("\n") == 1
        assert seam in err and path in err and reason in err
    assert (git(slime, "status", "--porcelain"), git(slime, "diff")) == before
    assert not (slime / "slime_plugins/lora").exists()


def test_the_older_home_of_the_hugging_face_save_is_found(slime):
    (slime / "slime/backends/megatron_utils/hf_checkpoint_saver.py").unlink()
    model = slime / "slime/backends/megatron_utils/model.py"
    model.write_text(model.read_text() + "\n\ndef save_hf_model(args, rollout_id, model):\n    return 1\n")
    made = checkout.plan(slime)
    assert not made.problems and b"@slime_lora.saving_hf" in made.files[str(model.relative_to(slime))][2]


def test_a_file_that_a_version_lacks_is_a_feature_that_it_lacks(slime):
    made = checkout.plan(slime)
    assert made.absent == ("engines of other models", "requests of agents")
    (slime / "slime/rollout/sglang_streaming_rollout.py").unlink()
    lacking = ("engines of other models", "requests of the streaming rollout", "requests of agents")
    assert checkout.plan(slime).absent == lacking


def test_a_dirty_checkout_is_warned_about_by_name(slime, capsys):
    code, _, err = patch(capsys, "apply", "--slime", slime)
    assert code == 0 and err == ""
    code, out, err = patch(capsys, "apply", "--slime", slime)  # our own lines are not dirt
    assert code == 0 and err == "" and "nothing to do" in out
    (slime / ACTOR).write_text((slime / ACTOR).read_text() + "# mine\n")
    (slime / "notes.txt").write_text("untracked files are nobody's business")
    code, _, err = patch(capsys, "apply", "--slime", slime)
    assert code == 0 and "warning" in err and ACTOR in err and COMMON not in err and "notes" not in err


def test_a_failed_write_is_undone(slime, monkeypatch):
    before, real, calls = contents(slime), os.replace, []

    def fail_third(src, dst):
        calls.append(dst)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(dst))
        return real(src, dst)

    monkeypatch.setattr(os, "replace", fail_third)
    with pytest.raises(OSError, match="No space"):
        checkout.apply(checkout.plan(slime))
    assert contents(slime) == before
    assert git(slime, "status", "--porcelain") == ""


def test_what_lies_in_the_way_is_left_alone(slime):
    target = slime / "slime_plugins/lora"
    target.mkdir()
    (target / "mine.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="move it away"):
        checkout.apply(checkout.plan(slime))
    assert git(slime, "diff") == ""
    assert checkout.revert(slime) == [] and (target / "mine.py").is_file()


def test_a_changed_copy_is_not_deleted(slime, capsys):
    checkout.apply(checkout.plan(slime), copy=True)
    names = slime / "slime_plugins/lora/names.py"
    names.write_text(names.read_text() + "# mine\n")
    code, _, err = patch(capsys, "revert", "--slime", slime)
    assert code == 1 and "names.py" in err and names.is_file() and checkout.plan(slime).applied
    code, _, _ = patch(capsys, "revert", "--slime", slime, "--force")
    assert code == 0 and git(slime, "status", "--porcelain") == ""


def test_diff_is_the_edit(slime, capsys):
    code, text, _ = patch(capsys, "diff", "--slime", slime)
    assert code == 0 and not re.search(r"^-(?!--)", text, re.M)  # insertions only
    git(slime, "apply", "-", input=text)
    assert checkout.plan(slime).applied
    code, again, _ = patch(capsys, "diff", "--slime", slime)
    assert again == text
    git(slime, "apply", "-R", "-", input=text)
    assert git(slime, "status", "--porcelain") == ""


def test_outside_git_it_works_too(slime):
    subprocess.run(["rm", "-rf", str(slime / ".git")], check=True)
    checkout.apply(checkout.plan(slime))
    assert checkout.dirty_files(slime) == []
    checkout.revert(slime)
    assert contents(slime) == {path: text.encode() for path, text in FILES.items()}


def test_usage_errors(slime, tmp_path, capsys):
    with pytest.raises(UsageError, match="not a slime checkout"):
        checkout.plan(tmp_path)
    for words in (("apply",), ("explode", "--slime", slime), ("revert", "--slime", slime, "--copy")):
        code, _, err = patch(capsys, *words)
        assert code == 2 and err.startswith("slime-lora: error: ")
