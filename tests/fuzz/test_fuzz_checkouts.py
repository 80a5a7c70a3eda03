"""``slime-lora patch`` on damaged checkouts that people have worked in: everything comes back, or nothing was touched.

Each case damages a small checkout in one to three ways and then applies, edits and reverts as a user would. A verb
either works or refuses in one line and changes nothing; ``check`` says which; applied and reverted, every byte, link
and permission is as it was, the user's edits in between included. Seeded: a failure names its seed.

Run: pytest tests/fuzz/test_fuzz_checkouts.py            75 cases, with all kinds of damage; -m slow: thousands
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from slime_checkouts import FILES, everything, make_checkout

from slime_plugins.lora.cli import main
from slime_plugins.lora.slime.patch import edits, plugin

MARK = edits.MARK
SEAMS = sorted(path for path in FILES if path.startswith("slime/"))
THEIRS = (
    f"timeout = 1  {MARK}\n",
    f'"""\n@slime_lora.naming_adapter  {MARK}\n"""\n',
    f"x = '''\n{edits.IMPORT}  {MARK}\n'''\n",
    f"def mine():\n    return slime_lora.mine  {MARK}\n",
    "\x0c\n# a page\n",
    "y = 'a\x0b\x1c\x85\u2028b'\n",
    "z = 1\r\n",
    "w = 2\r",
    "if 1: q = 3; r = '''\n'''\n",
    "import re; s = '''\n'''\n",
    "\\\n\n",
    "((\n",
    "<<<<<<< HEAD\n",
)


def test_nothing_is_lost(tmp_path):
    """Of the seeds tried before, the shortest run in which every kind of damage is done."""
    run(range(149, 224), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(149), *(range(n, n + 500) for n in range(1000, 4000, 500))], ids=lambda r: str(r.start)
)
def test_nothing_is_lost_in_thousands(seeds, tmp_path):
    run(seeds, tmp_path)


def run(seeds, tmp_path):
    pristine = make_checkout(tmp_path / "pristine")
    shutil.rmtree(pristine / ".git/hooks", ignore_errors=True)
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        root = tmp_path / f"case-{seed}" / "slime"
        shutil.copytree(pristine, root)
        print(f"seed {seed}")  # pytest shows it with a failure
        outcomes.update(case(random.Random(seed), root))
        shutil.rmtree(root.parent)
    assert outcomes["applied"] > len(seeds) // 8 and outcomes["refused"] > len(seeds) // 8, outcomes  # both are tried
    assert {name for name in outcomes if name.startswith("damage")} == {f"damage {i}" for i in KINDS_OF_DAMAGE}


def case(rng: random.Random, root: Path) -> list[str]:
    outcomes = []
    if rng.random() < 0.6:
        shutil.rmtree(root / ".git")  # git is half of the time
    for _ in range(rng.randint(0, 3)):
        damage = rng.choice(DAMAGES)
        damage(rng, root)
        outcomes.append(f"damage {DAMAGES.index(damage)}")
    expected = without_ours(root)
    for verb in rng.choices(("apply", "apply --copy"), (4, 1), k=rng.randint(1, 2)):
        checked = verb_changes_nothing(root, "check")
        code = outcome_of(root, verb)
        assert checked == code, f"check says {checked}, {verb} {code}"
        outcomes.append("refused" if code else "applied")
        if rng.random() < 0.4:
            edit = rng.choice(EDITS)
            expected = expected_after(edit, rng, root, expected)
    if verb_refuses(root, "revert"):
        outcomes.append("revert refused")
        assert verb_refuses(root, "revert"), "refused once, done the next time"
    else:
        after = everything(root)
        names = expected.keys() | after.keys()
        assert after == expected, [name for name in names if expected.get(name) != after.get(name)]
        outcomes.append("reverted")
    return outcomes


def verb(root: Path, words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    action, *flags = words.split()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["patch", action, "--slime", str(root), *flags])
    return code, out.getvalue(), err.getvalue()


def outcome_of(root: Path, words: str) -> int:
    """The exit code of a verb, which has worked, or refused in one line and changed nothing."""
    before = everything(root)
    code, _, err = verb(root, words)
    assert code in (0, 1, 2) and "Traceback" not in err
    if code:
        assert err.startswith("slime-lora: error: ") and err.count("\n") == 1, err
        assert everything(root) == before, f"{words} refused ({err.strip()}) and changed something"
    return code


def verb_refuses(root: Path, words: str) -> bool:
    return outcome_of(root, words) != 0


def verb_changes_nothing(root: Path, words: str) -> int:
    before = everything(root)
    code, _, _ = verb(root, words)
    assert everything(root) == before
    return code


def without_ours(root: Path) -> dict[str, tuple]:
    """What is to be there in the end: all that is there now but what a killed run of ours left."""
    now = everything(root)
    place = str(plugin.PLUGIN)
    if plugin.state(root) in ("half", "link"):
        now = {name: entry for name, entry in now.items() if name != place and not name.startswith(place + "/")}
    return {name: entry for name, entry in now.items() if "slime-lora" not in name}


# What happens to a checkout ------------------------------------------------------------------------------------------


def text_damage(change):
    def damage(rng, root):
        path = root / rng.choice(SEAMS)
        if path.is_file() and os.path.realpath(path).startswith(str(root)):
            path.chmod(0o644)
            path.write_bytes(change(rng, path.read_bytes()))

    return damage


def some_line(rng, content, replace):
    lines = content.splitlines(keepends=True) or [b""]
    at = rng.randrange(len(lines))
    lines[at : at + 1] = replace(lines[at])
    return b"".join(lines)


def entry_damage(make):
    def damage(rng, root):
        path = root / rng.choice(SEAMS)
        if path.is_file() and not path.is_symlink():
            aside = root.parent / "aside"
            shutil.move(path, aside)
            make(path, aside, root)

    return damage


def linked_inside(path, aside, root):
    inside = root / "slime" / f"real_{path.name}"
    shutil.move(aside, inside)
    path.symlink_to(os.path.relpath(inside, path.parent))


def linked_twice(path, aside, root):
    other = root / next(name for name in SEAMS if root / name != path)
    if other.is_file():
        path.symlink_to(other)


def at_plugin(make):
    def damage(rng, root):
        target = root / plugin.PLUGIN
        if not os.path.lexists(target):
            make(target)

    return damage


def folder_of(name, text):
    def make(target):
        target.mkdir()
        if name:
            (target / name).write_text(text)

    return make


def half_a_copy(target):
    target.mkdir()
    for name in ("names.py", "layout.py"):
        shutil.copy(plugin.package_dir() / name, target)


def leftovers(rng, root):
    (root / "slime/utils/http_utils.py.slime-lora.tmp").write_text("half")
    staged = root / "slime_plugins/.lora.slime-lora-new"
    staged.mkdir(exist_ok=True)
    (staged / "names.py").write_text("half")


def read_only(rng, root):
    path = root / rng.choice(SEAMS)
    if path.is_file():
        path.chmod(rng.choice((0o444, 0o755, 0o600)))


def their_line(rng, content):
    line = rng.choice(THEIRS).encode()
    return some_line(rng, content, lambda old: [line, old]) if rng.random() < 0.5 else content + line


DAMAGES = [
    *[text_damage(their_line)] * 4,
    text_damage(lambda rng, content: content.replace(b"\n", b"\r\n")),
    text_damage(lambda rng, content: content.replace(b"\n", b"\r\n", rng.randint(1, 5))),
    text_damage(lambda rng, content: b"\xef\xbb\xbf" + content),
    text_damage(lambda rng, content: content.replace(b"    ", b"\t")),
    text_damage(lambda rng, content: content.rstrip(b"\n")),
    text_damage(lambda rng, content: content[: rng.randrange(len(content) + 1)]),
    text_damage(lambda rng, content: some_line(rng, content, lambda line: [])),
    text_damage(lambda rng, content: some_line(rng, content, lambda line: [line, line])),
    text_damage(lambda rng, content: some_line(rng, content, lambda line: [b"\x0c", line])),
    text_damage(lambda rng, content: some_line(rng, content, lambda line: [line, rng.randbytes(5), b"\n"])),
    text_damage(lambda rng, content: some_line(rng, content, lambda line: [line[:-1], b" # \x0c\xe2\x80\xa8\n"])),
    entry_damage(lambda path, aside, root: None),
    entry_damage(lambda path, aside, root: path.mkdir()),
    entry_damage(lambda path, aside, root: os.mkfifo(path)),
    entry_damage(lambda path, aside, root: path.symlink_to(path.name)),
    entry_damage(lambda path, aside, root: path.symlink_to("nowhere")),
    entry_damage(lambda path, aside, root: path.symlink_to(aside)),
    entry_damage(linked_inside),
    entry_damage(linked_twice),
    at_plugin(folder_of(None, "")),
    at_plugin(folder_of("mine.py", "x = 1\n")),
    at_plugin(folder_of(plugin.COPY_MARK, "[]")),
    at_plugin(half_a_copy),
    at_plugin(lambda target: target.symlink_to("/nowhere/mine")),
    at_plugin(lambda target: target.symlink_to("lora")),
    at_plugin(lambda target: target.symlink_to("/former/slime_plugins/lora")),
    at_plugin(lambda target: target.write_text("x = 1\n")),
    leftovers,
    read_only,
]  # fmt: skip
KINDS_OF_DAMAGE = {DAMAGES.index(damage) for damage in DAMAGES}  # one of them stands there four times


def more_text(rng, root):
    path = root / rng.choice(SEAMS)
    line = rng.choice(THEIRS).encode()
    return (lambda content: content + line) if rng.random() < 0.5 else (
        lambda c: c.replace(b"return", b"return ")
    ), path


def more_files(rng, root):
    path = root / rng.choice(("slime/new.py", "slime_plugins/mine.py"))
    return lambda content: content + b"mine = 1\n", path


EDITS = [more_text, more_files]


def expected_after(edit, rng, root: Path, expected: dict[str, tuple]) -> dict[str, tuple]:
    """A user edits a file of the checkout; the same edit made in what is expected at the end."""
    change, path = edit(rng, root)
    name = str(path.relative_to(root))
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return expected
    old = expected.get(name, ("file", None, b""))
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    return {**expected, name: ("file", path.stat().st_mode, change(old[2]))} | folders(name, expected)


def folders(name: str, expected: dict[str, tuple]) -> dict[str, tuple]:
    return {str(parent): ("directory",) for parent in Path(name).parents if str(parent) != "."}
