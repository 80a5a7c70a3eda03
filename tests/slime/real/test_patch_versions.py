"""The patcher on the slime versions that it is known to fit, and ``patches/`` against what it does there.

SLIME_DIR=~/slime pytest tests/slime/real/test_patch_versions.py        # a clone with tags; seconds
SLIME_DIR=~/slime python tests/slime/real/test_patch_versions.py        # writes patches/ anew
"""

from __future__ import annotations

from pathlib import Path

import pytest
from checkouts import VERSIONS, clone, git, has

from slime_plugins.lora.slime.patch import checkout, edits

PATCHES = Path(__file__).parents[3] / "patches"


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def slime(version, slime_repo, tmp_path):
    if not has(slime_repo, VERSIONS[version]):
        pytest.skip(f"SLIME_DIR has no {VERSIONS[version]}; fetch its tags")
    return clone(slime_repo, VERSIONS[version], tmp_path / "slime")


@pytest.mark.parametrize("copy", [False, True], ids=["link", "copy"])
def test_apply_and_revert_leave_nothing_behind(slime, copy):
    made = checkout.plan(slime)
    assert not made.problems
    checkout.apply(made, copy=copy)
    changed = git(slime, "diff", "--name-only").split()
    assert sorted(changed) == sorted(made.files) and len(changed) >= 9
    assert git(slime, "diff", "--numstat").count("\t0\t") == len(changed), "a line was deleted"
    for path in changed:
        edits.parse((slime / path).read_text())
    assert checkout.dirty_files(slime) == [] and checkout.apply(checkout.plan(slime), copy=copy) == []
    checkout.revert(slime)
    assert git(slime, "status", "--porcelain", "--ignored") == ""


def test_the_doctor_sees_what_is_there(slime, capsys):
    from slime_plugins.lora import cli

    assert cli.main(["doctor", "--slime", str(slime)]) == 1
    assert "not patched; slime-lora patch apply" in capsys.readouterr().out
    checkout.apply(checkout.plan(slime))
    cli.main(["doctor", "--slime", str(slime)])
    assert "ok       checkout" in capsys.readouterr().out
    (slime / "slime_plugins" / "lora").unlink()
    assert cli.main(["doctor", "--slime", str(slime)]) == 1
    assert "is absent" in capsys.readouterr().out


def test_the_patch_is_the_edit(version, slime):
    text = (PATCHES / f"{version}.patch").read_text()
    assert text == rendered(version, slime), "make it anew: python tests/slime/real/test_patch_versions.py"
    git(slime, "apply", "-", input=text)
    assert checkout.plan(slime).applied
    git(slime, "apply", "-R", "-", input=text)
    assert git(slime, "status", "--porcelain") == ""


def test_no_more_of_slime_is_in_a_patch_than_one_line_around_each_edit(version):
    lines = (PATCHES / f"{version}.patch").read_text().splitlines()
    ours = [line for line in lines if line.endswith(edits.MARK)]
    context = [
        line for line in lines[lines.index(next(x for x in lines if x.startswith("diff"))) :] if line[:1] == " "
    ]
    assert len(ours) >= 20 and len(context) <= 2 * len(ours)


def rendered(version: str, slime: Path) -> str:
    """The file in ``patches/``: what it is, how to apply and drop it, and the edit."""
    commit = git(slime, "rev-parse", "--short=9", "HEAD").strip()
    return f"""\
slime-lora's edit of slime {version} (commit {commit}): calls into slime_plugins.lora.slime, insertions only.
Without --use-lora slime behaves as before. In the checkout:

  git apply SLIME_LORA/patches/{version}.patch && ln -s SLIME_LORA/slime_plugins/lora slime_plugins/lora
  git apply -R SLIME_LORA/patches/{version}.patch && rm slime_plugins/lora        (drops it)

`slime-lora patch apply --slime DIR` does both, on other versions too; `slime-lora patch diff` shows the edit.

{checkout.diff(checkout.plan(slime))}"""


if __name__ == "__main__":
    import os
    import tempfile

    repository = Path(os.environ["SLIME_DIR"]).resolve()
    for name, revision in VERSIONS.items():
        with tempfile.TemporaryDirectory() as directory:
            (PATCHES / f"{name}.patch").write_text(rendered(name, clone(repository, revision, Path(directory) / "s")))
        print(PATCHES / f"{name}.patch")
