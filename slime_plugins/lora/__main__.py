"""``python -m slime_plugins.lora`` is the command ``slime-lora``."""

import sys

from slime_plugins.lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
