"""Small synthetic slime checkouts: every place that ``slime-lora patch`` looks for, in a git repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

# What slime looks like from where the plugin stands. Not slime's code: the names, and a body to put them in.
FILES = {
    "slime_plugins/__init__.py": "",
    "slime/utils/arguments.py": (
        "import argparse\n\n\n"
        "def get_slime_extra_args_provider(add_custom_arguments=None):\n    return add_custom_arguments\n\n\n"
        "def slime_validate_args(args):\n    args.checked = True\n"
    ),
    "slime/backends/megatron_utils/model_provider.py": (
        "import os\n\n\ndef get_model_provider_func(args, role='actor'):\n    return os.getcwd\n"
    ),
    "slime/backends/megatron_utils/checkpoint.py": (
        "from os.path import join as save_checkpoint\n\n\n"
        "def load_checkpoint(ddp_model, optimizer, opt_param_scheduler, context):\n    return 0, 0\n"
    ),
    "slime/backends/megatron_utils/hf_checkpoint_saver.py": (
        "import os\n\n\ndef save_hf_model_to_path(args, output_dir, model, *, model_name=None):\n    return os.sep\n"
    ),
    "slime/backends/megatron_utils/model.py": (
        "import os\nfrom os.path import join as get_megatron_optimizer\n\n\n"
        "def train_one_step(args, rollout_id, model):\n    return {}, os.sep\n"
    ),
    "slime/backends/megatron_utils/actor.py": (
        '"""Actor."""\n'
        "from __future__ import annotations\n\nimport os\nfrom functools import (\n    wraps,\n)\n\n"
        "timer = wraps\n\n\n"
        "class MegatronTrainRayActor:\n"
        "    def init(self, args):\n"
        "        self.weights_backuper = dict(\n            a=1,\n        )\n"
        "        if args:\n            update_weight_cls = os\n"
        "        self.weight_updater = update_weight_cls(\n            self,\n        )\n\n"
        "    @timer\n"
        "    def update_weights(self):\n        return 1\n\n"
        "    def load_other_checkpoint(self, model_tag, path):\n        return 2\n"
    ),
    "slime/backends/megatron_utils/update_weight/common.py": (
        "import os\n\n\n"
        "def all_gather_param(name, param):\n    return param\n\n\n"
        "def named_params_and_buffers(args, model):\n    return os.sep\n"
    ),
    "slime/backends/megatron_utils/update_weight/hf_weight_iterator_direct.py": (
        "import os\n\n\n"
        "def _get_megatron_full_params(megatron_local_param_infos, megatron_local_weights):\n    return os.sep\n"
    ),
    "slime/utils/http_utils.py": "import os\n\n\nasync def post(url, payload, headers=None):\n    return os.sep\n",
    "slime/ray/rollout.py": (
        "import os\n\n\n"
        "class RolloutManager:\n    '''Rollouts.'''\n\n    def __init__(self):\n        self.a = os.sep\n"
        "\n    def _convert_samples_to_train_data(self, samples):\n        return samples\n"
    ),
    "slime/rollout/sglang_streaming_rollout.py": (
        "import os\n\n\nasync def generate_streaming(args):\n    url = os.sep\n"
        "    payload = {\n        'sampling_params': 1,\n        'stream': True,\n    }\n    return url, payload\n"
    ),
}
ACTOR = "slime/backends/megatron_utils/actor.py"
COMMON = "slime/backends/megatron_utils/update_weight/common.py"


def make_checkout(root: Path) -> Path:
    """Write ``FILES`` below ``root`` and commit them."""
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text.encode())
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "slime")
    return root


def git(root: Path, *command: str, **kwargs) -> str:
    """What git prints."""
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True, **kwargs)
    return done.stdout


def contents(root: Path) -> dict[str, bytes]:
    """The bytes of every file of ``FILES``."""
    return {path: (root / path).read_bytes() for path in FILES}


def everything(root: Path) -> dict[str, tuple]:
    """Every entry below ``root`` but git's own: kind, permissions and bytes (or where a link points to)."""
    seen: dict[str, tuple] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name == ".git" or name.startswith(".git/"):
            continue
        if path.is_symlink():
            seen[name] = ("link", str(path.readlink()))
        elif path.is_file():
            seen[name] = ("file", path.stat().st_mode, path.read_bytes())
        else:
            seen[name] = ("directory" if path.is_dir() else "special",)
    return seen
