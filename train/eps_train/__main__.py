"""`python -m eps_train`: the command `eps-train`, as torchrun starts it."""

from __future__ import annotations

import sys

from eps_train.cli import main

if __name__ == "__main__":
    sys.argv[0] = "eps-train"  # the name in its messages
    main()
