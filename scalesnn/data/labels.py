"""From what stands in a shard as a label to the number of a class."""

from __future__ import annotations

import json
import re
import reprlib

from scalesnn.base import UserError

__all__ = ["class_number", "label_of_json"]

_WHOLE = re.compile(r"([+-]?[0-9]{1,30})(\.0*)?")


def class_number(label: object, where: str) -> int:
    """The class number that a label stands for: a whole number from 0 to 2^63 - 1, also as text or float.

    Args:
        label: a number, or text or bytes with one.
        where: the label's place, for the message.

    Raises:
        UserError: anything else, such as -1, 0.7, a class name, a list, null.
    """
    number = label
    if isinstance(number, bytes):
        number = number.decode("utf-8", "replace")
    if isinstance(number, str):
        whole = _WHOLE.fullmatch(number.strip())
        number = int(whole[1]) if whole else None
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63:
        return number
    shown = label.decode("utf-8", "replace") if isinstance(label, bytes) else label
    text = reprlib.repr(shown) if isinstance(shown, (list, dict)) else repr(shown)  # of any depth
    raise UserError(
        f"{where}: a label must be a whole number from 0 on, the class's line in classes.txt counted from 0; "
        f"got {text if len(text) <= 40 else text[:37] + '...'}"
    )


def label_of_json(text: bytes, where: str) -> int:
    """The class number in a JSON object's "label".

    Raises:
        UserError: no such object, or a label that is no class number.
    """
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON") from None
    if not isinstance(loaded, dict) or "label" not in loaded:
        raise UserError(f'{where} has no "label": expected {{"label": 7}}')
    return class_number(loaded["label"], where)
