"""``python -m better_attention``: the command, where its script is not on the path."""

from better_attention.cli.main import main

raise SystemExit(main())
