"""How what is missing is installed."""

from __future__ import annotations

from pathlib import Path


def install_command(extra: str) -> str:
    """`pip install` of an extra, as it works where this program lies: in a checkout, of which no index need know, or not."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install 'modiff-trt[{extra}]'"
