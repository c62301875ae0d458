"""Where ``scalesnn export`` and ``scalesnn import`` write: the whole file, or nothing and one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from scalesnn.base import UserError
from scalesnn.training.export import write_whole


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "new" / "net.onnx"

    def write(file: Path) -> str:
        file.write_text("half")
        assert not output.exists()
        assert file.suffix == ".onnx"
        file.write_text("whole")
        return "said"

    assert write_whole(output, write) == "said"
    assert output.read_text() == "whole"
    assert [file.name for file in output.parent.iterdir()] == ["net.onnx"]


def test_an_old_file_stays_when_writing_fails(tmp_path: Path) -> None:
    output = tmp_path / "net.nir"
    output.write_text("old")

    def write(file: Path) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        write_whole(output, write)
    assert output.read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "file" / "net.onnx", lambda file: file.write_text("x"))
