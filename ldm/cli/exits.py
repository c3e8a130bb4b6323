"""How a command ends: its exit codes, and one sentence in place of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exit_codes() -> Iterator[None]:
    """Exits with 2 on bad input, 1 on values that are not finite, each told in one sentence, and 130 on Ctrl-C."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
