"""The shipped settings: recipes, DeepSpeed's JSONs, FSDP2's YAMLs; found by name from any folder."""

from __future__ import annotations

from pathlib import Path

from scalesnn.base import UserError

__all__ = ["FOLDER", "find_config"]

FOLDER = Path(__file__).parent


def find_config(flag: str, name: str, pattern: str) -> Path:
    """The file that ``name`` means: one that is there, else a shipped one.

    Args:
        flag: that took the name, for the message.
        name: a path; or ``sample``, ``sample.yaml``, or as in a checkout, ``configs/recipes/sample.yaml``.
        pattern: of the shipped files below ``FOLDER`` that the flag can take, such as ``recipes/*.yaml``.

    Raises:
        UserError: a bare name that is neither; a path that is not there is the reader's to refuse.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    for shipped in sorted(FOLDER.glob(pattern)):
        if name in (shipped.stem, shipped.name, f"configs/{shipped.relative_to(FOLDER)}"):
            return shipped
    if path.name == name and not path.suffix and not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob(pattern)))
        raise UserError(f"{flag} {name}: no such file, and none of the shipped ones: {known}")
    return path
